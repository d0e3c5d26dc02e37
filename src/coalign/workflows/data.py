"""The data commands: create, check and curate datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from coalign.config import DataConfig
from coalign.data.account import account_lines, class_lines
from coalign.data.images.decode import open_image
from coalign.data.prepare import emoji, openclipart, paraphrase
from coalign.data.prepare.check import check, gallery_images
from coalign.data.prepare.check_result import CONTEXT_LENGTH, DataCheck
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
from coalign.data.sources.base import Source, Splits
from coalign.data.sources.labeled import label_by_captions
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits, column_labels
from coalign.data.text.captions import require_captions
from coalign.data.text.context import CutTexts
from coalign.data.text.tokenizer import load_tokenizer, train_bpe
from coalign.devices import best_device, device_line
from coalign.errors import BadSample, UserError
from coalign.files import write_json
from coalign.progress import track
from coalign.report.check_page import check_page
from coalign.runs.folder import check_output
from coalign.workflows.train.preflight import Preflight, problems


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def write_scenes(out: Path, level: str, size: int, train: int, seed: int, swap: float) -> None:
    console = _console()
    counts = scenes.write_scenes(out, f"{train}:{level},seed={seed},size={size},swap={swap}")
    console.print(f"{out}: {_format_counts(counts)} images with captions, tags and ground truth")


def prepare_openclipart(out: Path, download: bool, installed: Path | None, max_side: int) -> None:
    console = _console()
    summary = openclipart.prepare_openclipart(out, installed, download, max_side)
    console.print(f"{out}: {summary.samples:,} pairs from {summary.pngs:,} images")
    if summary.skipped:
        console.print(f"Skipped (see {out / 'skipped.jsonl'}): {_format_counts(summary.skipped)}")


def prepare_emoji(out: Path, vendors: Sequence[str], language: str, max_side: int) -> None:
    console = _console()
    summary = emoji.prepare_emoji(out, vendors, language, max_side)
    console.print(f"{out}: {sum(summary.used.values()):,} drawings of {summary.emoji:,} emoji")
    console.print(f"Vendors: {_format_counts(summary.used)}. Results on other vendors are not comparable.")
    for sentence in summary.missing:
        console.print(f"Not used: {sentence}")
    for table, counts in summary.tables.items():
        console.print(f"{out / table}: {_format_counts(counts)}")
    console.print(f"Skipped (see {out / 'skipped.jsonl'}): {_format_counts(summary.skipped)}")
    console.print(f"Sources and licenses: {out / 'README.md'}")


def check_data(
    data: str, report: Path | None, limit: int | None, json_file: Path | None, samples: int, reading: DataConfig
) -> None:
    console = _console()
    source = open_source(data, reading=reading)
    for path in filter(None, (report, json_file)):
        check_output(path)
    if reading.group_column and (limit is None or json_file):
        column_labels(source, "--group-column", reading.group_column)  # raises an error before all images are read
    result = check(source, limit, load_tokenizer("clip"))
    console.print(f"{source.name}: {result.usable:,} of {result.checked:,} checked samples are usable")
    for broken in result.broken:
        console.print(f"Bad samples: {broken.count:,} ({broken.reason}), such as {broken.examples[0][:200]}")
    for unusable in result.unusable_captions:
        console.print(
            f"Captions that are not used, beside others of their image: {unusable.count:,} ({unusable.reason}), such as of "
            f"{unusable.examples[0][:200]}"
        )
    if line := _cut(result).line():
        console.print(line)
    splits = None
    if limit is None or json_file:  # reads all images
        source = label_by_captions(source)  # as training does
        splits = assign_splits(source, group=reading.group_column)[0]
    lines, found = _before_training(source, splits if limit is None else None)
    for line in [*lines, *(f"Warning: {problem}" for problem in found)]:
        console.print(line)
    result.warnings = [*found, *result.warnings]
    for line in [*_leak_lines(source, result), *_group_lines(source, reading)]:
        console.print(line)
    if json_file and splits is not None:
        write_json(json_file, _account(source, result, samples, splits))
        console.print(f"Account: {json_file}")
    if report:
        check_page(asdict(result), gallery_images(source, result)).write(report)
        console.print(f"Report: {report}")


def _before_training(source: Source, splits: Splits | None) -> tuple[list[str], list[str]]:
    """Returns what `coalign train` prints about the data, and the problems that stop it. splits: None if they are not known."""
    if splits is None:
        return account_lines(source), problems(Preflight(source, np.arange(len(source)), None))
    train, val = splits.get("train", np.arange(len(source))), splits.get("val", np.empty(0, np.int64))
    found = problems(Preflight(source, train, len(val)))
    return [*account_lines(source), *([] if found else class_lines(source, train, val))], found


def _leak_lines(source: Source, result: DataCheck) -> Iterator[str]:
    for split, leak in sorted(result.leaks.items()):
        line = f"Images in {split} that are in train too, or look like one: {leak.count:,} of {leak.samples:,}"
        examples = [
            f"{source.record(held_out).key} like {source.record(in_train).key}"
            for held_out, in_train in leak.examples[:3]
        ]
        more = ", …" if leak.count > len(examples) else ""
        yield line + (f" ({', '.join(examples)}{more})" if examples else "")


def _group_lines(source: Source, reading: DataConfig) -> Iterator[str]:
    """Yields how many samples of each given split belong to a group of train."""
    splits, column = source.splits or {}, reading.group_column
    if column is None or "train" not in splits:
        return
    groups = column_labels(source, "--group-column", column)
    in_train = np.unique(groups[splits["train"]])
    for split in sorted(splits.keys() - {"train"}):
        found = groups[splits[split]]
        count = np.count_nonzero((found >= 0) & np.isin(found, in_train))
        yield f"Samples in {split} whose {column} is in train too: {count:,} of {len(found):,}"


def _cut(result: DataCheck) -> CutTexts:
    longest = int(result.tokens.largest) if result.tokens else 0
    return CutTexts(result.cut, result.captions, longest, CONTEXT_LENGTH)


def _account(source: Source, result: DataCheck, num_samples: int, splits: Splits) -> dict[str, Any]:
    """Returns what is used and left out, by reason, what leaks from train, and the first samples as they are read."""
    left_out = Counter(result.left_out)
    for broken in result.broken:
        left_out[broken.reason] += broken.count
    names = np.full(len(source), "", dtype=object)
    for split, indices in splits.items():
        names[indices] = split
    samples: list[dict[str, Any]] = []
    for index in range(len(source)):
        if len(samples) == num_samples:
            break
        try:
            record = source.record(index)
            captions = require_captions(record)
            open_image(source.image(index)).decode()
        except BadSample:
            continue
        samples.append(
            {"key": record.key, "captions": list(captions), "tags": list(record.tags), "split": str(names[index])}
        )
    leaks = {split: leak.count for split, leak in result.leaks.items()}
    return {
        "used": result.usable,
        "left_out": dict(left_out),
        "unread": result.unread,
        "leaks": leaks,
        "samples": samples,
    }


def curate_data(data: str, out: Path, min_side: int, drop_chinese: bool, reading: DataConfig) -> None:
    console = _console()
    source = open_source(data, reading=reading)
    rules = replace(DECLIP_YFCC, min_side=min_side, no_chinese=drop_chinese)
    report = curate(source, rules)
    write_curated(source, report, out)
    console.print(f"{out}: kept {len(report.kept):,} of {len(source):,} samples")
    dropped = {rule: samples for rule, (samples, _) in report.counts().items()}
    console.print(f"Dropped (see {out / 'dropped.jsonl'}): {_format_counts(dropped)}")


def build_query_list(data: str, out: Path, reading: DataConfig) -> None:
    source = open_source(data, reading=reading)
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


def write_paraphrases(
    data: str, out: Path, pivots: Sequence[str], marian: Sequence[str], device: str | None, reading: DataConfig
) -> None:
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
    device = best_device(device)
    if marian:
        _console().print(device_line(device))
    translators += [
        (paraphrase.marian(to_pivot, device), paraphrase.marian(from_pivot, device))
        for to_pivot, from_pivot in zip(marian[::2], marian[1::2])
    ]
    source = open_source(data, reading=reading)
    paraphrases = paraphrase.paraphrase(_captions(source, np.arange(len(source))), translators)
    _, skipped = paraphrase.write_paraphrased(source, paraphrases, out)
    console = _console()
    count = sum(map(len, paraphrases.by_caption.values()))
    console.print(f"{out}: {count:,} paraphrases of {len(paraphrases.by_caption):,} distinct captions")
    if paraphrases.rejected:
        console.print(f"Rejected paraphrases: {_format_counts(dict(paraphrases.rejected.most_common()))}")
    if skipped:
        console.print(f"Skipped samples: {_format_counts(skipped)}")


def train_tokenizer(data: str, out: Path, vocab_size: int, reading: DataConfig) -> None:
    source = open_source(data, reading=reading)
    indices = assign_splits(source, group=reading.group_column)[0]["train"]
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
    for index in track(indices.tolist(), "Reading captions"):
        try:
            yield from require_captions(source.record(index))
        except BadSample as error:
            if bad is not None:
                bad[error.reason] += 1
