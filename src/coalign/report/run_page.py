"""The page of a training run: results, training curves, retrieval examples, embedding space, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coalign.formatting import percent
from coalign.metric import Metric
from coalign.report import figures
from coalign.report.changes import Change, changes_section
from coalign.report.class_results import ClassResults, class_results
from coalign.report.left_out import LeftOutTable, left_out_sections
from coalign.report.page import GalleryCell, Page


@dataclass
class Ranking:
    """A query and its top results, marked right or wrong."""

    query: GalleryCell
    answers: list[GalleryCell]


@dataclass
class Miss:
    """A query whose right result was narrowly outranked. Both results are cells as in a `Ranking`."""

    query: GalleryCell
    right: GalleryCell
    wrong: GalleryCell


@dataclass
class RunSummary:
    """Everything the page shows, as numbers, strings and arrays. Sections without data are omitted."""

    title: str
    subtitle: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)  # nested mappings are flattened with dots
    history: Sequence[Mapping[str, Any]] = ()  # rows of metrics.jsonl
    metrics: Sequence[Metric] = ()  # the first that is not a distance is in the headline
    highlights: Sequence[Metric] = ()  # shown large; by default the first four
    evaluated_on: str = "held-out pairs"
    ended: str = "finished"  # or "stopped early", "interrupted"
    image_queries: Sequence[Ranking] = ()
    text_queries: Sequence[Ranking] = ()
    nearest_misses: Sequence[Miss] = ()
    similarity_name: str = "cosine"  # "similarity" for any other comparison of images and captions
    similarities: np.ndarray | None = None  # [caption, image] of a few pairs, in the same order
    similarity_captions: Sequence[str] = ()
    similarity_images: Sequence[np.ndarray] = ()
    matching: np.ndarray | None = None  # similarities [pair] of some hundred held-out images with their own captions
    others: np.ndarray | None = None  # and with the caption of another of these images
    image_embeds: np.ndarray | None = (
        None  # normalized, [pair, dim], of the same pairs; None if a sample is not one vector
    )
    text_embeds: np.ndarray | None = None
    classes: ClassResults | None = None  # of zero-shot classification
    cost: Mapping[str, Any] = field(default_factory=dict)  # in the reader's words: "training time": "4 min 12 s"
    parameters: Mapping[str, int] = field(default_factory=dict)  # by tower or role
    frozen_parameters: int = 0
    bad_samples: Mapping[str, int] = field(default_factory=dict)  # reason -> count
    bad_examples: Sequence[tuple[str, str, str]] = ()  # (sample, reason, detail)
    samples_seen: int = 0
    left_out: LeftOutTable = field(default_factory=LeftOutTable)
    notes: Sequence[str] = ()
    changes: Sequence[Change] = ()  # of tracked tasks, from the start of the run to its end
    change_notes: Sequence[str] = ()


def run_page(run: RunSummary) -> Page:
    """The report of one run."""
    page = Page(run.title, run.subtitle)
    page.verdict(verdict(run))
    for note in run.notes:
        page.text(f"{note[:1].upper()}{note[1:]}")
    if run.metrics:
        page.numbers(
            [(metric.title, metric.text(), _small_print(metric)) for metric in run.highlights or run.metrics[:4]]
        )
        _metrics(page, run)
    changes_section(page, run.changes, run.change_notes)
    _curves(page, run)
    _retrieval(page, run)
    _embedding_space(page, run)
    if run.classes is not None:
        page.section("Zero-shot classification by class")
        class_results(page, run.classes, "confusion")
    _cost(page, run)
    _bad_samples(page, run)
    left_out_sections(page, run.left_out)
    if run.configuration:
        page.section("Configuration")
        page.table(("setting", "value"), list(flatten(run.configuration)))
    return page


def verdict(run: RunSummary) -> str:
    """The headline sentence: the first metric against chance, or the training loss if nothing was evaluated."""
    ending = {"interrupted": " The run was interrupted and can be resumed.", "stopped early": " It stopped early."}
    last = ending.get(run.ended, "")
    if not run.metrics:
        losses = [row["loss"] for row in run.history if isinstance(row.get("loss"), (int, float))]
        reached = f"The final training loss is {losses[-1]:.3g}" if losses else "No step was taken"
        return f"{reached}; nothing was evaluated.{last}"
    first = next((metric for metric in run.metrics if metric.kind != "distance"), None)
    if first is None:
        return (
            f"Retrieval on {run.evaluated_on} cannot be told from chance: they are too few, or their captions are equal; hold out "
            f"more with --val-fraction.{last}"
        )
    sentence = f"{first.title} on {run.evaluated_on} is {first.text()}"
    if first.chance is None:
        return f"{sentence} (95 % interval {first.interval_text()}).{last}"
    sentence += f" (95 % interval {first.interval_text()}; chance {first.chance_text()})"
    if not first.beats_chance():
        return f"{sentence}, not significantly better than chance.{last}"
    times = first.value / first.chance if first.kind == "rate" and first.chance else 0
    return f"{sentence}: {_times(times)} times chance.{last}" if times >= 2 else f"{sentence}.{last}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as rows of (dotted name, value)."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows.extend(flatten(value, f"{prefix}{name}."))
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value))
    return rows


def _metrics(page: Page, run: RunSummary) -> None:
    page.section(
        "Results",
        f"Evaluated on {run.evaluated_on}; intervals are 95 % bootstrap intervals over items. R@K is the fraction of queries whose correct "
        "result is among the top K. The median rank is the median position of the correct result; 1 is best.",
    )
    rates = [metric for metric in run.metrics if metric.kind == "rate"]
    if rates:
        page.figure(figures.metric_bars(rates), name="metrics")
    rows = [(m.title, m.text(), m.interval_text(), m.chance_text(), m.count) for m in run.metrics]
    page.table(("metric", "value", "95 % interval", "chance", "items"), rows)


def _curves(page: Page, run: RunSummary) -> None:
    figure = figures.training_curves(run.history)
    if figure is not None:
        page.section("Training")
        page.figure(
            figure,
            "Pale lines are logged values, strong lines their running mean. Loss terms are shown unweighted. The held-out loss may rise "
            "while retrieval still improves: a more confident model has a higher loss on each mistake.",
            name="curves",
        )


def _retrieval(page: Page, run: RunSummary) -> None:
    if run.image_queries:
        page.section(
            "Image → text retrieval",
            f"The five captions nearest to each image, best first, with their {_plural(run.similarity_name)}.",
        )
        for ranking in run.image_queries:
            page.ranking(ranking.query, ranking.answers)
    if run.text_queries:
        page.section("Text → image retrieval", "The five images nearest to each caption, best on the left.")
        for ranking in run.text_queries:
            page.ranking(ranking.query, ranking.answers)
    if run.nearest_misses:
        page.section(
            "Nearest misses",
            "Queries whose correct result was outranked by the smallest margins. The top result may fit just as well.",
        )
        for miss in run.nearest_misses:
            page.ranking(miss.query, [miss.wrong, miss.right])


def _embedding_space(page: Page, run: RunSummary) -> None:
    images, texts = run.image_embeds, run.text_embeds
    if run.similarities is None and images is None:
        return
    page.section("The embedding space")
    if run.similarities is not None:
        page.figure(
            figures.similarity_matrix(
                run.similarities, run.similarity_captions, run.similarity_images, run.similarity_name
            ),
            f"{_plural(run.similarity_name).capitalize()} of held-out captions and images. Pairs are on the diagonal, which should be "
            "darkest.",
            name="similarity",
        )
    if images is not None and texts is not None:
        figure, distance = figures.modality_gap(images, texts)
        page.figure(
            figure,
            f"Held-out pairs; thin lines connect image and caption. Modality gap: the centroids are {distance:.2f} apart (0 is none, 2 the "
            "maximum).",
            name="modality_gap",
        )
    if run.matching is not None and run.others is not None:
        values = {"matching caption": run.matching, "another caption": run.others}
        figure = figures.histogram(values, f"{run.similarity_name} of image and caption")
        page.figure(
            figure,
            "The less the two overlap, the better matching pairs are separated from random ones.",
            name=_plural(run.similarity_name),
        )


def _plural(name: str) -> str:
    return {"cosine": "cosines", "similarity": "similarities"}[name]


def _cost(page: Page, run: RunSummary) -> None:
    if not run.cost and not run.parameters:
        return
    page.section("Cost")
    rows: list[tuple[str, Any]] = list(run.cost.items())
    rows += [(f"trainable parameters, {role}", count) for role, count in run.parameters.items()]
    if len(run.parameters) > 1:
        rows.append(("trainable parameters, total", sum(run.parameters.values())))
    if run.frozen_parameters:
        rows.append(("frozen parameters", run.frozen_parameters))
    page.table(("", ""), rows)
    waits = [row["data_wait"] for row in run.history if isinstance(row.get("data_wait"), (int, float))]
    if waits and float(np.mean(waits)) > 0.2:
        page.text(
            f"{percent(float(np.mean(waits)))} of the time was spent waiting for data: more loader workers may help."
        )


def _bad_samples(page: Page, run: RunSummary) -> None:
    page.section("Bad samples")
    total = sum(run.bad_samples.values())
    if not total:
        page.text("None: every sample was readable.")
        return
    share = f" of {run.samples_seen:,} samples read, {percent(total / run.samples_seen)}" if run.samples_seen else ""
    page.text(f"{total:,}{share}, could not be used; each was replaced by another sample.")
    reasons = sorted(run.bad_samples.items(), key=lambda item: (-item[1], item[0]))
    page.table(("reason", "samples"), reasons)
    if run.bad_examples:
        page.table(("sample", "reason", "detail"), run.bad_examples, "Examples; the full list is in bad_samples.jsonl.")


def _small_print(metric: Metric) -> str:
    return metric.interval_text() + ("" if metric.chance is None else f" · chance {metric.chance_text()}")


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
