"""The claims of results/plan.json: its checks, Holm's correction, power, cost and verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest

from coalign.errors import UserError

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "results/plan.json"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        from evidence import plan, plan_page

        yield plan, plan_page


@pytest.fixture(scope="module")
def plan(modules):
    return modules[0]


@pytest.fixture
def values():
    return json.loads(PLAN.read_text())


def table(claims, seeds=5):
    """A table's results with entries of claims: (lower, higher, metric, p, difference)."""
    arms = {arm for lower, higher, *_ in claims for arm in (lower, higher)}
    return {
        "groups": [{"name": arm, "seeds": list(range(seeds))} for arm in arms],
        "claims": [
            {
                "claim": f"{higher} is better than {lower}",
                "metric": metric,
                "p": p,
                "difference": difference,
                "interval": [difference - 0.01, difference + 0.01],
            }
            for lower, higher, metric, p, difference in claims
        ],
    }


# ---------------------------------------------------------------- the file


def test_the_plan_keeps_its_rules(plan, values):
    found = plan.read_plan(PLAN)
    assert len(found.claims) == len({claim.id for claim in found.claims}) <= 12
    assert sum(claim.core_hours for claim in found.claims) <= 40
    assert min(claim.power for claim in found.claims) >= 0.8
    paid = {(claim.table, arm.partition(",")[0]) for claim in found.claims for arm in claim.arms}
    assert paid == {(name, arm) for name, each in values["tables"].items() for arm in each["arms"]}


def change_claim(**changes):
    return lambda values: values["claims"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_claim(id="uniclip-clip"), "two claims have the same id"),
        (change_claim(extra=1), "Claim 2 of .* has missing or unknown fields: extra"),
        (lambda values: values["claims"][0].pop("paper"), "Claim 1 of .* has missing or unknown fields: paper"),
        (change_claim(power=0.9), "strong-clip has the power 0.9, but its inputs give 0.82"),
        (change_claim(core_hours=1), "strong-clip has the core_hours 1, but its inputs give 5.81"),
        (change_claim(direction="better"), "has the direction 'better'; use higher or lower"),
        (change_claim(arms=["clip", "slip"]), "has the arm 'slip', which is not in tables.headline-emoji-concepts"),
        (change_claim(metric="retrieval.r5"), "has no noise for retrieval.r5 in tables.headline-emoji-concepts"),
        (change_claim(table="other"), "has no noise for retrieval_test.r10 in tables.other"),
        (change_claim(seeds=4), "has other items or seeds than tables.headline-emoji-concepts"),
        (lambda values: values["claims"].append(values["claims"][0]), "there are 13 claims, but at most 12"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(plan, values, tmp_path, change, message):
    change(values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        plan.read_plan(path)


def test_more_than_40_core_hours_are_refused(plan, values, tmp_path):
    values["cost"]["clip_pairs_per_second"] /= 2.1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    hours = plan.core_hours(plan.Plan(plan.read_plan(PLAN).claims, values))
    for claim in values["claims"]:
        claim["core_hours"] = hours[claim["id"]]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"the claims take 41\.8 core-hours, but at most 40 are allowed"):
        plan.read_plan(path)


def test_cost_of_an_arm_is_the_sum_of_its_runs(plan, values):
    """Counted run by run."""
    of_table = values["tables"]["headline-emoji-concepts"]
    epochs, lengths = 0.0, of_table["lengths"]
    assert (lengths, of_table["trials"]) == ([20, 40, 80], 12)
    longest = [20] * 6 + [40] * 3 + [80] * 3  # of the trials on all pairs
    for fraction in of_table["fractions"]:
        for to in longest if fraction == 1 else [80]:
            epochs += to  # at a constant rate
            for length in lengths:
                epochs += length / 5 if length <= to else 0  # a cool-down
        for _ in range(of_table["seeds"]):
            epochs += max(lengths)
    cost = values["cost"]
    seconds = epochs * of_table["pairs"] * cost["per_pair"]["uniclip"] / cost["clip_pairs_per_second"]
    assert plan.arm_hours(plan.read_plan(PLAN), "headline-emoji-concepts", "uniclip") == pytest.approx(seconds / 3600)


# ---------------------------------------------------------------- Holm, power


def rejected(p_values, level):
    """Holm's procedure (1979), step by step: the indices of the rejected hypotheses."""
    order, out = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
    for step, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - step):
            break
        out.add(index)
    return out


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_holm_matches_the_procedure_step_by_step(plan, count):
    random = np.random.default_rng(count)
    for _ in range(200):
        p_values = (random.random(count) ** 4).tolist()
        adjusted = plan.holm(p_values, count)
        for level in (0.01, 0.05, 0.2):
            assert {i for i, p in enumerate(adjusted) if p <= level} == rejected(p_values, level)


def test_holm_matches_the_example_of_r(plan):
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert plan.holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_open_claims_stay_in_the_denominator(plan):
    """An open claim counts like one with p = 1, and its result, whatever it is, leaves what is rejected rejected."""
    random = np.random.default_rng(0)
    for _ in range(200):
        known, rest = (random.random(5) ** 4).tolist(), (random.random(7) ** 4).tolist()
        adjusted = plan.holm(known, 12)
        assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected([*known, *[1.0] * 7], 0.05)
        assert all(later <= now for now, later in zip(adjusted, plan.holm([*known, *rest], 12)))


@pytest.mark.parametrize(("effect", "seeds", "items"), [(6, 5, 451), (2, 3, 301), (0, 5, 451)])
def test_power_matches_simulated_experiments(plan, effect, seeds, items):
    random = np.random.default_rng(0)
    s_seed, s_item, level, trials = 1.7, 25.0, 0.05, 20_000
    error = np.sqrt(2 * s_seed**2 / seeds + s_item**2 / items)
    arms = random.normal(0, s_seed, (trials, 2, seeds)).mean(2)
    of_items = np.concatenate([random.normal(effect, s_item, (1000, items)).mean(1) for _ in range(trials // 1000)])
    differences = arms[:, 1] - arms[:, 0] + of_items
    found = (differences > 1.959964 * error).mean()
    assert plan.power(effect, s_seed, s_item, seeds, items, level) == pytest.approx(found, abs=0.012)


# ---------------------------------------------------------------- verdicts


HEADLINE, R10 = "headline-emoji-concepts", "retrieval_test.r10"


def test_without_results_every_claim_is_open(plan):
    found = plan.verdicts(plan.read_plan(PLAN), {})
    assert [each.verdict for each in found] == ["open"] * 12


def test_verdicts(plan):
    """Of twelve planned claims: 0.004 is below 0.05 / 12, 0.0045 below 0.05 / 11, but 0.0051 above 0.05 / 10."""
    entries = [
        ("clip", "uniclip", R10, 0.004, 0.08),
        ("clip", "clip-strong", R10, 0.0045, -0.08),
        ("clip-strong", "uniclip", R10, 0.0051, 0.16),
    ]
    found = {each.claim.id: each for each in plan.verdicts(plan.read_plan(PLAN), {HEADLINE: table(entries)})}
    assert found["uniclip-clip"].verdict == "holds"
    assert found["uniclip-clip"].adjusted == pytest.approx(12 * 0.004)
    assert (found["uniclip-clip"].difference, found["uniclip-clip"].interval) == (0.08, (0.07, 0.09))
    assert found["strong-clip"].verdict == "does not hold"
    assert found["uniclip-strong"].verdict == "undecided"
    assert {each.verdict for name, each in found.items() if name not in list(found)[:3]} == {"open"}


def test_a_claim_is_open_until_both_arms_have_all_seeds(plan):
    entries = [("clip", "uniclip", R10, 0.0001, 0.08)]
    for seeds, verdict in ((4, "open"), (5, "holds")):
        assert plan.verdicts(plan.read_plan(PLAN), {HEADLINE: table(entries, seeds)})[0].verdict == verdict


def test_a_table_without_the_claim_of_its_arms_is_refused(plan):
    values = table([("clip", "uniclip", "retrieval_test.r1", 0.0001, 0.08)])
    with pytest.raises(
        UserError, match=r"headline-emoji-concepts\.json has both arms of the claim uniclip-clip, but not"
    ):
        plan.verdicts(plan.read_plan(PLAN), {HEADLINE: values})


def test_the_page_shows_the_verdicts(modules):
    plan, plan_page = modules
    entries = [
        ("clip", "uniclip", R10, 0.0001, 0.082),
        ("clip", "clip-strong", R10, 0.5, -0.01),
        ("clip-strong", "uniclip", R10, 0.01, 0.09),
    ]
    text = plan_page.plan_page(plan.read_plan(PLAN), {HEADLINE: table(entries)})
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 | On")]
    assert row.endswith("| `uniclip` > `clip` | 6 | +8.2 (+7.2 to +9.2) | **holds** (*p* 0.001) |")
    assert "Of 12 claims: 1 holds, 2 undecided, 9 open." in text


# ---------------------------------------------------------------- claims of a table


def test_claims_over_seeds_and_items_on_the_page_of_a_table(modules):
    from evidence import table_page

    claim = {
        "claim": "uniclip is better than clip",
        "metric": R10,
        "title": "Test: R@10, mean of both directions",
        "difference": 0.082,
        "interval": [0.01, 0.15],
        "p": 0.02,
        "verdict": "holds",
    }
    single_seed = {**claim, "interval": None, "p": None, "verdict": "undecided"}
    values = {"table": "style-shift", "groups": [], "claims": [claim, single_seed]}
    rows = table_page.claims(values)[-1].splitlines()
    assert rows[0] == "| Claim | Metric | Difference | 95 % CI | *p* |  |"
    metric = "uniclip is better than clip | Test: R@10, mean of both directions | +8.2"
    assert rows[2:] == [f"| {metric} | +1.0 to +15.0 | 0.020 | **holds** |", f"| {metric} | – | – | **undecided** |"]
