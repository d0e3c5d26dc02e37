"""The claims that were chosen before training: results/plan.json, its checks, and the verdicts that follow from results/.

`read_plan` recomputes the power and the cost of every claim, and raises a UserError if the file says otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from scipy.special import ndtr, ndtri

from coalign.errors import UserError
from coalign.evaluation.metrics import holm
from coalign.methods.search import halved
from evidence.text import Values

MAX_CLAIMS, MAX_CORE_HOURS = 12, 40.0
LEVEL = 0.05  # of the family of claims
DIRECTIONS = {"higher": 1, "lower": -1}  # what the metric of the second arm is, if the claim holds


@dataclass(frozen=True)
class Claim:
    """One claim: the second of two arms is better by a metric of a table."""

    id: str
    statement: str
    paper: str  # that it is from
    table: str  # its results are in results/<table>.json
    arms: tuple[str, str]  # lower, higher
    metric: str  # of the table; "retrieval_test.r10" is the mean of both directions
    direction: str  # of DIRECTIONS
    effect: float  # the difference that it is planned for, in percentage points
    items: int  # that the metric is evaluated on
    seeds: int  # per arm
    power: float  # the probability that the claim holds, if the difference is the effect
    core_hours: float  # of the runs that no earlier claim needs


@dataclass(frozen=True)
class Plan:
    claims: list[Claim]
    values: Values  # all of the file


@dataclass(frozen=True)
class Verdict:
    """A claim with what its table says."""

    claim: Claim
    difference: float | None  # as a fraction
    interval: tuple[float, float] | None
    adjusted: float | None  # Holm's p-value
    verdict: str  # holds, does not hold (the reverse is significant), undecided, or open (not trained yet)


# ---------------------------------------------------------------- the file


def read_plan(path: Path) -> Plan:
    """Reads and checks the plan. Raises UserError if it breaks a rule, or if a number is not what its inputs give."""
    values = json.loads(path.read_text(encoding="utf-8"))
    names = [field.name for field in fields(Claim)]
    claims = []
    for number, entry in enumerate(values["claims"], 1):
        if different := set(names) ^ entry.keys():
            raise UserError(f"Claim {number} of {path} has missing or unknown fields: {', '.join(sorted(different))}.")
        claims.append(Claim(**{**entry, "arms": tuple(entry["arms"])}))
    plan = Plan(claims, values)
    if problem := _problem(plan):
        raise UserError(f"{path}: {problem}.")
    return plan


def _problem(plan: Plan) -> str:
    """Returns what is wrong with the plan, "" if nothing is."""
    claims = plan.claims
    if len(claims) > MAX_CLAIMS:
        return f"there are {len(claims)} claims, but at most {MAX_CLAIMS} are allowed"
    if len({claim.id for claim in claims}) < len(claims):
        return "two claims have the same id"
    for claim in claims:
        if problem := _claim_problem(claim, plan.values["tables"].get(claim.table)):
            return f"the claim {claim.id} has {problem}"
    hours = core_hours(plan)
    for claim in claims:
        expected = {"power": claim_power(plan, claim), "core_hours": hours[claim.id]}
        for name, value in expected.items():
            if abs(getattr(claim, name) - value) > 0.005001:  # stated with two decimals
                return f"the claim {claim.id} has the {name} {getattr(claim, name)}, but its inputs give {value:.2f}"
    if (total := sum(hours.values())) > MAX_CORE_HOURS:
        return f"the claims take {total:.1f} core-hours, but at most {MAX_CORE_HOURS:g} are allowed"
    return ""


def _claim_problem(claim: Claim, of_table: Values | None) -> str:
    if claim.direction not in DIRECTIONS:
        return f"the direction {claim.direction!r}; use {' or '.join(DIRECTIONS)}"
    if of_table is None or claim.metric not in of_table["noise"]:
        return f"no noise for {claim.metric} in tables.{claim.table}"
    if unknown := [arm for arm in claim.arms if arm not in arms(of_table)]:
        return f"the arm {unknown[0]!r}, which is not in tables.{claim.table}"
    if (claim.items, claim.seeds) != (of_table["items"], of_table["seeds"]):
        return f"other items or seeds than tables.{claim.table}"
    return ""


def arms(of_table: Values) -> dict[str, str]:
    """Returns the arms of a table of the plan, with their names on all pairs."""
    return {
        arm if fraction == 1 else f"{arm}, {100 * fraction:g} %": arm
        for arm in of_table["arms"]
        for fraction in of_table["fractions"]
    }


# ---------------------------------------------------------------- power and cost


def power(effect: float, s_seed: float, s_item: float, seeds: int, items: int, level: float) -> float:
    """Returns the probability that a two-sided test at `level` finds a true difference of `effect` between two arms, on its own side.

    s_seed is the standard deviation of an arm's metric over seeds; s_item is the standard deviation of paired differences over items.
    """
    error = math.sqrt(2 * s_seed**2 / seeds + s_item**2 / items)
    return float(ndtr(effect / error + ndtri(level / 2)))


def claim_power(plan: Plan, claim: Claim) -> float:
    """Returns a claim's power at Holm's first and smallest level, so at least the power it has."""
    noise = plan.values["tables"][claim.table]["noise"][claim.metric]
    return power(claim.effect, noise["s_seed"], noise["s_item"], claim.seeds, claim.items, LEVEL / len(plan.claims))


def core_hours(plan: Plan) -> dict[str, float]:
    """Returns id -> core-hours of the runs that no earlier claim needs. An arm comes with all its fractions, which the figure needs."""
    hours: dict[str, float] = {}
    known: set[tuple[str, str]] = set()
    for claim in plan.claims:
        of_table = plan.values["tables"][claim.table]
        needed = {(claim.table, arms(of_table)[arm]) for arm in claim.arms} - known
        hours[claim.id] = sum(arm_hours(plan, table, arm) for table, arm in needed)
        known |= needed
    return hours


def arm_hours(plan: Plan, table: str, arm: str) -> float:
    """Returns the core-hours of an arm's search and final runs, if the search chooses the longest length.

    A search has some trials on all pairs, of which the better half is extended to the next length, and one trial per fraction, which
    chooses its length. A trial is a run at a constant rate to its longest length, with a cool-down from each length. On a fraction of the
    pairs, the number of steps is the same as on all pairs.
    """
    cost, of_table = plan.values["cost"], plan.values["tables"][table]
    lengths, trials, fractions = of_table["lengths"], of_table["trials"], len(of_table["fractions"])
    epochs = float(of_table["seeds"] * fractions * max(lengths))
    for number, (shorter, length) in enumerate(pairwise((0, *lengths))):
        extended = halved(trials, number) + fractions - 1 if trials else 0
        epochs += extended * (length - shorter + cost["cooldown"] * length)
    return epochs * of_table["pairs"] * cost["per_pair"][arm] / cost["clip_pairs_per_second"] / 3600


# ---------------------------------------------------------------- verdicts


def verdicts(plan: Plan, tables: Mapping[str, Values]) -> list[Verdict]:
    """Returns the verdict of every claim, corrected for all planned claims. Once a claim holds, no later result changes it."""
    found = [_result(claim, tables) for claim in plan.claims]
    known = [result for result in found if result is not None]
    adjusted = iter(holm([result["p"] for result in known], len(plan.claims)))
    return [_verdict(claim, result, adjusted) for claim, result in zip(plan.claims, found, strict=True)]


def _verdict(claim: Claim, result: Values | None, adjusted: Iterator[float]) -> Verdict:
    if result is None:
        return Verdict(claim, None, None, None, "open")
    p, difference = next(adjusted), result["difference"]
    decided = "holds" if difference * DIRECTIONS[claim.direction] > 0 else "does not hold"
    return Verdict(claim, difference, tuple(result["interval"]), p, decided if p <= LEVEL else "undecided")


def _result(claim: Claim, tables: Mapping[str, Values]) -> Values | None:
    """Returns the claim's entry in its table; None before both arms have the planned seeds. Raises UserError if the table omits it."""
    groups = tables.get(claim.table, {"groups": ()})["groups"]
    trained = {group["name"] for group in groups if len(group["seeds"]) >= claim.seeds}
    if not trained.issuperset(claim.arms):
        return None
    lower, higher = claim.arms
    for entry in tables[claim.table]["claims"]:
        if (entry["claim"], entry["metric"]) == (f"{higher} is better than {lower}", claim.metric):
            return entry
    raise UserError(f"results/{claim.table}.json has both arms of the claim {claim.id}, but not the claim itself.")
