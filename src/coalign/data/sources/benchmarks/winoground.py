"""Winoground (Thrush et al. 2022): pairs of images whose captions consist of the same words in a different order."""

from __future__ import annotations

import json
from pathlib import Path

from coalign.data.sources.base import Source, read_image_file
from coalign.data.text.captions import printable
from coalign.errors import UserError
from coalign.types import Record

EXAMPLES = "examples.jsonl"


class Winoground(Source):
    """The Winoground folder, with examples.jsonl and images/. Samples 2i and 2i + 1 are the two images of example i, with their captions.

    An image named without an extension is a .png file: `ex_0_img_0` is images/ex_0_img_0.png.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = printable(str(folder)), folder / "images"
        path = folder / EXAMPLES
        if not path.is_file() or not self.folder.is_dir():
            raise UserError(f"{folder} is not a Winoground folder: expected {EXAMPLES} and the folder images in it.")
        self._samples: list[tuple[str, str]] = []  # file, caption
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self._samples += [(str(entry[f"image_{i}"]), str(entry[f"caption_{i}"])) for i in (0, 1)]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"Line {number} of {path} is not a valid Winoground example.") from None
        if not self._samples:
            raise UserError(f"{path} contains no examples.")

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, index: int) -> Record:
        file, caption = self._samples[index]
        return Record(file, (caption,))

    def image(self, index: int) -> bytes:
        file = self._samples[index][0]
        return read_image_file(self.folder / (file if Path(file).suffix else f"{file}.png"))
