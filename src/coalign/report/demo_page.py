"""The page of `coalign demo`: two methods trained on the same pairs, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coalign.formatting import duration, percent
from coalign.metric import Kind, interval_text, value_text
from coalign.report import compare_figures
from coalign.report.compare_page import ComparedMetric, Comparison, difference_text
from coalign.report.page import GalleryCell, Page


@dataclass(frozen=True)
class Evaluated:
    """Metrics on one set of pairs.

    Attributes:
        title: Such as "1,918 drawings by OpenMoji, a style that neither has seen".
        short: Such as "New style". "": there is no other set.
        where: The same within a sentence, such as "Among 1,918 drawings by OpenMoji, a style that neither has seen,".
        metrics: The metrics to show: full name, such as "retrieval_test.text_to_image.r1", -> title.
        drawn: Those of them that are also drawn.
        found: What the first drawn one counts, such as "finds the right drawing first for" (a percentage follows). "": no sentence.
        queries: Such as "names".
        mean_recall: The one of them by which the sentence compares the methods.
    """

    title: str
    short: str
    where: str
    metrics: Mapping[str, str]
    drawn: Sequence[str]
    found: str = ""
    queries: str = ""
    mean_recall: str = ""


@dataclass(frozen=True)
class Search:
    """A text, and the first images that each method finds."""

    query: GalleryCell
    results: Mapping[str, Sequence[GalleryCell]]  # by method

    def first_hit(self, method: str) -> int | None:
        """Returns the rank of the first hit; None if there is none."""
        return next((rank for rank, cell in enumerate(self.results[method], 1) if cell.good), None)


@dataclass
class DemoSummary:
    """Everything the page shows. Sections without data are omitted."""

    title: str
    subtitle: str
    trained: str  # what was trained on what, in a sentence
    examples_text: str
    examples: Sequence[GalleryCell]
    comparison: Comparison
    evaluated: Sequence[Evaluated]
    searches_text: str
    searches: Sequence[Search]
    epochs: Mapping[str, float]  # by method
    commands_text: str
    commands: Sequence[str]
    advice: Sequence[str] = ()
    licenses: Sequence[str] = ()
    runs: Mapping[str, str] = field(default_factory=dict)  # method -> folder


def demo_page(demo: DemoSummary) -> Page:
    """The report of a demo."""
    page = Page(demo.title, demo.subtitle)
    for sentence in [*demo.advice, *filter(None, (sentence_of(demo.comparison, each) for each in demo.evaluated))]:
        page.verdict(sentence)
    page.section("What was trained on what", demo.trained)
    page.text(demo.examples_text)
    page.gallery(demo.examples, columns=4, wide=True)
    _results(page, demo)
    _searches(page, demo)
    _training(page, demo)
    page.section("Now with your own pictures", demo.commands_text)
    page.commands(demo.commands)
    if demo.licenses:
        page.section("Licenses of the drawings")
        for notice in demo.licenses:
            page.text(notice)
    return page


# ---------------------------------------------------------------- results


def sentence_of(comparison: Comparison, evaluated: Evaluated) -> str | None:
    """Returns the first drawn metric of both methods, and the paired difference of their mean recalls, in two sentences."""
    first, second = comparison.groups
    if not evaluated.found or evaluated.mean_recall not in first.metrics:
        return None
    base, other = (percent(group.metrics[evaluated.drawn[0]].value) for group in (first, second))
    known, recall = (group.metrics[evaluated.mean_recall] for group in (first, second))
    start = (
        f"{evaluated.where} {second.name} {evaluated.found} {other} of the {evaluated.queries}, {first.name} for {base}. Mean recall is "
        f"{percent(recall.value)} with {second.name} and {percent(known.value)} with {first.name}"
    )
    difference, interval = recall.difference or 0.0, recall.difference_over_items
    if interval is None:
        return f"{start}."
    size = f"{abs(100 * difference):.1f} percentage points {'more' if difference >= 0 else 'less'}"
    edges = f"95 % interval {difference_text(recall.kind, *interval)}"
    if interval[0] <= 0 <= interval[1]:
        return f"{start}: no significant difference ({edges} percentage points)."
    return f"{start}: {size} ({edges})."


def _results(page: Page, demo: DemoSummary) -> None:
    groups = demo.comparison.groups
    page.section(
        "Results",
        "R@K is the fraction of queries with a right result among the first K, and mean recall the mean of R@1, R@5 and R@10 of both "
        "directions. Intervals are 95 % bootstrap intervals over the evaluated "
        "pairs. Differences are in percentage points and paired: both methods are measured on the same resampled pairs.",
    )
    first, second = groups
    drawn = [(each, name) for each in demo.evaluated for name in each.drawn if name in first.metrics]
    if drawn:
        points = {group.name: [_point(group.metrics[name]) for _, name in drawn] for group in groups}
        titles = [f"{each.short}: {each.metrics[name]}" if each.short else each.metrics[name] for each, name in drawn]
        chance = [first.metrics[name].chance for _, name in drawn]
        page.figure(compare_figures.points(titles, points, chance), "Values with 95 % intervals.")
    for each in demo.evaluated:
        shown = {name: title for name, title in each.metrics.items() if name in first.metrics}
        rows = [
            (title.replace(" ", "\u00a0"), *_cells(first.metrics[n], second.metrics[n])) for n, title in shown.items()
        ]
        page.table(("", "chance", first.name, second.name, "difference"), rows, each.title)


def _cells(base: ComparedMetric, other: ComparedMetric) -> tuple[str | None, ...]:
    edges = difference_text(other.kind, *(other.difference_over_items or ()))
    return (
        None if base.chance is None else value_text(base.kind, base.chance),
        *(_with_interval(found.kind, found.value, found.over_items) for found in (base, other)),
        f"{difference_text(other.kind, other.difference)}{f' ({edges})' if edges else ''}",
    )


def _point(found: ComparedMetric) -> tuple[float, float, float]:
    return (found.value, *(found.over_items or (found.value, found.value)))


def _with_interval(kind: Kind, value: float, interval: tuple[float, float] | None) -> str:
    spread = "" if interval is None else f" ({interval_text(kind, *interval)})"
    return f"{value_text(kind, value)}{spread}"


# ---------------------------------------------------------------- searches and training


def _searches(page: Page, demo: DemoSummary) -> None:
    if not demo.searches:
        return
    names = list(demo.searches[0].results)
    hits = {name: sum(search.first_hit(name) is not None for search in demo.searches) for name in names}
    counts = " and ".join(f"{name} in {count}" for name, count in hits.items())
    page.section("Searches", demo.searches_text)
    page.text(f"Of these {len(demo.searches)} searches, the first five have a hit with {counts}.")
    for search in demo.searches:
        results = {}
        for name, cells in search.results.items():
            rank = search.first_hit(name)
            results[name] = ("no hit" if rank is None else f"first hit at {rank}", cells)
        page.side_by_side(search.query, results)


def _training(page: Page, demo: DemoSummary) -> None:
    groups = demo.comparison.groups
    page.section("Training")
    curves = compare_figures.learning_curves({group.name: group.validations for group in groups})
    if curves is not None:
        page.figure(
            curves,
            "Each validation on held-out pairs, against samples seen and against time. Losses of different methods are not comparable.",
        )
    page.table(
        ("", "trainable parameters", "epochs", "steps", "training time", "folder"),
        [
            (
                group.name,
                group.parameters,
                f"{demo.epochs[group.name]:.4g}",
                round(group.steps),
                duration(group.seconds),
                demo.runs[group.name],
            )
            for group in groups
        ],
        "Wall-clock time, validations included. With two cores or more, both are trained at the same time.",
    )
