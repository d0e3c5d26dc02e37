"""What is in a data set, before a GPU-day is spent on it: one pass over a source, counting everything."""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from coalign.data.check_result import CONTEXT_LENGTH, Broken, DataCheck, Duplicates, Example, Spread, worries
from coalign.data.common import hash64
from coalign.data.curate import english_ratio, single_part_of_speech
from coalign.data.images import open_image
from coalign.data.workers import fetch_all
from coalign.errors import BadSample
from coalign.types import Source

CHUNK = 64  # samples a task
POOL_FROM = 512  # fewer samples are done faster than worker processes start
LOOK = 64  # pixels; images are decoded to no more than about this, except where the format cannot
LONGEST_SHOWN = 300  # characters of a caption that are kept as an example
TOP = 50  # rows of a list


class Encoder(Protocol):
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
class _Part:
    """What a chunk of samples gave. Columns, not objects: 50 bytes a sample."""

    images: np.ndarray
    captions: np.ndarray
    broken: list[tuple[str, str]]  # (reason, key and detail)
    formats: Counter[str]
    modes: Counter[str]
    tags: Counter[str]
    single_parts: Counter[str]
    tagged: int


def check(
    source: Source,
    progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
    tokenizer: Encoder | None = None,
    seed: int = 0,
) -> DataCheck:
    """Read every sample of `source` (or `limit` random ones) once and say what is there.

    `progress(done, total)` is called as samples are read; token counts need a `tokenizer`. Uses all cores, and about
    100 bytes of memory a sample. A sample that raises BadSample is counted under its reason and in nothing else.
    """
    generator = np.random.default_rng(seed)
    indices = np.arange(len(source))
    if limit is not None and limit < len(indices):
        indices = np.sort(generator.choice(indices, limit, replace=False))
    parts = []
    workers = (os.cpu_count() or 1) if len(indices) >= POOL_FROM else 0
    tasks = range(-(-len(indices) // CHUNK))
    for task, part in zip(tasks, fetch_all(partial(_chunk, source, indices, tokenizer), tasks, workers, ahead=4)):
        parts.append(part)
        if progress is not None:
            progress(min(len(indices), (task + 1) * CHUNK), len(indices))
    images = np.concatenate([np.empty(0, _IMAGES), *(part.images for part in parts)])
    captions = np.concatenate([np.empty(0, _CAPTIONS), *(part.captions for part in parts)])
    result = DataCheck(source.name, samples=len(source), checked=len(indices), usable=len(images))
    result.broken = _broken(parts)
    problems = list(getattr(source, "problems", ()))
    result.problems = [(str(where), str(reason)) for where, reason in problems[:TOP]]
    result.num_problems = len(problems)
    _sum_up_images(result, images, parts)
    _sum_up_captions(result, captions, images, tokenizer is not None)
    tags = _total(part.tags for part in parts)
    result.single_part_of_speech = dict(_total(part.single_parts for part in parts).most_common())
    result.tagged = sum(part.tagged for part in parts)
    result.num_tags, result.tags = len(tags), tags.most_common(2 * TOP)
    _find_duplicates(result, source, images, captions)
    result.gallery = _gallery(source, images, captions, result, generator)
    result.worries = worries(result)
    return result


def gallery_images(source: Source, result: DataCheck, side: int = 192) -> dict[int, np.ndarray]:
    """The pictures of the gallery, by index: uint8 [height, width, 3], longest side at most `side`."""
    pictures = {}
    for index in sorted({example.index for examples in result.gallery.values() for example in examples}):
        picture = Image.fromarray(_decode(source.image(index), side)[0])
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        pictures[index] = np.asarray(picture)
    return pictures


# ---------------------------------------------------------------- one sample


def _chunk(source: Source, indices: np.ndarray, tokenizer: Encoder | None, task: int) -> _Part:
    images, captions = [], []
    part = _Part(np.empty(0), np.empty(0), [], Counter(), Counter(), Counter(), Counter(), 0)
    for index in map(int, indices[task * CHUNK : (task + 1) * CHUNK]):
        key = f"sample {index}"
        try:
            record = source.record(index)
            key = record.key
            image = source.image(index)
            small, (width, height), kind, mode = _decode(image, LOOK)
        except BadSample as bad:
            part.broken.append((bad.reason, f"{key}: {bad.detail}" if bad.detail else key))
            continue
        content = image if isinstance(image, bytes) else image.tobytes()
        blank = bool((small == small[:1, :1]).all())
        images.append((index, width, height, hash64(content), difference_hash(small), blank, len(record.captions)))
        captions += [(index, *_measure(caption, tokenizer)) for caption in record.captions]
        part.single_parts.update(name for name in map(single_part_of_speech, record.captions) if name)
        part.formats[kind] += 1
        part.modes[mode] += 1
        part.tags.update(set(record.tags))
        part.tagged += bool(record.tags)
    part.images, part.captions = np.array(images, _IMAGES), np.array(captions, _CAPTIONS)
    return part


def _decode(image: bytes | np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int], str, str]:
    """Pixels of roughly `side` or larger, full (width, height), the file's format and colour mode. Raises BadSample."""
    opened = open_image(image)
    pixels = opened.decode(min_scale=min(1.0, side / max(opened.size)))
    if not isinstance(image, bytes):
        return pixels, opened.size, "pixels", "RGB"
    try:
        with Image.open(io.BytesIO(image)) as header:  # reads no pixels
            return pixels, opened.size, header.format or "unknown", header.mode
    except Exception:  # Pillow's own limit of pixels, most likely; they have just been decoded, so the image is not bad
        return pixels, opened.size, "unknown", "unknown"


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits: which of 8 × 8 cells are lighter than their left neighbours. Equal for images that look alike small."""
    grey = Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey, dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def _measure(caption: str, tokenizer: Encoder | None) -> tuple[int, int, int, float]:
    """hash, words, tokens, share of English words."""
    tokens = len(tokenizer.encode(caption[:20_000], 10_000)) if tokenizer is not None else 0
    return hash64(caption.encode("utf-8")), len(caption.split()), tokens, english_ratio(caption)


# ---------------------------------------------------------------- summing up


def _spread(values: np.ndarray, edges: np.ndarray) -> Spread | None:
    """None where there are no values; what lies beyond the edges is in the first or last bin."""
    if not len(values):
        return None
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    smallest, median, mean, largest = (float(f(values)) for f in (np.min, np.median, np.mean, np.max))
    return Spread(smallest, median, mean, largest, edges.tolist(), counts.tolist())


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Edges around the whole numbers up to the 99th percentile, at most 40 bins; the tail goes into the last one."""
    top = max(1, int(np.percentile(values, 99))) if len(values) else 1
    step = -(-(top + 1) // 40)
    return np.arange(0, top + 1 + step, step) - 0.5


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _broken(parts: Sequence[_Part]) -> list[Broken]:
    found = defaultdict(list)
    for part in parts:
        for reason, detail in part.broken:
            found[reason].append(detail)
    return [
        Broken(reason, len(found[reason]), found[reason][:10])
        for reason in sorted(found, key=lambda name: -len(found[name]))
    ]


def _sum_up_images(result: DataCheck, images: np.ndarray, parts: Sequence[_Part]) -> None:
    pixels = 2.0 ** np.arange(0, 15.5, 0.5)
    width, height = images["width"], images["height"]
    result.formats = dict(_total(part.formats for part in parts).most_common())
    result.modes = dict(_total(part.modes for part in parts).most_common())
    result.width, result.height = _spread(width, pixels), _spread(height, pixels)
    result.shortest_side = _spread(np.minimum(width, height), pixels)
    result.aspect_ratio = _spread(width / np.maximum(1, height), 2.0 ** np.arange(-3.125, 3.25, 0.25))
    result.blank = int(images["blank"].sum())


def _sum_up_captions(result: DataCheck, captions: np.ndarray, images: np.ndarray, tokens: bool) -> None:
    result.captions = len(captions)
    result.captions_per_sample = {
        str(number): count for number, count in sorted(Counter(images["captions"].tolist()).items())
    }
    result.words = _spread(captions["words"], _whole_numbers(captions["words"]))
    if tokens:
        result.tokens = _spread(captions["tokens"], _whole_numbers(captions["tokens"]))
        result.cut = int((captions["tokens"] > CONTEXT_LENGTH).sum())
    result.english = _spread(captions["english"], np.linspace(0, 1, 11))
    result.hardly_english = int((captions["english"] < 0.5).sum())


def _find_duplicates(result: DataCheck, source: Source, images: np.ndarray, captions: np.ndarray) -> None:
    result.same_caption = _duplicates(
        captions["hash"], captions["index"], lambda group, of: _caption_of(source, int(group[0]), of)
    )
    result.same_image = _duplicates(images["hash"], images["index"], lambda group, _: source.record(int(group[0])).key)
    # One of each set of identical files, and no blank ones: look-alikes are what the other count does not find.
    once = np.unique(images["hash"], return_index=True)[1]
    rest = images[np.sort(once[~images["blank"][once]])]
    result.look_alikes = _duplicates(rest["look"], rest["index"], lambda group, _: source.record(int(group[0])).key)


def _duplicates(hashes: np.ndarray, indices: np.ndarray, name: Callable[[np.ndarray, int], str]) -> Duplicates:
    """Groups of different samples with equal hashes; `name(indices of the group, hash)`."""
    # A sample counts once in a group, however many captions of it are equal.
    pairs = np.unique(np.stack([hashes.astype(np.uint64), indices.astype(np.uint64)], axis=1), axis=0)
    values, starts, sizes = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 1).sum())]
    members = pairs[np.repeat(sizes > 1, sizes), 1]
    largest = []
    for g in order[:TOP]:
        group = pairs[starts[g] : starts[g] + sizes[g], 1].astype(np.int64)
        largest.append((name(group, int(values[g])), int(sizes[g]), group[:8].tolist()))
    return Duplicates(groups=len(order), samples=len(np.unique(members)), largest=largest)


def _caption_of(source: Source, index: int, wanted: int) -> str:
    captions = source.record(index).captions
    return next((c for c in captions if hash64(c.encode("utf-8")) == wanted), captions[0])[:LONGEST_SHOWN]


# ---------------------------------------------------------------- the gallery


def _gallery(
    source: Source, images: np.ndarray, captions: np.ndarray, result: DataCheck, generator: np.random.Generator
) -> dict[str, list[Example]]:
    def rows(chosen: Iterable[int], note: str = "") -> list[Example]:
        return [_example(source, int(index), note) for index in chosen]

    def of_captions(order: np.ndarray, count: int) -> list[Example]:
        return [
            _example(source, int(captions["index"][i]), f"words: {captions['words'][i]}", int(captions["hash"][i]))
            for i in order[:count]
        ]

    def of_groups(found: Duplicates | None, groups: int, each: int) -> list[Example]:
        # Two captions may be shared by the same samples; their pictures are shown once.
        distinct = {tuple(some): count for _, count, some in (found.largest if found else [])}
        return [row for some, count in list(distinct.items())[:groups] for row in rows(some[:each], f"{count} times")]

    sample = generator.permutation(images["index"])[:24]
    by_words = np.argsort(captions["words"], kind="stable")
    by_size = np.argsort(images["width"].astype(np.int64) * images["height"], kind="stable")
    foreign = generator.permutation(np.flatnonzero(captions["english"] < 0.5))
    return {
        "random": rows(sample),
        "longest captions": of_captions(by_words[::-1], 6),
        "shortest captions": of_captions(by_words, 6),
        "hardly English": of_captions(foreign, 12),
        "shared captions": of_groups(result.same_caption, 6, 4),
        "identical images": of_groups(result.same_image, 6, 3),
        "look-alikes": of_groups(result.look_alikes, 6, 4),
        "blank images": rows(images["index"][images["blank"]][:6]),
        "smallest images": rows(images["index"][by_size[:6]]),
    }


def _example(source: Source, index: int, note: str, caption_hash: int | None = None) -> Example:
    record = source.record(index)
    if caption_hash is not None:
        return Example(index, record.key, _caption_of(source, index, caption_hash), note)
    return Example(index, record.key, " / ".join(record.captions)[:LONGEST_SHOWN], note)
