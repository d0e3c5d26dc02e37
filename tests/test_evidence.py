"""The pages of docs/evidence are those that scripts/render_evidence.py renders from results/."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs/evidence"


@pytest.fixture(scope="module")
def render():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import render_evidence

        yield render_evidence


def test_pages_are_those_of_the_results(render):
    rendered = render.pages(render.read_tables())
    committed = {path.stem: path.read_text(encoding="utf-8") for path in EVIDENCE.glob("*.md")}
    assert rendered.keys() == committed.keys()
    stale = [name for name in committed if rendered[name] != committed[name]]
    assert not stale, f"run python scripts/render_evidence.py; these pages differ: {stale}"


def test_every_figure_of_a_page_exists_and_is_shown(render):
    rendered = render.pages(render.read_tables())
    shown = {part.partition(")")[0] for text in rendered.values() for part in text.split("](")[1:]}
    assert {path.name for path in EVIDENCE.glob("*.png")} == {name for name in shown if name.endswith(".png")}


def test_every_table_of_the_results_has_a_page(render):
    tables = {path.stem for path in (ROOT / "results").glob("*.json") if "table" in json.loads(path.read_text())}
    assert tables - {"transfer-emoji", "transfer-openclipart"} == set(render.read_tables())


def test_the_readme_has_the_recommendation_and_its_table(render):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render.readme(text, render.read_tables()) == text, "run python scripts/render_evidence.py"


def test_the_words_of_the_advice_agree_with_the_results(render):
    """If this fails, the advice in scripts/evidence/summary.py is to be rewritten: its sentences are fixed, only its numbers are not."""
    import headline
    from evidence.titles import METHODS

    groups = {each["name"]: each for each in render.read_tables()[headline.HEADLINE]["groups"]}
    recall = {name: headline.both_directions(each["metrics"], "r10")[0] for name, each in groups.items()}
    methods = groups.keys() & METHODS.keys()
    assert recall["locked"] > recall["locked, 12.5 %"] > max(recall[name] for name in methods)
    assert min(methods, key=lambda name: groups[name]["cpu_seconds"]) == "clip"
    assert max(methods, key=recall.__getitem__) == "clip"
    transfer = render.read(render.TRANSFERS[0])["arms"]
    for data in ("openclipart", "digits"):
        clip, *better = (
            transfer[name]["accuracies"][f"knn:{data}"]["over_seeds"] for name in ("clip", "uniclip", "mcd")
        )
        assert all(clip[1] < low for low, _ in better)
    assert recall["clip"] - recall["clip, 50 %"] > max(recall[name] for name in methods) - recall["clip"]


def test_navigation_lists_every_page_with_its_title(render):
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    (section,) = [entry["Evidence"] for entry in yaml.safe_load("nav:" + lines)["nav"] if "Evidence" in entry]
    assert section[0] == "evidence/index.md"
    found = {path: title for entry in section[1:] for title, path in entry.items()}
    headings = {
        f"evidence/{path.stem}.md": path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for path in EVIDENCE.glob("*.md")
        if path.stem != "index"
    }
    assert found == headings
