from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coalign.report.check_page import check_page


def spread(counts: list[int], edges: list[float]) -> dict[str, Any]:
    return {"smallest": 1.0, "median": 2.0, "mean": 2.5, "largest": 9.0, "edges": edges, "counts": counts}


def plain(**changes: Any) -> dict[str, Any]:
    """A data check as plain values, as read from JSON."""
    sides = spread([0, 0, 5, 40, 0], [8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
    shares = spread([10, 80], [0.0, 0.5, 1.0])
    few = spread([0, 7, 2], [-0.5, 0.5, 1.5, 2.5])
    row = {"index": 3, "key": "k3", "caption": "a <b>cat</b> & $x$", "note": "5 times"}
    check = {
        "name": "some data",
        "samples": 1200,
        "checked": 1200,
        "usable": 1190,
        "broken": [{"reason": "truncated image", "count": 10, "examples": ["k1: <cut>", "k2"]}],
        "unusable_captions": [{"reason": "caption is not UTF-8", "count": 3, "examples": ["k3"]}],
        "left_out": {"wrong number of columns": 77},
        "left_out_where": [["line 4", "wrong number of columns"]],
        "unread": ["captions.csv"],
        "formats": {"JPEG": 1000, "PNG": 190},
        "modes": {"RGB": 1190},
        **dict.fromkeys(("width", "height", "shortest_side", "aspect_ratio"), sides),
        "blank": 3,
        "captions": 1300,
        "captions_per_sample": {"1": 1080, "2": 110},
        "words": few,
        "tokens": None,
        "cut": 0,
        "english": shares,
        "hardly_english": 52,
        "single_part_of_speech": {"nouns": 13},
        "same_caption": {"groups": 1, "samples": 50, "largest": [["one $caption$", 50, [3, 4]]]},
        "same_image": {"groups": 2, "samples": 4, "largest": []},
        "look_alikes": {"groups": 0, "samples": 0, "largest": []},
        "leaks": {"val": {"count": 7, "samples": 90, "examples": [[3, 4]]}},
        "tagged": 600,
        "num_tags": 2,
        "tags": [["cat", 500], ["$dog_", 100]],
        "gallery": {"random": [row], "shared captions": [row], "look-alikes": []},
        "warnings": ["The first warning.", "The second warning."],
    }
    return check | changes


PICTURES = {3: np.zeros((10, 12, 3), np.uint8)}


def visible(page: Any) -> str:
    """The text of the page, without images and styles."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.html(), flags=re.DOTALL)
    return " ".join(text.split())


def test_verdict_comes_first_and_numbers_are_there() -> None:
    text = visible(check_page(plain(), PICTURES))
    body = text[text.index("all 1,200 samples") :]
    assert body.index("The first warning. One more warning below.") < body.index("Usable samples")
    for piece in (
        "1,190",
        "10 bad (0.83 %)",
        "truncated image",
        "Captions that are not used",
        "wrong number of columns",
        "77",
        "The second warning.",
    ):
        assert piece in body, piece
    assert "one $caption$ 50" in body
    assert "only nouns 13 1.0 %" in body


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    check_page(plain(), PICTURES).write(tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text(encoding="utf-8")
    assert "<b>cat" not in page
    assert "<cut>" not in page
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert list(tmp_path.iterdir()) == [tmp_path / "check.html"]


@pytest.mark.parametrize(
    ("warnings", "verdict"), [([], "No problems found"), (["One."], "One."), (["A.", "B.", "C."], "A. 2 more warnings")]
)
def test_verdict(warnings: list[str], verdict: str) -> None:
    text = visible(check_page(plain(warnings=warnings), PICTURES))
    assert verdict in text
    assert ("Warnings" in text) == (len(warnings) > 1)


def test_token_lengths_appear_if_counted() -> None:
    assert "tokens per caption" not in visible(check_page(plain(), PICTURES))
    text = visible(check_page(plain(tokens=spread([3, 4], [2.5, 3.5, 4.5]), cut=26), PICTURES))
    assert "tokens per caption 1 2 2.5 9" in text
    assert "longer than the context length 26 2.0 %" in text


def test_nothing_usable() -> None:
    absent = dict.fromkeys(["width", "height", "shortest_side", "aspect_ratio", "words", "english"])
    empty = {
        "usable": 0,
        "captions": 0,
        "formats": {},
        "modes": {},
        "captions_per_sample": {},
        "tags": [],
        "num_tags": 0,
    }
    text = visible(check_page(plain(**absent, **empty, gallery={}, warnings=["None can be used."]), {}))
    assert "None can be used." in text
    assert "truncated image" in text


def test_a_partial_check_is_labeled() -> None:
    text = visible(check_page(plain(samples=9000), PICTURES))
    assert "1,200 random samples of 9,000" in text
    assert "Only a sample was checked" in text


def test_images_are_shown_with_their_captions() -> None:
    page = check_page(plain(), PICTURES).html()
    cells = re.findall(r'<div class="cell[^>]*>.*?</div></div>', page)
    assert sum("data:image/" in cell and "a &lt;b&gt;cat" in cell for cell in cells) == 2
