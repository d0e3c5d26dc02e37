"""`open_table` opens a table of images and captions: CSV and its kin, JSON, JSON lines, and Parquet."""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import Source
from coalign.data.sources.tables.csv_table import read_csv
from coalign.data.sources.tables.files import table_kind
from coalign.data.sources.tables.json_table import read_json
from coalign.data.sources.tables.parquet_table import open_parquet
from coalign.data.sources.tables.table_source import TableSource
from coalign.data.text.captions import printable
from coalign.errors import UserError
from coalign.progress import track

TEXT_TABLES = frozenset({".csv", ".tsv", ".tab", ".psv", ".txt", ".dat", ".token"})
JSON_TABLES = frozenset({".json", ".jsonl", ".ndjson"})
TABLE_TYPES = TEXT_TABLES | JSON_TABLES | {".parquet"}


def open_table(path: Path, reading: DataConfig = DETECT) -> Source:
    """Opens the table at `path`, in the format of its extension. Unset columns are detected by name, ignoring case.

    Raises UserError if the file cannot be read, a column is missing, or there are no rows.
    """
    kind = table_kind(path)
    if kind == ".parquet":
        return open_parquet(path, reading)
    try:
        columns, rows = read_json(path, reading) if kind in JSON_TABLES else read_csv(path, reading)
        name = printable(str(path))
        return TableSource(name, path.parent, track(rows, f"Reading {name}", unit="rows"), columns)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
