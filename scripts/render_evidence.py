"""Renders docs/evidence: a summary page, and one page with its figures per file in results/. The pages are not edited by hand.

Each table of experiments is the table.json of `coalign reproduce`, under the name of the table. A new page needs a title in
evidence/titles.py and a line in mkdocs.yml.

Run: python scripts/render_evidence.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import headline
from evidence.headline_page import headline_page
from evidence.oner_mct import oner_mct_page
from evidence.other_pages import clip_page, detection_page, misalignment_page
from evidence.plan import read_plan, verdicts
from evidence.plan_page import plan_page
from evidence.small_models import small_models_page
from evidence.speed import speed_page
from evidence.summary import summary_page
from evidence.table_page import table_page
from evidence.text import Values
from evidence.titles import TABLE_TITLES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/evidence"


def read(name: str) -> Any:
    return json.loads((ROOT / f"results/{name}.json").read_text())


def read_tables() -> dict[str, Values]:
    """Returns the tables in the order of the pages. A table without claims or fractions of the pairs may lack these entries."""
    return {name: {"claims": [], "efficiency": {}, **read(name)} for name in TABLE_TITLES}


def pages(tables: dict[str, Values]) -> dict[str, str]:
    """Returns name -> Markdown of every page."""
    plan = read_plan(ROOT / "results/plan.json")
    found = {"index": summary_page(tables), "plan": plan_page(plan, tables)}
    if headline.NAME in tables:
        own = [each for each in verdicts(plan, tables) if each.claim.table == headline.NAME]
        found["headline"] = headline_page(tables[headline.NAME], own)
    return {
        **found,
        **{name: table_page(values) for name, values in tables.items()},
        "clip-openclipart": clip_page(read("openclipart_clip")),
        "detection": detection_page(read("detection-scenes")),
        "misalignment": misalignment_page(read("misalignment-scenes")),
        "oner-mct": oner_mct_page(read("oner-mct-account")),
        "small-models": small_models_page(read("small-models")),
        "speed": speed_page(read("benchmarks")),
    }


def main() -> None:
    from evidence.figures import figures

    tables = read_tables()
    for name, text in pages(tables).items():
        (OUT / f"{name}.md").write_text(text)
    for name, figure in figures(tables).items():
        figure.savefig(OUT / f"{name}.png", dpi=110)
    if headline.NAME in tables:
        headline.main()


if __name__ == "__main__":
    main()
