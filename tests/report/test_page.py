from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from coalign.errors import UserError
from coalign.report.page import LONGEST_CAPTION, GalleryCell, Page

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects tags, texts and attributes as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def pixels(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


EVIL = "<script>alert('1')</script> & \"quoted\" $x$"


def full_page() -> Page:
    page = Page(EVIL, EVIL)
    page.verdict(EVIL)
    page.numbers([(EVIL, EVIL, EVIL)])
    for _ in range(3):
        page.section(EVIL, EVIL)
    page.text(EVIL)
    page.table((EVIL,), [(EVIL,)], EVIL)
    page.figure(Figure(figsize=(2, 1)), EVIL, name="plot")
    page.gallery([GalleryCell(pixels(), EVIL, True, EVIL), GalleryCell(pixels()[..., 0], EVIL, False)])
    page.ranking(GalleryCell(pixels(), EVIL), [GalleryCell(None, EVIL, True, EVIL), GalleryCell(None, EVIL, False)])
    page.ranking(GalleryCell(None, EVIL), [GalleryCell(pixels(), EVIL, False)])
    return page


def test_everything_is_escaped_and_nests():
    reader = Reader(full_page().html())
    assert reader.named("script") == []
    # Title, heading, subtitle, verdict, text; tile; sections with their links; table; figure, gallery, two rankings.
    assert " ".join(reader.words).count("alert('1')") == 5 + 3 + 9 + 3 + 1 + 3 + 4 + 2
    assert all(attrs["alt"] == EVIL for attrs in reader.named("img"))


def test_the_page_is_self_contained():
    page = full_page().html()
    reader = Reader(page)
    sources = [attrs["src"] for attrs in reader.named("img")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert {name for name, _ in reader.tags}.isdisjoint({"link", "script", "iframe", "object"})
    assert re.findall(r"url\(|@import|https?:", page) == []
    targets = {attrs.get("id") for attrs in reader.named("h2")}
    assert {attrs["href"] for attrs in reader.named("a")} == {f"#{target}" for target in targets}


def test_images_are_embedded_and_large_ones_resized():
    small, large = pixels(), pixels(400, 800)
    page = Page("t")
    page.gallery([GalleryCell(small, "small"), GalleryCell(large, "large"), GalleryCell(small[..., 0], "grey")])
    images = [decoded(attrs["src"]) for attrs in Reader(page.html()).named("img")]
    np.testing.assert_array_equal(np.array(images[0]), small)
    assert images[1].size == (320, 160)
    np.testing.assert_array_equal(np.array(images[2])[..., 1], small[..., 0])


def test_hits_and_misses_differ_in_symbol():
    page = Page("t")
    page.gallery([GalleryCell(pixels(), "a", True), GalleryCell(pixels(), "b", False), GalleryCell(pixels(), "c")])
    reader = Reader(page.html())
    assert [word for word in reader.words if word in "✓✗"] == ["✓", "✗"]
    assert [attrs["class"] for attrs in reader.named("div") if "cell" in (attrs["class"] or "")] == [
        "cell good",
        "cell bad",
        "cell plain",
    ]


def test_hostile_captions_are_harmless(tmp_path):
    page = Page("t")
    captions = ["x" * 1_000_000, "nul \x00 and \ud800 lone surrogate", "\u202eright to left", "line\nbreak\ttab", ""]
    page.gallery([GalleryCell(pixels(), caption) for caption in captions])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 50_000
    assert "x" * LONGEST_CAPTION + "…" in text
    assert "\x00" not in text
    assert "nul \ufffd and \ufffd lone" in text
    assert "line break tab" in text


def test_tables_align_numbers_and_show_absent_ones():
    page = Page("t")
    page.table(
        ("name", "value"),
        [
            ("a", 1234567),
            ("b", 0.123456),
            ("c", None),
            ("d", True),
            ("e", "12.5 %"),
            ("f", "3 apples"),
            ("g", "12 min 34 s"),
            ("h", "2 d 4 h"),
        ],
    )
    html = page.html()
    for cell in ("1,234,567", "0.1235", "12.5 %", "12 min 34 s", "2 d 4 h"):
        assert re.search(rf'<td class="number"[^>]*>{cell}</td>', html)
    assert '<td class="quiet">–</td>' in html
    assert "<td>yes</td>" in html
    assert re.search(r'<td dir="auto">3 apples</td>', html)
    page.table(("name",), [])
    assert "none" in Reader(page.html()).words


def test_a_named_figure_is_written_beside_the_page(tmp_path):
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2])
    page = Page("t")
    page.figure(figure, "a line", name="line")
    page.write(tmp_path / "deep" / "report.html")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["line.png", "report.html"]
    beside = Image.open(tmp_path / "deep" / "line.png")
    (attrs,) = Reader((tmp_path / "deep" / "report.html").read_text(encoding="utf-8")).named("img")
    np.testing.assert_array_equal(np.array(decoded(attrs["src"])), np.array(beside))
    assert attrs["width"] == str(round(beside.width * 100 / 160))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "twice"])
def test_a_figure_name_is_a_plain_name_used_once(name):
    page = Page("t")
    page.figure(Figure(figsize=(1, 1)), name="twice")
    with pytest.raises(ValueError, match="plain file name"):
        page.figure(Figure(figsize=(1, 1)), name=name)


def test_failed_write_keeps_the_old_page_and_no_temporary_files(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    Page("old").write(path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match=r"Cannot write the report to .*No space left"):
        Page("new").write(path)
    assert "old" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_unwritable_path_raises_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the report"):
        Page("t").write(Path(tmp_path / "file" / "report.html"))
