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
from evidence.other_pages import misalignment_page, transfer_page
from evidence.plan import read_plan, verdicts
from evidence.plan_page import plan_page
from evidence.small_models import small_models_page
from evidence.speed import speed_page
from evidence.summary import summary_page, which_method
from evidence.table_page import table_page
from evidence.text import Values
from evidence.titles import HEADLINE, TABLE_TITLES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/evidence"
TRANSFERS = (
    "transfer-emoji",
    "transfer-openclipart",
)  # by what the encoders were trained on; the first, those of the headline
MARKS = ("<!-- evidence: which method -->\n", "<!-- end of evidence -->")  # in the README


def read(name: str) -> Any:
    return json.loads((ROOT / f"results/{name}.json").read_text())


def exists(name: str) -> bool:
    return (ROOT / f"results/{name}.json").exists()


def read_tables() -> dict[str, Values]:
    """Returns the tables with results, in the order of the pages."""
    return {name: {"claims": [], "efficiency": {}, **read(name)} for name in TABLE_TITLES if exists(name)}


def pages(tables: dict[str, Values]) -> dict[str, str]:
    """Returns name -> Markdown of every page."""
    plan = read_plan(ROOT / "results/plan.json")
    decided = verdicts(plan, tables)
    others = {
        "plan": plan_page(plan, tables),
        "headline": headline_page(tables[HEADLINE], [each for each in decided if each.claim.table == HEADLINE]),
        "transfer": transfer_page([read(name) | {"name": name} for name in TRANSFERS if exists(name)]),
        "oner-mct": oner_mct_page(read("oner-mct-account")),
        "small-models": small_models_page(read("small-models")),
        "speed": speed_page(read("benchmarks")),
    }
    if exists("misalignment-scenes"):
        others["misalignment"] = misalignment_page(read("misalignment-scenes"))
    index = summary_page(tables, read(TRANSFERS[0]), decided, others)
    return {"index": index, **others, **{name: table_page(values) for name, values in tables.items()}}


def readme(text: str, tables: dict[str, Values]) -> str:
    """Returns the README with its recommendation, figure and table as on the summary page."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    found = which_method(tables, read(TRANSFERS[0]), "docs/evidence/")
    return before + MARKS[0] + found + "\n" + MARKS[1] + after


def main() -> None:
    from evidence.figures import figures

    tables = read_tables()
    for name, text in pages(tables).items():
        (OUT / f"{name}.md").write_text(text)
    for name, figure in figures(tables).items():
        figure.savefig(OUT / f"{name}.png", dpi=110)
    headline.main()
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(), tables))


if __name__ == "__main__":
    main()
