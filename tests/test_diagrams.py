"""The pictures of the methods in docs/methods are what scripts/render_method_diagrams.py draws."""

import importlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from coalign.methods import METHODS

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
NAMES = [*METHODS, "overview"]


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("render_method_diagrams").PICTURES


def test_each_method_has_a_picture(pictures):
    assert sorted(pictures) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_committed_picture_is_up_to_date(pictures, name):
    committed = (ROOT / f"docs/methods/{name}.svg").read_bytes()
    assert committed == pictures[name]().svg().encode(), "run python scripts/render_method_diagrams.py"


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_readable(name):
    """It is well-formed, has a title and a description for screen readers, and its text is large enough for a phone."""
    root = ElementTree.parse(ROOT / f"docs/methods/{name}.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text
    assert len(root.find(f"{SVG}desc").text) > 50
    assert root.get("viewBox").split()[:3] == ["0", "0", "720"]
    assert min(float(text.get("font-size")) for text in root.iter(f"{SVG}text")) >= 15
