"""The data commands: make, check and curate data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from coalign.data import curate, openclipart, paraphrase, scenes
from coalign.data.check import check, gallery_images
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits
from coalign.data.tokenizer import load_tokenizer, train_bpe
from coalign.errors import BadSample, UserError
from coalign.report.check_page import check_page
from coalign.types import Source


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing otherwise."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def write_scenes(out: Path, size: int, train: int, seed: int, swap: float) -> None:
    console = _console()
    with _progress(console, "drawing") as progress:
        counts = scenes.write_scenes(out, f"{train},seed={seed},size={size},swap={swap}", progress=progress)
    console.print(f"{out}: {_counted(counts)} pictures with captions, tags and ground truth")


def prepare_openclipart(out: Path, download: bool, installed: Path | None, max_side: int) -> None:
    console = _console()
    with _progress(console, "reading") as progress:
        summary = openclipart.prepare_openclipart(out, installed, download, max_side, progress)
    console.print(f"{out}: {summary.samples:,} pairs from {summary.pngs:,} pictures")
    if summary.skipped:
        console.print(f"left out, and listed in {out / 'skipped.jsonl'}: {_counted(dict(summary.skipped))}")


def check_data(data: str, report: Path | None, limit: int | None) -> None:
    console = _console()
    source = open_source(data)
    with _progress(console, "checking") as progress:
        result = check(source, progress, limit, load_tokenizer("clip"))
    page = check_page(asdict(result), gallery_images(source, result))
    console.print(f"{source.name}: {result.usable:,} of {result.checked:,} samples checked can be used")
    for broken in result.broken:
        console.print(f"cannot be used: {broken.count:,} ({broken.reason})")
    if report:
        page.write(report)
        console.print(f"Report: {report}")


def curate_data(data: str, out: Path, min_side: int, drop_chinese: bool) -> None:
    console = _console()
    source = open_source(data)
    rules = replace(curate.DECLIP_YFCC, min_side=min_side, no_chinese=drop_chinese)
    report = curate.curate(source, rules)
    curate.write_curated(source, report, out)
    console.print(f"{out}: kept {len(report.kept):,} of {len(source):,} samples")
    console.print(
        f"dropped, and listed in {out / 'dropped.jsonl'}: {_counted({rule: samples for rule, (samples, _) in report.counts().items()})}"
    )


def write_queries(data: str, out: Path) -> None:
    source = open_source(data)
    tags, unread = curate.tag_counts(source)
    if not tags:
        tags.update(
            noun for caption in captions(source, np.arange(len(source))) for noun in curate.caption_nouns(caption)
        )
    queries = curate.build_queries(tags)
    curate.write_queries(queries, out)
    console = _console()
    console.print(f"{out}: {len(queries):,} queries from {len(tags):,} tags or nouns")
    if unread:
        console.print(f"left out: {_counted(dict(unread))}")


def write_paraphrases(data: str, out: Path, pivots: Sequence[str], marian: Sequence[str], device: str) -> None:
    if not pivots and not marian:
        raise UserError(
            "There is no translator; give --apertium spa, or --marian with two models, such as Helsinki-NLP/opus-mt-en-de "
            "Helsinki-NLP/opus-mt-de-en."
        )
    if len(marian) % 2:
        raise UserError(f"--marian takes pairs of models, there and back, and was given {len(marian)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name a new one.")  # before the work
    translators = [(paraphrase.apertium(f"eng-{pivot}"), paraphrase.apertium(f"{pivot}-eng")) for pivot in pivots]
    translators += [
        (paraphrase.marian(there, device), paraphrase.marian(back, device))
        for there, back in zip(marian[::2], marian[1::2])
    ]
    source = open_source(data)
    found = paraphrase.paraphrase(captions(source, np.arange(len(source))), translators)
    _, unread = paraphrase.write_paraphrased(source, found, out)
    console = _console()
    kept = sum(map(len, found.of_caption.values()))
    console.print(f"{out}: {kept:,} paraphrases of {len(found.of_caption):,} different captions")
    if found.left_out:
        console.print(f"left out: {_counted(dict(found.left_out.most_common()))}")
    if unread:
        console.print(f"samples left out: {_counted(dict(unread))}")


def train_tokenizer(data: str, out: Path, vocab_size: int) -> None:
    source = open_source(data)
    indices = assign_splits(source)[0]["train"]
    bad: Counter[str] = Counter()
    tokenizer = train_bpe(captions(source, indices, bad), vocab_size)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise UserError(f"The tokenizer could not be written to {out}: {error.strerror}.") from error
    console = _console()
    console.print(f"{out}: {tokenizer.vocab_size:,} entries from {len(indices):,} samples")
    if bad:
        console.print(f"left out: {_counted(dict(bad))}")


def captions(source: Source, indices: np.ndarray, bad: Counter[str] | None = None) -> Iterator[str]:
    """Every caption of these samples; what cannot be read is counted in `bad`."""
    for index in indices.tolist():
        try:
            yield from source.record(index).captions
        except BadSample as error:
            if bad is not None:
                bad[error.reason] += 1
