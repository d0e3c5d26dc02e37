"""Random images, captions, and what is known of a random dataset."""

from __future__ import annotations

import io
import os
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from coalign.config import DETECT, DataConfig

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "round",
    "café",
    "grün",
    "圆形",
    "dog's",
    "boat",
    "tree",
    "naïve",
    "house",
    "🙂",
    "tall",
]
FORMATS = {"png": "PNG", "PNG": "PNG", "jpg": "JPEG", "JPG": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "gif": "GIF",
           "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM", "avif": "AVIF"}  # fmt: skip
UNOPENABLE = ("svg", "cr2", "NEF", "eps")
NOT_UTF8 = "ungültig".encode("latin-1")


@dataclass
class Truth:
    """What a dataset holds. `refused`: it must not open. If nothing is usable, it may open or not."""

    spec: str
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the usable samples, by key
    total: int = 0  # images, rows, or samples of shards that are there, usable or not
    reading: DataConfig = DETECT
    refused: bool = False

    def add(self, key: str, captions: tuple[str, ...], usable: bool = True) -> None:
        self.total += 1
        if captions and usable:
            assert key not in self.captions
            self.captions[key] = captions


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))


@cache
def encoded(kind: str, number: int) -> bytes:
    buffer = io.BytesIO()
    color = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (4, 4), color).save(buffer, kind)
    return buffer.getvalue()


def random_image(rng: random.Random, extension: str) -> bytes:
    kind = (
        FORMATS[extension] if rng.random() > 0.1 else rng.choice(["PNG", "JPEG", "WEBP"])
    )  # whatever the extension says
    return encoded(kind, rng.randrange(8))


def damaged_image(rng: random.Random, extension: str) -> bytes:
    content = encoded(FORMATS[extension], rng.randrange(8))
    return rng.choice([b"", content[: len(content) * 2 // 5], b"<!doctype html><p>404", b"version https://git-lfs\n"])


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def put_image(rng: random.Random, path: Path, damage: float = 0.2) -> bool:
    """Writes an image, possibly a damaged one, or a link. Returns whether it is usable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = path.suffix[1:]
    if rng.random() < damage:
        if rng.random() < 0.25:
            os.symlink(f"nowhere.{extension}", path)
        else:
            path.write_bytes(damaged_image(rng, extension))
            if os.geteuid() and rng.random() < 0.2:  # root reads any file
                path.chmod(0)
        return False
    if rng.random() < 0.1:
        put(path.parent.parent / "elsewhere" / f".{path.name}", random_image(rng, extension))
        os.symlink(Path("..", "elsewhere", f".{path.name}"), path)
    else:
        path.write_bytes(random_image(rng, extension))
    return True
