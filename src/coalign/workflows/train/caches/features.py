"""The features of a run's locked towers: which are cached, where, and the pass that computes them once."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from coalign.config import TrainConfig
from coalign.data.images import evaluation_view
from coalign.data.images.views import NUM_PARAMS
from coalign.data.loading.cached_views import CachedImages, CachedTexts, CachedViews, to_bits
from coalign.data.loading.feature_file import MISSING, FeatureFile
from coalign.data.loading.feature_inputs import ImageVariants, TextVariants, check_record
from coalign.data.loading.samples import Samples, read_samples
from coalign.data.loading.workers import fetch_all
from coalign.data.sources.base import Source
from coalign.data.text.tokenizer import Tokenizer, pad
from coalign.errors import BadSample, UserError
from coalign.formatting import data_size, duration
from coalign.method import Method
from coalign.networks.towers.spec import Tower
from coalign.progress import progress
from coalign.runs.run import context_length, image_size
from coalign.training.distributed import World
from coalign.training.sharding import full_tensors, unsharded
from coalign.training.trainer import autocast_dtype
from coalign.types import Batch, DualEncoder, TextView
from coalign.workflows.train.caches.sharing import alone, on_first

CHUNK = 256  # views of images, and captions, that are written at a time
_ENCODED = {"cpu": 64, "cuda": 512, "mps": 512}  # images and texts that are encoded at once
_TIMED = 8  # rows from which the time is estimated


def locked_towers(method: Method) -> dict[str, Tower]:
    """Returns the towers, "image" and "text", that have views, and of which no parameter but the projection's is trained."""
    views = {"image": method.view_plan.images, "text": method.view_plan.texts}
    towers = {name: getattr(method, name, None) for name, of_tower in views.items() if of_tower}
    return {
        name: tower
        for name, tower in towers.items()
        if isinstance(tower, Tower)
        and not any(
            parameter.requires_grad
            for name, parameter in tower.named_parameters()
            if not name.startswith("projection.")
        )
    }


@dataclass
class _Pass:
    """The rows of one file that a tower computes."""

    name: str  # "images" or "texts"
    file: FeatureFile
    tower: Any
    load: Callable[[slice], Any]
    encode: Callable[[Any], tuple[np.ndarray, np.ndarray | None, np.ndarray]]
    chunk: int  # rows that are written at a time
    key: Callable[[], dict[str, str]]

    def missing(self) -> list[slice]:
        """Returns the chunks that are not complete. They are the same for any number of processes."""
        chunks = [
            slice(first, min(first + self.chunk, self.file.rows)) for first in range(0, self.file.rows, self.chunk)
        ]
        state = self.file.state
        return [rows for rows in chunks if (state[rows] == MISSING).any()]


class RunFeatures:
    """The cached features of a run, in its folder, or in one that runs share.

    Attributes:
        towers: The locked towers whose features are cached, by name.
        folder: The folder of the files. Unless runs share it, it is deleted when the run has ended.
        is_temporary: Whether it is not named to the user, who did not choose it.
    """

    is_temporary = False

    def __init__(self, method: Method, config: TrainConfig, tokenizer: Tokenizer, out: Path, world: World) -> None:
        self.method, self.config, self.tokenizer, self.world = method, config, tokenizer, world
        self.is_shared = config.feature_folder is not None
        self.folder = config.feature_folder or out / "features"
        locked = locked_towers(method)
        if not locked and config.feature_views > 1:
            raise UserError(
                f"--feature-views {config.feature_views} needs a locked tower; add --image-tuning locked or --text-tuning locked, or "
                "omit it."
            )
        self.towers: Mapping[str, Any] = locked if config.feature_views else {}
        for name in self.towers:
            self._check(name)
        self._passes: list[_Pass] = []
        self._samples: list[Samples] = []

    def _check(self, name: str) -> None:
        """Raises UserError if the method cannot be trained on the cached features of a tower."""
        config, plan = self.config, self.method.view_plan
        if term := self.method.token_terms.get(name):
            parts = "patches" if name == "image" else "tokens"
            what, remedy = f"The term {term} of {config.method}", f"add --no-{term.replace('_', '-')}, "
            if term == config.method:  # cannot be turned off
                what, remedy = term, ""
            raise UserError(
                f"{what} needs the {parts} of the {name} tower, but of a locked tower only the pooled features are kept; {remedy}use "
                f"--{name}-tuning full, or run the tower in every step with --feature-views 0."
            )
        if name == "image" and config.feature_views == 1 and len(plan.images) > 1:
            raise UserError(
                f"{config.method} compares {len(plan.images)} views of an image ({', '.join(plan.images)}), which are equal with a "
                "locked image tower and --feature-views 1; use --feature-views 2 or more."
            )
        if name == "image" and config.unpaired_captions:
            raise UserError(
                "--unpaired-captions has samples without images, for which a locked image tower has no cached features; add "
                "--feature-views 0, which runs the tower in every step."
            )

    # ------------------------------------------------------------ views of a split

    def views(self, split: str, source: Source, indices: np.ndarray, tag_ids: Mapping[str, int]) -> CachedViews:
        """Returns the cached views of samples, whose features `compute` will compute. Reads the records if texts are cached."""
        return CachedViews(
            self._images(split, source, indices) if "image" in self.towers else None,
            self._texts(split, source, indices, tag_ids) if "text" in self.towers else None,
        )

    def _images(self, split: str, source: Source, indices: np.ndarray) -> CachedImages:
        config, tower = self.config, self.towers["image"]
        rows = np.unique(np.asarray(indices) % len(source))
        policies = self.method.view_plan.images
        variants = ImageVariants(
            source, rows, policies, config.feature_views, image_size(self.method), tower.preprocess, config.seed
        )
        count = len(variants.drawn())
        file = FeatureFile(self.folder / f"{split}_images", len(rows), count, tower.width, NUM_PARAMS)
        drawn = config.seed if config.feature_views > 1 else evaluation_view.VERSION
        self._passes.append(
            _Pass(
                "images", file, tower, variants.load, partial(self._encode_images, tower), max(1, CHUNK // count),
                lambda: self._key("image", source, rows, [policies, config.feature_views, drawn, variants.image_size]),
            )
        )  # fmt: skip
        return CachedImages(file, variants.of_view(), source, rows)

    def _texts(self, split: str, source: Source, indices: np.ndarray, tag_ids: Mapping[str, int]) -> CachedTexts:
        config, plan, tower = self.config, self.method.view_plan, self.towers["text"]
        check = partial(check_record, plan.texts, plan.captionless)
        context = context_length(self.method)
        samples = read_samples(source, indices, lambda _: [], check, tag_ids, config.reading.group_column)
        self._samples.append(samples)
        variants = TextVariants(samples, plan.texts, config.feature_views, self.tokenizer, context, config.seed)
        count = len(variants.drawn())
        file = FeatureFile(self.folder / f"{split}_texts", len(samples.captions), count, tower.width)
        seed = config.seed if count > 1 else ""
        self._passes.append(
            _Pass(
                "texts", file, tower, variants.load, partial(self._encode_texts, tower, count), max(1, CHUNK // count),
                lambda: self._key("text", source, samples.caption_ids, [plan.texts, config.feature_views, seed, context]),
            )
        )  # fmt: skip
        return CachedTexts(file, variants.of_view(), samples)

    # ------------------------------------------------------------ the key of a file

    def _key(self, name: str, source: Source, ids: np.ndarray, views: list[Any]) -> dict[str, str]:
        config, tower = self.config, self.towers[name]
        weights = {key: value for key, value in tower.state_dict().items() if not key.startswith("projection.")}
        records = [_record(source, index) for index in np.linspace(0, len(source) - 1, 64).astype(int).tolist()]
        if name == "image":
            preprocessing: list[Any] = [tower.preprocess]
        else:  # what the tokenizer does; its name changes when the run is resumed
            preprocessing = [
                self.tokenizer.encode(text, context_length(self.method)) for _, texts in records for text in texts
            ]
        precision = str(autocast_dtype(config.precision, self.world.device))
        return {
            "weights": _digest(config.model, full_tensors(weights, keep=True)),
            "preprocessing": _digest(preprocessing, precision),
            "data": _digest(len(source), source.stamp(), ids, records),
            "views": _digest(views),
        }

    # ------------------------------------------------------------ the pass

    def compute(self, console: Console, workers: int) -> None:
        """Computes the features that are missing, each process a part. All processes must call it, after the weights are loaded.

        workers: processes that load images.
        """
        if not self.towers:
            return
        self.method.eval()
        autocast, device = autocast_dtype(self.config.precision, self.world.device), self.world.device.type
        with torch.no_grad(), unsharded(self.method), torch.autocast(device, autocast, enabled=autocast is not None):
            keys = [each.key() for each in self._passes]  # on all processes, which gather sharded weights
            if self.is_shared:  # beside the files of other weights, pairs and views
                digests = self.world.broadcast([_digest(sorted(key.items())) for key in keys])
                for each, digest in zip(self._passes, digests):
                    each.file.path = self.folder / f"{each.name}-{digest}"
            # a run that is validated on its training pairs has the same file twice
            paths = sorted({each.file.path for each in self._passes}) if self.is_shared else []
            with alone(self.folder, paths, self.world, console):
                self._compute(self._prepare(keys, console), console, workers)
        for samples in self._samples:  # from now on, their captions are rows of a file
            samples.captions, samples.paraphrases = [], {}

    def _compute(self, missing: list[list[slice]], console: Console, workers: int) -> None:
        """Computes the chunks that are missing in each file."""
        if any(missing) and self.world.is_first:
            seconds = self._estimate(missing)
            time_words = f" Computing them takes about {duration(seconds)}." if seconds >= 1 else ""
            console.print(self.announcement(missing) + time_words)
        for each, chunks in zip(self._passes, missing):
            with progress(f"Features of {each.name}") as task:
                task.update(each.file.num_complete(), each.file.rows)
                for rows, loaded in self._load(each, chunks[self.world.rank :: self.world.size], workers):
                    each.file.write(rows.start, *each.encode(loaded))
                    task.update(each.file.num_complete())
        self.world.barrier()

    def _prepare(self, keys: list[dict[str, str]], console: Console) -> list[list[slice]]:
        """Creates the files. Returns the missing chunks of each."""

        def create() -> None:
            for each, key in zip(self._passes, keys):
                if replaced := each.file.prepare(key):
                    console.print(f"{each.file.path} is computed again: {replaced}.")

        on_first(self.world, create)
        self._check_shared()
        return self.world.broadcast([each.missing() for each in self._passes if self.world.is_first])

    def _load(self, each: _Pass, chunks: list[slice], workers: int) -> Iterator[tuple[slice, Any]]:
        """Yields the chunks with their inputs, which loader workers prepare if they are images."""
        workers = workers if each.name == "images" else 0
        with closing(fetch_all(_Loader(each.load, chunks), range(len(chunks)), workers, ahead=1)) as fetched:
            yield from zip(chunks, fetched)

    def _encode_images(self, tower: Any, loaded: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels, params, bad = loaded
        views = torch.from_numpy(pixels).flatten(0, 1)
        parts = [tower(part.to(self.world.device)).pooled for part in views.split(_ENCODED[self.world.device.type])]
        return self._bits("image", parts, len(pixels)), params, bad

    def _encode_texts(self, tower: Any, count: int, tokens: list[list[int]]) -> tuple[np.ndarray, None, np.ndarray]:
        distinct = sorted({tuple(each) for each in tokens}, key=lambda each: (len(each), each))  # little padding
        size = _ENCODED[self.world.device.type]
        parts = []
        for first in range(0, len(distinct), size):
            ids, lengths = pad([list(each) for each in distinct[first : first + size]])
            parts.append(tower(ids.to(self.world.device), lengths.to(self.world.device)).pooled)
        position = {each: number for number, each in enumerate(distinct)}
        rows = torch.tensor([position[tuple(each)] for each in tokens], device=parts[0].device)
        num_captions = len(tokens) // count
        return self._bits("text", [torch.cat(parts)[rows]], num_captions), None, np.zeros(num_captions, bool)

    def _bits(self, name: str, parts: list[Tensor], rows: int) -> np.ndarray:
        features = torch.cat([part.float() for part in parts])
        if not bool(torch.isfinite(features).all()):
            raise UserError(
                f"The features of the locked {name} tower are not finite; its weights are corrupt, or --precision "
                f"{self.config.precision} is too low."
            )
        return to_bits(features.unflatten(0, (rows, -1)))

    def announcement(self, missing: list[list[slice]] | None = None) -> str:
        """Returns a sentence on what is computed, None: all of it, and its size."""
        counts = Counter[str]()
        for number, each in enumerate(self._passes):
            rows = each.file.rows if missing is None else sum(chunk.stop - chunk.start for chunk in missing[number])
            counts[f"{each.name}, {each.file.variants} views each" if each.file.variants > 1 else each.name] += rows
        towers = f"{' and '.join(self.towers)} {'towers' if len(self.towers) > 1 else 'tower'}"
        computed = "; ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        size = data_size(sum(each.file.num_bytes for each in self._passes))
        where = "" if self.is_temporary else f" in {self.folder}"
        return f"The features of the locked {towers} are computed once: {computed}. They take {size}{where}."

    def _estimate(self, missing: list[list[slice]]) -> float:
        """Returns the seconds that the pass takes, estimated from a few rows."""
        seconds = 0.0
        for each, chunks in zip(self._passes, missing):
            if not chunks:
                continue
            rows = sum(chunk.stop - chunk.start for chunk in chunks)
            first, count = chunks[0].start, min(_TIMED, chunks[0].stop - chunks[0].start)
            each.encode(each.load(slice(first, first + 1)))  # the first pass is slower
            start = time.monotonic()
            each.encode(each.load(slice(first, first + count)))
            seconds += (time.monotonic() - start) * rows / count / self.world.size
        return seconds

    def _check_shared(self) -> None:
        """Raises UserError on all processes if one does not see the files of the first."""
        seen = self.world.gather_objects(all(each.file.path.exists() for each in self._passes))
        if not all(seen):
            option = "--feature-folder" if self.is_shared else "--out"
            raise UserError(
                f"Rank {seen.index(False)} of {self.world.size} does not see {self.folder}, which rank 0 created; choose a folder "
                f"that all machines share with {option}, or add --feature-views 0."
            )

    # ------------------------------------------------------------ validation

    def encoded(self, pixels: Tensor) -> Tensor:
        """Returns what a validation passes to `encode_image` for pixels: a cached tower's features, else the pixels."""
        if "image" not in self.towers or not len(pixels):
            return pixels
        return self.towers["image"](pixels.to(self.world.device)).pooled.cpu()

    def remembering(self, encoder: DualEncoder) -> DualEncoder:
        """Returns the encoder of a validation, which runs a cached text tower once for each text."""
        if "text" not in self.towers:
            return encoder
        known: dict[str, Tensor] = {}
        method, tower, device = self.method, self.towers["text"], self.world.device

        @torch.no_grad()
        def encode_text(texts: Sequence[str]) -> Any:
            method.eval()
            if new := [text for text in texts if text not in known]:
                ids, lengths = self.tokenizer(new, context_length(self.method))
                known.update(zip(new, tower(ids.to(device), lengths.to(device)).pooled.cpu()))
            pooled = torch.stack([known[text] for text in texts]).to(device)
            return method.encode_text(pooled, torch.zeros(len(pooled), dtype=torch.int64, device=device))

        return replace(encoder, encode_text=encode_text)

    @torch.no_grad()
    def replaced(self, batch: Batch) -> Batch:
        """Returns a batch of pixels and ids as training reads it: with the features of cached towers."""
        images, texts, device = batch.images, batch.texts, self.world.device
        self.method.eval()
        if image := self.towers.get("image"):
            images = {
                name: replace(view, pixels=image(view.pixels.to(device)).pooled.cpu()) for name, view in images.items()
            }
        if text := self.towers.get("text"):
            texts = {
                name: TextView(text(view.ids.to(device), view.lengths.to(device)).pooled.cpu(), 0 * view.lengths)
                for name, view in texts.items()
            }
        return replace(batch, images=images, texts=texts)

    def remove(self) -> None:
        """Deletes the files from the first process, unless runs share them."""
        if self.world.is_first and not self.is_shared:
            rmtree(self.folder, ignore_errors=True)


@dataclass
class _Loader:
    """Loads the inputs of a chunk by its number, in a worker."""

    load: Callable[[slice], Any]
    chunks: list[slice]

    def __call__(self, number: int) -> Any:
        return self.load(self.chunks[number])


def _record(source: Source, index: int) -> tuple[str, tuple[str, ...]]:
    """Returns the key and the captions of a sample; the reason and no captions if it is bad."""
    try:
        record = source.record(index)
    except BadSample as bad:
        return bad.reason, ()
    return record.key, record.captions


def _digest(*values: Any) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for value in values:
        if isinstance(value, Mapping):
            for name, item in value.items():
                tensor = item.detach().cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        else:
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()
