"""Fails on words that this project does not use: the wording guide in CONTRIBUTING.md says which term stands for what.

python scripts/lint_words.py [FILES]: without files, the sources (help texts included), the docs and the README.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = (
    "src/**/*.py",
    "docs/**/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/*.py",
    "benchmarks/*.md",
    "scripts/**/*.py",
)

# pattern -> what to write instead
WORDS = {
    r"\b(asks?|asked|asking)\b": "evaluate, query, request, need",
    r"\b(wants?|wanted)\b": "need, take, require",
    r"\b(questions?|Asker|Subject)\b": "task, query, EvalContext, Task, EvalModel",
    r"\bsettled?\b": "resolve, default",
    r"\b(followed|worries|worry|divided|contest)\b": "tracked, warnings, sharded, benchmark",
    r"\banother look\b": "distribution shift",
    r"\bnew combinations\b": "compositional split",
    r"\bas many (pairs|steps|samples)\b": "at equal samples seen, for the same number of steps",
    r"\bper cent\b": "% or percent; percentage points",
    r"\bwhat (a step|it|they|each) costs?\b": "cost per step",
    r"\blies? to each other\b": "how embeddings are distributed",
    r"\bby themselves\b": "automatically",
    r"\bgoes on (where|from|at|with)\b|\bgoing on at\b|\bgo on (with|from|at|where)\b": "resume, continue",
    r"\bstarted otherwise\b": "started with different settings",
    r"\bleave (one |it |\S+ )?away\b": "omit",
    r"(?<!here )\bis no (picture|image|file|run|task|number|multiple|method|model|split)\b|\bare no (pairs|tasks)\b": "is not a …",
    r"\bthat of\b|\bthe same of\b": "repeat the noun, or 's",
    r"\ba (line|row|file|page|figure) an? (step|task|epoch|pair|class|sample|run|method|query|figure)\b|\bone an? line\b": "one … per …",
    r"\bhidden behind computing\b": "overlapped with compute",
    r"\b(un)?learnt\b": "learned",
    r"\w*(colour|behaviour|favour|honour|neighbour)\w*": "American spelling",
    r"(?<!\w)(grey|centre|licence|artefact|catalogue|judgement|modelling|labelled|unlabelled|travelled)\w*": "American spelling",
    r"\b\w*(normalis|optimis|initialis|tokenis|generalis|recognis|summaris|serialis|quantis|visualis)\w*": "American spelling",
    r"\bdata sets?\b": "dataset",
    r"\b(Mend|mend|mended|mends)\b": "fix",
}
# string kinds of scenes, and words that captions use: data, which seeds generators, not wording
DATA = re.compile(r"""["'](shape_)?colour["']|foils[/.]colour|\{colour\}|colour\.(accuracy|clusters)""")


def faults(path: Path) -> list[str]:
    """The lines of a file that hold a word of the list, as "path:line: word -> what to write instead"."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        kept = DATA.sub("", line)
        for pattern, instead in WORDS.items():
            if match := re.search(pattern, kept):
                found.append(f"{os.path.relpath(path)}:{number}: {match.group(0)!r} -> {instead}")
    return found


def main() -> int:
    given = [Path(name).resolve() for name in sys.argv[1:]]
    paths = given or sorted({path for place in PLACES for path in ROOT.glob(place)} - {Path(__file__).resolve()})
    found = [fault for path in paths for fault in faults(path)]
    if found:
        print("\n".join(found), f"{len(found)} words to replace", sep="\n")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
