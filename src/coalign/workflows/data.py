"""The data commands: create, check and curate datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from coalign.data.prepare import openclipart, paraphrase
from coalign.data.prepare.check import check, gallery_images
from coalign.data.prepare.curate import (
    DECLIP_YFCC,
    build_queries,
    caption_nouns,
    curate,
    tag_counts,
    write_curated,
    write_queries,
)
from coalign.data.scenes import source as scenes
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.data.text.captions import require_captions
from coalign.data.text.tokenizer import load_tokenizer, train_bpe
from coalign.errors import BadSample, UserError
from coalign.report.check_page import check_page


@contextmanager
def _progress(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar if the console is a terminal. Yields a callback(done, total)."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def write_scenes(out: Path, size: int, train: int, seed: int, swap: float) -> None:
    console = _console()
    with _progress(console, "Drawing") as progress:
        counts = scenes.write_scenes(out, f"{train},seed={seed},size={size},swap={swap}", progress=progress)
    console.print(f"{out}: {_format_counts(counts)} images with captions, tags and ground truth")


def prepare_openclipart(out: Path, download: bool, installed: Path | None, max_side: int) -> None:
    console = _console()
    with _progress(console, "Reading") as progress:
        summary = openclipart.prepare_openclipart(out, installed, download, max_side, progress)
    console.print(f"{out}: {summary.samples:,} pairs from {summary.pngs:,} images")
    if summary.skipped:
        console.print(f"Skipped (see {out / 'skipped.jsonl'}): {_format_counts(summary.skipped)}")


def check_data(data: str, report: Path | None, limit: int | None) -> None:
    console = _console()
    source = open_source(data)
    with _progress(console, "Checking") as progress:
        result = check(source, progress, limit, load_tokenizer("clip"))
    page = check_page(asdict(result), gallery_images(source, result))
    console.print(f"{source.name}: {result.usable:,} of {result.checked:,} checked samples are usable")
    for broken in result.broken:
        console.print(f"Bad samples: {broken.count:,} ({broken.reason})")
    if report:
        page.write(report)
        console.print(f"Report: {report}")


def curate_data(data: str, out: Path, min_side: int, drop_chinese: bool) -> None:
    console = _console()
    source = open_source(data)
    rules = replace(DECLIP_YFCC, min_side=min_side, no_chinese=drop_chinese)
    report = curate(source, rules)
    write_curated(source, report, out)
    console.print(f"{out}: kept {len(report.kept):,} of {len(source):,} samples")
    dropped = {rule: samples for rule, (samples, _) in report.counts().items()}
    console.print(f"Dropped (see {out / 'dropped.jsonl'}): {_format_counts(dropped)}")


def build_query_list(data: str, out: Path) -> None:
    source = open_source(data)
    tags, skipped = tag_counts(source)
    if not tags:
        captions = _captions(source, np.arange(len(source)))
        tags.update(noun for caption in captions for noun in caption_nouns(caption))
    queries = build_queries(tags)
    write_queries(queries, out)
    console = _console()
    console.print(f"{out}: {len(queries):,} queries from {len(tags):,} tags or nouns")
    if skipped:
        console.print(f"Skipped samples: {_format_counts(skipped)}")


def write_paraphrases(data: str, out: Path, pivots: Sequence[str], marian: Sequence[str], device: str) -> None:
    if not pivots and not marian:
        raise UserError(
            "No translator is given; use --apertium spa, or --marian with a pair of models, such as "
            "Helsinki-NLP/opus-mt-en-de Helsinki-NLP/opus-mt-de-en."
        )
    if len(marian) % 2:
        raise UserError(f"--marian requires pairs of models, from English and back, but {len(marian)} are given.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another folder or empty it.")
    translators = [(paraphrase.apertium(f"eng-{pivot}"), paraphrase.apertium(f"{pivot}-eng")) for pivot in pivots]
    translators += [
        (paraphrase.marian(to_pivot, device), paraphrase.marian(from_pivot, device))
        for to_pivot, from_pivot in zip(marian[::2], marian[1::2])
    ]
    source = open_source(data)
    paraphrases = paraphrase.paraphrase(_captions(source, np.arange(len(source))), translators)
    _, skipped = paraphrase.write_paraphrased(source, paraphrases, out)
    console = _console()
    count = sum(map(len, paraphrases.by_caption.values()))
    console.print(f"{out}: {count:,} paraphrases of {len(paraphrases.by_caption):,} distinct captions")
    if paraphrases.rejected:
        console.print(f"Rejected paraphrases: {_format_counts(dict(paraphrases.rejected.most_common()))}")
    if skipped:
        console.print(f"Skipped samples: {_format_counts(skipped)}")


def train_tokenizer(data: str, out: Path, vocab_size: int) -> None:
    source = open_source(data)
    indices = assign_splits(source)[0]["train"]
    bad: Counter[str] = Counter()
    tokenizer = train_bpe(_captions(source, indices, bad), vocab_size)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise UserError(f"The tokenizer could not be written to {out}: {error.strerror}.") from error
    console = _console()
    console.print(f"{out}: {tokenizer.vocab_size:,} tokens from {len(indices):,} samples")
    if bad:
        console.print(f"Skipped samples: {_format_counts(bad)}")


def _captions(source: Source, indices: np.ndarray, bad: Counter[str] | None = None) -> Iterator[str]:
    """Yields all captions of the samples. Unreadable samples and those without a caption are counted in `bad` by reason."""
    for index in indices.tolist():
        try:
            yield from require_captions(source.record(index))
        except BadSample as error:
            if bad is not None:
                bad[error.reason] += 1
