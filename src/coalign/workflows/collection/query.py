"""A collection of embedded images, and queries to it: a text, an image, an indexed image, what not to show, tags and folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from coalign.data.images.decode import open_image
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_any
from coalign.data.text.prompts import DEFAULT, class_prompts
from coalign.embeds import pooled, similarities
from coalign.errors import BadSample, UserError
from coalign.evaluation.embed import embed_images, embed_joint, embed_texts
from coalign.types import DualEncoder, dot_product
from coalign.workflows.collection.classify import label_embeds, probabilities
from coalign.workflows.collection.embedding_settings import is_of_model
from coalign.workflows.collection.index_files import damaged, open_embeddings, read_faiss, read_info
from coalign.workflows.collection.nearest import ApproximateVectors, ExactVectors, Vectors, sample_of, stored_vectors
from coalign.workflows.collection.records import Records, StoredRecords
from coalign.workflows.evaluate.eval_model import EvalModel, device_for, open_eval_model
from coalign.workflows.evaluate.samples import reading_of, select_split
from coalign.workflows.image_files import encoder_view

CANDIDATES = 100  # images that a model's own similarity compares
EXCLUDED = 0.5  # weight of what not to show, relative to a part of the query


@dataclass(frozen=True)
class Query:
    """What to search for; at least one of text, image and like."""

    text: str | None = None
    image: Image.Image | None = None  # upright RGB
    like: str | None = None  # key of an image of the collection
    exclude: str | None = None  # a text that the images should not match
    tags: tuple[str, ...] = ()  # images have all of them
    folder: str | None = None  # images are in it or below it

    def check(self, top: int) -> None:
        """Raises UserError if a text is empty, there is nothing to search for, or nothing to return."""
        if top < 1:
            raise UserError(f"--top is {top}, but must be at least 1.")
        for what, text in (("to search for", self.text), ("to exclude", self.exclude)):
            if text is not None and not text.strip():
                raise UserError(f"The text {what} is empty.")
        if self.text is None and self.image is None and self.like is None:
            raise UserError("There is nothing to search for; give --text, --image or both.")


@dataclass(frozen=True)
class Found:
    """One image found by a search."""

    row: int  # of the image in the collection
    key: str
    score: float  # similarity to the query; of a query of several parts, their weighted mean in standard deviations
    captions: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    found: list[Found]  # best first
    query: str  # how the query was embedded
    searched: int  # images that pass the filters
    missing: int = 0  # images near the query that could not be read again, which a model's own similarity needs


@dataclass(frozen=True)
class _Part:
    """A part of a query: its embeds, one sample, and their vector, [dim]."""

    embeds: Any
    vector: np.ndarray
    weight: float = 1.0


# rows -> the embeds of their images, and the positions in `rows` of those that could be read
EmbedsOf = Callable[[np.ndarray], tuple[Any, list[int]]]


class Collection:
    """Embedded images that can be searched. Safe to use from several threads.

    A model that compares cosines ranks all images by them. Of a model with its own similarity, the images nearest by their mean vectors
    are the candidates, which are embedded again and ranked by the similarity.

    Attributes:
        name: The name in pages.
        model: The model that embeds queries.
        records: Keys, captions, tags and images by row.
        size: The number of images.
        dim: The length of their vectors.
        device: Where the model embeds queries.
    """

    def __init__(
        self,
        name: str,
        model: EvalModel,
        vectors: Vectors,
        records: Records,
        embeds_of: EmbedsOf | None = None,
        candidates: int = CANDIDATES,
        device: str = "cpu",
    ) -> None:
        """embeds_of: how candidates are embedded; None: from their images."""
        self.name, self.model, self.records, self.device = name, model, records, device
        self.size, self.dim = vectors.size, vectors.dim
        self._vectors, self._candidates = vectors, candidates
        self._embeds_of = embeds_of or self._embed_again
        self._lock = Lock()  # tokenizers and some models cannot be used by several threads

    # ------------------------------------------------------------ search

    def search(self, query: Query, top: int = 50) -> list[Found]:
        """Returns the `top` images that match the query best. Raises UserError if it is empty or its filters match nothing known."""
        return self.answer(query, top).found

    def answer(self, query: Query, top: int = 50) -> Answer:
        """As `search`, with how the query was embedded."""
        query.check(top)
        rows = self.records.matching(query.tags, query.folder)
        searched = self.size if rows is None else len(rows)
        parts, description = self._parts(query)
        vector, offset = self._combined(parts)
        if self.model.encoder.compares_cosines:
            scores, rows = self._vectors.nearest(vector, top, rows)
            return Answer(self._found(rows, scores + offset), description, searched)
        _, candidates = self._vectors.nearest(vector, max(top, self._candidates), rows)
        if not len(candidates):
            return Answer([], description, searched)
        rows, scores = self._compare(parts, candidates)
        missing = len(candidates) - len(rows)
        return Answer(self._found(rows[:top], scores[:top]), description, searched, missing)

    def _found(self, rows: np.ndarray, scores: np.ndarray) -> list[Found]:
        records = self.records
        return [
            Found(row, records.key(row), score, records.captions(row), records.tags(row))
            for row, score in zip(rows.tolist(), scores.tolist())
        ]

    def _parts(self, query: Query) -> tuple[list[_Part], str]:
        """Embeds the query. Returns its parts, and a description."""
        pictures = [] if query.image is None else [query.image]
        images = [self._of_image(image) for image in pictures]
        if query.like is not None:
            images.append(self._of_row(self.records.row(query.like)))
        excluded = [] if query.exclude is None else [self._of_text(query.exclude, -EXCLUDED)]
        suffix = f", without {query.exclude!r}" if excluded else ""
        if query.text is not None and len(images) == 1 and self.model.has_joint:
            (picture,) = pictures or [self.image_file(self.records.row(query.like or ""))]
            return [self._of_both(picture, query.text), *excluded], f"image and text as one sequence{suffix}"
        texts = [] if query.text is None else [self._of_text(query.text)]
        kinds = " and ".join(["image"] * len(images) + ["text"] * len(texts))
        parts = [*images, *texts, *excluded]
        if len(parts) > 1:
            suffix += ", each standardized over the collection"
        return parts, kinds + suffix

    def _combined(self, parts: Sequence[_Part]) -> tuple[np.ndarray, float]:
        """Returns a vector and an offset: the score of an image is its product with the vector, plus the offset.

        The similarities to one part are the score. Of several parts, each is standardized over the collection first, as similarities of
        two images vary more than those of an image and a text, and would outweigh them.
        """
        if len(parts) == 1:
            return parts[0].vector, 0.0
        vectors = np.stack([part.vector for part in parts])
        mean, scale = _statistics(self._sample @ vectors.T)
        weights = _weights(parts) / scale
        return weights @ vectors, -float(weights @ mean)

    def _compare(self, parts: Sequence[_Part], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ranks rows by the model's own similarity. Returns those whose image can be read, best first, and their scores."""
        embeds, kept = self._embeds_of(rows)
        if not kept:
            raise UserError(
                f"None of the {len(rows):,} images nearest to the query can be read, and {self.model.name} compares images itself; "
                "run `coalign index` again."
            )
        with self._lock, torch.no_grad():
            compared = [similarities(self.model.encoder.similarity, embeds, part.embeds) for part in parts]
        values = torch.cat(compared, dim=1).numpy()
        scores = values[:, 0]
        if len(parts) > 1:
            mean, scale = _statistics(values)
            scores = (values - mean) / scale @ _weights(parts)
        order = np.argsort(-scores, kind="stable")
        return rows[kept][order], scores[order]

    @cached_property
    def _sample(self) -> np.ndarray:
        return sample_of(self._vectors)

    # ------------------------------------------------------------ embedding

    def embed_text(self, text: str) -> np.ndarray:
        """Returns the vector of a text, float32 [dim]."""
        return self._of_text(text).vector

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of texts, float32 [text, dim], embedded in batches."""
        with self._lock:
            return pooled(embed_texts(self.model.encoder, texts)).numpy()

    def embed_image(self, image: Image.Image) -> np.ndarray:
        """Returns the vector of an image, float32 [dim]."""
        return self._of_image(image).vector

    def embeddings(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns the vectors of images, float32 [row, dim]: at `rows`, or of all, which are read once."""
        return self._vectors.all() if rows is None else self._vectors.at(rows)

    def _of_text(self, text: str, weight: float = 1.0) -> _Part:
        with self._lock:
            return _part(embed_texts(self.model.encoder, [text]), weight)

    def _of_image(self, image: Image.Image) -> _Part:
        pixels = encoder_view(np.asarray(image.convert("RGB")), self.model.encoder)
        with self._lock:
            return _part(embed_images(self.model.encoder, [([0], pixels, [])]).embeds)

    def _of_both(self, image: Image.Image, text: str) -> _Part:
        pixels = encoder_view(np.asarray(image.convert("RGB")), self.model.encoder)
        with self._lock:
            return _part(embed_joint(self.model.encoder, self.model.joint_encoder(), pixels, [text]))

    def _of_row(self, row: int) -> _Part:
        if not self.model.encoder.compares_cosines:
            return self._of_image(self.image_file(row))
        vector = self._vectors.at(np.array([row]))[0]
        return _Part(torch.from_numpy(vector)[None], vector)

    def _embed_again(self, rows: np.ndarray) -> tuple[Any, list[int]]:
        views, kept = [], []
        for position, row in enumerate(rows.tolist()):
            try:
                views.append(encoder_view(self.records.image(row), self.model.encoder))
                kept.append(position)
            except BadSample:  # gone or changed since it was embedded; counted by the caller
                continue
        if not kept:
            return torch.empty(0), kept
        with self._lock, torch.no_grad():
            return embed_images(self.model.encoder, [(kept, torch.cat(views), [])]).embeds, kept

    # ------------------------------------------------------------ images, classes, tags

    def image_file(self, row: int) -> Image.Image:
        """Returns an image, upright RGB, read from the data. Raises UserError if it is gone or cannot be read."""
        try:
            return Image.fromarray(open_image(self.records.image(row)).decode())
        except BadSample as bad:
            raise UserError(f"The image {self.records.key(row)} cannot be read: {bad.reason}.") from bad

    def classify(
        self, image: Image.Image, labels: Sequence[str], prompts: Sequence[str] = ()
    ) -> list[tuple[str, float]]:
        """Returns the probability of each label, the most probable first. prompts: templates with {} for the label; none: the default.

        Raises UserError if there are fewer than two labels, one is repeated, or a template has no {}.
        """
        texts = dict(zip(labels, class_prompts(labels, prompts or DEFAULT)))
        part = self._of_image(image)
        with self._lock, torch.no_grad():
            found = probabilities(self.model, part.embeds, label_embeds(self.model, texts))[0].tolist()
        return sorted(zip(labels, found), key=lambda pair: -pair[1])

    def tags(self) -> list[tuple[str, int]]:
        """Returns the tags and their number of images, the most frequent first."""
        counts = [(tag, len(rows)) for tag, rows in self.records.by_tag.items()]
        return sorted(counts, key=lambda pair: -pair[1])

    def folders(self) -> list[tuple[str, int]]:
        """Returns the folders and the number of images in each and below it, by name."""
        return [(folder, len(rows)) for folder, rows in self.records.by_folder.items()]


def one_vector(encoder: DualEncoder) -> DualEncoder:
    """Returns the encoder, or of one with its own similarity, an encoder of the mean vectors of its embeds (`coalign.embeds.pooled`)."""
    if encoder.compares_cosines:
        return encoder
    return replace(
        encoder,
        encode_image=lambda pixels: pooled(encoder.encode_image(pixels)),
        encode_text=lambda texts: pooled(encoder.encode_text(texts)),
        similarity=dot_product,
    )


def open_collection(index_folder: str | Path, device: str | None = None) -> Collection:
    """Opens an index for queries.

    Args:
        index_folder: A folder that `coalign index` has written.
        device: Where queries are embedded; None: the best there is.

    Raises:
        UserError: It is not an index of this version, a file of it is missing or damaged, or its model has changed or cannot be opened.
    """
    folder = Path(index_folder)
    info = read_info(folder)
    files = open_embeddings(folder, info)
    index = read_faiss(folder, info)
    try:
        device = device_for(info.model, device)
        model = open_eval_model(info.model, device=device)
    except UserError as error:
        raise UserError(f"The model of the index {folder} cannot be opened: {error}") from error
    if not is_of_model(files.manifest, replace(model, encoder=one_vector(model.encoder))):
        raise UserError(
            f"The model {info.model} has changed since {folder} was built; build an index of it in another folder."
        )

    def load() -> np.ndarray:
        try:
            return files.images()[0]
        except UserError as error:
            raise UserError(
                f"The embeddings of the index {folder} were updated or damaged since it was opened; open it again."
            ) from error

    vectors: Vectors = ExactVectors(stored_vectors(index)) if info.kind == "exact" else ApproximateVectors(index, load)
    try:
        columns = files.table(["key", "captions", "tags"])
        numbers = np.arange(len(columns)) if info.bad == 0 else files.images()[1]
    except UserError as error:
        raise damaged(folder, error) from error

    def open_data() -> tuple[Source, np.ndarray]:
        try:
            source = open_any(info.data, reading_of(info.data, model.run, info.reading))
        except UserError as error:
            raise UserError(f"The images of the index {folder} cannot be read: {error}") from error
        return source, select_split(source, info.data, model.run, info.split)[1]

    records = StoredRecords(columns.take(numbers), numbers, open_data)
    return Collection(folder.resolve().name, model, vectors, records, device=device)


def _part(embeds: Any, weight: float = 1.0) -> _Part:
    return _Part(embeds, pooled(embeds)[0].numpy(), weight)


def _weights(parts: Sequence[_Part]) -> np.ndarray:
    weights = np.array([part.weight for part in parts], np.float32)
    return weights / np.abs(weights).sum()


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the similarities [image, part] to each part; a part that all images match alike has 1."""
    scale = values.std(0)
    return values.mean(0), np.where(scale > 1e-6, scale, 1.0)
