r"""Draws the README's picture from a finished demo, and updates the numbers of README.md and docs/get-started.md:

    coalign demo --out runs/demo
    python -c "from coalign.experiments.demo.demo import demo; [demo(f'runs/demo{seed}', seed=seed) for seed in (1, 2)]"
    python scripts/render_demo.py runs/demo runs/demo1 runs/demo2

Writes docs/demo.png, results/demo.json, and the passages between `<!-- demo: NAME -->` and `<!-- end of demo -->`. The picture has the
first searches of the demo's page: three of our own, and names that a rule chooses. Hits have a green frame. The other folders are of the
same demo with other seeds, of which the results and docs/get-started.md have the differences.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coalign.data.prepare.emoji import VENDORS_TABLE
from coalign.data.sources.open import open_source
from coalign.experiments.demo.demo import DATA, PAGE, QUERIES, RESULT, SETTINGS, emoji_searches
from coalign.files import write_json
from coalign.methods import method_class
from coalign.report.compare_page import difference_text
from coalign.report.demo_page import Search
from coalign.report.figures import INK, LINE, SOFT

ROOT = Path(__file__).parents[1]
NUM_SEARCHES = 6

# in pixels of a page on which the picture is 900 wide; SCALE pixels of the file each
WIDTH, TILE, GAP, MARGIN, HEADER, SCALE = 900, 64, 8, 16, 44, 2
RIGHT = "#2a9d4a"
BETWEEN = 36  # the two runs
TOP = 5
NO_BREAK = "\0"  # a space within a line
LABELS = WIDTH - 2 * MARGIN - 2 * (TOP * TILE + (TOP - 1) * GAP) - BETWEEN  # width of the column of queries


def draw(searches: Sequence[Search]) -> Figure:
    """One row per search, one group of columns per run."""
    height = HEADER + len(searches) * (TILE + GAP) - GAP + MARGIN
    figure = Figure(figsize=(WIDTH / 100, height / 100), facecolor="white")
    FigureCanvasAgg(figure)
    top = lambda row: HEADER + row * (TILE + GAP)  # noqa: E731
    left = lambda run, rank: (  # noqa: E731
        MARGIN + LABELS + run * (TOP * (TILE + GAP) - GAP + BETWEEN) + rank * (TILE + GAP)
    )
    for run, name in enumerate(searches[0].results):
        figure.text(left(run, 0) / WIDTH, 1 - 26 / height, name, fontsize=12, fontweight="bold", color=INK, va="center")
    for row, search in enumerate(searches):
        lines = "\n".join(textwrap.wrap(search.query.caption, 16))
        middle = 1 - (top(row) + TILE / 2) / height
        figure.text(MARGIN / WIDTH, middle, lines, fontsize=10.5, color=SOFT, va="center", parse_math=False)
        for run, found in enumerate(search.results.values()):
            for rank, cell in enumerate(found):
                box = (left(run, rank) / WIDTH, 1 - (top(row) + TILE) / height, TILE / WIDTH, TILE / height)
                axes = figure.add_axes(box, xticks=[], yticks=[])
                axes.imshow(cell.image, interpolation="lanczos")
                for spine in axes.spines.values():
                    spine.set(color=RIGHT if cell.good else LINE, linewidth=2.5 if cell.good else 0.8)
    return figure


def passages(values: dict[str, Any], own: int) -> dict[str, str]:
    """The generated passages, by name. own: searches of the picture that are in QUERIES."""
    new_style, held_out = values["sentences"]
    rows = f"the first {own} of our choice, the others by a rule" if own < NUM_SEARCHES else "of our choice"
    caption = textwrap.fill(
        f"*The first five of OpenMoji's drawings for {NUM_SEARCHES} searches, {rows}. Both models start from an image encoder "
        f"trained on photographs, learned from {values['settings']['num_train']:,} drawings by Twemoji, and have never seen one by "
        f"OpenMoji. Green: the drawing's "
        f"name has all words of the query. {new_style} `make{NO_BREAK}demo` trains both. Drawings: [OpenMoji](https://openmoji.org), "
        "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).*",
        140,
        break_on_hyphens=False,
        break_long_words=False,
    ).replace(NO_BREAK, " ")
    output = f"```text\n{new_style}\n{held_out}\nPage: runs/demo/{PAGE}\n```"
    return {"caption": caption, "output": output, "seeds": seeds_passage(values["other_seeds"])}


def difference(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the difference in mean recall on the other vendor's drawings, with its interval, and R@1 of both methods."""
    first, second = (group["metrics"] for group in values["groups"])
    found = second["retrieval_test.mean_recall"]
    sides = [f"retrieval_test.{side}.r1" for side in ("image_to_text", "text_to_image")]
    return {
        "mean_recall": found["difference"],
        "interval": found["difference_over_items"],
        "r1": [[metrics[side]["value"] for side in sides] for metrics in (first, second)],
    }


def seeds_passage(others: dict[str, dict[str, Any]]) -> str:
    """Returns the differences of the other seeds in a sentence; "" if there are none."""
    if not others:
        return ""
    found = [
        f"{difference_text('rate', each['mean_recall'])} ({difference_text('rate', *each['interval'])})"
        for each in others.values()
    ]
    return textwrap.fill(
        f"With the seeds {' and '.join(others)}, the difference in mean recall on OpenMoji's drawings is {' and '.join(found)}.",
        140,
    )


def replace_passages(path: Path, texts: dict[str, str]) -> None:
    """Replaces the passages of a page."""
    page = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        pattern = rf"(<!-- demo: {name} -->\n).*?(<!-- end of demo -->)"
        page = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a finished `coalign demo`")
    parser.add_argument("others", type=Path, nargs="*", help="folders of the same demo with other seeds")
    arguments = parser.parse_args()
    folder = arguments.demo
    runs = {method_class(arm).__name__: folder / f"{arm}-seed0" for arm in SETTINGS.arms}
    searches = emoji_searches(open_source(str(folder / DATA / VENDORS_TABLE)), runs)[:NUM_SEARCHES]
    buffer = io.BytesIO()
    draw(searches).savefig(buffer, dpi=100 * SCALE)
    # 256 colors are enough for drawings, and a third of the size
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs/demo.png", optimize=True)
    values = json.loads((folder / RESULT).read_text())
    values["settings"]["data"] = "emoji"
    values["other_seeds"] = {}
    for other in arguments.others:
        found = json.loads((other / RESULT).read_text())
        values["other_seeds"][str(found["groups"][0]["seeds"][0])] = difference(found)
    write_json(ROOT / "results/demo.json", values, indent=1)
    texts = passages(values, sum(search.query.caption in QUERIES for search in searches))
    for name in ("README.md", "docs/get-started.md"):
        replace_passages(ROOT / name, texts)


if __name__ == "__main__":
    main()
