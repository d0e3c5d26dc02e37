"""Draws the picture of the search page in docs/serve.md: a screenshot of a page that `coalign serve` serves.

The pictures are of Open Clip Art, in the public domain:

    coalign data emoji --out data/emoji
    coalign train --recipe clip --data data/emoji --epochs 60 --out runs/emoji
    coalign data openclipart --download --max-side 96 --out data/openclipart
    coalign index runs/emoji data/openclipart --out shelf
    coalign serve shelf
    python scripts/render_serve_picture.py http://127.0.0.1:7860/ --text "playing card"

It needs Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1100, 760


def screenshot(address: str) -> bytes:
    """Returns the PNG of a page once its images are loaded."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(address, wait_until="networkidle")
        page.locator("#view-search .tile img").first.wait_for()
        page.locator("#text").blur()
        shot = page.screenshot()
        browser.close()
    return shot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="what `coalign serve` prints")
    parser.add_argument("--text", required=True, help="the query")
    parser.add_argument("--out", type=Path, default=Path("docs/serve.png"), help="the picture to write")
    args = parser.parse_args()
    shot = screenshot(f"{args.address}#{urlencode({'text': args.text})}")
    # 256 colors are enough for drawings, and a third of the size
    with Image.open(io.BytesIO(shot)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
