"""The training loader: the samples and views of a step are a pure function of (seed, step).

The loader's only state is the step number: resuming replays nothing, batches do not depend on the number of workers, and
ranks load consecutive slices of one global batch. Workers load chunks of a batch, which bounds the data in flight and
lets several workers share a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.data.images.cache import ImageCache
from coalign.data.images.decode import open_image
from coalign.data.images.device_views import finish_views
from coalign.data.images.views import NUM_PARAMS, AnyImage, in_groups, make_views
from coalign.data.loading.cached_views import NOTHING_CACHED, CachedViews, to_float
from coalign.data.loading.order import order
from coalign.data.loading.samples import BadEntry, Samples, naming, read_samples, sample_key
from coalign.data.loading.texts import text_views
from coalign.data.loading.workers import fetch_all
from coalign.data.sources.base import Source
from coalign.data.text.captions import require_captions
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import BadSample, NoImage, UserError
from coalign.randomness import Draws, stable_hash
from coalign.types import CLIP_PREPROCESS, Batch, ImageView, Preprocess, Record, TextView, ViewPlan

CHUNK = 64  # samples that a worker loads at a time; more if a batch would otherwise have more than MAX_CHUNKS chunks
MAX_CHUNKS = 64  # each takes a file descriptor in transit
MAX_ATTEMPTS = 20  # replacements to try for a bad sample
_BELOW_ONE = np.float32(1 - 2.0**-24)
MAX_KEPT = 100_000  # samples of which captions are kept in memory


# ---------------------------------------------------------------- loaded batches


@dataclass
class LoadedBatch:
    """A batch, and the bad samples that were replaced in it."""

    batch: Batch
    bad: list[BadEntry]


@dataclass
class _Chunk:
    """Consecutive samples of a batch, as sent by a worker. Only the pixels are a tensor, in shared memory; the rest is pickled."""

    pixels: Tensor  # uint8 [view, sample, 3, size, size]
    rows: np.ndarray  # structured [sample]
    tags: list[np.ndarray]
    bad: list[BadEntry]
    # bits of bfloat16, uint16 [view, sample, width], of image and of text views; empty if none are cached
    features: tuple[np.ndarray, np.ndarray]


# ---------------------------------------------------------------- training loader


class PairLoader:
    """Loads one rank's batches of image-text pairs, addressed by step.

    indices: indices of the source's samples to train on.
    batch_size: the global batch size; this rank loads its consecutive slice.
    cache: keeps decoded images.
    cached: views whose features take the place of pixels and ids, float32 [batch, width].
    finish_on: device to which batches are moved, and on which color and blur are applied.
    preprocess: of the evaluation views.

    The incomplete last batch of an epoch is dropped. A bad sample is replaced by one that depends only on (seed, epoch,
    sample, attempt). A sample without captions is bad if the plan has texts and is not `captionless`.

    All random numbers are `Draws` of (seed, epoch, index, occurrence): an image view uses those named NAME, its patch ranks NAME/patches,
    a text view text/NAME. All text views of a sample show the same caption, drawn from "caption". `caption_ids` are equal
    exactly where captions are equal; a sample without captions has a unique id. With a `group_column`, `group_ids` are equal exactly where
    the values in this column are; a sample without a value is its own group.

    Paraphrases are stored in the record's facts: {"paraphrases": {caption: [paraphrase, …]}}. Views of kind "paraphrase"
    get distinct ones, assigned by a draw from "paraphrases"; the caption itself is added if there are too few.

    To load an epoch or more, the records of up to `MAX_KEPT` samples are read once, before the first batch, and kept as tokens.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        plan: ViewPlan,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        context_length: int,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tag_vocabulary: Mapping[str, int] | None = None,
        patch_grid: tuple[int, int] | None = None,
        cache: ImageCache | None = None,
        group_column: str | None = None,
        finish_on: torch.device | None = None,
        preprocess: Preprocess = CLIP_PREPROCESS,
        cached: CachedViews = NOTHING_CACHED,
    ) -> None:
        _check_sizes(len(indices), batch_size, world_size)
        if plan.tags and tag_vocabulary is None:
            raise ValueError("a plan with tags needs tag_vocabulary")
        if plan.patch_ranks and patch_grid is None:
            raise ValueError("a plan with patch_ranks needs patch_grid")
        self.source, self.indices, self.plan, self.tokenizer = source, np.asarray(indices), plan, tokenizer
        self.image_size, self.context_length, self.batch_size, self.seed = image_size, context_length, batch_size, seed
        self.workers, self.rank, self.cache, self.cached = workers, rank, cache, cached
        self.preprocess = preprocess
        self.finish_on = finish_on if cached.images is None else None
        # the views that are made, not read from the cache
        self._images = plan.images if cached.images is None else {}
        self._texts = plan.texts if cached.texts is None else {}
        self._group_column = group_column
        self.steps_per_epoch = len(indices) // batch_size
        self._vocabulary = tag_vocabulary or {}
        self._local = batch_size // world_size
        self._chunk_size = max(CHUNK, -(-self._local // MAX_CHUNKS))
        self._num_chunks = -(-self._local // self._chunk_size)  # per batch of this rank
        self._kept = cached.texts.samples if cached.texts else None
        self._row = _row_type(
            replace(plan, texts=self._texts), context_length, patch_grid if plan.patch_ranks else None
        )

    def batches(self, start_step: int, stop_step: int) -> Generator[LoadedBatch, None, None]:
        """Yields the batches of steps start_step … stop_step - 1; step s is batch s % steps_per_epoch of its epoch.

        Raises UserError if no usable replacement is found for a bad sample. Closing the generator terminates the workers.
        """
        if self._kept is None and len(self.indices) <= MAX_KEPT and stop_step - start_step >= self.steps_per_epoch:
            self._kept = self._read_samples(self.indices)
        tasks = range(start_step * self._num_chunks, stop_step * self._num_chunks)
        chunks: list[_Chunk] = []
        with closing(fetch_all(self._chunk, tasks, self.workers, ahead=self._num_chunks)) as fetched:
            for chunk in fetched:
                chunks.append(chunk)
                if len(chunks) == self._num_chunks:
                    batch, bad = self._collate(chunks), [entry for chunk in chunks for entry in chunk.bad]
                    yield LoadedBatch(batch if self.finish_on is None else finish_views(batch, self.finish_on), bad)
                    chunks = []

    def _chunk(self, task: int) -> _Chunk:
        step, number = divmod(task, self._num_chunks)
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.batch_size + self.rank * self._local
        start, stop = number * self._chunk_size, min((number + 1) * self._chunk_size, self._local)
        positions = np.arange(first + start, first + stop)
        indices = self.indices[order(len(self.indices), self.seed, epoch)[positions]]

        pixels = torch.zeros((len(self._images), len(indices), 3, self.image_size, self.image_size), dtype=torch.uint8)
        chunk = _Chunk(
            pixels, np.zeros(len(indices), self._row), [np.empty(0)] * len(indices), [], self.cached.empty(len(indices))
        )
        tried: list[list[BadEntry]] = [[] for _ in indices]
        positions, candidates = np.arange(len(indices)), indices
        for attempt in range(MAX_ATTEMPTS + 1):
            failures = self._fill(chunk, positions, Draws(self.seed, epoch, candidates, occurrence=attempt))
            for row, bad in failures.items():
                key = sample_key(self.source, int(candidates[row]))
                tried[positions[row]].append(BadEntry(key, bad.reason, bad.detail, epoch))
            positions = positions[sorted(failures)]
            if not len(positions):
                chunk.bad += [entry for entries in tried for entry in entries]
                return chunk
            hashes = [stable_hash(self.seed, epoch, index, attempt) for index in indices[positions].tolist()]
            candidates = self.indices[[each % len(self.indices) for each in hashes]]
        raise UserError(_unusable_message(self.source.name, tried[positions[0]]))

    def _fill(self, chunk: _Chunk, positions: np.ndarray, draws: Draws) -> dict[int, BadSample]:
        """Writes samples with their views to `positions` of the chunk. Returns the unusable ones, by their row in `positions`."""
        samples = self._kept or self._read_samples(draws.indices)
        rows = samples.rows(draws.indices)
        failures = {row: samples.bad[each] for row, each in enumerate(rows.tolist()) if each in samples.bad}
        chunk.rows["index"][positions] = draws.indices
        chunk.rows["group_id"][positions] = samples.group_ids[rows]
        if self.plan.tags:
            for position, tags in zip(positions.tolist(), samples.tags[rows]):
                chunk.tags[position] = tags
        texts = text_views(samples, rows, draws, self._texts, self.tokenizer, self.context_length)
        for name in ("has_caption", "caption_id", "ids", "lengths", "labels"):
            chunk.rows[name][positions] = getattr(texts, name)
        failures |= texts.failures
        if self.cached.texts:
            chunk.features[1][:, positions] = self.cached.texts.draw(texts.captions, draws)
        if self.cached.images:
            features, params, bad = self.cached.images.draw(draws)
            chunk.features[0][:, positions], chunk.rows["has_image"][positions] = features, True
            chunk.rows["params"][positions] = params.transpose(1, 0, 2)
            return bad | failures
        return failures | self._add_images(chunk, positions, draws, failures)

    def _read_samples(self, indices: np.ndarray) -> Samples:
        encode = partial(self.tokenizer.encode, context_length=self.context_length)
        check = require_captions if self.plan.texts and not self.plan.captionless else _no_check
        return read_samples(self.source, indices, encode, check, self._vocabulary, self._group_column)

    # ------------------------------------------------------------ images

    def _add_images(
        self, chunk: _Chunk, positions: np.ndarray, draws: Draws, failed: Mapping[int, BadSample]
    ) -> dict[int, BadSample]:
        """Adds the image views of the samples that have not failed."""
        failures: dict[int, BadSample] = {}
        imageless: set[int] = set()

        def opened() -> Iterator[tuple[int, AnyImage]]:
            for row, index in enumerate(draws.indices.tolist()):
                if row in failed:
                    continue
                image: AnyImage | None = None
                try:
                    image = self._open_image(index)
                except BadSample as bad:
                    if not (isinstance(bad, NoImage) and self.plan.imageless):
                        failures[row] = bad.copy()
                        continue
                chunk.rows["has_image"][positions[row]] = image is not None
                if image is None:
                    imageless.add(row)
                if self._images and (image := image or self._substitute_image(index, draws.epoch)):
                    yield row, image

        pixels = chunk.pixels.numpy()
        pixels[:, positions], chunk.rows["params"][positions] = 0, 0
        for rows, images in in_groups(opened()):
            uniform = draws[np.array(rows)].uniform
            views = make_views(images, self._images, uniform, self.image_size, self.finish_on is None, self.preprocess)
            pixels[:, positions[rows]] = views.pixels
            chunk.rows["params"][positions[rows]] = views.params.transpose(1, 0, 2)
            # a substitute that cannot be decoded stays black, and counts where it is a sample's own image
            failures |= {rows[row]: bad for row, bad in views.failures.items() if rows[row] not in imageless}
        if self.plan.patch_ranks:
            grid = chunk.rows["patch_ranks"].shape[2:]
            for view, name in enumerate(self.plan.images):
                ranks = draws.uniform(f"{name}/patches", grid[0] * grid[1]).reshape(-1, *grid)
                chunk.rows["patch_ranks"][positions, view] = np.minimum(ranks, _BELOW_ONE)
        return failures

    def _open_image(self, index: int) -> AnyImage:
        def read() -> bytes | np.ndarray:
            with naming(self.source, index):
                return self.source.image(index)

        return open_image(read()) if self.cache is None else self.cache.open(index, read)

    def _substitute_image(self, index: int, epoch: int) -> AnyImage | None:
        """Another sample's image for a sample without one, which keeps batch statistics those of images. None if no attempt finds one."""
        for attempt in range(10 * MAX_ATTEMPTS):  # many, since a large share of the samples may have no image
            position = stable_hash(self.seed, epoch, index, "image", attempt) % len(self.indices)
            with suppress(BadSample):
                return self._open_image(int(self.indices[position]))
        return None

    # ------------------------------------------------------------ batches

    def _collate(self, chunks: list[_Chunk]) -> Batch:
        rows = np.concatenate([chunk.rows for chunk in chunks])
        images, texts = {}, {}
        for view, name in enumerate(self.plan.images):
            images[name] = ImageView(
                pixels=_concatenate_features(chunks, 0, view)
                if self.cached.images
                else _concatenate_pixels(chunks, view),
                params=_tensor(rows["params"][:, view], np.float32),
                patch_ranks=_tensor(rows["patch_ranks"][:, view], np.float32) if self.plan.patch_ranks else None,
            )
        for view, name in enumerate(self.plan.texts if self.cached.texts else ()):
            texts[name] = TextView(
                _concatenate_features(chunks, 1, view), lengths=torch.zeros(len(rows), dtype=torch.int64)
            )
        for view, (name, policy) in enumerate(self._texts.items()):
            lengths = rows["lengths"][:, view]
            longest = lengths.max()
            texts[name] = TextView(
                ids=_tensor(rows["ids"][:, view, :longest]),
                lengths=_tensor(lengths),
                labels=_tensor(rows["labels"][:, view, :longest]) if policy.mask_p > 0 else None,
            )
        tags = [sample for chunk in chunks for sample in chunk.tags]
        return Batch(
            indices=_tensor(rows["index"]),
            images=images,
            texts=texts,
            caption_ids=_tensor(rows["caption_id"]),
            has_caption=_tensor(rows["has_caption"], np.bool_),
            tags=_pad(tags) if self.plan.tags else None,
            has_image=_tensor(rows["has_image"], np.bool_) if self.plan.imageless else None,
            group_ids=_tensor(rows["group_id"]) if self._group_column else None,
        )


def _concatenate_pixels(chunks: list[_Chunk], view: int) -> Tensor:
    """The pixels of one view of all chunks, in pinned memory for asynchronous copies to a GPU."""
    parts = [chunk.pixels[view] for chunk in chunks]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    return torch.cat(parts, out=torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))


def _concatenate_features(chunks: list[_Chunk], kind: int, view: int) -> Tensor:
    """The features of one image view (kind 0) or text view (kind 1) of all chunks, float32 [sample, width]."""
    features = to_float(np.concatenate([chunk.features[kind][view] for chunk in chunks]))
    return features.pin_memory() if torch.cuda.is_available() else features


def _no_check(record: Record) -> None:
    pass


def _row_type(plan: ViewPlan, context_length: int, patch_grid: tuple[int, int] | None) -> np.dtype:
    """Structured dtype of a sample's fixed-size data (all but pixels and tags), which is cheap to send and to concatenate."""
    images, texts = len(plan.images), len(plan.texts)
    fields: list[Any] = [
        ("index", np.int64),
        ("caption_id", np.int64),
        ("group_id", np.int64),
        ("has_caption", np.bool_),
        ("has_image", np.bool_),
        ("params", np.float32, (images, NUM_PARAMS)),
        ("lengths", np.int32, (texts,)),
        ("ids", np.int32, (texts, context_length)),
        ("labels", np.int32, (texts, context_length)),
    ]
    if patch_grid is not None:
        fields.append(("patch_ranks", np.float32, (images, *patch_grid)))
    return np.dtype(fields, align=True)


def _tensor(values: np.ndarray, dtype: type = np.int64) -> Tensor:
    tensor = torch.from_numpy(values.astype(dtype, order="C"))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _pad(tags: list[np.ndarray]) -> Tensor:
    """int64 [sample, max_tags], padded with -1."""
    padded = np.full((len(tags), max([1, *map(len, tags)])), -1, np.int64)
    for row, sample in zip(padded, tags):
        row[: len(sample)] = sample
    return _tensor(padded)


def _check_sizes(pairs: int, batch_size: int, world_size: int) -> None:
    if pairs < 2:
        count = "no training pairs" if pairs == 0 else "one training pair"
        raise UserError(f"The data has {count}, but contrastive training requires at least two; add data.")
    check_batch_size(batch_size, world_size)
    if batch_size > pairs:
        largest = pairs // world_size * world_size
        advice = f"use --batch-size {largest} or less" if largest else f"use at most {pairs} processes"
        raise UserError(f"The data has {pairs:,} training pairs, fewer than --batch-size {batch_size:,}; {advice}.")


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Raises UserError if the global batch has fewer than two samples or is not divisible by the number of processes."""
    if batch_size < 2:
        raise UserError(
            f"Batch size {batch_size} is too small: contrastive training requires --batch-size 2 or more, and encoders with BatchNorm, "
            "such as ResNets, a multiple of --batch-norm-group."
        )
    if batch_size % world_size:
        larger = -(-batch_size // world_size) * world_size
        raise UserError(
            f"Batch size {batch_size} is not divisible by the number of processes, {world_size}; use --batch-size {larger}."
        )


def _unusable_message(source: str, tried: list[BadEntry]) -> str:
    reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(bad.reason for bad in tried).most_common())
    return (
        f"The data in {source} seems unusable: {len(tried)} samples in a row were bad ({reasons}), "
        f"starting with {tried[0].key!r}; run `coalign data check` to inspect it."
    )


# ---------------------------------------------------------------- tags


def tag_vocabulary(source: Source, indices: Sequence[int] | np.ndarray, size: int) -> dict[str, int]:
    """Maps the `size` most frequent tags to ids, most frequent first, ties in alphabetical order. Ignores bad samples."""
    counts: Counter[str] = Counter()
    for index in np.asarray(indices).tolist():
        with suppress(BadSample):
            counts.update(set(source.record(index).tags))
    ranked = sorted(counts, key=lambda tag: (-counts[tag], tag))
    return {tag: number for number, tag in enumerate(ranked[:size])}
