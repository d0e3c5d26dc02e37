"""Checks a dataset before training: one pass over a source that counts broken samples, sizes, captions, duplicates and tags."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from coalign.cores import num_cores
from coalign.data.account import left_out
from coalign.data.images.decode import open_image
from coalign.data.loading.workers import fetch_all
from coalign.data.look_alikes import DECODED_SIDE, have_look_alike, look_alike_groups, look_hash, num_differing_bits
from coalign.data.prepare.check_result import (
    CONTEXT_LENGTH,
    Broken,
    DataCheck,
    Distribution,
    Duplicates,
    Example,
    Leak,
    warnings,
)
from coalign.data.prepare.curate import english_ratio, single_part_of_speech
from coalign.data.sources.base import Source, hash64
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample
from coalign.progress import progress

CHUNK_SIZE = 64  # samples per task
MIN_PARALLEL = 512  # samples; below, starting worker processes takes longer than the check
MAX_CAPTION_SHOWN = 300  # characters
MAX_ROWS = 50  # of each list in the result
LEAKS_SHOWN = 6  # of each split


class CaptionTokenizer(Protocol):
    def encode(self, text: str, context_length: int) -> list[int]: ...


_IMAGES = np.dtype(
    [
        ("index", "i8"),
        ("width", "i4"),
        ("height", "i4"),
        ("hash", "u8"),
        ("look", "u8"),
        ("blank", "?"),
        ("captions", "i4"),
    ]
)
_CAPTIONS = np.dtype([("index", "i8"), ("hash", "u8"), ("words", "i4"), ("tokens", "i4"), ("english", "f4")])


@dataclass
class _ChunkStats:
    """Results for a chunk of samples. Arrays keep memory at about 50 bytes per sample."""

    images: np.ndarray
    captions: np.ndarray
    broken: list[tuple[str, str]]  # (reason, key and detail)
    formats: Counter[str]
    modes: Counter[str]
    tags: Counter[str]
    single_parts: Counter[str]
    tagged: int
    unusable: list[tuple[str, str]] = field(default_factory=list)  # (reason, key) of captions


def check(
    source: Source,
    limit: int | None = None,
    tokenizer: CaptionTokenizer | None = None,
    seed: int = 0,
) -> DataCheck:
    """Reads every sample of `source`, or `limit` random ones, and returns statistics and warnings.

    Token counts require a `tokenizer`. A bad sample, such as one without a caption, is counted by its reason and in no other statistic.
    Uses all CPU cores, and about 100 bytes of memory per sample.
    """
    generator = np.random.default_rng(seed)
    indices = np.arange(len(source))
    if limit is not None and limit < len(indices):
        indices = np.sort(generator.choice(indices, limit, replace=False))
    chunks = []
    workers = num_cores() if len(indices) >= MIN_PARALLEL else 0
    tasks = range(-(-len(indices) // CHUNK_SIZE))
    check_chunk = partial(_check_chunk, source, indices, tokenizer)
    with progress("Checking samples", len(indices)) as task:
        for number, chunk in zip(tasks, fetch_all(check_chunk, tasks, workers, ahead=4)):
            chunks.append(chunk)
            task.update(min(len(indices), (number + 1) * CHUNK_SIZE))
    images = np.concatenate([np.empty(0, _IMAGES), *(chunk.images for chunk in chunks)])
    captions = np.concatenate([np.empty(0, _CAPTIONS), *(chunk.captions for chunk in chunks)])
    result = DataCheck(source.name, samples=len(source), checked=len(indices), usable=len(images))
    result.broken = _by_reason(each for chunk in chunks for each in chunk.broken)
    result.unusable_captions = _by_reason(each for chunk in chunks for each in chunk.unusable)
    result.left_out = dict(left_out(source))
    result.left_out_where = [(each.where, each.reason) for each in source.left_out[:MAX_ROWS]]
    result.unread = list(source.unread)
    _summarize_images(result, images, chunks)
    _summarize_captions(result, captions, images, tokenizer is not None)
    tags = _sum_counters(chunk.tags for chunk in chunks)
    result.single_part_of_speech = dict(_sum_counters(chunk.single_parts for chunk in chunks).most_common())
    result.tagged = sum(chunk.tagged for chunk in chunks)
    result.num_tags, result.tags = len(tags), tags.most_common(2 * MAX_ROWS)
    _find_duplicates(result, source, images, captions)
    result.gallery = _gallery(source, images, captions, result, generator)
    result.warnings = warnings(result)
    return result


def gallery_images(source: Source, result: DataCheck, side: int = 192) -> dict[int, np.ndarray]:
    """Returns the images of the gallery by index, uint8 [height, width, 3], with a longer side of at most `side` pixels."""
    images = {}
    for index in sorted({example.index for examples in result.gallery.values() for example in examples}):
        image = Image.fromarray(_decode(source.image(index), side)[0])
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        images[index] = np.asarray(image)
    return images


# ---------------------------------------------------------------- one sample


def _check_chunk(source: Source, indices: np.ndarray, tokenizer: CaptionTokenizer | None, task: int) -> _ChunkStats:
    images, captions = [], []
    chunk = _ChunkStats(np.empty(0), np.empty(0), [], Counter(), Counter(), Counter(), Counter(), 0)
    for index in map(int, indices[task * CHUNK_SIZE : (task + 1) * CHUNK_SIZE]):
        key = f"sample {index}"
        try:
            record = source.record(index)
            key = record.key
            require_captions(record)
            image = source.image(index)
            thumbnail, (width, height), file_format, mode = _decode(image, DECODED_SIDE)
        except BadSample as bad:
            chunk.broken.append((bad.reason, f"{key}: {bad.detail}" if bad.detail not in ("", key) else key))
            continue
        content = image if isinstance(image, bytes) else image.tobytes()
        blank = bool((thumbnail == thumbnail[:1, :1]).all())
        hashes = hash64(content), look_hash(thumbnail)
        images.append((index, width, height, *hashes, blank, len(record.captions)))
        captions += [(index, *_caption_stats(caption, tokenizer)) for caption in record.captions]
        chunk.single_parts.update(name for name in map(single_part_of_speech, record.captions) if name)
        chunk.unusable += ((reason, key) for reason in record.unusable)
        chunk.formats[file_format] += 1
        chunk.modes[mode] += 1
        chunk.tags.update(list(dict.fromkeys(record.tags)))  # not a set, whose order would vary between processes
        chunk.tagged += bool(record.tags)
    chunk.images, chunk.captions = np.array(images, _IMAGES), np.array(captions, _CAPTIONS)
    return chunk


def _decode(image: bytes | np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int], str, str]:
    """Returns pixels reduced to about `side`, the original (width, height), the file format and the color mode. Raises BadSample."""
    opened = open_image(image)
    pixels = opened.decode(min_scale=min(1.0, side / max(opened.size)))
    return pixels, opened.size, opened.format, opened.mode


def _caption_stats(caption: str, tokenizer: CaptionTokenizer | None) -> tuple[int, int, int, float]:
    """Returns the hash, the number of words, the number of tokens and the fraction of English words."""
    tokens = len(tokenizer.encode(caption[:20_000], 10_000)) if tokenizer is not None else 0
    return hash64(caption.encode("utf-8")), len(caption.split()), tokens, english_ratio(caption)


# ---------------------------------------------------------------- statistics


def _distribution(values: np.ndarray, edges: np.ndarray) -> Distribution | None:
    """Summarizes values, with outliers in the first and last bin. Returns None if there are no values."""
    if not len(values):
        return None
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    smallest, median, mean, largest = (float(f(values)) for f in (np.min, np.median, np.mean, np.max))
    return Distribution(smallest, median, mean, largest, edges.tolist(), counts.tolist())


def _integer_bins(values: np.ndarray) -> np.ndarray:
    """Returns the edges of at most 40 bins for integers up to the 99th percentile."""
    largest = max(1, int(np.percentile(values, 99))) if len(values) else 1
    step = -(-(largest + 1) // 40)
    return np.arange(0, largest + 1 + step, step) - 0.5


def _sum_counters(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _by_reason(found: Iterable[tuple[str, str]]) -> list[Broken]:
    details = defaultdict(list)
    for reason, detail in found:
        details[reason].append(detail)
    return [
        Broken(reason, len(details[reason]), details[reason][:10])
        for reason in sorted(details, key=lambda reason: -len(details[reason]))
    ]


def _summarize_images(result: DataCheck, images: np.ndarray, chunks: Sequence[_ChunkStats]) -> None:
    edges = 2.0 ** np.arange(0, 15.5, 0.5)  # pixels
    width, height = images["width"], images["height"]
    result.formats = dict(_sum_counters(chunk.formats for chunk in chunks).most_common())
    result.modes = dict(_sum_counters(chunk.modes for chunk in chunks).most_common())
    result.width, result.height = _distribution(width, edges), _distribution(height, edges)
    result.shortest_side = _distribution(np.minimum(width, height), edges)
    result.aspect_ratio = _distribution(width / np.maximum(1, height), 2.0 ** np.arange(-3.125, 3.25, 0.25))
    result.blank = int(images["blank"].sum())


def _summarize_captions(result: DataCheck, captions: np.ndarray, images: np.ndarray, tokens: bool) -> None:
    result.captions = len(captions)
    result.captions_per_sample = {
        str(number): count for number, count in sorted(Counter(images["captions"].tolist()).items())
    }
    result.words = _distribution(captions["words"], _integer_bins(captions["words"]))
    if tokens:
        result.tokens = _distribution(captions["tokens"], _integer_bins(captions["tokens"]))
        result.cut = int((captions["tokens"] > CONTEXT_LENGTH).sum())
    result.english = _distribution(captions["english"], np.linspace(0, 1, 11))
    result.hardly_english = int((captions["english"] < 0.5).sum())


def _find_duplicates(result: DataCheck, source: Source, images: np.ndarray, captions: np.ndarray) -> None:
    result.same_caption = _duplicates(
        captions["hash"], captions["index"], lambda index, caption_hash: _find_caption(source, index, caption_hash)
    )
    result.same_image = _duplicates(images["hash"], images["index"], lambda index, _: source.record(index).key)
    # One of each group of identical files: those are counted above.
    distinct = images[np.sort(np.unique(images["hash"], return_index=True)[1])]
    groups = look_alike_groups(distinct["look"])
    known = groups >= 0
    result.look_alikes = _duplicates(groups[known], distinct["index"][known], lambda index, _: source.record(index).key)
    splits = source.splits or {}
    if "train" in splits:
        train = images[np.isin(images["index"], splits["train"])]
        for split in splits.keys() - {"train"}:
            held_out = images[np.isin(images["index"], splits[split])]
            result.leaks[split] = _leak(held_out, train)


def _leak(held_out: np.ndarray, train: np.ndarray) -> Leak:
    leaks = np.isin(held_out["hash"], train["hash"]) | have_look_alike(held_out["look"], train["look"])
    examples = []
    for row in held_out[leaks][:LEAKS_SHOWN]:
        same = np.flatnonzero(train["hash"] == row["hash"])
        other = same[0] if len(same) else np.argmin(num_differing_bits(train["look"], row["look"]))
        examples.append((int(row["index"]), int(train["index"][other])))
    return Leak(int(leaks.sum()), len(held_out), examples)


def _duplicates(hashes: np.ndarray, indices: np.ndarray, name: Callable[[int, int], str]) -> Duplicates:
    """Groups samples with equal hashes. `name(first index, hash)` returns the name of a group."""
    # A sample with several equal captions counts once.
    pairs = np.unique(np.stack([hashes.astype(np.uint64), indices.astype(np.uint64)], axis=1), axis=0)
    values, starts, sizes = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 1).sum())]
    members = pairs[np.repeat(sizes > 1, sizes), 1]
    largest = []
    for g in order[:MAX_ROWS]:
        group = pairs[starts[g] : starts[g] + sizes[g], 1].astype(np.int64)
        largest.append((name(int(group[0]), int(values[g])), int(sizes[g]), group[:8].tolist()))
    return Duplicates(groups=len(order), samples=len(np.unique(members)), largest=largest)


def _find_caption(source: Source, index: int, caption_hash: int) -> str:
    captions = source.record(index).captions
    return next((c for c in captions if hash64(c.encode("utf-8")) == caption_hash), captions[0])[:MAX_CAPTION_SHOWN]


# ---------------------------------------------------------------- the gallery


def _gallery(
    source: Source, images: np.ndarray, captions: np.ndarray, result: DataCheck, generator: np.random.Generator
) -> dict[str, list[Example]]:
    def examples(indices: Iterable[int], note: str = "") -> list[Example]:
        return [_example(source, int(index), note) for index in indices]

    def caption_examples(order: np.ndarray, count: int) -> list[Example]:
        return [
            _example(source, int(captions["index"][i]), f"words: {captions['words'][i]}", int(captions["hash"][i]))
            for i in order[:count]
        ]

    def duplicate_examples(duplicates: Duplicates | None, per_group: int) -> list[Example]:
        # Samples that share two captions are shown once.
        groups = {tuple(indices): count for _, count, indices in (duplicates.largest if duplicates else [])}
        return [
            example
            for indices, count in list(groups.items())[:6]
            for example in examples(indices[:per_group], f"{count} times")
        ]

    def leak_examples() -> list[Example]:
        return [
            example
            for split, leak in sorted(result.leaks.items())
            for held_out, in_train in leak.examples
            for example in (_example(source, held_out, split), _example(source, in_train, "train"))
        ]

    sample = generator.permutation(images["index"])[:24]
    by_words = np.argsort(captions["words"], kind="stable")
    by_size = np.argsort(images["width"].astype(np.int64) * images["height"], kind="stable")
    foreign = generator.permutation(np.flatnonzero(captions["english"] < 0.5))
    return {
        "random": examples(sample),
        "longest captions": caption_examples(by_words[::-1], 6),
        "shortest captions": caption_examples(by_words, 6),
        "hardly English": caption_examples(foreign, 12),
        "shared captions": duplicate_examples(result.same_caption, 4),
        "identical images": duplicate_examples(result.same_image, 3),
        "look-alikes": duplicate_examples(result.look_alikes, 4),
        "leaks": leak_examples(),
        "blank images": examples(images["index"][images["blank"]][:6]),
        "smallest images": examples(images["index"][by_size[:6]]),
    }


def _example(source: Source, index: int, note: str, caption_hash: int | None = None) -> Example:
    record = source.record(index)
    if caption_hash is not None:
        return Example(index, record.key, _find_caption(source, index, caption_hash), note)
    return Example(index, record.key, " / ".join(record.captions)[:MAX_CAPTION_SHOWN], note)
