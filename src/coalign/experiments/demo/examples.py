"""What the demo's page shows of the data and of the models: pairs, and the first images that searches find."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coalign.data.images.decode import open_image
from coalign.data.loading.eval import image_batches
from coalign.data.sources.base import Source
from coalign.embeds import similarities
from coalign.errors import BadSample
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.report.demo_page import Search
from coalign.report.page import GalleryCell
from coalign.runs.run import load
from coalign.types import DualEncoder
from coalign.workflows.evaluate.samples import captions_of

_STARTS = ("image_tuning", "model", "pretrained", "image_tower", "init_from", "image_size")
TOP = 5  # images per search and method
_SIDE = 128  # pixels of the longer side of an image on the page
_GAP = 10  # pixels between the two drawings of an emoji


def words(text: str) -> frozenset[str]:
    """Returns the words of a text, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower()))


def is_hit(query: str, captions: Sequence[str]) -> bool:
    """Whether one of an image's captions has all words of the query."""
    return any(words(query) <= words(caption) for caption in captions)


def evenly_spaced(items: Sequence[str], number: int) -> list[str]:
    """Returns `number` items, evenly spaced in alphabetical order: the middle ones of equal parts."""
    ordered = sorted(set(items))
    number = min(number, len(ordered))
    return [ordered[(2 * position + 1) * len(ordered) // (2 * number)] for position in range(number)]


def search(runs: Mapping[str, Path], source: Source, indices: np.ndarray, queries: Mapping[str, str]) -> list[Search]:
    """Searches images for each query, by the model of each run. queries: text -> a remark on it.

    A locked image encoder that several runs start from runs once.
    """
    captions = captions_of(source)
    nearest: dict[str, list[list[int]]] = {}
    features: dict[Any, list[Any]] = {}  # of locked image encoders, by what they start from
    for name, folder in runs.items():
        run = load(folder)
        encoder, start = run.encoder(), tuple(getattr(run.config, setting) for setting in _STARTS)
        batches: Iterable[Any] | None = features.get(start)
        if batches is None:
            batches = image_batches(source, indices, encoder.image_size, preprocess=encoder.preprocess)
            if run.config.image_tuning == "locked":
                batches = _remembered(batches, encoder, features.setdefault(start, []))
        images = embed_images(encoder, batches, total=len(indices))
        scores = similarities(encoder.similarity, images.embeds, embed_texts(encoder, list(queries))).T
        top = scores.topk(min(TOP, len(images.indices))).indices.tolist()
        nearest[name] = [[images.indices[row] for row in rows] for rows in top]
    found = []
    for number, (query, remark) in enumerate(queries.items()):
        results = {
            name: [
                GalleryCell(picture(source, index), " / ".join(captions(index)), is_hit(query, captions(index)))
                for index in of_query[number]
            ]
            for name, of_query in nearest.items()
        }
        found.append(Search(GalleryCell(None, query, note=remark), results))
    return found


def _remembered(batches: Iterable[Any], encoder: DualEncoder, kept: list[Any]) -> Iterator[Any]:
    """Yields batches with the features of a locked image encoder instead of pixels, and keeps them."""
    assert encoder.image_features is not None
    for indices, pixels, bad in batches:
        kept.append((indices, encoder.image_features(pixels) if indices else pixels, bad))
        yield kept[-1]


def picture(source: Source, index: int) -> np.ndarray:
    """Returns an image for the page, uint8 [height, width, 3]; small ones in their own size."""
    image = Image.fromarray(open_image(source.image(index)).decode())
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def examples(source: Source, indices: Sequence[int], number: int) -> list[GalleryCell]:
    """Returns some pairs, evenly spaced in the order of their first captions."""
    cells: list[GalleryCell] = []
    captions = captions_of(source)
    by_caption = {texts[0]: index for index in indices if (texts := captions(index))}
    for caption in evenly_spaced(list(by_caption), number):
        try:
            cells.append(GalleryCell(picture(source, by_caption[caption]), caption))
        except BadSample:
            continue
    return cells


def middle_names(source: Source, indices: Sequence[int], number: int) -> list[str]:
    """Returns the middle name, in alphabetical order, of each of the largest groups of Unicode among the emoji at `indices`."""
    groups: dict[str, list[str]] = {}
    for index in indices:
        record = source.record(index)
        if group := record.fact("category"):
            groups.setdefault(group, []).append(record.captions[0])
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:number]
    return [name for group in sorted(largest) for name in evenly_spaced(groups[group], 1)]


def same_emoji(source: Source, names: Sequence[str], vendors: Sequence[str]) -> list[GalleryCell]:
    """Returns the drawings of each emoji by the vendors that have it, side by side."""
    drawn: dict[str, dict[str, int]] = {name: {} for name in names}
    for index in range(len(source)):
        record = source.record(index)
        if record.captions[0] in drawn:
            drawn[record.captions[0]].setdefault(record.fact("vendor"), index)
    cells = []
    for name, by_vendor in drawn.items():
        pictures = [picture(source, by_vendor[vendor]) for vendor in vendors if vendor in by_vendor]
        gap = np.full((len(pictures[0]), _GAP, 3), 255, np.uint8)
        parts = [part for each in pictures for part in (gap, each)][1:]
        cells.append(GalleryCell(np.concatenate(parts, axis=1), name))
    return cells
