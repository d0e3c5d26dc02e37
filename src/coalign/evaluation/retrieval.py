"""Image-text retrieval in both directions, with any number of captions per image."""

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
_CHUNK = 2_000_000  # similarities in memory at a time


@dataclass
class Direction:
    """One direction of retrieval. Arrays have a row per query, in the order of `queries`."""

    recall: dict[int, Metric]  # R@K: fraction of queries with a correct result among the top K
    chance: dict[int, float]  # exact R@K of a random order, given each query's number of correct candidates
    median_rank: Metric  # of each query's best correct result; 1 is the best
    chance_median_rank: float
    queries: np.ndarray  # int64 [query]: row of the query; images without a caption are not queries
    clusters: np.ndarray  # int64 [query]: row of the query's image; the bootstrap draws images with all their captions
    # K -> float64 [query]: whether a correct result is among the top K (its probability under ties)
    hits: dict[int, np.ndarray]
    ranks: np.ndarray  # float64 [query]: rank of the best correct result (expected rank if tied with incorrect ones)
    top: np.ndarray  # int64 [query, 10 or fewer]: rows of the top results
    top_scores: np.ndarray  # float32, their cosines
    top_correct: np.ndarray  # bool, whether each is correct

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            f"r{k}": {**metric.to_json(), "chance": self.chance[k]} for k, metric in self.recall.items()
        }
        out["median_rank"] = {**self.median_rank.to_json(), "chance": self.chance_median_rank}
        return out

    def outcomes(self) -> dict[str, np.ndarray]:
        """Returns the per-query values behind the metrics of `to_json`, and the queries' clusters."""
        hits = {f"r{k}": values for k, values in self.hits.items()}
        return {**hits, "median_rank": self.ranks, "clusters": self.clusters}


@dataclass
class RetrievalResult:
    image_to_text: Direction
    text_to_image: Direction
    num_images: int
    num_texts: int
    num_distinct_texts: int  # equal captions are one: each is correct for every image that has it
    num_captionless: int  # images that are candidates but not queries
    modality_gap: float  # distance between the centroids of images and captions, 0 to 2 (Liang et al. 2022)

    def to_json(self) -> dict[str, Any]:
        """Returns both directions, with the recalls also under CLIP_benchmark's names (`image_retrieval` is text to image)."""
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
        outcomes = {f"{name}.{key}": values for name, side in sides.items() for key, values in side.outcomes().items()}
        return {**outcomes, "modality_gap": np.array([self.modality_gap])}


@dataclass
class _RaggedLists:
    """Lists of integers of different lengths: `values[start[row]:start[row + 1]]`."""

    start: np.ndarray
    values: np.ndarray

    @classmethod
    def group(cls, keys: np.ndarray, values: np.ndarray, num_keys: int) -> _RaggedLists:
        order = np.argsort(keys, kind="stable")
        return cls(np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=num_keys))]), values[order])

    def lengths(self) -> np.ndarray:
        return np.diff(self.start)

    def mask(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Returns bool [row, width], true at the values of each row's list."""
        out = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            out[i, self.values[self.start[row] : self.start[row + 1]]] = True
        return out


def retrieval(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, text_ids: Tensor | None = None, seed: int = 0
) -> RetrievalResult:
    """Evaluates retrieval between normalized image_embeds [image, dim] and text_embeds [text, dim].

    image_of_text: int64 [text], the row of each text's image. text_ids: int64 [text], equal if and only if the captions are equal: a
    caption is correct for every image that has it. The full similarity matrix is never in memory. Intervals resample images, each with
    all of its captions.
    """
    num_images, num_texts = len(image_embeds), len(text_embeds)
    if not num_images or not num_texts:
        raise UserError(f"There is nothing to retrieve: the data has {num_images} images and {num_texts} captions.")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"images have {image_embeds.shape[1]} dimensions and texts {text_embeds.shape[1]}")
    image_rows = image_of_text.numpy()
    if len(image_rows) != num_texts or image_rows.min() < 0 or image_rows.max() >= num_images:
        raise ValueError(f"image_of_text must hold one of {num_images} image rows for each of {num_texts} texts")
    require_finite(image_embeds, "Image")
    require_finite(text_embeds, "Text")

    ids = np.arange(num_texts) if text_ids is None else np.unique(text_ids.numpy(), return_inverse=True)[1]
    num_ids = int(ids.max()) + 1
    pairs = np.unique(np.stack([image_rows, ids], 1), axis=0)  # distinct (image, caption id)
    ids_of_image = _RaggedLists.group(pairs[:, 0], pairs[:, 1], num_images)
    images_of_id = _RaggedLists.group(pairs[:, 1], pairs[:, 0], num_ids)

    captioned = np.flatnonzero(ids_of_image.lengths())
    texts = np.arange(num_texts)
    return RetrievalResult(
        image_to_text=_search(
            image_embeds, text_embeds, captioned, captioned, lambda rows: ids_of_image.mask(rows, num_ids)[:, ids], seed
        ),
        text_to_image=_search(
            text_embeds, image_embeds, texts, image_rows, lambda rows: images_of_id.mask(ids[rows], num_images), seed
        ),
        num_images=num_images,
        num_texts=num_texts,
        num_distinct_texts=num_ids,
        num_captionless=num_images - len(captioned),
        modality_gap=float((image_embeds.mean(0) - text_embeds.mean(0)).norm()),
    )


def retrieve(
    model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], Sequence[str]], batch_size: int = 256
) -> Evaluation:
    """Evaluates retrieval between the images of `embed_images` and all captions of their indices.

    A caption is correct for every image that has it.
    """
    texts: list[str] = []
    image_of_text: list[int] = []
    for row, index in enumerate(images.indices):
        image_captions = captions(index)
        texts.extend(image_captions)
        image_of_text.extend([row] * len(image_captions))
    text_embeds = embed_texts(model, texts, batch_size)
    id_of_text = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = torch.tensor([id_of_text[text] for text in texts])
    result = retrieval(images.embeds, text_embeds, torch.tensor(image_of_text), ids)
    return Evaluation(result, images, texts, text_embeds)


FOLD = 1000  # images per fold in COCO's 1K protocol (Karpathy and Fei-Fei 2015)


@dataclass
class FoldsResult:
    """Retrieval within folds of FOLD images: metrics over the queries of all folds."""

    folds: list[RetrievalResult]
    left_over: int  # images beyond the last whole fold
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
    """Evaluates retrieval within consecutive folds of `fold` samples of `order`; unreadable samples are missing from their fold.

    Raises UserError if there are fewer samples than one fold, or a fold has no readable image.
    """
    num_folds = len(order) // fold
    if not num_folds:
        raise UserError(f"There are {len(order):,} images, fewer than one fold of {fold:,}.")
    position = {int(index): i for i, index in enumerate(order)}
    folds = []
    for number in range(num_folds):
        rows = [row for row, index in enumerate(images.indices) if position[index] // fold == number]
        if not rows:
            raise UserError(f"No image of fold {number + 1} could be read.")
        fold_images = ImageEmbeds(images.embeds[rows], [images.indices[row] for row in rows])
        folds.append(retrieve(model, fold_images, captions).result)
    sides = [_pool([getattr(result, name) for result in folds], fold) for name in ("image_to_text", "text_to_image")]
    return FoldsResult(folds, len(order) - num_folds * fold, *sides)


def _pool(sides: Sequence[Direction], fold: int) -> dict[str, dict[str, Any]]:
    """Returns the metrics of one direction over all folds; chance is weighted by the folds' numbers of queries."""
    clusters = np.concatenate([side.clusters + number * fold for number, side in enumerate(sides)])
    weights = [len(side.queries) for side in sides]

    def entry(metric: Metric, chances: Sequence[float]) -> dict[str, Any]:
        return {**metric.to_json(), "chance": float(np.average(chances, weights=weights))}

    recalls = {
        f"r{k}": entry(
            metrics.mean(np.concatenate([side.hits[k] for side in sides]), clusters), [side.chance[k] for side in sides]
        )
        for k in RECALL_AT
    }
    ranks = np.concatenate([side.ranks for side in sides])
    return recalls | {"median_rank": entry(metrics.median(ranks, clusters), [s.chance_median_rank for s in sides])}


def _search(
    queries: Tensor,
    candidates: Tensor,
    rows: np.ndarray,
    clusters: np.ndarray,
    correct_mask: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> Direction:
    """Ranks all candidates for the query rows; `correct_mask(rows)` -> bool [row, candidate], with at least one true value per row."""
    step = max(16, _CHUNK // len(candidates))
    top_k = min(max(RECALL_AT), len(candidates))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        is_correct = torch.from_numpy(correct_mask(chunk))  # [query, candidate]
        scores = queries[torch.from_numpy(chunk)] @ candidates.T
        top_scores, top = scores.topk(top_k, dim=1)
        correct_scores = torch.where(is_correct, scores, -torch.inf)
        best = correct_scores.amax(1, keepdim=True)
        tied_correct = _count(correct_scores >= best - TIE)
        better = _count(scores.masked_fill_(is_correct, -torch.inf) > best + TIE)
        tied_incorrect = _count(scores >= best - TIE) - better
        top_correct = is_correct.gather(1, top)
        parts.append((better, tied_incorrect, tied_correct, _count(is_correct), top, top_scores, top_correct))
    better_n, tied_incorrect_n, tied_correct_n, num_correct, top_n, scores_n, top_correct_n = (
        torch.cat(part).numpy() for part in zip(*parts)
    )

    zeros, num_incorrect = np.zeros_like(num_correct), len(candidates) - num_correct
    ranks = 1 + better_n + tied_incorrect_n / (tied_correct_n + 1)
    hits = {k: metrics.hit_probability(better_n, tied_incorrect_n, tied_correct_n, k) for k in RECALL_AT}
    return Direction(
        recall={k: metrics.mean(values, clusters, seed) for k, values in hits.items()},
        chance={k: float(metrics.hit_probability(zeros, num_incorrect, num_correct, k).mean()) for k in RECALL_AT},
        median_rank=metrics.median(ranks, clusters, seed),
        chance_median_rank=metrics.chance_median_rank(num_incorrect, num_correct),
        queries=rows,
        clusters=clusters,
        hits=hits,
        ranks=ranks,
        top=top_n,
        top_scores=scores_n,
        top_correct=top_correct_n,
    )


def _count(mask: Tensor) -> Tensor:
    """Returns the number of true values per row; numpy counts several times faster than torch."""
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
