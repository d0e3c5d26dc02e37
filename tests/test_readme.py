"""README.md is one page, and its table of results has the values of results/."""

import json
import re

from helpers.pages import ROOT

from coalign.experiments.tables.registry import STEP_COST
from coalign.methods import recipes

TEXT = (ROOT / "README.md").read_text()


def rows(header):
    """The cells of the table below a header line, by the first cell."""
    lines = TEXT[TEXT.index(header) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def mark(metric):
    """▲ or ▼ if the difference from the first group excludes zero over items and over seeds."""
    spans = [metric["difference_over_items"], metric["difference_over_seeds"]]
    if not all(spans):
        return ""
    return " ▲" if all(low > 0 for low, _ in spans) else " ▼" if all(high < 0 for _, high in spans) else ""


def test_results_are_those_of_the_table():
    results = json.loads((ROOT / "results/style-shift-openclipart.json").read_text())
    groups = {group["name"]: group for group in results["groups"]}
    table = rows("| | Same styles, image → text |")
    columns = ["retrieval.image_to_text.r10", "retrieval_test.image_to_text.r10", "retrieval_test.text_to_image.r10"]
    chance = [groups["clip"]["metrics"][name]["chance"] for name in columns]
    assert table.pop("Chance")[:3] == [f"{100 * value:.1f}" for value in chance]
    names = {"CLIP, strong views": "clip, DeCLIP's views"}
    assert {names.get(name, name.lower()) for name in table} == set(groups)
    for name, (*values, seeds, cost) in table.items():
        group = groups[names.get(name, name.lower())]
        for text, column in zip(values, columns, strict=True):
            metric = group["metrics"][column]
            low, high = metric["over_seeds"]
            assert text == f"{100 * metric['value']:.1f} ± {50 * (high - low):.1f}{mark(metric)}", name
        assert int(seeds) == len(group["seeds"])
        assert cost == ("1" if name == "CLIP" else str(STEP_COST["openclipart"].get(name.lower(), ""))), name
    longer = json.loads((ROOT / "results/declip-openclipart.json").read_text())["groups"]
    (metric,) = [group["metrics"][columns[1]] for group in longer if group["name"] == "CLIP, twice the epochs"]
    low, high = metric["over_seeds"]
    assert f"{100 * metric['value']:.1f} ± {50 * (high - low):.1f}" in TEXT
    settings = results["settings"]
    assert f"Trained on {settings['num_train']:,} drawings" in TEXT
    assert f"{settings['epochs']:.0f} epochs at {settings['image_size']} pixels" in TEXT


def test_every_method_is_listed_with_its_page():
    table = rows("| `--recipe` | Paper |")
    listed = {re.search(r"\[`(\w+)`\]\((.*?)\)", cell).groups() for cell in table}
    methods = {name for name in recipes() if "-" not in name}
    assert {name for name, _ in listed} == methods
    for name, page in listed:
        assert (ROOT / page).is_file() or page == f"docs/methods/{name}.md"


def test_the_demo_is_as_in_its_results():
    """`python scripts/render_demo.py` writes the results and the passages."""
    values = json.loads((ROOT / "results/demo.json").read_text())
    new_style, held_out = values["sentences"]
    (caption,) = re.findall(r"<!-- demo: caption -->\n(.*?)<!-- end of demo -->", TEXT, re.DOTALL)
    assert new_style in " ".join(caption.split())
    assert f"{values['settings']['num_train']:,} drawings by Twemoji" in " ".join(caption.split())
    page = (ROOT / "docs/get-started.md").read_text()
    assert f"{new_style}\n{held_out}\n" in page
    first, second = (group["metrics"]["retrieval_test.text_to_image.r1"] for group in values["groups"])
    assert f"{100 * second['value']:.1f} % of the names, CLIP for {100 * first['value']:.1f} %" in new_style
    text = json.dumps(values)
    assert "/tmp" not in text
    assert "/home" not in text
