"""What each endpoint of the API does: plain functions of a validated request, which run in the worker's thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException

from coalign.errors import UserError
from coalign.serve import schemas
from coalign.serve.limits import Limits
from coalign.serve.localization import draw_heat_map
from coalign.serve.pictures import encode_jpeg, encode_png, uploaded_image
from coalign.workflows.collection.query import Collection, Query

MAX_POINTS = 5000  # of a map
MAX_FILTERS = 500  # tags and folders that are listed, the largest
MAX_LABEL_TEXTS = 2000  # labels × prompts, each of which is embedded
_CHUNK = 65_536  # embeddings compared at once


class Shelf:
    """A collection, with what is computed once."""

    def __init__(self, number: int, collection: Collection) -> None:
        self.number, self.collection = number, collection

    @cached_property
    def info(self) -> schemas.CollectionInfo:
        collection, model = self.collection, self.collection.model
        try:
            model.localizer()
            can_localize = True
        except UserError:
            can_localize = False
        return schemas.CollectionInfo(
            id=self.number,
            name=collection.name,
            model=model.name,
            size=collection.size,
            dim=collection.dim,
            tags=_largest(collection.tags()),
            folders=_largest(collection.folders()),
            can=schemas.Abilities(localize=can_localize, joint=model.has_joint),
        )

    @cached_property
    def map(self) -> schemas.Map:
        size = self.collection.size
        rows = np.arange(size) if size <= MAX_POINTS else np.linspace(0, size - 1, MAX_POINTS).astype(int)
        places = principal_components(np.asarray(self.collection.embeddings(rows), np.float32)).tolist()
        return schemas.Map(points=[[row, x, y] for row, (x, y) in zip(rows.tolist(), places)])


class Service:
    """The collections of a server. Methods raise UserError or HTTPException, whose sentences are the responses."""

    def __init__(self, collections: Sequence[Collection], limits: Limits) -> None:
        self.shelves = [Shelf(number, collection) for number, collection in enumerate(collections)]
        self.limits = limits

    def health(self, given: schemas.Nothing) -> schemas.Health:
        return schemas.Health()

    def list_collections(self, given: schemas.Nothing) -> schemas.Collections:
        return schemas.Collections(collections=[shelf.info for shelf in self.shelves])

    def search(self, given: schemas.SearchJson) -> schemas.SearchResult:
        collection = self._shelf(given.collection).collection
        start = time.perf_counter()
        data = given.image if isinstance(given, schemas.SearchForm) else None
        image = None if data is None else self._upload(data)
        query = Query(given.text, image, given.like, given.exclude, given.tags, given.folder)
        answer = collection.answer(query, given.top)
        hits = [
            schemas.Hit(row=each.row, key=each.key, score=each.score, captions=each.captions, tags=each.tags)
            for each in answer.found
        ]
        seconds = time.perf_counter() - start
        return schemas.SearchResult(hits=hits, query=answer.query, missing=answer.missing, seconds=seconds)

    def item(self, given: schemas.ItemPath) -> schemas.Item:
        records = self._with_row(given.collection, given.row).records
        captions, tags = records.captions(given.row), records.tags(given.row)
        return schemas.Item(row=given.row, key=records.key(given.row), captions=captions, tags=tags)

    def image(self, given: schemas.ImagePath) -> bytes:
        return encode_jpeg(self._picture(given.collection, given.row), given.side)

    def classify(self, given: schemas.ClassifyForm) -> schemas.Classified:
        collection = self._shelf(given.collection).collection
        _check_labels(given.labels, given.prompts)
        if given.row is not None and given.image is None:
            image = self._picture(given.collection, given.row)
        elif given.image is not None and given.row is None:
            image = self._upload(given.image)
        else:
            raise UserError("Give either row or image.")
        probabilities = collection.classify(image, given.labels, given.prompts)
        return schemas.Classified(
            labels=[schemas.LabelProbability(label=label, probability=value) for label, value in probabilities]
        )

    def classify_collection(self, given: schemas.ClassifyCollection) -> schemas.ClassifiedCollection:
        """Assigns each image to its nearest label. A label's vector is the normalized mean of its prompts' embeddings."""
        collection = self._shelf(given.collection).collection
        _check_labels(given.labels, given.prompts)
        texts = [prompt.replace("{}", label) for label in given.labels for prompt in given.prompts]
        sums = collection.embed_texts(texts).reshape(len(given.labels), len(given.prompts), -1).sum(1)
        vectors = sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)
        best, scores = nearest_label(collection.embeddings(), vectors)
        labels = []
        for number, label in enumerate(given.labels):
            rows = np.flatnonzero(best == number)
            top = rows[np.argsort(-scores[rows], kind="stable")[: given.top]]
            hits = [_hit(collection, row, float(scores[row])) for row in top.tolist()]
            labels.append(schemas.LabelImages(label=label, count=len(rows), hits=hits))
        return schemas.ClassifiedCollection(labels=labels)

    def localize(self, given: schemas.Localize) -> bytes:
        model = self._shelf(given.collection).collection.model
        return encode_png(draw_heat_map(model, self._picture(given.collection, given.row), given.text))

    def map(self, given: schemas.CollectionPath) -> schemas.Map:
        return self._shelf(given.collection).map

    def _shelf(self, number: int) -> Shelf:
        if number >= len(self.shelves):
            raise HTTPException(404, f"There is no collection {number}; this server has {len(self.shelves)}, from 0.")
        return self.shelves[number]

    def _with_row(self, number: int, row: int) -> Collection:
        collection = self._shelf(number).collection
        if row >= collection.size:
            raise HTTPException(
                404, f"There is no row {row} in collection {number}, which has {collection.size:,} images."
            )
        return collection

    def _picture(self, number: int, row: int) -> Image.Image:
        collection = self._with_row(number, row)
        try:
            return collection.image_file(row)
        except UserError as error:
            raise HTTPException(404, str(error)) from error

    def _upload(self, data: bytes) -> Image.Image:
        return uploaded_image(data, self.limits.image_pixels)


def principal_components(embeds: np.ndarray) -> np.ndarray:
    """Projects embeds [row, dim] to their first two principal components, scaled by one factor into [0, 1]: [row, 2]."""
    centered = embeds - embeds.mean(0)
    axes = np.linalg.eigh(centered.T @ centered)[1]  # by increasing variance
    places = np.zeros((len(embeds), 2))
    places[:, : embeds.shape[1]] = centered @ axes[:, :-3:-1]
    low, high = places.min(0), places.max(0)
    span = float((high - low).max())
    return (0.5 + (places - (low + high) / 2) / (span or 1.0)).clip(0, 1)


def nearest_label(embeds: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest of the vectors [label, dim] to each of the embeds [row, dim], and the cosines to it."""
    parts = [(part @ vectors.T) for part in _chunks(embeds)]
    best = np.concatenate([part.argmax(1) for part in parts])
    return best, np.concatenate([part.max(1) for part in parts])


def _chunks(embeds: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(embeds), _CHUNK):
        yield np.asarray(embeds[start : start + _CHUNK], np.float32)


def _check_labels(labels: Sequence[str], prompts: Sequence[str]) -> None:
    if len(set(labels)) < len(labels):
        raise UserError("Each label must be given once.")
    if len(labels) * len(prompts) > MAX_LABEL_TEXTS:
        raise UserError(
            f"There are {len(labels)} labels × {len(prompts)} prompts; at most {MAX_LABEL_TEXTS} texts are embedded."
        )


def _largest(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Returns the groups with the most images, in their order."""
    least = sorted((count for _, count in counts), reverse=True)[:MAX_FILTERS][-1:]
    return [group for group in counts if group[1] >= least[0]][:MAX_FILTERS] if least else []


def _hit(collection: Collection, row: int, score: float) -> schemas.Hit:
    records = collection.records
    return schemas.Hit(
        row=row, key=records.key(row), score=score, captions=records.captions(row), tags=records.tags(row)
    )
