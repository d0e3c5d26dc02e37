"""Random tables of images and captions as text, JSON and Parquet, in folders and in datasets of Hugging Face; with random damage."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from helpers.random_folders import clutter
from helpers.random_images import (
    FORMATS,
    Truth,
    encoded,
    put,
    put_image,
    sentence,
)

from coalign.config import DataConfig


@dataclass
class Row:
    image: str
    captions: tuple[str, ...]  # that are in the row
    usable: bool  # the image


def make_rows(rng: random.Random, folder: Path, text: Callable[[], str], multiple: bool = True) -> list[Row]:
    """Writes images and returns rows about them: with one caption, several or none, of missing images, and of the same image."""
    rows: list[Row] = []
    for number in range(rng.randint(2, 8)):
        if rows and rng.random() < 0.15:
            first = rng.choice(rows)
            rows.append(Row(first.image, (text(),), first.usable))
            continue
        stem = rng.choice([f"{number:03d}", f"dog {number}", f"x.y_{number}", f"Ünï-{number}"])
        image = rng.choice(["", "", "sub/", "s p/q/"]) + f"{stem}.{rng.choice(list(FORMATS))}"
        usable = rng.random() > 0.1 and put_image(rng, folder / image, 0.15)
        count = rng.choice([0, 1, 1, 1, 1, 1, 1, 2]) if multiple else rng.choice([0, 1, 1, 1, 1, 1])
        rows.append(Row(image, tuple(text() for _ in range(count)), usable))
    if not any(row.usable for row in rows):  # nothing tells where the images are
        put(folder / "last.png", encoded("PNG", 0))
        rows.append(Row("last.png", (text(),), True))
    return rows


def add_rows(truth: Truth, rows: list[Row], prefix: str = "") -> None:
    """Adds a sample for each image, with the captions of all its rows."""
    merged: dict[str, list[Row]] = {}
    for row in rows:
        merged.setdefault(row.image, []).append(row)
    for image, own in merged.items():
        captions = tuple(caption for row in own for caption in row.captions)
        truth.add(prefix + image, tuple(" ".join(caption.split()) for caption in captions), own[0].usable)


def quoted(text: str, separator: str, style: str) -> str:
    if style == "backslash":
        return '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'
    special = any(character in text for character in (separator, '"', "\n", "\r"))
    return '"' + text.replace('"', '""') + '"' if style == "all" or (style == "minimal" and special) else text


def random_text(rng: random.Random, separator: str, style: str, line_end: str) -> str:
    """A caption with characters that are special in tables; those that the quoting style can represent."""
    text = sentence(rng)
    extras = [
        text,
        text,
        f'a 5" {text}',
        f'the "big" {text}',
        f'"what" he said, of {text}',
        f"{text}; and, more | less",
    ]
    if style != "none":
        extras += [f"{text}{line_end}and {text}", f'"{text}"', f"{text} \t tab", f'{text} "end"']
    extras = [each for each in extras if style != "none" or separator not in each]
    return rng.choice(extras)


@dataclass
class TextTable:
    """How a text table is written."""

    rng: random.Random
    separator: str
    style: str
    line_end: str
    names: list[str]
    image: str
    captions: list[str]
    utf8: bool

    def cells(self, row: Row) -> dict[str, str]:
        cells = {self.image: row.image, "width": "4", "id": "7", "note": "a b"}
        if row.image[-1:] == "G" and self.rng.random() < 0.3:
            cells[self.image] = (
                f"{row.image}#{self.rng.randrange(5)}"  # the number of the caption, as in Flickr8k's tables
            )
        if len(self.captions) == 1:
            return cells | {self.captions[0]: self.cell(row.captions)}
        return cells | dict(zip(self.captions, [*row.captions, "", ""]))

    def plain(self, cells: dict[str, str]) -> str:
        return self.separator.join(cells.get(name, "") for name in self.names)

    def cell(self, captions: tuple[str, ...]) -> str:
        if len(captions) < 2:
            return captions[0] if captions else self.rng.choice(["", "  ", "nan", "NULL", "None"])
        return self.rng.choice([json.dumps(captions, ensure_ascii=False), repr(list(captions)), repr(captions)])

    def line(self, row: Row) -> str:
        cells = self.cells(row)
        return self.separator.join(quoted(cells[name], self.separator, self.style) for name in self.names)

    def damaged(self, row: Row, truth: Truth) -> str:
        """A line unlike the others. Its row is changed to what is right; its image is "" if the line is none."""
        kind = self.rng.choice(["stray", "stray", "few", "many", "blank", "comment", "header", "no image", "not utf-8"])
        first = self.captions[0]
        cells = (
            self.cells(row) | dict.fromkeys(self.captions, "") | {first: sentence(self.rng)}
        )  # unquoted, in one line
        if kind in ("stray", "not utf-8") and (self.utf8 or kind == "stray"):  # an opening quotation mark that is text
            cells[first] = '"' + sentence(self.rng) if kind == "stray" else "ung\udcfcltig"
            row.captions = (cells[first],) if kind == "stray" else ()
            return self.plain(cells)
        if kind == "many" and self.captions == [self.names[-1]]:  # separators in the last column, unquoted
            cells[first] = f"{sentence(self.rng)}{self.separator}{sentence(self.rng)}"
            row.captions = (cells[first],)
            return self.plain(cells)
        row.image = ""
        truth.total += kind in ("few", "many", "no image")
        if kind == "no image":
            return self.plain(cells | {self.image: "", first: sentence(self.rng)})
        lines = {"few": "lonely words", "many": f"{self.plain(cells)}{self.separator}more{self.separator}cells"}
        lines |= {"comment": "# a comment", "header": self.plain({name: name for name in self.names})}
        return lines.get(kind, "")


def text_layout(rng: random.Random, truth: Truth) -> tuple[TextTable, bool]:
    """How a table is written, and whether it has a header."""
    separator, style = rng.choice(",,\t\t;|"), rng.choice(["minimal", "minimal", "all", "none", "backslash"])
    image, captions, has_header = "image", ["caption"], rng.random() > 0.2
    names = rng.choice([["image", "caption"], ["caption", "image"], ["id", "image", "caption"]])
    if has_header:
        image = rng.choice(["image", "File_Name", "filepath", "image_path"])
        captions = rng.choice([["caption"], ["Text"], ["title"], ["caption_0"], ["caption_1", "caption_2"]])
        if rng.random() < 0.15:
            image, captions = "picref", ["utterance"]
            truth.reading = DataConfig(image_column=image, caption_column=("utterance",), separator=separator)
        names = [image, *captions, *rng.sample(["width", "id", "note"], rng.randint(0, 2))]
        rng.shuffle(names)
        captions.sort(key=names.index)
    line_end = rng.choice(["\n", "\n", "\r\n", "\r"])
    return TextTable(rng, separator, style, line_end, names, image, captions, rng.random() < 0.7), has_header


def text_table(rng: random.Random, root: Path) -> Truth:
    """A table as text, with any separator, quoting, encoding and line end, with a header or without."""
    truth = Truth("")
    table, has_header = text_layout(rng, truth)
    separator, style, end = table.separator, table.style, table.line_end
    multiple = has_header and style in ("minimal", "all")
    rows = make_rows(rng, root, lambda: random_text(rng, separator, style, end), multiple)
    if style != "backslash":
        vary_paths(rng, root, rows)
    lines = [separator.join(quoted(name, separator, style) for name in table.names)]
    if not has_header:  # the first line shows that there is none
        lines, rows[0].captions = [], (sentence(rng),)
    if has_header and rng.random() < 0.1:
        lines.insert(0, f"sep={separator}")
    for number, row in enumerate(rows):
        alone = [each.image for each in rows].count(row.image) == 1
        is_damaged = has_header and number and alone and rng.random() < 0.15
        lines.append(table.damaged(row, truth) if is_damaged else table.line(row))
    add_rows(truth, [row for row in rows if row.image])
    if has_header and rng.random() < 0.1 and table.names[-1] not in table.captions:
        lines = [line if line.startswith("sep=") else line + separator for line in lines]  # an empty column at the end
    path = root / ("table." + rng.choice(["csv", "tsv", "txt", "tab", "CSV", "dat", "psv"]))
    encoding = rng.choice(["utf-8", "utf-8-sig"] if table.utf8 else ["utf-16", "utf-16-le", "utf-16-be"])
    content = (end.join(lines) + rng.choice(["", end])).encode(encoding, "surrogateescape" if table.utf8 else "strict")
    if rng.random() < 0.1:
        path, content = path.with_name(f"{path.name}.gz"), gzip.compress(content)
    put(path, content)
    truth.spec = str(path)
    return truth


def vary_paths(rng: random.Random, root: Path, rows: list[Row]) -> None:
    """Writes the paths of some images in another way: absolute, from this folder, or as on Windows."""
    for image in {row.image: None for row in rows}:
        new = rng.choice([image] * 7 + [f"./{image}", str(root / image), image.replace("/", "\\")])
        for row in rows:
            row.image = new if row.image == image else row.image


def json_value(rng: random.Random, captions: tuple[str, ...]) -> Any:
    if not captions:
        return rng.choice([None, "", " ", []])
    if len(captions) > 1:
        return rng.choice([list(captions), [{"caption": each} for each in captions], json.dumps(captions)])
    return rng.choice([captions[0], [captions[0]], {"text": captions[0], "score": 0.5}])


def json_table(rng: random.Random, root: Path) -> Truth:
    """A table as JSON: lines, a list, rows under a key, or captions by image; with lines that are broken."""
    truth = Truth("")
    rows = make_rows(rng, root, lambda: random_text(rng, ",", "all", "\n"))
    image, caption = (
        rng.choice(["image", "file_name", "filepath"]),
        rng.choice(["caption", "captions", "text", "sentences"]),
    )
    layout = rng.choice(
        ["lines", "lines", "list", "rows", "by image", "broken", "columns", "by number", "by split", "pairs"]
    )
    if layout == "by image":
        rows = list({row.image: row for row in rows}.values())
        content: Any = json.dumps({row.image: json_value(rng, row.captions) or "" for row in rows})
    else:
        objects = [{image: row.image, caption: json_value(rng, row.captions), "id": 3} for row in rows]
        texts = [json.dumps(each, ensure_ascii=rng.random() < 0.5) for each in objects]
        if layout == "columns":  # as pandas writes them
            content = json.dumps(
                {name: {str(i): each[name] for i, each in enumerate(objects)} for name in (image, caption, "id")}
            )
        elif layout == "by split":
            half = len(objects) // 2
            content = json.dumps({"train": objects[:half], rng.choice(["val", "test"]): objects[half:]})
        elif layout == "pairs":
            content = json.dumps([[row.image, list(row.captions)] for row in rows])
        elif layout == "by number":
            content = json.dumps({str(i): each for i, each in enumerate(objects)}, indent=2)
        elif layout == "lines":
            for _ in range(rng.choice([0, 0, 1])):
                texts.insert(rng.randrange(1, len(texts) + 1), rng.choice([texts[-1][:-3], "3", '["a"]', "nonsense"]))
                truth.total += 1
            content = "\n".join(texts) + "\n" * rng.randint(0, 2)
        else:
            content = (
                "[" + ", ".join(texts) + "]" if layout != "rows" else f'{{"info": 1, "data": [{", ".join(texts)}]}}'
            )
    add_rows(truth, rows)
    if layout == "broken":
        content, truth.refused = content[:-5], True
    path = root / f"table.{rng.choice(['jsonl', 'ndjson', 'JSONL']) if layout == 'lines' else 'json'}"
    put(path, content.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]) if layout == "lines" else "utf-8"))
    truth.spec = str(path)
    return truth


def folder_tables(rng: random.Random, root: Path) -> Truth:
    """Folders with a metadata table each, as Hugging Face's imagefolder; with images that are in no table."""
    truth = Truth(str(root))
    for folder in rng.choice(
        [[""], ["train", "test"], ["train", "dev", "test"], ["a", "b/c"], ["x/train", "x/validation"]]
    ):
        kind = rng.choice(["csv", "tsv", "jsonl", "json", "CSV"])
        separator = "\t" if kind == "tsv" else ","
        rows = make_rows(rng, root / folder, partial(random_text, rng, separator, "minimal", "\n"))
        unnamed = [f"unnamed {number}.png" for number in range(rng.choice([0, 0, 1, 2]))]
        for name in unnamed:
            put(root / folder / name, encoded("PNG", 1))
        truth.total += len(unnamed)
        name = rng.choice(["file_name", "image"])
        if kind in ("jsonl", "json"):
            texts = [json.dumps({name: row.image, "text": json_value(rng, row.captions)}) for row in rows]
            content = "\n".join(texts) if kind == "jsonl" else f"[{', '.join(texts)}]"
        else:
            table = TextTable(rng, separator, "minimal", "\n", [name, "text"], name, ["text"], True)
            content = "\n".join([f"{name}{separator}text", *map(table.line, rows)])
        put(root / folder / f"{rng.choice(['metadata', 'captions'])}.{kind}", content.encode())
        add_rows(truth, rows, f"{folder}/" if folder else "")
    clutter(rng, root, truth)
    return truth


def coco(rng: random.Random, root: Path) -> Truth:
    """COCO captions, or Karpathy's JSON, beside the images or above them."""
    truth = Truth("")
    folder = root / rng.choice(["", "images", "images/train2017"])
    rows = list({row.image: row for row in make_rows(rng, folder, lambda: sentence(rng))}.values())
    add_rows(truth, rows)
    if rng.random() < 0.4:
        images = [{"filename": row.image, "split": rng.choice(["train", "val", "test", "restval"]),
                   "sentences": [{"raw": each, "tokens": each.split()} for each in row.captions]} for row in rows]  # fmt: skip
        content: dict[str, Any] = {"images": images, "dataset": "x"}
    else:
        annotations = [
            {"id": 1, "image_id": number, "caption": each} for number, row in enumerate(rows) for each in row.captions
        ]
        for _ in range(rng.choice([0, 0, 1, 2])):
            annotations.append({"id": 2, "image_id": 999, "caption": sentence(rng)})
            truth.total += 1
        if rng.random() < 0.2:
            annotations.append({"id": 3, "image_id": 0, "caption": None})
        truth.refused = not any(row.captions for row in rows)
        content = {"images": [{"id": number, "file_name": row.image} for number, row in enumerate(rows)]}
        content["annotations"] = annotations
    path = root / rng.choice(["captions.json", "annotations/captions.json", "dataset.JSON"])
    put(path, json.dumps(content).encode())
    truth.spec = str(path)
    return truth


# ---------------------------------------------------------------- Parquet, Hugging Face


def cell_of_image(content: bytes | None, kind: str) -> Any:
    return content if kind == "bytes" or content is None else {"bytes": content, "path": "a.png"}


def parquet(rng: random.Random, root: Path) -> Truth:
    """Parquet files with paths, with bytes, or with structs of bytes and path; truncated ones are refused."""
    import pyarrow
    import pyarrow.parquet

    truth = Truth("")
    kind = rng.choice(["path", "bytes", "struct"])
    rows = make_rows(
        rng, root if kind == "path" else root.parent / "embedded", lambda: random_text(rng, ",", "all", "\n")
    )
    values = [list(row.captions) or None for row in rows]
    if all(len(row.captions) < 2 for row in rows):
        values = [row.captions[0] if row.captions else rng.choice([None, ""]) for row in rows]
    names = ["table.parquet"] if kind == "path" else ["table.parquet", "data/train-0.parquet", ""]
    name = rng.choice(names)  # "": a folder of two files
    files = [root / name] if name else [root / "data/train-0.parquet", root / "data/val-0.parquet"]
    half = -(-len(rows) // len(files))
    images: list[Any] = [row.image for row in rows]
    if kind == "path":
        add_rows(truth, rows)
    else:
        images = []
        for number, row in enumerate(rows):
            content = encoded("PNG", number) if row.usable else rng.choice([None, b"", encoded("PNG", 0)[:30]])
            images.append(cell_of_image(content, kind))
            cleaned = tuple(" ".join(each.split()) for each in row.captions)
            path = files[number // half]
            shown = path.name if name else path.relative_to(root).as_posix()
            truth.add(f"{shown} row {number % half}", cleaned, row.usable)
    table = pyarrow.table({"image" if kind != "bytes" else "jpg": images, "caption": values, "width": [4] * len(rows)})
    for number, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table.slice(number * half, half), path, row_group_size=3)
    if rng.random() < 0.15:
        files[-1].write_bytes(files[-1].read_bytes()[:-20])
        truth.refused = True
    truth.spec = str(files[0] if name else root)
    return truth


def saved_dataset(rng: random.Random, root: Path) -> Truth:
    """A dataset of Hugging Face's library, saved to disk, with splits or without."""
    import datasets

    truth = Truth(str(root / "saved"))
    parts = {}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for split in rng.choice([["train"], ["train", "validation"]]):
        rows = []
        for number in range(rng.randint(3, 8)):
            caption = rng.choice([sentence(rng)] * 5 + ["", None])
            content = rng.choice([encoded("PNG", number), encoded("JPEG", number)] * 3 + [None, encoded("PNG", 0)[:30]])
            rows.append({"image": cell_of_image(content, "struct"), "caption": caption})
            usable = content is not None and len(content) > 30
            truth.add(f"{split}/{number}", (caption,) if caption else (), usable)
        parts[split] = datasets.Dataset.from_list(rows, features=features)
    data = datasets.DatasetDict(parts) if len(parts) > 1 else parts["train"]
    data.save_to_disk(root / "saved")
    return truth
