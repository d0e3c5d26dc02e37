"""The page of results/plan.json: the claims with their verdicts, the rule, and what power and cost follow from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from evidence.plan import LEVEL, MAX_CORE_HOURS, Plan, Verdict, arm_hours, core_hours, verdicts
from evidence.text import Values, bullet, page, paragraph, results_link, signed, span_text, table
from evidence.titles import TITLES, link

SPLITS = {"retrieval": "held out", "retrieval_test": "test"}
INTRODUCTION = """
The claims that the current round of experiments tests. They were written down before training: the arms, the metric, the seeds, and the
difference that each is planned for. A claim *holds* or *does not hold* (the reverse is significant) after the correction for all of them;
until both arms have all their seeds, it is *open*. *p* is corrected.
"""
EMOJI = "The emoji are written by `coalign data emoji --vendors twemoji openmoji --out data/emoji`."
POWER = """
**Power** is the probability that a claim holds if the true difference is its effect. It is computed at the level of Holm's first step,
{level}, so it is a lower bound. The standard error of a difference is the root of 2 *s*²(seed) / seeds + *s*²(item) / items, with *s*(seed)
the standard deviation of a metric over seeds and *s*(item) the standard deviation of paired differences over items, both in percentage
points. Items are evaluated images; drawings with the same caption, such as those of an emoji by two vendors, count as one.
"""
COST = """
**Core-hours** are an upper bound: every search chooses the longest length. Runs that several claims need count with the first. They sum to
{total:.1f}, and at most {most:g} are allowed. A trial of a search is a run at a constant rate, with a cool-down of a fifth from each
length; the better half of the trials of a length is extended to the next one. A search has one more trial per fraction of the pairs, which
chooses its length; on a fraction, the number of steps is the same as on all pairs.
"""


def plan_page(plan: Plan, tables: Mapping[str, Values]) -> str:
    """Returns the page; `tables` are the results by name."""
    found = verdicts(plan, tables)
    total = sum(core_hours(plan).values())
    return page(
        f"# {TITLES['plan']}",
        paragraph(INTRODUCTION),
        paragraph(counts(found)),
        "## Claims",
        "Effects and differences are in percentage points.",
        table(
            ["", "Claim", "Arms", "Effect", "Difference (95 % CI)", "Verdict"],
            [_row(number, each) for number, each in enumerate(found, 1)],
        ),
        paragraph(plan.values["rule"]),
        "## Data and arms",
        "\n".join(bullet(text) for text in _data(plan, tables)),
        paragraph(EMOJI),
        "## Power",
        paragraph(POWER.format(level=f"{LEVEL} / {len(plan.claims)}")),
        "\n".join(bullet(text) for text in _noise(plan)),
        table(["Claim", "Paper", "Power", "Core-hours"], _planned(plan)),
        "## Cost",
        paragraph(COST.format(total=total, most=MAX_CORE_HOURS)),
        paragraph(plan.values["cost"]["source"]),
        table(["Results", "Arm", "Cost per pair, CLIP's is 1", "Core-hours"], _cost(plan)),
        "## All values",
        f"{results_link('plan')} has all inputs. `scripts/evidence/plan.py` computes power, cost and verdicts from them.",
    )


def counts(found: Sequence[Verdict]) -> str:
    counts = Counter(each.verdict for each in found)
    shown = [f"{counts[name]} {name}" for name in ("holds", "does not hold", "undecided", "open") if counts[name]]
    return f"Of {len(found)} claims: {', '.join(shown)}."


def _row(number: int, each: Verdict) -> list[str]:
    claim = each.claim
    difference = "" if each.difference is None else f"{signed(each.difference)} ({span_text(each.interval)})"
    p = "" if each.adjusted is None else f" (*p* {max(each.adjusted, 0.001):.3f})"
    arms = f"`{claim.arms[1]}` > `{claim.arms[0]}`"
    return [str(number), claim.statement, arms, f"{claim.effect:g}", difference, f"**{each.verdict}**{p}"]


def _planned(plan: Plan) -> list[list[str]]:
    return [
        [str(number), claim.paper, f"{claim.power:.2f}", f"{claim.core_hours:.1f}"]
        for number, claim in enumerate(plan.claims, 1)
    ]


def _data(plan: Plan, tables: Mapping[str, Values]) -> list[str]:
    """Returns what each table trains on and is evaluated on, with the claims that it decides."""
    found = []
    for name, of_table in plan.values["tables"].items():
        own = [(number, claim) for number, claim in enumerate(plan.claims, 1) if claim.table == name]
        fractions = [f"{100 * fraction:g}" for fraction in of_table["fractions"]]
        on = f"{', '.join(fractions[:-1])} and {fractions[-1]} %" if len(fractions) > 1 else "all"
        metrics = ", ".join(dict.fromkeys(metric_text(claim.metric) for _, claim in own))
        numbers = f"Claims {own[0][0]} to {own[-1][0]}" if len(own) > 1 else f"Claim {own[0][0]}"
        found.append(
            f"{numbers}: {link(name) if name in TITLES and name in tables else f'`{name}`'}, {of_table['what']} (`{of_table['data']}`). "
            f"{of_table['pairs']:,} pairs to train on, {of_table['items']:,} items, {of_table['seeds']} seeds. Arms: "
            f"{', '.join(f'`{arm}`' for arm in of_table['arms'])}, on {on} of the pairs. Metric: {metrics}."
        )
    return found


def metric_text(metric: str) -> str:
    """Returns "R@10 of the test split, mean of both directions" for "retrieval_test.r10"."""
    task, _, recall = metric.partition(".r")
    return f"R@{recall} of the {SPLITS[task]} split, mean of both directions"


def _noise(plan: Plan) -> list[str]:
    return [
        f"`{name}`, {metric_text(metric)}: *s*(seed) {noise['s_seed']:g}, *s*(item) {noise['s_item']:g}. {noise['source']}"
        for name, of_table in plan.values["tables"].items()
        for metric, noise in of_table["noise"].items()
    ]


def _cost(plan: Plan) -> list[list[str]]:
    costs = plan.values["cost"]["per_pair"]
    return [
        [f"`{name}`", f"`{arm}`", f"{costs[arm]:g}", f"{arm_hours(plan, name, arm):.1f}"]
        for name, of_table in plan.values["tables"].items()
        for arm in of_table["arms"]
    ]
