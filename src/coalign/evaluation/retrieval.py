"""Image-text retrieval in both directions, with any number of captions per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.embeds import num_samples, similarities, take, transposed
from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts, require_finite
from coalign.evaluation.metrics import TIE, measure
from coalign.metric import Metric, Outcome
from coalign.progress import track
from coalign.types import DualEncoder, Embeds, Similarity, dot_product

RECALL_AT = (1, 5, 10)
MIN_CLUSTERS = 50  # a bootstrap of fewer clusters is unreliable
_CHUNK = 2_000_000  # similarities in memory at a time


@dataclass
class Direction:
    """One direction of retrieval. Arrays have a row per query, in the order of `queries`."""

    recall: dict[int, Metric]  # R@K: fraction of queries with a correct result among the top K
    median_rank: Metric  # of each query's best correct result; 1 is the best
    queries: np.ndarray  # int64 [query]: row of the query; images without a caption are not queries
    ranks: np.ndarray  # float64 [query]: rank of the best correct result (expected rank if tied with incorrect ones)
    chance_ranks: np.ndarray  # int64 [query]: ranks in a random order of all candidates
    top: np.ndarray  # int64 [query, 10 or fewer]: rows of the top results
    top_scores: np.ndarray  # float32, their similarities
    top_correct: np.ndarray  # bool, whether each is correct

    def metrics(self) -> list[Metric]:
        """Returns the recalls and the median rank. The bootstrap draws images with all their captions (see `_clusters`).

        Chance is the value of a random order, given each query's number of correct candidates.
        """
        return [*self.recall.values(), self.median_rank]


@dataclass
class RetrievalResult:
    image_to_text: Direction
    text_to_image: Direction
    num_images: int
    num_texts: int
    num_distinct_texts: int  # equal captions are one candidate, which is correct for every image that has it
    num_captionless: int  # images that are candidates but not queries
    # distance between the centroids of images and captions, 0 to 2 (Liang et al. 2022); None if a sample is not one vector
    modality_gap: float | None

    def metrics(self) -> list[Metric]:
        found = with_mean_recall([*self.image_to_text.metrics(), *self.text_to_image.metrics()])
        if self.modality_gap is None:
            return found
        outcome = Outcome(np.array([self.modality_gap]))
        gap = Metric(
            "modality_gap", "Modality gap", "distance", self.modality_gap, count=self.num_images, outcome=outcome
        )
        return [*found, gap]

    def details(self) -> dict[str, Any]:
        return {
            "images": self.num_images,
            "captions": self.num_texts,
            "distinct_captions": self.num_distinct_texts,
            "images_without_caption": self.num_captionless,
        }


def with_mean_recall(found: list[Metric]) -> list[Metric]:
    """Returns the metrics of both directions, and the mean of their recalls that can differ from chance, if any can.

    Its items are images, with what they add to the mean: their own recalls as an image, and those of their captions. Images that are drawn
    together share the sum of what they add.
    """
    recalls = [metric for metric in found if metric.kind == "rate" and metric.can_beat_chance()]
    outcomes = [metric.outcome for metric in recalls if metric.outcome is not None]
    if not outcomes:
        return found
    items = _groups(outcomes[0])  # of image to text, if it can differ from chance: one per image
    clusters, of_item, sizes = np.unique(items, return_inverse=True, return_counts=True)
    rows = np.searchsorted(clusters, np.concatenate([_groups(outcome) for outcome in outcomes]))
    parts = np.concatenate([outcome.values / len(outcome.values) for outcome in outcomes])
    values = (np.bincount(rows, parts, minlength=len(clusters)) / sizes)[of_item] * len(items) / len(recalls)
    chance = sum(metric.chance or 0.0 for metric in recalls) / len(recalls)
    return [*found, measure("mean_recall", "Mean recall", Outcome(values, items), chance)]


def _groups(outcome: Outcome) -> np.ndarray:
    assert outcome.groups is not None
    return outcome.groups


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

    def row(self, row: int) -> np.ndarray:
        return self.values[self.start[row] : self.start[row + 1]]

    def mask(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Returns bool [row, width], true at the values of each row's list."""
        out = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            out[i, self.row(row)] = True
        return out


@torch.no_grad()
def retrieval(
    image_embeds: Embeds,
    text_embeds: Embeds,
    image_of_text: Tensor,
    text_ids: Tensor | None = None,
    seed: int = 0,
    similarity: Similarity = dot_product,
) -> RetrievalResult:
    """Evaluates retrieval between images and texts by their similarity; the default takes normalized vectors [image, dim] and [text, dim].

    image_of_text: int64 [text], the row of each text's image. text_ids: int64 [text], equal if and only if the captions are equal: a
    caption is correct for every image that has it, and is one candidate: if it were several, with equal similarities, even a random model
    would be below the chance level. The full similarity matrix is never in memory. Intervals resample images, each with all of its
    captions, and images with the same captions together (see `_clusters`).
    """
    num_images, num_texts, image_rows = num_samples(image_embeds), num_samples(text_embeds), image_of_text.numpy()
    _check_inputs(num_images, num_texts, image_rows)
    require_finite(image_embeds, "Image")
    require_finite(text_embeds, "Text")
    modality_gap = _modality_gap(image_embeds, text_embeds) if similarity is dot_product else None

    distinct = np.arange(num_texts) if text_ids is None else text_ids.numpy()
    _, first, ids = np.unique(distinct, return_index=True, return_inverse=True)  # first: row of a text with each id
    num_ids = len(first)
    pairs = np.unique(np.stack([image_rows, ids], 1), axis=0)  # distinct (image, caption id)
    ids_of_image = _RaggedLists.group(pairs[:, 0], pairs[:, 1], num_images)
    images_of_id = _RaggedLists.group(pairs[:, 1], pairs[:, 0], num_ids)

    captioned, clusters = np.flatnonzero(ids_of_image.lengths()), _clusters(ids_of_image)
    texts = np.arange(num_texts)
    image_to_text = _search(
        ("image_to_text", "Image → text"),
        similarity,
        image_embeds,
        take(text_embeds, torch.from_numpy(first)),
        captioned,
        clusters[captioned],
        lambda rows: ids_of_image.mask(rows, num_ids),
        seed,
    )
    return RetrievalResult(
        image_to_text=replace(image_to_text, top=first[image_to_text.top]),
        text_to_image=_search(
            ("text_to_image", "Text → image"),
            transposed(similarity),
            text_embeds,
            image_embeds,
            texts,
            clusters[image_rows],
            lambda rows: images_of_id.mask(ids[rows], num_images),
            seed,
        ),
        num_images=num_images,
        num_texts=num_texts,
        num_distinct_texts=num_ids,
        num_captionless=num_images - len(captioned),
        modality_gap=modality_gap,
    )


def _clusters(ids_of_image: _RaggedLists) -> np.ndarray:
    """Returns the cluster of each image [image], the row of its first image. The bootstrap draws images with the same captions together.

    Equal captions are one query with one result, so two drawings of the same thing are not independent items. But with fewer than
    MIN_CLUSTERS clusters, as of images with class labels, each image is its own.
    """
    num_images = len(ids_of_image.lengths())
    first: dict[tuple[int, ...], int] = {}
    clusters = [first.setdefault(tuple(ids_of_image.row(row).tolist()), row) for row in range(num_images)]
    return np.array(clusters) if len(first) >= MIN_CLUSTERS else np.arange(num_images)


def _check_inputs(num_images: int, num_texts: int, image_rows: np.ndarray) -> None:
    if not num_images or not num_texts:
        raise UserError(f"There is nothing to retrieve: the data has {num_images} images and {num_texts} captions.")
    if len(image_rows) != num_texts or image_rows.min() < 0 or image_rows.max() >= num_images:
        raise ValueError(f"image_of_text must hold one of {num_images} image rows for each of {num_texts} texts")


def _modality_gap(image_embeds: Any, text_embeds: Any) -> float:
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"images have {image_embeds.shape[1]} dimensions and texts {text_embeds.shape[1]}")
    return float((image_embeds.mean(0) - text_embeds.mean(0)).norm())


def retrieve(
    model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], Sequence[str]], batch_size: int = 256
) -> Evaluation:
    """Evaluates retrieval between the images of `embed_images` and all captions of their indices.

    Equal captions are one candidate, which is correct for every image that has it.
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
    result = retrieval(images.embeds, text_embeds, torch.tensor(image_of_text), ids, similarity=model.similarity)
    return Evaluation(result, images, texts, text_embeds)


FOLD = 1000  # images per fold in COCO's 1K protocol (Karpathy and Fei-Fei 2015)


@dataclass
class FoldsResult:
    """Retrieval within folds of FOLD images: metrics over the queries of all folds."""

    metrics: list[Metric]  # the recalls and median ranks of both directions, and the mean recall
    num_folds: int
    num_images: int
    left_over: int  # images beyond the last whole fold


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
        fold_images = ImageEmbeds(take(images.embeds, rows), [images.indices[row] for row in rows])
        folds.append(retrieve(model, fold_images, captions).result)
    num_images = sum(result.num_images for result in folds)
    return FoldsResult(_pool(folds, fold), num_folds, num_images, len(order) - num_folds * fold)


def _pool(folds: Sequence[RetrievalResult], fold: int) -> list[Metric]:
    """Returns the metrics over the queries of all folds."""
    sides = zip(*((result.image_to_text, result.text_to_image) for result in folds))
    return with_mean_recall([metric for side in sides for metric in _pool_direction(side, fold)])


def _pool_direction(folds: Sequence[Direction], fold: int) -> list[Metric]:
    pooled = []
    for parts in zip(*(each.metrics() for each in folds)):
        outcomes = [part.outcome for part in parts if part.outcome is not None]
        groups = [
            outcome.groups + number * fold for number, outcome in enumerate(outcomes) if outcome.groups is not None
        ]
        values = np.concatenate([outcome.values for outcome in outcomes])
        outcome = Outcome(values, np.concatenate(groups), outcomes[0].statistic)
        if outcome.statistic == "median":
            chance = float(np.median(np.concatenate([each.chance_ranks for each in folds])))
        else:
            chance = float(np.average([part.chance or 0.0 for part in parts], weights=[part.count for part in parts]))
        pooled.append(measure(parts[0].name, parts[0].title, outcome, chance))
    return pooled


def _search(
    names: tuple[str, str],
    similarity: Similarity,
    queries: Embeds,
    candidates: Embeds,
    rows: np.ndarray,
    clusters: np.ndarray,
    correct_mask: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> Direction:
    """Ranks all candidates for the query rows.

    names: key and title of the direction. clusters: int64 [query], of the query's image. `correct_mask(rows)` -> bool
    [row, candidate], with at least one true value per row.
    """
    num_candidates = num_samples(candidates)
    step = max(16, _CHUNK // num_candidates)
    top_k = min(max(RECALL_AT), num_candidates)
    side, title = names
    parts: list[tuple[Tensor, ...]] = []
    for start in track(range(0, len(rows), step), f"Ranking {title.lower()}", unit="parts"):
        chunk = rows[start : start + step]
        is_correct = torch.from_numpy(correct_mask(chunk))  # [query, candidate]
        scores = similarities(similarity, take(queries, torch.from_numpy(chunk)), candidates)
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

    zeros, num_incorrect = np.zeros_like(num_correct), num_candidates - num_correct
    ranks = 1 + better_n + tied_incorrect_n / (tied_correct_n + 1)
    recall = {}
    for k in RECALL_AT:
        hits = metrics.hit_probability(better_n, tied_incorrect_n, tied_correct_n, k)
        chance = float(metrics.hit_probability(zeros, num_incorrect, num_correct, k).mean())
        recall[k] = measure(f"{side}.r{k}", f"{title} R@{k}", Outcome(hits, clusters), chance, seed=seed)
    drawn = metrics.drawn_ranks(better_n, tied_incorrect_n, tied_correct_n)
    chance_ranks = metrics.drawn_ranks(zeros, num_incorrect, num_correct)
    outcome, chance = Outcome(drawn, clusters, "median"), float(np.median(chance_ranks))
    return Direction(
        recall=recall,
        median_rank=measure(f"{side}.median_rank", f"{title} median rank", outcome, chance, seed=seed),
        queries=rows,
        ranks=ranks,
        chance_ranks=chance_ranks,
        top=top_n,
        top_scores=scores_n,
        top_correct=top_correct_n,
    )


def _count(mask: Tensor) -> Tensor:
    """Returns the number of true values per row; numpy counts several times faster than torch."""
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
