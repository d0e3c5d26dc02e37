"""Packs the finished trials of a table, without weights, so that a later `coalign reproduce` continues from them on any machine.

    python scripts/pack_trials.py runs/headline results/trials/headline-emoji-concepts.tar.xz
    mkdir -p runs/headline && tar -xf results/trials/headline-emoji-concepts.tar.xz -C runs/headline

The archive has the scores of the search's trials, and of every finished run its settings, results, validations and the outcome of every
evaluated item, from which all intervals and claims of the table follow. Paths of this machine are reduced to their last name.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coalign.experiments.tables.search import FOLDER
from coalign.files import read_rows, write_atomically
from coalign.runs.folder import CONFIG, HELD_OUT, RESULTS, public


def contents(table: Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of each file to pack, in a fixed order."""
    for path in sorted((table / FOLDER).glob("*.json")):
        yield f"{FOLDER}/{path.name}", path.read_bytes()
    for results in sorted(table.glob(f"*-seed*/{RESULTS}")):
        run = results.parent
        for name in (CONFIG, RESULTS):
            yield f"{run.name}/{name}", _json(public(json.loads((run / name).read_text())))
        yield f"{run.name}/metrics.jsonl", b"".join(_json(row) + b"\n" for row in _validations(run / "metrics.jsonl"))
        yield f"{run.name}/{HELD_OUT}", _without_compression(run / HELD_OUT)


def _validations(log: Path) -> list[dict[str, Any]]:
    """The rows of the log of the steps that were validated."""
    rows = read_rows(log)
    steps = {row["step"] for row in rows if any(key.startswith("val/") for key in row)}
    return [row for row in rows if row["step"] in steps]


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _without_compression(path: Path) -> bytes:
    """The same arrays, whose repetition in all trials the archive compresses better."""
    buffer = io.BytesIO()
    with np.load(path, allow_pickle=False) as arrays:
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def pack(table: Path, archive: Path) -> int:
    """Replaces the archive, and returns the number of its files. Equal trials give equal archives."""
    files = list(contents(table))

    def write(temporary: Path) -> None:
        with (
            lzma.open(temporary, "wb", preset=9) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, data in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))

    write_atomically(archive, write)
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the folder of the table")
    parser.add_argument("archive", type=Path, help="the .tar.xz file to write")
    options = parser.parse_args()
    if next(contents(options.table), None) is None:
        raise SystemExit(f"{options.table} has no finished trials.")
    options.archive.parent.mkdir(parents=True, exist_ok=True)
    number = pack(options.table, options.archive)
    print(f"{options.archive}: {number} files, {options.archive.stat().st_size / 1024:,.0f} KB")


if __name__ == "__main__":
    main()
