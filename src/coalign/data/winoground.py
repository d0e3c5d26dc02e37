"""Winoground (Thrush et al. 2022): two images and two captions of the same words, which tell the images apart by their order alone."""

from __future__ import annotations

import json
from pathlib import Path

from coalign.data.common import printable, read_image_file
from coalign.errors import UserError
from coalign.types import Record

EXAMPLES = "examples.jsonl"


class Winoground:
    """The folder of the data set: examples.jsonl, and images/ with what it names (`ex_0_img_0` is ex_0_img_0.png). Samples 2 i and 2 i + 1
    are the two images of example i, with their captions."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = printable(str(folder)), folder / "images"
        path = folder / EXAMPLES
        if not path.is_file() or not self.folder.is_dir():
            raise UserError(f"{folder} is not Winoground: {EXAMPLES} and the folder images are expected in it")
        self._samples: list[tuple[str, str]] = []  # file, caption
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self._samples += [(str(entry[f"image_{i}"]), str(entry[f"caption_{i}"])) for i in (0, 1)]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"line {number} of {path} is no example of Winoground's") from None
        if not self._samples:
            raise UserError(f"{path} holds no examples")

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, index: int) -> Record:
        file, caption = self._samples[index]
        return Record(file, (caption,))

    def image(self, index: int) -> bytes:
        file = self._samples[index][0]
        return read_image_file(self.folder / (file if Path(file).suffix else f"{file}.png"))
