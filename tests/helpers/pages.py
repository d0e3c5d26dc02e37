"""The code blocks of README.md, CONTRIBUTING.md and the documentation."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN_BY_ANOTHER_TEST = {ROOT / "docs/add-a-method.md"}  # test_add_a_method.py
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted({*(ROOT / "docs").rglob("*.md")} - RUN_BY_ANOTHER_TEST),
]
# why a block is not run; it is parsed all the same
REASONS = {
    "downloads a model",
    "downloads data",
    "installs packages",
    "needs a GPU",
    "needs a running server",
    "needs several machines",
    "serves until Ctrl-C",
    "takes hours",
    "trains for minutes",
}
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?(?P<indent> *)```(?P<kind>bash|python)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str  # path from the repository's root
    line: int  # of its first line of code
    kind: str  # bash or python
    code: str
    not_run: str | None  # the reason why tests do not run it

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = re.sub(r"\\\n\s*", " ", self.code).splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Returns the bash and python blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text[: match.start("code")].count("\n") + 1,
            match["kind"],
            textwrap.dedent(match["code"]),
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def coalign_words(words: list[str]) -> list[str] | None:
    """Returns the arguments of a coalign command, also behind torchrun, or None if it is another program's."""
    if words[0].rpartition("/")[2] == "coalign":
        return words[1:]
    if words[0] == "torchrun" and "coalign" in words:
        at = words.index("coalign")
        assert words[at - 1] == "-m", words
        return words[at + 1 :]
    return None
