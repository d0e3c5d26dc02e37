"""The lines of the benchmarks' table: a script prints what it has measured by `line`, and `all.py` gathers the lines of all scripts."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

KEPT = "COALIGN_BENCHMARK_LINES"  # the file that lines are kept in


def line(
    what: str, ratios: Sequence[float], *, at_least: float | None = None, at_most: float | None = None, more: str = ""
) -> None:
    """Prints the median of `ratios`, from the smallest to the largest of them, with the target and whether it holds; `more` is said beside.

    One ratio is one run.
    """
    ordered = sorted(ratios)
    middle = statistics.median(ordered)
    target = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}" if at_most is not None else ""
    holds = None
    if target:
        holds = middle >= at_least if at_least is not None else middle <= (at_most or 0)
    spread = f"from {ordered[0]:.3g} to {ordered[-1]:.3g} in {len(ordered)}" if len(ordered) > 1 else "one run"
    said = [
        spread,
        *([f"target {target}: {'holds' if holds else 'MISSED'}"] if target else []),
        *([more] if more else []),
    ]
    print(f"  {what}: RATIO {middle:.3g} ({'; '.join(said)})", flush=True)
    if KEPT in os.environ:
        kept = {
            "script": Path(sys.argv[0]).name, "what": what, "median": middle, "least": ordered[0], "most": ordered[-1],
            "measured": len(ordered), "target": target, "holds": holds, "more": more,
        }  # fmt: skip
        with open(os.environ[KEPT], "a") as file:
            file.write(json.dumps(kept) + "\n")
