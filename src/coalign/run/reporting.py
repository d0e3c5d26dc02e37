"""Fills the pages of `report` from what a run and its evaluation left behind, and prints results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coalign import __version__
from coalign.config import TrainConfig, to_json
from coalign.errors import BadSample
from coalign.evaluation.embed import Evaluation
from coalign.evaluation.retrieval import Direction, RetrievalResult
from coalign.method import Method
from coalign.report import compare_page
from coalign.report.compare_page import Comparison
from coalign.report.figures import MetricRow
from coalign.report.page import GalleryCell
from coalign.report.run_page import Miss, Ranking, RunSummary, run_page, verdict
from coalign.run.model import trained_on
from coalign.run.pictures import thumbnail
from coalign.training.log import duration
from coalign.training.trainer import TrainResult
from coalign.types import Source

QUERIES, SHOWN, PAIRS_IN_MATRIX, PAIRS_IN_SPACE = 6, 5, 12, 400


def write_run_report(
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    source: Source,
    result: TrainResult,
    evaluations: Mapping[str, Evaluation],
    num_train: int,
) -> tuple[str, Path]:
    """Writes out/report.html. Returns its first sentence and its path."""
    history = read_rows(out / "metrics.jsonl")
    bad = read_rows(out / "bad_samples.jsonl")
    speeds = [row["pairs_per_second"] for row in history if row.get("pairs_per_second")]
    groups = method.parameter_groups()
    summary = RunSummary(
        title=f"{config.method} on {Path(data).name or data}",
        subtitle=f"{config.model}, trained on {trained_on(config, num_train)}, coalign {__version__}",
        configuration={"data": data, **to_json(config)},
        history=history,
        ended=result.ended,
        cost={
            "training time": duration(result.seconds),
            "steps": f"{result.step:,} of {config.batch_size} pairs",
            "pairs a second (median)": f"{np.median(speeds):,.0f}" if speeds else "-",
            "steps skipped for a loss or gradient that was not finite": f"{result.skipped_steps:,}",
        },
        parameters={role: sum(p.numel() for p in parameters) for role, parameters in groups.items()},
        bad_samples=result.bad_samples,
        bad_examples=[(row["key"], row["reason"], row["detail"]) for row in bad[:10]],
        samples_seen=min(result.step * config.batch_size, num_train),
    )
    if "retrieval" in evaluations:
        _add_retrieval(summary, evaluations["retrieval"], source)
    for task, evaluation in evaluations.items():
        if task.startswith("retrieval_"):
            summary.metrics = [*summary.metrics, *_recalls(evaluation, f"{task.removeprefix('retrieval_')}: ")]
    if "zero_shot" in evaluations:
        zero_shot = evaluations["zero_shot"].result
        metrics = {"zero-shot top-1": zero_shot.top1, "zero-shot mean per class": zero_shot.mean_per_class}
        summary.metrics = [
            *summary.metrics,
            *(_row(name, metric, zero_shot.chance) for name, metric in metrics.items()),
        ]
        summary.confusion, summary.classnames = zero_shot.confusion, zero_shot.classnames
    if "probe" in evaluations:
        found = evaluations["probe"].result
        summary.metrics = [*summary.metrics, _row("linear probe top-1", found.top1, 1 / found.num_classes)]
    if "foils" in evaluations:
        foils = evaluations["foils"].result
        named = {"true or false caption": foils.overall, **{f"… of {kind}": m for kind, m in foils.by_kind.items()}}
        summary.metrics = [*summary.metrics, *(_row(name, metric, 0.5) for name, metric in named.items())]
    path = out / "report.html"
    run_page(summary).write(path)
    return verdict(summary), path


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """The tables of `compare`, for a terminal of 100 columns."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    groups = comparison.groups
    several = any(len(group.runs) > 1 for group in groups)
    table = _plain_table("run", "method", "seeds", "parameters", "steps", "pairs seen", "time")
    for group in groups:
        numbers = (f"{round(number):,}" for number in (group.parameters, group.steps, group.samples_seen))
        seeds = ", ".join(map(str, group.seeds))
        table.add_row(escape(group.name), group.method, seeds, *numbers, compare_page.time_text(group.seconds))
    console.print(table)
    common, own = compare_page.differing(groups)
    if common:
        table = _plain_table("what differs", *(escape(group.name) for group in groups))
        for name in common:
            words = (escape(compare_page.setting_text(group.settings, name)) for group in groups)
            table.add_row(compare_page.setting_name(name), *words)
        console.print(table)
    if own:
        console.print(f"{len(own):,} settings that not all methods have are in the report.")
    columns = ["", "value", "over items", *(["over seeds"] if several else [])]
    columns += ["difference", "over items", *(["over seeds"] if several else [])] if len(groups) > 1 else []
    table = _plain_table(*columns)
    for name, figure in groups[0].figures.items():
        chance = None if figure.chance is None else f"[dim]{compare_page.value_text(figure, figure.chance)}[/dim]"
        heading = f"[bold]{compare_page.title(name).replace('median rank', 'rank')}[/bold]"
        table.add_row(heading, chance, "[dim]chance[/dim]" if chance else None)
        for group in groups:
            table.add_row(
                *(
                    escape(cell or "")
                    for cell in compare_page.figure_cells(group, name, several, len(groups) > 1, False)
                )
            )
    console.print(table)
    what = "rank: the median; over items: 95 % bootstrap interval over the held-out items"
    what += "; over seeds: 95 % t-interval over the runs" if several else ""
    what += f"; differences are to {groups[0].name} on the same items" if len(groups) > 1 else ""
    console.print(f"{what}.", markup=False)


def _plain_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for position, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if position == 0 else "right")
    return table


# ---------------------------------------------------------------- retrieval


def _add_retrieval(summary: RunSummary, evaluation: Evaluation, source: Source) -> None:
    result: RetrievalResult = evaluation.result
    indices, texts = evaluation.images.indices, evaluation.texts
    sides = (("image to text", result.image_to_text), ("text to image", result.text_to_image))
    summary.metrics = [
        *_recalls(evaluation),
        *(_row(f"{name} median rank", side.median_rank, side.chance_median_rank, "rank") for name, side in sides),
    ]
    summary.evaluated_on = f"{result.num_images:,} held-out pairs"
    view = _Thumbnails(source, indices, texts)
    rng = np.random.default_rng(0)
    summary.image_queries = _rankings(view, result.image_to_text, rng, images_ask=True)
    summary.text_queries = _rankings(view, result.text_to_image, rng, images_ask=False)
    summary.nearest_misses = _nearest_misses(view, evaluation)
    first_text: dict[int, int] = {}
    for text_row, row in enumerate(view.owner):
        first_text.setdefault(row, text_row)
    pairs = [(row, first_text[row]) for row in rng.permutation(len(indices)).tolist() if row in first_text]
    rows, text_rows = (torch.tensor(column) for column in zip(*pairs))
    assert evaluation.text_embeds is not None
    images, captions = evaluation.images.embeds[rows], evaluation.text_embeds[text_rows]
    n = min(PAIRS_IN_MATRIX, len(rows))
    summary.cosines = (captions[:n] @ images[:n].T).numpy()
    summary.cosine_captions = [texts[row] for row in text_rows[:n].tolist()]
    summary.cosine_images = [view.pixels(row) for row in rows[:n].tolist()]
    summary.image_embeds, summary.text_embeds = images[:PAIRS_IN_SPACE].numpy(), captions[:PAIRS_IN_SPACE].numpy()


def _recalls(evaluation: Evaluation, where: str = "") -> list[MetricRow]:
    result = evaluation.result
    sides = (("image to text", result.image_to_text), ("text to image", result.text_to_image))
    return [_row(f"{where}{name} R@{k}", side.recall[k], side.chance[k]) for name, side in sides for k in side.recall]


def _rankings(view: _Thumbnails, side: Direction, rng: np.random.Generator, images_ask: bool) -> list[Ranking]:
    shown = range(min(SHOWN, side.top.shape[1]))
    return [
        Ranking(
            view.cell(side.queries[i], images_ask), [_answer(view, side, i, place, not images_ask) for place in shown]
        )
        for i in rng.permutation(len(side.queries))[:QUERIES]
    ]


class _Thumbnails:
    """Cells for images and captions by their rows in the evaluation."""

    def __init__(self, source: Source, indices: Sequence[int], texts: Sequence[str]) -> None:
        self.source, self.indices, self.texts = source, indices, texts
        self.owner: list[int] = []  # the image row of each text
        for row, index in enumerate(indices):
            try:
                self.owner.extend([row] * len(source.record(index).captions))
            except BadSample:
                continue

    def pixels(self, row: int) -> np.ndarray:
        return thumbnail(self.source, int(self.indices[row]))

    def cell(self, row: int, is_image: bool, good: bool | None = None, score: float | None = None) -> GalleryCell:
        """An image with its first caption, or a caption alone."""
        row, note = int(row), "" if score is None else f"{score:.2f}"
        if not is_image:
            return GalleryCell(None, self.texts[row], good, note)
        caption = self.texts[self.owner.index(row)] if row in self.owner else ""
        return GalleryCell(self.pixels(row), caption, good, note)


def _answer(view: _Thumbnails, side: Direction, query: int, place: int, is_image: bool) -> GalleryCell:
    return view.cell(
        side.top[query, place], is_image, bool(side.top_right[query, place]), float(side.top_scores[query, place])
    )


def _nearest_misses(view: _Thumbnails, evaluation: Evaluation, count: int = 4) -> list[Miss]:
    """Image queries whose right caption lost by the smallest margin."""
    side: Direction = evaluation.result.image_to_text
    owner = torch.tensor(view.owner)
    assert evaluation.text_embeds is not None
    missed = []
    for i in np.flatnonzero(~side.top_right[:, 0] & (side.ranks > 1)).tolist():
        row = int(side.queries[i])
        own = torch.nonzero(owner == row).flatten()
        scores = evaluation.images.embeds[row] @ evaluation.text_embeds[own].T
        missed.append((float(side.top_scores[i, 0] - scores.max()), i, int(own[scores.argmax()]), float(scores.max())))
    return [
        Miss(
            view.cell(side.queries[i], True),
            view.cell(right, False, True, score),
            _answer(view, side, i, 0, False),
        )
        for _, i, right, score in sorted(missed)[:count]
    ]


def _row(name: str, metric: Any, chance: float, kind: Any = "rate") -> MetricRow:
    return MetricRow(name, metric.value, metric.low, metric.high, metric.n, chance, kind)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
