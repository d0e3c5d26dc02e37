"""The report page of a training run, from its logs and final evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coalign.config import TrainConfig, to_json
from coalign.data.account import left_out
from coalign.data.sources.base import Source
from coalign.embeds import on_device, pair_similarities, similarities, take
from coalign.evaluation.embed import Evaluation
from coalign.evaluation.retrieval import Direction, RetrievalResult
from coalign.files import read_rows
from coalign.formatting import duration
from coalign.method import Method
from coalign.networks.tuning import Tuning
from coalign.report.left_out import LeftOutTable
from coalign.report.page import GalleryCell
from coalign.report.run_page import Miss, Ranking, RunSummary, run_page, verdict
from coalign.runs.folder import WITHOUT_LOOK_ALIKES, describe_model, describe_samples, read_config
from coalign.training.trainer import TrainResult
from coalign.types import Similarity, dot_product
from coalign.version import __version__
from coalign.workflows.evaluate.eval_report import class_results_of
from coalign.workflows.evaluate.samples import captions_of
from coalign.workflows.image_files import thumbnail
from coalign.workflows.train.batches import TrainingData
from coalign.workflows.train.start import TrackedChanges
from coalign.workflows.train.validation import HeldOutResult

NUM_QUERIES, TOP_K, PAIRS_IN_MATRIX, PAIRS_IN_SPACE = 6, 5, 12, 400


def write_run_report(
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tuning: Tuning,
    result: TrainResult,
    results: Mapping[str, HeldOutResult],
    pairs: TrainingData,
    tracked: TrackedChanges,
) -> tuple[str, Path]:
    """Writes out/report.html. Returns its headline and its path."""
    history = read_rows(out / "metrics.jsonl")
    bad = read_rows(out / "bad_samples.jsonl")
    speeds = [row["pairs_per_second"] for row in history if row.get("pairs_per_second")]
    num_train = len(pairs.train)
    summary = RunSummary(
        title=f"{config.method} on {Path(data).name or data}",
        subtitle=f"{describe_model(config)}, trained on {describe_samples(config, num_train)}, coalign {__version__}",
        configuration={"data": data, **to_json(config)},
        history=history,
        ended=result.ended,
        cost={
            "training time": duration(result.seconds),
            "steps": f"{result.step:,}, batch size {config.batch_size:,}",
            "precision": result.precision,
            "pairs per second (median)": f"{np.median(speeds):,.0f}" if speeds else "-",
            "steps skipped for a non-finite loss or gradient": f"{result.skipped_steps:,}",
        },
        parameters=tuning.num_trained(),
        frozen_parameters=sum(tuning.num_frozen().values()),
        bad_samples=result.bad_samples,
        bad_examples=[(row["key"], row["reason"], row["detail"]) for row in bad[:10]],
        left_out=LeftOutTable(
            left_out(pairs.source), [(each.where, each.reason) for each in pairs.source.left_out], pairs.source.unread
        ),
        notes=pairs.account(),
        samples_seen=min(result.step * config.batch_size, num_train),
    )
    summary.changes, summary.change_notes = tracked.changes, tracked.notes
    if (saved := read_config(out)).extended_from:
        summary.notes = [*summary.notes, f"The run has {saved.describe_epochs()} epochs."]
    _add_results(summary, results)
    if "retrieval" in results:
        similarity = on_device(method.similarity, next(method.parameters()).device)
        _add_retrieval(summary, results["retrieval"], similarity)
    if "zeroshot" in results:
        summary.classes = class_results_of(results["zeroshot"].result.details)
    path = out / "report.html"
    run_page(summary).write(path)
    return verdict(summary), path


def _add_results(summary: RunSummary, results: Mapping[str, HeldOutResult]) -> None:
    """Adds the metrics of all tasks, with their notes and what look-alikes there are."""
    for held_out in results.values():
        summary.metrics = [*summary.metrics, *held_out.result.metrics]
        summary.notes = [*summary.notes, *held_out.result.notes]
    for task, held_out in results.items():
        if held_out.look_alikes is not None:
            found, total = held_out.look_alikes
            note = f"{found:,} of {total:,} held-out pairs ({held_out.split}) have an image that is in training too, or looks like one"
            without = task + WITHOUT_LOOK_ALIKES in results
            summary.notes = [
                *summary.notes,
                f"{note}; metrics without look-alikes are on the others." if without else f"{note}.",
            ]


def _evaluation(held_out: HeldOutResult) -> Evaluation:
    assert held_out.result.evaluation is not None
    return held_out.result.evaluation


def _add_retrieval(summary: RunSummary, held_out: HeldOutResult, similarity: Similarity) -> None:
    evaluation, source = _evaluation(held_out), held_out.source
    result: RetrievalResult = evaluation.result
    indices, texts = evaluation.images.indices, evaluation.texts
    summary.evaluated_on = f"{result.num_images:,} held-out pairs"
    recalls = [side.recall[k] for side in (result.image_to_text, result.text_to_image) for k in (1, 10)]
    summary.highlights = [*summary.metrics[:1], *recalls] if source.classes is not None else recalls
    summary.highlights = [metric for metric in summary.highlights if metric.can_beat_chance()]
    cells = _Cells(source, indices, texts)
    rng = np.random.default_rng(0)
    summary.image_queries = _rankings(cells, result.image_to_text, rng, image_queries=True)
    summary.text_queries = _rankings(cells, result.text_to_image, rng, image_queries=False)
    summary.nearest_misses = _nearest_misses(cells, evaluation, similarity)
    first_text: dict[int, int] = {}
    for text_row, row in enumerate(cells.image_rows):
        first_text.setdefault(row, text_row)
    pairs = [(row, first_text[row]) for row in rng.permutation(len(indices)).tolist() if row in first_text]
    rows, text_rows = (list(column) for column in zip(*pairs[:PAIRS_IN_SPACE]))
    assert evaluation.text_embeds is not None
    images: Any = take(evaluation.images.embeds, rows)
    captions: Any = take(evaluation.text_embeds, text_rows)
    shown, order = slice(PAIRS_IN_MATRIX), range(len(rows))
    summary.similarities = similarities(similarity, take(images, shown), take(captions, shown)).T.numpy()
    summary.similarity_captions = [texts[row] for row in text_rows[shown]]
    summary.similarity_images = [cells.pixels(row) for row in rows[shown]]
    summary.matching, summary.others = (
        pair_similarities(similarity, images, captions, order, other).numpy()
        for other in (order, [*order[-1:], *order[:-1]])
    )
    if similarity is dot_product:
        summary.image_embeds, summary.text_embeds = images.numpy(), captions.numpy()
    else:
        summary.similarity_name = "similarity"


def _rankings(cells: _Cells, side: Direction, rng: np.random.Generator, image_queries: bool) -> list[Ranking]:
    """Returns the top results of some queries drawn at random."""
    ranks = range(min(TOP_K, side.top.shape[1]))
    return [
        Ranking(
            cells.cell(side.queries[i], image_queries),
            [_result_cell(cells, side, i, rank, not image_queries) for rank in ranks],
        )
        for i in rng.permutation(len(side.queries))[:NUM_QUERIES]
    ]


class _Cells:
    """Makes gallery cells of images and captions from their rows in the evaluation."""

    def __init__(self, source: Source, indices: Sequence[int], texts: Sequence[str]) -> None:
        self.source, self.indices, self.texts = source, indices, texts
        self.image_rows: list[int] = []  # the image row of each text
        captions = captions_of(source)
        for row, index in enumerate(indices):
            self.image_rows.extend([row] * len(captions(index)))

    def pixels(self, row: int) -> np.ndarray:
        return thumbnail(self.source.image(int(self.indices[row])))

    def cell(self, row: int, is_image: bool, correct: bool | None = None, score: float | None = None) -> GalleryCell:
        """Returns the cell of an image with its first caption, or of a caption."""
        row, note = int(row), "" if score is None else f"{score:.2f}"
        if not is_image:
            return GalleryCell(None, self.texts[row], correct, note)
        caption = self.texts[self.image_rows.index(row)] if row in self.image_rows else ""
        return GalleryCell(self.pixels(row), caption, correct, note)


def _result_cell(cells: _Cells, side: Direction, query: int, rank: int, is_image: bool) -> GalleryCell:
    return cells.cell(
        side.top[query, rank], is_image, bool(side.top_correct[query, rank]), float(side.top_scores[query, rank])
    )


def _nearest_misses(cells: _Cells, evaluation: Evaluation, similarity: Similarity, count: int = 4) -> list[Miss]:
    """Returns the image queries whose correct caption was outranked by the smallest margins."""
    side: Direction = evaluation.result.image_to_text
    image_rows = torch.tensor(cells.image_rows)
    assert evaluation.text_embeds is not None
    missed = []
    for i in np.flatnonzero(~side.top_correct[:, 0] & (side.ranks > 1)).tolist():
        row = int(side.queries[i])
        captions = torch.nonzero(image_rows == row).flatten()
        own = take(evaluation.text_embeds, captions)
        scores = similarities(similarity, take(evaluation.images.embeds, [row]), own)[0]
        best, margin = float(scores.max()), float(side.top_scores[i, 0] - scores.max())
        missed.append((margin, i, int(captions[scores.argmax()]), best))
    return [
        Miss(
            cells.cell(side.queries[i], True),
            cells.cell(correct, False, True, score),
            _result_cell(cells, side, i, 0, False),
        )
        for _, i, correct, score in sorted(missed)[:count]
    ]
