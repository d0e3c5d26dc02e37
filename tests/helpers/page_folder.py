"""The folder in which the pages' commands run, and how commands are made small."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers import tiny
from helpers.data_files import write_tar
from helpers.pages import ROOT
from PIL import Image

VIT = "vit.json"  # a small Vision Transformer that open_clip and transformers can hold
OPEN_CLIP_MODEL = r"(ViT|RN\d|timm:|convnext|EVA|coca).*"
SMALL = {"--epochs": "1", "--workers": "0", "--evals": "1"}
COUNT = 256  # of the pairs, so that 5 % are enough for every command


def write_folder(root: Path) -> Path:
    """Writes the data that commands and snippets of the pages use."""
    shapes = tiny.write_pairs(root / "shapes", COUNT)
    images = sorted(shapes.rglob("*.png"))
    rows = []
    (root / "photos").mkdir()
    for number, path in enumerate(images):
        color, noun, verb = path.stem.split("_")
        image = Image.open(path)
        image.resize((96, 72)).save(root / f"photos/{number:03d}.jpg", quality=95)
        (root / f"photos/{number:03d}.txt").write_text(f"a {color} {noun} {verb}\n")
        rows.append((f"photos/{number:03d}.jpg", f"a {color} {noun} {verb}", f"{color},{noun}"))
    lines = ["image,caption,tags", *(f'{image},{caption},"{tags}"' for image, caption, tags in rows)]
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    (root / "photo.jpg").write_bytes((root / "photos/000.jpg").read_bytes())
    (root / "classes.txt").write_text("red\ngreen\nblue\ngrey\n")
    (shown,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/classify.md").read_text(), re.MULTILINE | re.DOTALL)
    (root / "animals.json").write_text(shown)
    (root / "colors.json").write_text(json.dumps({name: [name, f"a {name} thing"] for name in tiny.COLORS}))
    _write_classes(root, rows)
    _write_products(root / "products.csv", rows)
    _write_openclipart(root / "data/openclipart", root, rows)
    _write_shards(root / "cc3m", root, rows)
    _write_coco(root / "coco", root, rows)
    model = tiny.MODEL | {"text_cfg": tiny.MODEL["text_cfg"] | {"context_length": 32}}
    (root / VIT).write_text(json.dumps(model))
    (shown,) = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL)
    (root / "small-vit.json").write_text(shown)
    return root


def _write_classes(root: Path, rows: list[tuple[str, str, str]]) -> None:
    """Writes birds in class folders, and a table of the same images."""
    lines = ["image,species"]
    for number, (image, _, _) in enumerate(rows):
        species = ("house_sparrow", "barn_owl", "wren")[number % 3]
        path = root / f"birds/{species}/IMG_{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / image).read_bytes())
        lines.append(f"{path.relative_to(root).as_posix()},{species}")
    (root / "birds.csv").write_text("\n".join(lines) + "\n")


def _write_products(path: Path, rows: list[tuple[str, str, str]]) -> None:
    lines = [f'{image},{caption},"{tags}",{number // 2}' for number, (image, caption, tags) in enumerate(rows)]
    path.write_text("\n".join(["picture,words,topics,product_id", *lines]) + "\n")


def _write_openclipart(folder: Path, root: Path, rows: list[tuple[str, str, str]]) -> None:
    samples = []
    for number, (image, caption, tags) in enumerate(rows):
        path = folder / f"images/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(root / image).save(path)
        name = path.relative_to(folder).as_posix()
        samples.append(
            {
                "image": name,
                "captions": [caption],
                "tags": tags.split(","),
                "category": tags.partition(",")[0],
                "style": f"style {number % 3}",
            }
        )
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    split = [sample | {"split": "test" if number % 4 == 0 else "train"} for number, sample in enumerate(samples)]
    (folder / "style-shift.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in split))


def _write_shards(folder: Path, root: Path, rows: list[tuple[str, str, str]]) -> None:
    for shard in range(4):
        entries = []
        for number, (image, caption, _) in list(enumerate(rows))[shard::4]:
            meta = json.dumps({"caption": caption, "url": f"https://example.org/{number}"}).encode()
            content = (root / image).read_bytes()
            entries += [
                (f"{number:09d}.jpg", content),
                (f"{number:09d}.json", meta),
                (f"{number:09d}.txt", caption.encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", entries)


def _write_coco(folder: Path, root: Path, rows: list[tuple[str, str, str]]) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, (image, caption, _) in enumerate(rows):
        name = f"{number:012d}.jpg"
        (folder / "images" / name).write_bytes((root / image).read_bytes())
        images.append({"id": number, "file_name": name})
        annotations += [{"id": 2 * number + k, "image_id": number, "caption": f"{caption} {k}"} for k in range(2)]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def small(words: list[str]) -> list[str]:
    """Makes the models, epochs, batches, shards and minutes of a coalign command small. Its other options stay."""
    words = [re.sub(r"\{0+\.\.\d+\}", "{00000..00003}", word) for word in words]
    words = [re.sub(r"scenes:\d+", "scenes:64", word) for word in words]
    if words[0] in ("train", "profile"):
        options = dict(SMALL) if words[0] == "train" else {"--workers": "0", "--steps": "2"}
        recipe = _value(words, "--recipe") or "clip"
        large = re.fullmatch(OPEN_CLIP_MODEL, _value(words, "--model") or "") or "-" in recipe
        if large and not _value(words, "--pretrained"):
            options["--model"] = "oner-tiny" if recipe.startswith("oner") else VIT
            options |= {"--batch-size": "16", "--image-size": "32"}
        if (micro_batch := _value(words, "--micro-batch")) and int(micro_batch) > 8:
            options |= {"--micro-batch": "16", "--batch-size": "32"}
        elif int(_value(words, "--batch-size") or 0) > 16:
            options["--batch-size"] = "16"
        if "--head-epochs" in words:
            options["--head-epochs"] = "0.5"
        words = with_options(words, options)
    if words[0] == "benchmark":
        words = with_options(_without(words, "--minutes"), {"--epochs": "1", "--seeds": "1"})
    return words


def _value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def _without(words: list[str], option: str) -> list[str]:
    """Removes an option that takes one value."""
    at = words.index(option) if option in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def with_options(words: list[str], options: dict[str, str]) -> list[str]:
    """Replaces or appends options that take one value."""
    words = list(words)
    for option, value in options.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words
