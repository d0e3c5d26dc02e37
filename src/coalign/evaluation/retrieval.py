"""Image-text retrieval in both directions, with any number of captions an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts, require_finite
from coalign.evaluation.metrics import TIE, Metric
from coalign.types import DualEncoder

RECALL_AT = (1, 5, 10)
_CHUNK = 2_000_000  # similarities held at a time


@dataclass
class Direction:
    """One direction of retrieval. Arrays have a row per query, in the order of `queries`."""

    recall: dict[int, Metric]  # R@K: the share of queries with a right answer among the first K
    chance: dict[int, float]  # R@K of a random order, exactly, from each query's number of right answers
    median_rank: Metric  # of each query's best right answer; 1 is the best
    chance_median_rank: float
    queries: np.ndarray  # int64 [query]: row of the query; images without a caption ask nothing
    clusters: np.ndarray  # int64 [query]: row of the query's image; the bootstrap draws images with all their captions
    hits: dict[
        int, np.ndarray
    ]  # float64 [query]: whether a right answer is among the first K (its probability under ties)
    ranks: np.ndarray  # float64 [query]: rank of the best right answer (expected rank where it ties with wrong ones)
    top: np.ndarray  # int64 [query, 10 or fewer]: rows of the best answers
    top_scores: np.ndarray  # float32, their cosines
    top_right: np.ndarray  # bool, whether each is right

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            f"r{k}": {**metric.to_json(), "chance": self.chance[k]} for k, metric in self.recall.items()
        }
        out["median_rank"] = {**self.median_rank.to_json(), "chance": self.chance_median_rank}
        return out

    def outcomes(self) -> dict[str, np.ndarray]:
        """What the figures of `to_json` are means or medians of, query by query, and the queries' clusters."""
        hits = {f"r{k}": values for k, values in self.hits.items()}
        return {**hits, "median_rank": self.ranks, "clusters": self.clusters}


@dataclass
class RetrievalResult:
    image_to_text: Direction
    text_to_image: Direction
    num_images: int
    num_texts: int
    num_distinct_texts: int  # fewer than the texts: equal captions count as right for every image that has them
    num_captionless: int  # images that are candidates but ask nothing
    modality_gap: float  # distance of the centroids of images and captions, 0 … 2 (Liang et al. 2022)

    def to_json(self) -> dict[str, Any]:
        """Both directions; the recalls also under CLIP_benchmark's names (`image_retrieval` finds images by text)."""
        named = (("image_retrieval", self.text_to_image), ("text_retrieval", self.image_to_text))
        return {
            "task": "zeroshot_retrieval",
            **{f"{name}_recall@{k}": metric.value for name, side in named for k, metric in side.recall.items()},
            "image_to_text": self.image_to_text.to_json(),
            "text_to_image": self.text_to_image.to_json(),
            "images": self.num_images,
            "captions": self.num_texts,
            "distinct_captions": self.num_distinct_texts,
            "images_without_caption": self.num_captionless,
            "modality_gap": self.modality_gap,
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        sides = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        found = {f"{name}.{key}": values for name, side in sides.items() for key, values in side.outcomes().items()}
        return {**found, "modality_gap": np.array([self.modality_gap])}


@dataclass
class _Lists:
    """Lists of integers of different lengths: `values[start[row]:start[row + 1]]`."""

    start: np.ndarray
    values: np.ndarray

    @classmethod
    def group(cls, keys: np.ndarray, values: np.ndarray, num_keys: int) -> _Lists:
        order = np.argsort(keys, kind="stable")
        return cls(np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=num_keys))]), values[order])

    def lengths(self) -> np.ndarray:
        return np.diff(self.start)

    def mask(self, rows: np.ndarray, width: int) -> np.ndarray:
        """bool [row, width], true at the values of each row's list."""
        out = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            out[i, self.values[self.start[row] : self.start[row + 1]]] = True
        return out


def retrieval(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, text_ids: Tensor | None = None, seed: int = 0
) -> RetrievalResult:
    """Scores normalised image_embeds [image, dim] and text_embeds [text, dim].

    image_of_text: int64 [text], the row of each text's image. text_ids: int64 [text], equal exactly where the captions
    are equal: an equal caption is right for every image that has it. Memory is bounded: the full matrix of similarities
    is never held. Intervals come from resampling images, each with all of its captions.
    """
    num_images, num_texts = len(image_embeds), len(text_embeds)
    if not num_images or not num_texts:
        raise UserError(f"There is nothing to retrieve: the data gave {num_images} images and {num_texts} captions.")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"images have {image_embeds.shape[1]} dimensions and texts {text_embeds.shape[1]}")
    owner = image_of_text.numpy()
    if len(owner) != num_texts or owner.min() < 0 or owner.max() >= num_images:
        raise ValueError(f"image_of_text must give one of {num_images} images for each of {num_texts} texts")
    require_finite(image_embeds, "Image")
    require_finite(text_embeds, "Text")

    ids = np.arange(num_texts) if text_ids is None else np.unique(text_ids.numpy(), return_inverse=True)[1]
    num_ids = int(ids.max()) + 1
    pairs = np.unique(np.stack([owner, ids], 1), axis=0)  # which image has which caption
    ids_of_image = _Lists.group(pairs[:, 0], pairs[:, 1], num_images)
    images_of_id = _Lists.group(pairs[:, 1], pairs[:, 0], num_ids)

    asking = np.flatnonzero(ids_of_image.lengths())
    texts = np.arange(num_texts)
    return RetrievalResult(
        image_to_text=_search(
            image_embeds, text_embeds, asking, asking, lambda rows: ids_of_image.mask(rows, num_ids)[:, ids], seed
        ),
        text_to_image=_search(
            text_embeds, image_embeds, texts, owner, lambda rows: images_of_id.mask(ids[rows], num_images), seed
        ),
        num_images=num_images,
        num_texts=num_texts,
        num_distinct_texts=num_ids,
        num_captionless=num_images - len(asking),
        modality_gap=float((image_embeds.mean(0) - text_embeds.mean(0)).norm()),
    )


def retrieve(
    model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], Sequence[str]], batch_size: int = 256
) -> Evaluation:
    """Scores the images of `embed_images` against all captions of their indices. An equal caption is right for every image that has it."""
    texts: list[str] = []
    owner: list[int] = []
    for row, index in enumerate(images.indices):
        own = captions(index)
        texts.extend(own)
        owner.extend([row] * len(own))
    text_embeds = embed_texts(model, texts, batch_size)
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = torch.tensor([number[text] for text in texts])
    return Evaluation(retrieval(images.embeds, text_embeds, torch.tensor(owner), ids), images, texts, text_embeds)


FOLD = 1000  # images, of COCO's 1K protocol (Karpathy and Fei-Fei 2015)


@dataclass
class FoldsResult:
    """Retrieval among FOLD images at a time: the figures of all queries of all folds."""

    folds: list[RetrievalResult]
    left_over: int  # images that made no whole fold
    image_to_text: dict[str, dict[str, Any]]  # r1, r5, r10 and median_rank, each with its chance
    text_to_image: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "zeroshot_retrieval_folds",
            "folds": len(self.folds),
            "images": sum(result.num_images for result in self.folds),
            "left_over": self.left_over,
            "image_to_text": self.image_to_text,
            "text_to_image": self.text_to_image,
        }


def retrieve_in_folds(
    model: DualEncoder,
    images: ImageEmbeds,
    captions: Callable[[int], Sequence[str]],
    order: Sequence[int] | np.ndarray,
    fold: int = FOLD,
) -> FoldsResult:
    """Retrieval among each `fold` samples of `order` in turn, of which those that could not be read are missing. UserError for less than a
    fold, and for a fold without images."""
    count = len(order) // fold
    if not count:
        raise UserError(f"There are {len(order):,} images, which is less than a fold of {fold:,}.")
    place = {int(index): position for position, index in enumerate(order)}
    folds = []
    for number in range(count):
        rows = [row for row, index in enumerate(images.indices) if place[index] // fold == number]
        if not rows:
            raise UserError(f"No image of fold {number + 1} could be read.")
        part = ImageEmbeds(images.embeds[rows], [images.indices[row] for row in rows])
        folds.append(retrieve(model, part, captions).result)
    sides = [_joined([getattr(result, name) for result in folds], fold) for name in ("image_to_text", "text_to_image")]
    return FoldsResult(folds, len(order) - count * fold, *sides)


def _joined(sides: Sequence[Direction], fold: int) -> dict[str, dict[str, Any]]:
    """The figures of one direction over all folds; chance is weighted by the folds' queries."""
    clusters = np.concatenate([side.clusters + number * fold for number, side in enumerate(sides)])
    weights = [len(side.queries) for side in sides]

    def entry(metric: Metric, chances: Sequence[float]) -> dict[str, Any]:
        return {**metric.to_json(), "chance": float(np.average(chances, weights=weights))}

    found = {
        f"r{k}": entry(
            metrics.mean(np.concatenate([side.hits[k] for side in sides]), clusters), [side.chance[k] for side in sides]
        )
        for k in RECALL_AT
    }
    ranks = np.concatenate([side.ranks for side in sides])
    return found | {"median_rank": entry(metrics.median(ranks, clusters), [s.chance_median_rank for s in sides])}


def _search(
    queries: Tensor,
    candidates: Tensor,
    rows: np.ndarray,
    clusters: np.ndarray,
    right_answers: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> Direction:
    """Ranks all candidates for the query rows; `right_answers(rows)` -> bool [row, candidate], one or more in a row."""
    step = max(16, _CHUNK // len(candidates))
    shown = min(max(RECALL_AT), len(candidates))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        right = torch.from_numpy(right_answers(chunk))  # [query, candidate]
        scores = queries[torch.from_numpy(chunk)] @ candidates.T
        top_scores, top = scores.topk(shown, dim=1)
        of_right = torch.where(right, scores, -torch.inf)
        best = of_right.amax(1, keepdim=True)
        tied_right = _count(of_right >= best - TIE)
        better = _count(scores.masked_fill_(right, -torch.inf) > best + TIE)
        tied_wrong = _count(scores >= best - TIE) - better
        parts.append((better, tied_wrong, tied_right, _count(right), top, top_scores, right.gather(1, top)))
    better_n, wrong_n, right_n, num_right, top_n, scores_n, top_right = (
        torch.cat(part).numpy() for part in zip(*parts)
    )

    nothing, wrong = np.zeros_like(num_right), len(candidates) - num_right
    ranks = 1 + better_n + wrong_n / (right_n + 1)
    found = {k: metrics.hit_probability(better_n, wrong_n, right_n, k) for k in RECALL_AT}
    return Direction(
        recall={k: metrics.mean(hits, clusters, seed) for k, hits in found.items()},
        chance={k: float(metrics.hit_probability(nothing, wrong, num_right, k).mean()) for k in RECALL_AT},
        median_rank=metrics.median(ranks, clusters, seed),
        chance_median_rank=metrics.chance_median_rank(wrong, num_right),
        queries=rows,
        clusters=clusters,
        hits=found,
        ranks=ranks,
        top=top_n,
        top_scores=scores_n,
        top_right=top_right,
    )


def _count(mask: Tensor) -> Tensor:
    """True values of each row; numpy counts them several times as fast as torch does."""
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
