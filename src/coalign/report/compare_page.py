"""The page that compares finished runs: their settings, their metrics with intervals, their learning curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from coalign import metric
from coalign.formatting import duration
from coalign.metric import Kind, value_text
from coalign.report import compare_figures
from coalign.report.page import Page

Interval = tuple[float, float]


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of a group of runs. Intervals are 95 % intervals, (low, high).

    Attributes:
        title: Such as "Image → text R@1".
        kind: As in `Metric`. Rates and differences are fractions.
        value: The mean over the group's runs.
        over_items: Bootstrap interval over the held-out items. None for a distance, which is one value for all items.
        over_seeds: t-interval over the group's runs. None for a single run.
        count: The number of held-out items.
        chance: The value of a random guess. None: unknown.
        difference: The difference from the first group on the same items. None for the first group itself.
        difference_over_items: Its paired bootstrap interval.
        difference_over_seeds: Its t-interval over seeds. None for single runs.
    """

    title: str
    kind: Kind
    value: float
    over_items: Interval | None
    over_seeds: Interval | None
    count: int
    chance: float | None
    difference: float | None = None
    difference_over_items: Interval | None = None
    difference_over_seeds: Interval | None = None


@dataclass
class Group:
    """Runs that differ only in their seed, or a single run.

    Attributes:
        name: The name of a single run, or of the group.
        runs: The names of its runs.
        seeds: Their seeds.
        method: The name of the method.
        settings: The settings that differ between groups, by dotted name.
        parameters: The number of trainable parameters.
        steps: Optimizer steps, mean over the runs.
        samples_seen: Steps times batch size.
        seconds: Training time, mean over the runs.
        cpu_seconds: Processor time of it, mean over the runs.
        metrics: By full name, such as "retrieval.image_to_text.r1".
        validations: For each run, its validations: step, samples, seconds and values.
    """

    name: str
    runs: list[str]
    seeds: list[int]
    method: str
    settings: dict[str, Any]
    parameters: int
    steps: float
    samples_seen: float
    seconds: float
    cpu_seconds: float
    metrics: dict[str, ComparedMetric] = field(default_factory=dict)
    validations: list[list[dict[str, float]]] = field(default_factory=list)


@dataclass
class Comparison:
    """Groups of runs evaluated on the same held-out items. Differences are from the first group.

    Attributes:
        groups: In the order of the runs.
        settings: The settings that all groups share.
        held_out: The numbers of held-out images, captions and distinct captions.
    """

    groups: list[Group]
    settings: dict[str, Any]
    held_out: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns all values, as `coalign compare --json` writes them."""
        return asdict(self)


def compare_page(comparison: Comparison, advice: Sequence[str] = ()) -> Page:
    """The report of a comparison. `advice` replaces the headline sentence at its top."""
    page = Page("Comparison", ", ".join(group.name for group in comparison.groups))
    for sentence in advice or [verdict(comparison)]:
        page.verdict(sentence)
    add_comparison(page, comparison)
    return page


def add_comparison(page: Page, comparison: Comparison) -> None:
    """Adds the sections of a comparison."""
    groups = comparison.groups
    _setup(page, comparison)
    _results(page, comparison)
    curves = compare_figures.learning_curves({group.name: group.validations for group in groups})
    if curves is not None:
        page.section("Learning curves")
        page.figure(
            curves,
            "Each validation, against samples seen and against time since the start, validations included. Pale lines are single seeds. "
            "Losses of different methods are not comparable.",
        )
    if own := differing(groups)[1]:
        page.section("Method-specific settings")
        _settings_table(page, groups, own)
    page.section("Shared settings")
    page.table(("setting", "value"), [(name, shown(value)) for name, value in comparison.settings.items()])


def verdict(comparison: Comparison) -> str:
    """The headline sentence: the first group's first metric that is not a distance, and the differences of the other groups."""
    first, *others = comparison.groups
    name, headline = next(((n, found) for n, found in first.metrics.items() if found.kind != "distance"), ("", None))
    if headline is None:
        return "The runs cannot be told apart: they held out too few pairs, or pairs with equal captions."
    chance = "" if headline.chance is None else f"; chance {value_text(headline.kind, headline.chance)}"
    interval = interval_text(headline.kind, _widest(headline))
    start = f"{headline.title} of {first.name} is {value_text(headline.kind, headline.value)} (95 % interval {interval}{chance})"
    if not others:
        return f"{start}."
    differences = []
    for other in others:
        found = other.metrics[name]
        edges = found.difference_over_seeds or found.difference_over_items
        undecided = ", not significant" if edges is None or edges[0] <= 0 <= edges[1] else ""
        spread = difference_text(found.kind, *(edges or ()))
        differences.append(f"{other.name} {difference_text(found.kind, found.difference)} ({spread}{undecided})")
    return f"{start}. Differences in percentage points: {'; '.join(differences)}."


def _widest(found: ComparedMetric) -> Interval:
    return found.over_seeds or found.over_items or (found.value, found.value)


# ---------------------------------------------------------------- words


def interval_text(kind: Kind, interval: Interval | None) -> str | None:
    """Returns a metric's interval as text. No metric is below zero, but a t-interval may be."""
    return None if interval is None else metric.interval_text(kind, *(max(0.0, edge) for edge in interval))


def difference_text(kind: Kind, *edges: float | None) -> str | None:
    """Returns a difference from the first group, or its interval: percentage points for a rate, else the metric's own unit."""
    return " to ".join(metric.difference_text(kind, edge) for edge in edges if edge is not None) or None


def shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def setting_text(settings: Mapping[str, Any], name: str) -> str:
    return "none" if name in settings and settings[name] is None else shown(settings.get(name))


def seed_column(groups: Sequence[Group]) -> str:
    """Returns the heading of the column that lists the seeds of each group."""
    return "seeds" if any(len(group.runs) > 1 for group in groups) else "seed"


# ---------------------------------------------------------------- sections


def _setup(page: Page, comparison: Comparison) -> None:
    groups = comparison.groups
    page.section("Training")
    page.table(
        ("", "method", seed_column(groups), "trainable parameters", "steps", "samples seen", "training time"),
        [
            (
                g.name,
                g.method,
                shown(g.seeds),
                g.parameters,
                round(g.steps),
                round(g.samples_seen),
                duration(g.seconds),
            )
            for g in groups
        ],
        "Wall-clock time, validations included; means over seeds.",
    )
    common, own = differing(groups)
    if common:
        _settings_table(page, groups, common)
    if own:
        page.text("Method-specific settings are listed at the end of the page.")


def differing(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """The differing settings that are not of a method, or that all groups have; and those of methods that only some have."""
    counts = Counter(name for group in groups for name in group.settings if name != "method")
    common = [name for name, count in counts.items() if count == len(groups) or "." not in name]
    return common, [name for name in counts if name not in common]


def _settings_table(page: Page, groups: Sequence[Group], names: Sequence[str]) -> None:
    rows = [(setting_name(name), *(setting_text(group.settings, name) for group in groups)) for name in names]
    page.table(("setting", *(group.name for group in groups)), rows)


def setting_name(name: str) -> str:
    return name.removeprefix("method_config.")


def _results(page: Page, comparison: Comparison) -> None:
    groups = comparison.groups
    several = any(len(group.runs) > 1 for group in groups)
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in comparison.held_out.items())
    page.section(
        "Results",
        f"All runs were evaluated on the same held-out items ({counts}). Intervals over items are 95 % bootstrap intervals: how much the "
        "metric would change on other items of the same kind. "
        + ("Intervals over seeds are 95 % t-intervals over the runs of a group, on these items. " if several else "")
        + "Differences are from the first group and paired: both sides are measured on the same resampled items, so their intervals are "
        "usually narrower than the metrics' own intervals suggest. No correction for multiple comparisons is applied.",
    )
    names = [name for name, found in groups[0].metrics.items() if found.kind == "rate"]
    points = {g.name: [(g.metrics[n].value, *_widest(g.metrics[n])) for n in names] for g in groups}
    titles = [groups[0].metrics[name].title for name in names]
    if not names:
        _metrics_table(page, groups, several)
        return
    page.figure(
        compare_figures.points(titles, points, [groups[0].metrics[name].chance for name in names]),
        f"95 % intervals over {'seeds if there are several, else over items' if several else 'items'}.",
    )
    if len(groups) > 1:
        differences = {g.name: [_difference(g.metrics[n]) for n in names] for g in groups[1:]}
        page.figure(
            compare_figures.points(titles, differences, difference_to=groups[0].name),
            "An interval that crosses the line is not significant.",
        )
    _metrics_table(page, groups, several)


def _difference(found: ComparedMetric) -> tuple[float, float, float]:
    interval = found.difference_over_seeds or found.difference_over_items or (0.0, 0.0)
    return (found.difference or 0.0, *interval)


def _metrics_table(page: Page, groups: Sequence[Group], several: bool) -> None:
    columns = ["", "run", "value", "over items", *(["over seeds"] if several else []), "chance"]
    if len(groups) > 1:
        columns += ["difference", "over items", *(["over seeds"] if several else [])]
    rows = []
    for name, found in groups[0].metrics.items():
        for position, group in enumerate(groups):
            rows.append((found.title if position == 0 else "", *metric_cells(group, name, several, len(groups) > 1)))
    page.table(
        columns,
        rows,
        "Differences of rates are in percentage points. Lower median ranks are better. The modality gap is the distance between the "
        "centroids of image and text embeddings, 0 to 2.",
    )


def metric_cells(group: Group, name: str, several: bool, differences: bool, chance: bool = True) -> list[str | None]:
    """One row of the table of metrics, for the page and for the terminal."""
    found = group.metrics[name]
    kind = found.kind
    cells: list[str | None] = [group.name, value_text(kind, found.value), interval_text(kind, found.over_items)]
    cells += [interval_text(kind, found.over_seeds)] if several else []
    if chance:
        cells.append(None if found.chance is None else value_text(kind, found.chance))
    if differences:
        intervals = [found.difference_over_items, *([found.difference_over_seeds] if several else [])]
        cells.append(difference_text(kind, found.difference))
        cells += [difference_text(kind, *(interval or ())) for interval in intervals]
    return cells
