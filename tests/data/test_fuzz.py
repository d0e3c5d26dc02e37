"""Random small datasets of every kind with random damage: each is accounted for, and each caption is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.random_data import BUILDERS, make
from helpers.random_images import FORMATS, UNOPENABLE, Truth

from coalign.data.images.decode import open_image
from coalign.data.prepare.check import check
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_source
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError

NEEDS = {"parquet": "pyarrow", "saved dataset": "datasets"}


def used(source: Source) -> dict[str, tuple[str, ...]]:
    """The captions of each sample that can be used, by key."""
    found = {}
    for index in range(len(source)):
        try:
            record = source.record(index)
            captions = require_captions(record)
            open_image(source.image(index)).decode()
        except BadSample:
            continue
        assert record.key not in found, f"two samples have the key {record.key}"
        found[record.key] = captions
    return found


def opened(truth: Truth) -> Source | None:
    """The source; None if it is refused, and may be."""
    try:
        source = open_source(truth.spec, reading=truth.reading)
    except UserError as error:
        if "\n" in str(error) or not (truth.refused or not truth.captions):
            raise AssertionError(f"refused: {error}") from None
        return None
    assert not truth.refused, "not refused"
    return source


def compare(truth: Truth) -> None:
    source = opened(truth)
    if source is None:
        return
    assert used(source) == truth.captions
    result = check(source)
    lost = sum(result.left_out.values()) + sum(each.count for each in result.broken)
    account = f"{result.usable} used, {result.left_out}, {[(each.reason, each.count) for each in result.broken]}"
    assert result.usable == len(truth.captions), account
    assert result.usable + lost == truth.total, f"{account}; there are {truth.total}"


def layout(root: Path) -> str:
    """The files of a dataset, with the content of those that are text."""
    lines = []
    for path in sorted(root.rglob("*")):
        line = f"  {path.relative_to(root)}"
        if path.is_symlink():
            line += f" -> {path.readlink()}"
        elif path.is_file() and path.suffix[1:] not in (
            *FORMATS,
            *UNOPENABLE,
            "tar",
            "coalign-index",
            "parquet",
            "arrow",
        ):
            content = path.read_bytes()
            utf16 = b"\0" in content
            line += f": {content.decode('utf-16-le' if utf16 else 'utf-8', 'replace')!r}{' in UTF-16' if utf16 else ''}"
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # of TIFF files, by Pillow
@pytest.mark.parametrize("kind", BUILDERS)
def test_random_datasets(kind: str, tmp_path: Path) -> None:
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    failures, num_used, num_lost = [], 0, 0
    for seed in range(BUILDERS[kind][1]):
        root = tmp_path / str(seed)
        truth = make(kind, seed, root)
        num_used += len(truth.captions)
        num_lost += truth.total - len(truth.captions)
        try:
            compare(truth)
        except Exception as error:
            failures.append(f"make({kind!r}, {seed}, folder): {type(error).__name__}: {error}\n{layout(root)}")
    if failures:
        pytest.fail(
            f"{len(failures)} of {BUILDERS[kind][1]} datasets; the first:\n" + "\n\n".join(failures[:3]), pytrace=False
        )
    assert min(num_used, 2 * num_lost) > BUILDERS[kind][1]  # both happen
