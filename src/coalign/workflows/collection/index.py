"""build_index(): embeds the images of a dataset and indexes them for search, or brings an index up to date."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from coalign.config import DETECT, DataConfig
from coalign.errors import UserError
from coalign.evaluation.embed import embed_texts
from coalign.formatting import percent
from coalign.training.checkpoint import RunLock
from coalign.types import DualEncoder
from coalign.workflows.collection import nearest
from coalign.workflows.collection.embed import Embedded, embed
from coalign.workflows.collection.embedding_files import DamagedFile, EmbeddingFiles, is_readable
from coalign.workflows.collection.index_files import (
    EMBEDDINGS,
    FAISS,
    IndexInfo,
    check_folder,
    damaged,
    is_index,
    open_embeddings,
    read_faiss,
    read_info,
    remove_other_versions,
    start_version,
    write_faiss,
    write_info,
)
from coalign.workflows.collection.query import one_vector
from coalign.workflows.evaluate.eval_model import device_for, open_eval_model


@dataclass(frozen=True)
class Changes:
    """Samples that were embedded because they are new or changed, that are gone, and that are as they were in the index before."""

    new: int
    changed: int
    deleted: int
    kept: int


@dataclass(frozen=True)
class Indexed:
    """An index and what was done to build it."""

    path: Path
    info: IndexInfo
    changes: Changes
    skipped: dict[str, int]  # samples that cannot be used, or only in part, by reason
    account: tuple[str, ...] = ()  # what opening the data left out, in sentences

    def lines(self) -> list[str]:
        """Returns what the command line prints."""
        info = self.info
        kind = "exact search"
        if info.recall is not None:
            kind = f"approximate search, recall@10 {percent(info.recall)} of exact search"
        return [
            f"Images: {', '.join(f'{count:,} {name}' for name, count in vars(self.changes).items())}",
            *(f"Skipped: {count:,} ({reason})" for reason, count in self.skipped.items()),
            *self.account,
            f"{self.path}: {info.size:,} images, {info.dim} numbers each, {kind}",
        ]


def build_index(
    model: str | Path,
    data: str,
    out: str | Path,
    *,
    split: str = "all",
    device: str | None = None,
    workers: int | None = None,
    reading: DataConfig = DETECT,
    console: Console | None = None,
) -> Indexed:
    """Embeds the images of a dataset and writes an index of them. On an index, embeds only new and changed images.

    If it was interrupted, call it again to resume. An earlier index stays in use until the new one is complete.

    Args:
        model: A run, an exported folder, `open_clip:…` or `transformers:…`.
        data: As in `open_data`.
        out: The folder of the index: new, empty, or an index of the same model and data.
        split: train, val, test, … or all.
        device: Where to embed; None: the best there is.
        workers: Number of loader processes; None: one per CPU core, at most 8.
        reading: The columns of a table to read.
        console: Where the device is printed. None: nowhere.

    Raises:
        UserError: The model or the data cannot be opened, `out` is another index or cannot be written, or no image can be read.
    """
    nearest.require_faiss()
    folder = Path(out)
    check_folder(folder, data)
    device = device_for(model, device)
    opened = open_eval_model(model, device=device)
    one_vector_model = replace(opened, encoder=one_vector(opened.encoder))
    path = folder
    with RunLock(folder):
        before = read_info(folder) if is_index(folder) else None
        try:
            version = start_version(folder, before)
            path = folder / version / EMBEDDINGS
            embedded = embed(
                one_vector_model,
                data,
                path,
                split=split,
                texts=False,
                device=device,
                workers=workers,
                reading=reading,
                console=console,
            )
            if not embedded.manifest["counts"]["images"]:
                raise UserError(f"There is nothing to index: {data} has no readable image.")
            changes = _changes(folder, before, path)
            info = _unchanged(folder, before, embedded)
            if info is None:
                info = _write_faiss(folder, version, one_vector_model.encoder, split)
            info = replace(info, model=_reference(model), data=_reference(data), reading=reading)
            if info != before:
                write_info(folder, info)
        except OSError as error:
            raise UserError(
                f"The index could not be written to {folder} ({error.strerror or error}); what is complete is kept: free some space and "
                "run the command again to resume."
            ) from error
        except DamagedFile as error:
            raise damaged(folder, error) from error
        except UserError as error:  # of the embeddings, such as that they are of another model
            raise UserError(str(error).replace(f"{path} ", f"{folder} ")) from error
        remove_other_versions(folder, info.current)
    skipped = {reason: entry["count"] for reason, entry in embedded.manifest["skipped"].items()}
    return Indexed(folder, info, changes, skipped, embedded.account)


def _reference(name: str | Path) -> str:
    """Returns a path as it is found from anywhere; other names as they are."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else str(name)


def _unchanged(folder: Path, before: IndexInfo | None, embedded: Embedded) -> IndexInfo | None:
    """Returns the index before, if it is of the same embeddings and can be read."""
    if before is None or before.state != embedded.manifest["state"]:
        return None
    try:
        read_faiss(folder, before)
        parts = open_embeddings(folder, before).files
    except UserError:
        return None
    return before if all(map(is_readable, parts)) else None


def _write_faiss(folder: Path, version: str, encoder: DualEncoder, split: str) -> IndexInfo:
    """Writes the faiss index of a version. Returns what it is, without its origin."""
    files = EmbeddingFiles.open(folder / version / EMBEDDINGS)
    vectors, _ = files.images()
    queries = np.empty((0, files.dim), np.float32)
    if len(vectors) >= nearest.EXACT_BELOW:
        queries = _queries(files, vectors, encoder)
    built = nearest.build(vectors, queries)
    path = folder / version / FAISS
    write_faiss(built.index, path)
    counts, state = files.manifest["counts"], files.manifest["state"]
    size, bad = len(vectors), counts["samples"] - len(vectors)
    return IndexInfo(
        "", "", split, DETECT, built.kind, built.recall, size, files.dim, bad, state, version, path.stat().st_size
    )


def _queries(files: EmbeddingFiles, vectors: np.ndarray, encoder: DualEncoder) -> np.ndarray:
    """Returns the queries to measure the recall on: captions and images of the collection, half each, or images alone.

    Captions are embedded far from images, so that their neighbors are in more lists.
    """
    rng = np.random.default_rng(0)
    captions: list[str] = []
    for batch in files.batches(["captions"]):
        captions += [each[0] for each in batch["captions"].to_pylist() if each]
    texts = sorted(rng.choice(captions, nearest.NUM_QUERIES // 2).tolist()) if captions else []
    rows = rng.choice(len(vectors), nearest.NUM_QUERIES - len(texts))
    return np.concatenate([vectors[rows], *([embed_texts(encoder, texts).numpy()] if texts else [])])


def _changes(folder: Path, before: IndexInfo | None, path: Path) -> Changes:
    """Compares embeddings with those of the index before, also if an interrupted call wrote a part of them."""
    now = _stamps(path)
    try:
        old = _stamps(folder / before.current / EMBEDDINGS) if before else {}
    except UserError:  # they are damaged
        old = {}
    kept = sum(old.get(key) == stamp for key, stamp in now.items())
    both = len(now.keys() & old.keys())
    return Changes(len(now) - both, both - kept, len(old) - both, kept)


def _stamps(path: Path) -> dict[tuple[str, int], str]:
    """Returns the stamp of each sample, by key and its number among samples with that key."""
    seen: Counter[str] = Counter()
    stamps = {}
    for batch in EmbeddingFiles.open(path).batches(["key", "stamp"]):
        for key, stamp in zip(batch["key"].to_pylist(), batch["stamp"].to_pylist()):
            stamps[key, seen[key]] = stamp
            seen[key] += 1
    return stamps
