"""The page that compares finished runs: their settings, their metrics with intervals, their learning curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from coalign.formatting import duration, foil_kind, percent
from coalign.report import compare_figures
from coalign.report.page import Page

Interval = tuple[float, float]


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of a group of runs. Intervals are 95 %: over the held-out items (bootstrap) and over seeds (t)."""

    kind: Literal["rate", "rank", "distance"]
    value: float  # mean over the group's runs
    over_items: Interval | None  # None for a distance, which is one value for all items
    over_seeds: Interval | None  # None for a single run
    n: int  # items
    chance: float | None
    difference: float | None = None  # from the first group, on the same items; None for the first group itself
    difference_over_items: Interval | None = None
    difference_over_seeds: Interval | None = None


@dataclass
class Group:
    """Runs that differ only in their seed, or a single run."""

    name: str
    runs: list[str]
    seeds: list[int]
    method: str
    settings: dict[str, Any]  # those that differ between groups, by dotted name
    parameters: int  # trainable
    steps: float  # steps, samples and seconds: means over the runs
    samples_seen: float
    seconds: float
    metrics: dict[str, ComparedMetric] = field(default_factory=dict)
    # of each run: step, samples, seconds, values
    validations: list[list[dict[str, float]]] = field(default_factory=list)


@dataclass
class Comparison:
    """Groups of runs evaluated on the same held-out items. Differences are from the first group."""

    groups: list[Group]
    settings: dict[str, Any]  # those that all groups share
    held_out: dict[str, int]  # images, captions, …

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_page(comparison: Comparison, advice: Sequence[str] = ()) -> Page:
    """The report of a comparison. `advice` replaces the headline sentence at its top."""
    groups = comparison.groups
    page = Page("Comparison", ", ".join(group.name for group in groups))
    for sentence in advice or [verdict(comparison)]:
        page.verdict(sentence)
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
    return page


def verdict(comparison: Comparison) -> str:
    """The headline sentence: the first group's first metric, and the differences of the other groups."""
    first, *others = comparison.groups
    name = next(iter(first.metrics))
    metric = first.metrics[name]
    chance = f"; chance {percent(metric.chance)}" if metric.chance is not None else ""
    start = f"{title(name)} of {first.name} is {value_text(metric)} (95 % interval {interval_text(metric, _widest(metric))}{chance})"
    if not others:
        return f"{start}."
    differences = []
    for other in others:
        metric = other.metrics[name]
        interval = metric.difference_over_seeds or metric.difference_over_items
        undecided = ", not significant" if interval is None or interval[0] <= 0 <= interval[1] else ""
        differences.append(f"{other.name} {difference_text(metric)} ({difference_text(metric, interval)}{undecided})")
    return f"{start}. Differences in percentage points: {'; '.join(differences)}."


def _widest(metric: ComparedMetric) -> Interval:
    return metric.over_seeds or metric.over_items or (metric.value, metric.value)


# ---------------------------------------------------------------- words


def title(name: str) -> str:
    """ "retrieval.image_to_text.r5" -> "Image → text R@5"; of the split "test", "Test: image → text R@5"."""
    task, _, rest = name.partition(".")
    if task.startswith("retrieval_"):
        what = title(f"retrieval.{rest}")
        return f"{task.removeprefix('retrieval_').replace('_', ' ').capitalize()}: {what[0].lower()}{what[1:]}"
    words = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "mean per class", "median_rank": "median rank"}
    if task == "foils":
        return f"Foils: {'all kinds' if rest == 'mean_per_kind' else foil_kind(rest.removesuffix('.accuracy'))}"
    if rest == "modality_gap":
        return "Modality gap"
    side, _, last = rest.rpartition(".")
    last = words.get(last, f"R@{last[1:]}" if last[1:].isdigit() else last)
    where = side.replace("_to_", " → ").capitalize() if side else task.replace("_", "-").capitalize()
    return f"{where} {last}"


def value_text(metric: ComparedMetric, value: float | None = None) -> str:
    value = metric.value if value is None else value
    if metric.kind == "distance":
        return f"{value:.2f}"
    return percent(value) if metric.kind == "rate" else f"{value:,.1f}".removesuffix(".0")


def interval_text(metric: ComparedMetric, interval: Interval | None) -> str | None:
    if interval is None:
        return None
    low, high = (value_text(metric, max(0.0, edge)) for edge in interval)
    return f"{low.removesuffix(' %')}–{high.removesuffix(' %')}"


def difference_text(metric: ComparedMetric, interval: Interval | None = None) -> str | None:
    """The difference from the first group, or its interval: percentage points for a rate, else the metric's own unit."""
    scale, digits = (100 if metric.kind == "rate" else 1), (2 if metric.kind == "distance" else 1)
    values = [metric.difference] if interval is None else interval
    shown = [f"{scale * value:+.{digits}f}".replace("-", "−") for value in values if value is not None]
    return " to ".join(shown) if shown else None


def shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def setting_text(settings: Mapping[str, Any], name: str) -> str:
    return "none" if name in settings and settings[name] is None else shown(settings.get(name))


# ---------------------------------------------------------------- sections


def _setup(page: Page, comparison: Comparison) -> None:
    groups = comparison.groups
    page.section("Training")
    page.table(
        ("", "method", "seeds", "trainable parameters", "steps", "samples seen", "training time"),
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
    """The differing settings that all groups have, and those that only some have."""
    counts = Counter(name for group in groups for name in group.settings if name != "method")
    common = [name for name, count in counts.items() if count == len(groups)]
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
    names = [name for name, metric in groups[0].metrics.items() if metric.kind == "rate"]
    points = {g.name: [(g.metrics[n].value, *_widest(g.metrics[n])) for n in names] for g in groups}
    titles = [title(name) for name in names]
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


def _difference(metric: ComparedMetric) -> tuple[float, float, float]:
    interval = metric.difference_over_seeds or metric.difference_over_items or (0.0, 0.0)
    return (metric.difference or 0.0, *interval)


def _metrics_table(page: Page, groups: Sequence[Group], several: bool) -> None:
    columns = ["", "run", "value", "over items", *(["over seeds"] if several else []), "chance"]
    if len(groups) > 1:
        columns += ["difference", "over items", *(["over seeds"] if several else [])]
    rows = []
    for name in groups[0].metrics:
        for position, group in enumerate(groups):
            rows.append((title(name) if position == 0 else "", *metric_cells(group, name, several, len(groups) > 1)))
    page.table(
        columns,
        rows,
        "Differences of rates are in percentage points. Lower median ranks are better. The modality gap is the distance between the "
        "centroids of image and text embeddings, 0 to 2.",
    )


def metric_cells(group: Group, name: str, several: bool, differences: bool, chance: bool = True) -> list[str | None]:
    """One row of the table of metrics, for the page and for the terminal."""
    metric = group.metrics[name]
    cells: list[str | None] = [group.name, value_text(metric), interval_text(metric, metric.over_items)]
    cells += [interval_text(metric, metric.over_seeds)] if several else []
    if chance:
        cells.append(None if metric.chance is None else value_text(metric, metric.chance))
    if differences:
        intervals = [metric.difference_over_items, *([metric.difference_over_seeds] if several else [])]
        cells.append(difference_text(metric))
        cells += [None if interval is None else difference_text(metric, interval) for interval in intervals]
    return cells
