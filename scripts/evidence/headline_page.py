"""The page of the headline: its figure, the values on all pairs, the data efficiency, the claims and the search."""

from __future__ import annotations

from collections.abc import Sequence

import headline

from evidence.plan import Verdict
from evidence.text import (
    Values,
    bullet,
    factor_text,
    page,
    paragraph,
    percents,
    results_link,
    shared_settings,
    signed,
    span_text,
    table,
)
from evidence.titles import ARMS, HEADLINE, OTHERS, link

KNOWN = (1, 3, 6, 12)  # numbers of trials


def headline_page(values: Values, verdicts: Sequence[Verdict]) -> str:
    """Returns the page; `verdicts` are those of the plan's claims on this table."""
    by_arm = headline.points(values)
    seeds = sorted({len(group["seeds"]) for group in values["groups"]})
    held_out = shared_settings(values)
    return page(
        f"# {OTHERS['headline']}",
        paragraph(
            "How good is the best model that a number of pairs can give, and how many fewer pairs does a method need for it? Settings and "
            "length of every arm were chosen on held-out pairs, by the same number of trials; the test drawings, of emoji that are "
            f"in no training pair, were evaluated once. {held_out['num_train']:,} drawings to train on; "
            f"{' or '.join(map(str, seeds))} seeds per point."
        ),
        "![Recall on unseen emoji against pairs and core-minutes](headline.png)",
        "`python scripts/headline.py` draws it again.",
        "## On all pairs",
        paragraph(
            "R@1 and R@10 in %, mean of both directions, with half the width of the 95 % CI over seeds; core-minutes of the "
            "final training and of the search, by processor time. The features of the locked encoders are not included: for all pairs, "
            "they take about 1.5 core-minutes, once for all trials."
        ),
        table(
            ["", *(f"R@{recall[1:]}" for recall in headline.RECALLS), "Core-minutes", "Search"],
            [_row(arm, of_arm[-1]) for arm, of_arm in by_arm.items()],
        ),
        "## Data efficiency",
        paragraph(
            "How many times fewer pairs than CLIP an arm needs for CLIP's R@10 on all pairs, mean of both directions, with a 95 % "
            "interval. Below 1, CLIP needs fewer pairs for the arm's R@10. ≥ and ≤: beyond the fractions tried."
        ),
        table(
            ["", "Factor"],
            [[_name(arm), factor_text(found)] for arm, found in values["efficiency"].get(headline.TASK, {}).items()],
        ),
        "## Claims",
        f"Of {link('plan')}:",
        "\n".join(bullet(_claim(each)) for each in verdicts),
        "## Search",
        paragraph(
            "The length that was chosen, and the expected best score of *k* trials of the shortest length on the held-out pairs (mean of "
            "R@1, R@5 and R@10 of both directions, in %). If the last columns are close, more trials would hardly help."
        ),
        table(["", "Epochs", *(f"*k* = {k}" for k in KNOWN)], [_search(values, arm) for arm in by_arm]),
        "## All values",
        f"{link(HEADLINE)} has all metrics and settings; {results_link(HEADLINE)} has every trial of the search.",
    )


def _name(arm: str) -> str:
    return ARMS.get(arm, arm)


def _row(arm: str, point: headline.Point) -> list[str]:
    recalls = [percents(*each) for each in point.recalls.values()]
    return [_name(arm), *recalls, f"{point.core_minutes:.1f}", f"{point.search_core_minutes:.0f}"]


def _claim(each: Verdict) -> str:
    if each.difference is None:
        return f"{each.claim.statement} **{each.verdict}**"
    return f"{each.claim.statement} **{each.verdict}**: {signed(each.difference)} ({span_text(each.interval)})"


def _search(values: Values, arm: str) -> list[str]:
    found = values["search"]["arms"][arm]
    best = found["best_of"]
    return [
        _name(arm),
        f"{found['chosen']['epochs']:g}",
        *(f"{100 * best[k - 1]:.1f}" if k <= len(best) else "" for k in KNOWN),
    ]
