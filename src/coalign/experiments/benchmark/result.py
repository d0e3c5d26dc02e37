"""The result of a benchmark: the best method by the validation pairs, its lead on the test pairs, and how to train it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from coalign.evaluation.metrics import holm
from coalign.experiments.compare.compare import HELD_OUT_COUNTS, compare
from coalign.experiments.tables.claims import LEVEL, decide
from coalign.experiments.tables.data_efficiency import (
    BASE,
    Efficiency,
    Scores,
    efficiencies,
    efficiency_words,
    fraction_draws,
    fraction_scores,
)
from coalign.experiments.tables.launch_script import options
from coalign.experiments.tables.search import ArmSearch, score, searches
from coalign.experiments.tables.trials import Trial
from coalign.formatting import percent
from coalign.methods import recipe
from coalign.methods.table import Table, parts
from coalign.report import compare_figures
from coalign.report.compare_page import ComparedMetric, Comparison, Group, add_comparison, difference_text
from coalign.report.page import Page
from coalign.runs.folder import read_config, read_results
from coalign.version import __version__

TEST = "test"  # the split that decides
RECOMMENDED = "recommended"  # folder of the model that the command trains
# The first of these that all runs have on the test pairs decides. Accuracy: the captions are class labels. R@5 or R@1: among ten captions,
# R@10 is 100 % for any model.
HEADLINES = {
    f"zeroshot_{TEST}.acc1": "zero-shot top-1",
    **{f"retrieval_{TEST}.r{k}": f"R@{k}, mean of both directions" for k in (10, 5, 1)},
}
# settings of the experiment; the command that trains the recommended model leaves them at their defaults
_OF_THE_BENCHMARK = ("val_fraction", "test_fraction", "test_splits", "evals", "seed", "feature_folder")


@dataclass(frozen=True)
class Lead:
    """The lead of the best method over another one, on the test pairs.

    Attributes:
        over: The other method.
        difference: Of the headline metric; below 0, the other method is better on the test pairs.
        interval: 95 % interval over seeds and test pairs. None with one seed.
        p: Two-sided, corrected by Holm for all pairs of methods. None with one seed.
    """

    over: str
    difference: float
    interval: tuple[float, float] | None
    p: float | None

    @property
    def is_significant(self) -> bool:
        return self.p is not None and self.p < LEVEL


@dataclass
class BenchmarkResult:
    """The result of a benchmark.

    Attributes:
        comparison: The runs with the chosen settings on the test pairs, with one group per method and fraction.
        advice: One sentence: which method is best, whether its lead is significant, and which one to choose.
        recommended: The method to choose. "" if no method beats chance.
        command: Trains the recommended method with the settings chosen for it. "" if there is none.
        leads: The lead of the best method, as chosen by the validation pairs, over each other method.
        chosen: By method and fraction, the settings and the epochs chosen by the search, and the mean validation score of the final runs.
        efficiency: By method, how many times fewer pairs than CLIP it needs for equal scores. Empty without fractions.
        by_fraction: Headline metric by method, fraction of the pairs and seed.
        headline: The title of the metric that decides.
        search: By method and fraction, the trials of the search, as in `search.json`.
        left_out: The methods and fractions that have no finished run, with the reason.
    """

    comparison: Comparison
    advice: str
    recommended: str = ""
    command: str = ""
    leads: list[Lead] = field(default_factory=list)
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)
    efficiency: dict[str, Efficiency] = field(default_factory=dict)
    by_fraction: Scores = field(default_factory=dict)
    headline: str = ""
    search: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns all values, as in `benchmark.json`."""
        own = {name: value for name, value in asdict(self).items() if name != "comparison"}
        return {"version": __version__, **own, **self.comparison.to_json()}


def judge(trials: Sequence[Trial], left_out: Mapping[str, str]) -> BenchmarkResult:
    """Chooses the best method by the validation pairs, and tests its lead on the test pairs. The trials are finished.

    left_out: what has no finished trial, with the reason.
    """
    sweep, data, out = trials[0].sweep, trials[0].data, trials[0].out
    arms = {trial.arm: sweep.arms[trial.arm] for trial in trials}
    comparison = _on_test(compare([trial.folder for trial in trials], groups=[trial.arm for trial in trials]), trials)
    found = searches(sweep, data, out)
    validation = {arm: float(np.mean([score(each.folder) for each in trials if each.arm == arm])) for arm in arms}
    result = BenchmarkResult(
        comparison,
        "The methods cannot be compared: the test pairs are too few, or have equal captions; use more data.",
        chosen={arm: _chosen(sweep, arm, found[arm]) | {"validation": validation[arm]} for arm in arms},
        search={arm: each.to_json() for arm, each in found.items()},
        left_out=dict(left_out),
    )
    known = comparison.groups[0].metrics
    metric = next((name for name in HEADLINES if all(part in known for part in parts(name))), None)
    if metric is None:
        return result
    result.headline = HEADLINES[metric]
    groups = {group.name: group for group in comparison.groups}
    whole = [name for name, arm in arms.items() if arm.train_fraction == 1]
    best = max(whole, key=validation.__getitem__)
    above_chance = {name for name, group in groups.items() if any(map(_above_chance, _metrics(group, metric)))}
    if above_chance.isdisjoint(whole):
        shown = percent(_value(groups[best], metric))
        short = result.headline.partition(",")[0]
        result.advice = f"No method beats chance yet: the best {short} is {shown} ({best}); give more --minutes."
        return result
    result.leads = _leads(sweep, trials, best, [name for name in whole if name != best], metric)
    result.recommended, result.advice = _advice(result, groups, best, metric)
    trial = next(each for each in trials if each.arm == result.recommended)
    result.command = train_command(trial)
    sides = [(task, name) for task, _, name in (part.partition(".") for part in parts(metric))]
    if BASE in above_chance and (scores := fraction_scores(trials, sides)):
        result.by_fraction, result.efficiency = scores, efficiencies(scores, fraction_draws(trials, sides))
    return result


def _on_test(comparison: Comparison, trials: Sequence[Trial]) -> Comparison:
    """The comparison without the metrics of the validation pairs, by which the settings were chosen."""
    counts = read_results(trials[0].folder)["tasks"][f"retrieval_{TEST}"]
    groups = [
        replace(group, metrics={name: each for name, each in group.metrics.items() if f"_{TEST}" in name.split(".")[0]})
        for group in comparison.groups
    ]
    return replace(comparison, groups=groups, held_out={name: counts[name] for name in HELD_OUT_COUNTS})


def _chosen(sweep: Table, arm: str, search: ArmSearch) -> dict[str, float]:
    """The chosen settings of an arm, and its length in epochs of all pairs."""
    return {**search.to_json()["chosen"]["settings"], "epochs": search.choice.epochs * sweep.arms[arm].epochs}


def _metrics(group: Group, metric: str) -> list[ComparedMetric]:
    return [group.metrics[part] for part in parts(metric)]


def _value(group: Group, metric: str) -> float:
    return float(np.mean([each.value for each in _metrics(group, metric)]))


def _above_chance(metric: ComparedMetric) -> bool:
    return metric.over_items is not None and metric.chance is not None and metric.over_items[0] > metric.chance


# ---------------------------------------------------------------- verdict


def _leads(sweep: Table, trials: Sequence[Trial], best: str, others: Sequence[str], metric: str) -> list[Lead]:
    claims = decide(replace(sweep, claims=tuple((other, best) for other in others), headline_metrics=(metric,)), trials)
    p_values = [claim["p"] for claim in claims]
    # All pairs of methods: the runs that are tested have also chosen the best one. A correction for its own leads only would find one among
    # five equal methods in up to 9 % of benchmarks.
    planned = math.comb(len(others) + 1, 2)
    adjusted = [None] * len(claims) if None in p_values else holm(p_values, planned)
    return [Lead(other, claim["difference"], claim["interval"], p) for other, claim, p in zip(others, claims, adjusted)]


def _advice(result: BenchmarkResult, groups: Mapping[str, Group], best: str, metric: str) -> tuple[str, str]:
    """Returns the method to choose, and the sentence."""
    start = f"On these pairs {best} is best by validation: {result.headline}, {percent(_value(groups[best], metric))} on the test pairs"
    if not result.leads:
        return best, f"{start}; no other method finished."
    # a significantly better method first
    second = min(result.leads, key=lambda lead: (lead.difference >= 0 or not lead.is_significant, lead.difference))
    side = "ahead of" if second.difference >= 0 else "behind"
    start += f", {100 * abs(second.difference):.1f} percentage points {side} {second.over}"
    if any(lead.p is None for lead in result.leads):
        return best, f"{start}; with one seed, it is not known whether this is more than chance: use --seeds 2 or more."
    if second.is_significant and second.difference < 0:
        return second.over, (
            f"{start}, which is significant: the validation and the test pairs disagree; choose {second.over} if the model is for pairs "
            "like the test pairs."
        )
    close = [lead.over for lead in result.leads if not lead.is_significant]
    if not close:
        every = "its lead" if len(result.leads) == 1 else "its lead over every other method"
        return best, f"{start}; {every} is significant: choose {best}."
    cheapest = min([best, *close], key=lambda name: groups[name].seconds / groups[name].samples_seen)
    names = " and ".join([", ".join(close[:-1])] * (len(close) > 1) + close[-1:])
    return (
        cheapest,
        f"{start}, but the difference from {names} is not significant: choose the cheapest of them, {cheapest}.",
    )


def train_command(trial: Trial) -> str:
    """Returns the command that trains an arm with its chosen settings on all pairs, apart from those that `train` holds out by default."""
    name, num_pairs = trial.sweep.arms[trial.arm].recipe, read_config(trial.folder).num_train
    config, default = trial.config(num_pairs), recipe(name)(num_pairs)
    # the recipe's model, rates and sizes of heads follow from the number of pairs, and `train` may hold out fewer
    all_pairs = math.ceil(num_pairs / (1 - config.val_fraction) / (1 - config.test_fraction))
    config = replace(config, **{each: getattr(default, each) for each in _OF_THE_BENCHMARK})
    words = ["coalign", "train", "--data", trial.data, "--out", str(trial.out / RECOMMENDED), "--recipe", name]
    return shlex.join([*words, *options(name, config, num_pairs, all_pairs, _short)])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- page and terminal


def _rows(result: BenchmarkResult) -> list[tuple[str, ...]]:
    """Headline metric of each method on all pairs and, but for the best, how far the best is ahead."""
    leads = {lead.over: lead for lead in result.leads}
    metric = next(name for name, title in HEADLINES.items() if title == result.headline)
    rows = []
    for group in result.comparison.groups:
        cells = [group.name, percent(result.chosen[group.name]["validation"]), percent(_value(group, metric))]
        lead = leads.get(group.name)
        interval = lead and lead.interval
        cells.append((lead and difference_text("rate", lead.difference)) or "")
        cells.append((interval and difference_text("rate", *interval)) or "")
        cells.append("" if lead is None or lead.p is None else f"{lead.p:.2g}")
        cells.append(f"{1000 * group.seconds / group.samples_seen:.2g} ms")
        rows.append(tuple(cells))
    return rows


def _settings_rows(result: BenchmarkResult) -> list[tuple[str, ...]]:
    return [
        (
            arm,
            f"× {each['lr_factor']:.2g}",
            f"{each['weight_decay']:.2g}",
            f"{each['crop']:.2g}" if "crop" in each else "",
            f"{each['epochs']:.3g}",
        )
        for arm, each in result.chosen.items()
    ]


def _sentences(result: BenchmarkResult) -> list[str]:
    left_out = [f"{arm} is left out: {reason}." for arm, reason in result.left_out.items()]
    return [result.advice, *left_out, *efficiency_words(result.efficiency)]


_COLUMNS = ("", "validation", "test", "lead of the best", "95 % interval", "p", "time per pair")
_SETTINGS = ("", "learning rate", "weight decay", "crop", "epochs")


def print_result(result: BenchmarkResult) -> None:
    """Prints the results on the test pairs, the chosen settings, the advice and the command."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    tables: list[tuple[Sequence[str], list[tuple[str, ...]]]] = [(_SETTINGS, _settings_rows(result))]
    if result.headline:
        tables.append((_COLUMNS, _rows(result)))
    for columns, rows in tables:
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        for position, column in enumerate(columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in _sentences(result):
        console.print(line, markup=False)
    if result.command:
        console.print(f"To train {result.recommended} on all pairs:\n{result.command}", markup=False)


def write_page(result: BenchmarkResult, path: Path) -> None:
    page = Page("Benchmark", ", ".join(group.name for group in result.comparison.groups))
    for sentence in _sentences(result):
        page.verdict(sentence)
    if result.headline:
        page.section("Verdict")
        page.table(
            _COLUMNS,
            _rows(result),
            f"Test: {result.headline}, on test pairs that chose nothing. Validation: mean recall, or accuracy on class labels, by which "
            "settings, lengths and the best method were chosen. Means over seeds. Intervals and p-values of the lead are over seeds and "
            "test pairs together (hierarchical bootstrap); p-values are corrected for all pairs of methods (Holm). Time per pair seen in "
            "training, without the features of locked encoders.",
        )
    page.section("Settings chosen by the search")
    trials = max(len(search["trials"]) for search in result.search.values())
    page.table(
        _SETTINGS,
        _settings_rows(result),
        f"Of {trials} trials per method: the first has the recipe's own settings, the others the same draws. The learning rate is a factor "
        "of the recipe's; the crop is an exponent of the smallest crop area: above 1, crops are stronger than the recipe's.",
    )
    if result.command:
        page.text(f"To train {result.recommended} on all pairs with these settings:")
        page.commands([result.command])
    if result.by_fraction:
        page.section("By dataset size")
        page.figure(
            compare_figures.by_fraction(result.by_fraction),
            f"{result.headline}, against the fraction of the pairs trained on. Points are seeds, lines their means. Where a line crosses "
            "CLIP's score on all pairs (dotted), that fraction is enough to match it.",
        )
    add_comparison(page, result.comparison)
    page.write(path)
