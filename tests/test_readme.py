"""README.md lists every method, and its demo is that of results/; test_evidence.py checks its table."""

import json
import re

from helpers.pages import ROOT

from coalign.methods import recipes

TEXT = (ROOT / "README.md").read_text()


def rows(header):
    """The cells of the table below a header line, by the first cell."""
    lines = TEXT[TEXT.index(header) :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


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
