"""The page that shows finished runs side by side: what differs between them, what came out, and how it got there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from coalign.report import compare_figures
from coalign.report.figures import percent
from coalign.report.page import Page

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One figure of a group of runs. Intervals are 95 %: over the held-out items (bootstrap) and over seeds (t)."""

    kind: Literal["rate", "rank", "distance"]
    value: float  # the mean over the group's runs
    over_items: Interval | None  # None: a distance, which is of all items together
    over_seeds: Interval | None  # None: a single run
    n: int  # items
    chance: float | None
    difference: float | None = None  # to the first group, on the same items; None for the first group itself
    difference_over_items: Interval | None = None
    difference_over_seeds: Interval | None = None


@dataclass
class Group:
    """Runs that differ in their seed alone, or a single run."""

    name: str
    runs: list[str]
    seeds: list[int]
    method: str
    settings: dict[str, Any]  # those that differ between the groups, by dotted name
    parameters: int  # trained ones
    steps: float  # steps, samples and seconds: means over the runs
    samples_seen: float
    seconds: float
    figures: dict[str, Figure] = field(default_factory=dict)
    validations: list[list[dict[str, float]]] = field(
        default_factory=list
    )  # of each run: step, samples, seconds, values


@dataclass
class Comparison:
    """Groups of runs that were evaluated on the same held-out items. Differences are to the first."""

    groups: list[Group]
    settings: dict[str, Any]  # those that all share
    held_out: dict[str, int]  # images, captions, …

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_page(comparison: Comparison, advice: Sequence[str] = ()) -> Page:
    """The report of a comparison. `advice` stands at its top, instead of the headline's sentence."""
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
            "Each validation, by pairs seen and by time since the start, validations included. Pale lines are single seeds. Losses of "
            "different methods are different things: compare them only where the method is the same.",
        )
    if own := differing(groups)[1]:
        page.section("Settings that not all methods have")
        _settings_table(page, groups, own)
    page.section("Settings that all share")
    page.table(("setting", "value"), [(name, shown(value)) for name, value in comparison.settings.items()])
    return page


def verdict(comparison: Comparison) -> str:
    """The one sentence: the headline figure of the first group, and how far the others are from it."""
    first, *others = comparison.groups
    name = next(iter(first.figures))
    figure = first.figures[name]
    chance = f"; chance {percent(figure.chance)}" if figure.chance is not None else ""
    start = f"{title(name)} of {first.name} is {value_text(figure)} (95 % interval {interval_text(figure, _widest(figure))}{chance})"
    if not others:
        return f"{start}."
    said = []
    for other in others:
        figure = other.figures[name]
        interval = figure.difference_over_seeds or figure.difference_over_items
        untold = ", which cannot be told from none" if interval is None or interval[0] <= 0 <= interval[1] else ""
        said.append(f"{other.name} {difference_text(figure)} ({difference_text(figure, interval)}{untold})")
    return f"{start}; against it, in points: {'; '.join(said)}."


def _widest(figure: Figure) -> Interval:
    return figure.over_seeds or figure.over_items or (figure.value, figure.value)


# ---------------------------------------------------------------- words


def title(name: str) -> str:
    """ "retrieval.image_to_text.r5" -> "Image → text R@5"; of the split "test", "Test: image → text R@5"."""
    task, _, rest = name.partition(".")
    if task.startswith("retrieval_"):
        what = title(f"retrieval.{rest}")
        return f"{task.removeprefix('retrieval_').replace('_', ' ').capitalize()}: {what[0].lower()}{what[1:]}"
    words = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "mean per class", "median_rank": "median rank"}
    if task == "foils":
        return f"Foils: {'all kinds' if rest == 'mean_per_kind' else rest.removesuffix('.accuracy').replace('_', ' ')}"
    if rest == "modality_gap":
        return "Modality gap"
    side, _, last = rest.rpartition(".")
    last = words.get(last, f"R@{last[1:]}" if last[1:].isdigit() else last)
    where = side.replace("_to_", " → ").capitalize() if side else task.replace("_", "-").capitalize()
    return f"{where} {last}"


def value_text(figure: Figure, value: float | None = None) -> str:
    value = figure.value if value is None else value
    if figure.kind == "distance":
        return f"{value:.2f}"
    return percent(value) if figure.kind == "rate" else f"{value:,.1f}".removesuffix(".0")


def interval_text(figure: Figure, interval: Interval | None) -> str | None:
    if interval is None:
        return None
    low, high = (value_text(figure, max(0.0, edge)) for edge in interval)
    return f"{low.removesuffix(' %')}–{high.removesuffix(' %')}"


def difference_text(figure: Figure, interval: Interval | None = None) -> str | None:
    """The difference to the first group, or its interval, in points of per cent, in ranks, or of a distance."""
    scale, digits = (100 if figure.kind == "rate" else 1), (2 if figure.kind == "distance" else 1)
    values = [figure.difference] if interval is None else interval
    shown = [f"{scale * value:+.{digits}f}".replace("-", "−") for value in values if value is not None]
    return " to ".join(shown) if shown else None


def shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def setting_text(settings: Mapping[str, Any], name: str) -> str:
    return "none" if name in settings and settings[name] is None else shown(settings.get(name))


def time_text(seconds: float) -> str:
    """Short, so that it fits a table's column."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


# ---------------------------------------------------------------- sections


def _setup(page: Page, comparison: Comparison) -> None:
    groups = comparison.groups
    page.section("What was trained")
    page.table(
        ("", "method", "seeds", "trained parameters", "steps", "pairs seen", "training time"),
        [
            (
                g.name,
                g.method,
                shown(g.seeds),
                g.parameters,
                round(g.steps),
                round(g.samples_seen),
                time_text(g.seconds),
            )
            for g in groups
        ],
        "Time is that on the clock, validations included; with several seeds, means.",
    )
    common, own = differing(groups)
    if common:
        _settings_table(page, groups, common)
    if own:
        page.text("The settings that not all methods have stand at the end.")


def differing(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """The settings that differ and that all groups have, and those that only some have."""
    counts = Counter(name for group in groups for name in group.settings if name != "method")
    common = [name for name, count in counts.items() if count == len(groups)]
    return common, [name for name in counts if name not in common]


def _settings_table(page: Page, groups: Sequence[Group], names: Sequence[str]) -> None:
    rows = [(setting_name(name), *(setting_text(group.settings, name) for group in groups)) for name in names]
    page.table(("what differs", *(group.name for group in groups)), rows)


def setting_name(name: str) -> str:
    return name.removeprefix("method_config.")


def _results(page: Page, comparison: Comparison) -> None:
    groups = comparison.groups
    several = any(len(group.runs) > 1 for group in groups)
    counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in comparison.held_out.items())
    page.section(
        "Results",
        f"All were evaluated on the same held-out items ({counted}). The interval over items is a 95 % bootstrap interval: it says how far "
        "other items of the same kind would move the figure. "
        + ("That over seeds is a 95 % t-interval over the runs of a group, on these items. " if several else "")
        + "A difference is to the first of the list, paired: both are measured on the same drawn items, so that its interval is usually "
        "narrower than the two figures' own suggest. Nothing is corrected for the number of comparisons.",
    )
    names = [name for name, figure in groups[0].figures.items() if figure.kind == "rate"]
    points = {g.name: [(g.figures[n].value, *_widest(g.figures[n])) for n in names] for g in groups}
    titles = [title(name) for name in names]
    page.figure(
        compare_figures.points(titles, points, [groups[0].figures[name].chance for name in names]),
        f"95 % intervals over {'seeds, where there are several, else over items' if several else 'items'}.",
    )
    if len(groups) > 1:
        differences = {g.name: [_difference(g.figures[n]) for n in names] for g in groups[1:]}
        page.figure(
            compare_figures.points(titles, differences, difference_to=groups[0].name),
            "An interval that crosses the line cannot be told from no difference.",
        )
    _figures_table(page, groups, several)


def _difference(figure: Figure) -> tuple[float, float, float]:
    interval = figure.difference_over_seeds or figure.difference_over_items or (0.0, 0.0)
    return (figure.difference or 0.0, *interval)


def _figures_table(page: Page, groups: Sequence[Group], several: bool) -> None:
    columns = ["", "run", "value", "over items", *(["over seeds"] if several else []), "chance"]
    if len(groups) > 1:
        columns += ["difference", "over items", *(["over seeds"] if several else [])]
    rows = []
    for name in groups[0].figures:
        for position, group in enumerate(groups):
            rows.append((title(name) if position == 0 else "", *figure_cells(group, name, several, len(groups) > 1)))
    page.table(
        columns,
        rows,
        "Differences of rates are in points of per cent; a median rank is the better the smaller. The modality gap is the distance between "
        "the centroids of images and captions, 0 to 2.",
    )


def figure_cells(group: Group, name: str, several: bool, differences: bool, chance: bool = True) -> list[str | None]:
    """A row of the table of figures: for the page, and for the terminal."""
    figure = group.figures[name]
    cells: list[str | None] = [group.name, value_text(figure), interval_text(figure, figure.over_items)]
    cells += [interval_text(figure, figure.over_seeds)] if several else []
    if chance:
        cells.append(None if figure.chance is None else value_text(figure, figure.chance))
    if differences:
        intervals = [figure.difference_over_items, *([figure.difference_over_seeds] if several else [])]
        cells.append(difference_text(figure))
        cells += [None if interval is None else difference_text(figure, interval) for interval in intervals]
    return cells
