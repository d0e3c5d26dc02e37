"""The documentation builds without warnings, and its pages load nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    # a proxy that refuses connections: the build needs no network
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return out


class Loaded(HTMLParser):
    """Collects what a page loads."""

    def __init__(self):
        super().__init__()
        self.urls = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.urls += [attributes.get("src")]
        if tag == "link" and attributes.get("rel") in ("stylesheet", "preconnect", "preload", "icon", "prefetch"):
            self.urls += [attributes.get("href")]

    def handle_data(self, data):
        self.text.append(data)


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        for url in filter(None, parser.urls):
            assert not re.match(r"(https?:)?//", url), f"{page.relative_to(site)} loads {url}"
            folder = site if url.startswith("/") else page.parent  # the page 404 has paths from the root
            assert (folder / url.partition("?")[0].lstrip("/")).exists() or url.startswith("data:"), f"{page}: {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text()), style


def test_formulas_and_generated_parts_are_filled_in(site):
    page = (site / "methods/mcd.html").read_text()
    assert page.count("<math") > 5
    assert "arithmatex" not in page
    assert "--teacher-momentum" in page
    assert not re.search(r"<!-- (options|recipes|details):", page)
    home = (site / "index.html").read_text()
    assert "Find the best" in home
