import dataclasses
import json
from pathlib import Path

import pytest

from coalign.config import flatten, to_json
from coalign.errors import UserError
from coalign.experiments.tables.registry import TABLES, table
from coalign.methods import recipes
from coalign.methods.table import Arm
from coalign.methods.table_settings import CHOSEN, chosen, tuned_arm

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", TABLES)
def test_arms_differ_only_in_declared_settings(name):
    sweep = TABLES[name]
    first_row = next(iter(sweep.arms.values()))
    first = flatten(to_json(sweep.config(next(iter(sweep.arms)), 0, round(6000 * first_row.sample_fraction))))
    for arm, row in sweep.arms.items():
        config = sweep.config(arm, 3, round(6000 * row.sample_fraction))
        settings = flatten(to_json(config))
        differ = {key for key in first.keys() & settings.keys() if first[key] != settings[key]}
        allowed = {
            "method",
            "seed",
            *(["model"] if row.recipe == "oner" else []),
            *(["epochs"] if row.epochs != 1 else []),
            *(["epochs", "train_fraction"] if row.train_fraction != first_row.train_fraction else []),
            *(["unpaired_captions"] if row.unpaired_captions else []),
            *(["batch_size"] if row.batch != 1 else []),
        }
        allowed |= {key for key in differ if key.startswith("method_config.")}
        assert differ <= allowed
        assert config.seed == 3
        assert config.precision == "fp32"  # whatever the machine is fastest at
        if row.train_fraction == 1:
            assert config.epochs == sweep.epochs * row.epochs
        for field, value in row.changes.items():
            assert getattr(config.method_config, field) == value
        dataclasses.replace(config.method_config)  # passes the configuration's own checks


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_need_a_column_or_a_split_name_data_that_has_it(name):
    assert bool(TABLES[name].val_by or TABLES[name].test_splits) == bool(TABLES[name].data)


@pytest.mark.parametrize("name", TABLES)
def test_arms_that_evaluate_anew_only_change_the_method(name):
    for arm, row in TABLES[name].arms.items():
        if row.weights_of:
            base = TABLES[name].arms[row.weights_of]
            assert base.recipe == row.recipe
            assert not base.weights_of
            assert row == Arm(row.recipe, row.changes, paper=row.paper, weights_of=row.weights_of)
            trained, anew = (TABLES[name].config(each, 1, 6000) for each in (row.weights_of, arm))
            changed = dataclasses.replace(trained.method_config, **row.changes)
            assert trained.method_config != changed
            assert anew == dataclasses.replace(trained, method_config=changed)
            assert TABLES[name].paper_config(arm, 0) is None


def test_claims_of_oners_table_hold_by_both_similarities():
    claims = TABLES["oner-emoji"].claims
    by_projector = [tuple(f"{arm}, by projector" for arm in pair) for pair in claims[: len(claims) // 2]]
    assert list(claims[len(claims) // 2 :]) == by_projector
    assert ("ITC", "ITC, two heads") in claims
    assert {arm for pair in claims for arm in pair} == TABLES["oner-emoji"].arms.keys() - {"clip"}


@pytest.mark.parametrize("pairs", [1426, 6000])
def test_arms_on_a_fraction_keep_the_number_of_steps_and_the_model(pairs):
    sweep = TABLES["headline-emoji-concepts"]
    whole = sweep.config("uniclip", 0, pairs)
    for fraction in (0.5, 0.25):
        part = sweep.config(f"uniclip, {100 * fraction:g} %", 0, round(pairs * fraction))
        steps = [round(c.epochs * (n // c.batch_size)) for c, n in ((whole, pairs), (part, round(pairs * fraction)))]
        assert steps[0] == steps[1]
        assert (part.train_fraction, part.model) == (fraction, whole.model)


def test_settings_exist_for_fewer_pairs_than_a_batch():
    """So that the error is about the pairs, not about the epochs that follow from them."""
    assert TABLES["headline-emoji-concepts"].config("uniclip, 25 %", 0, 10).epochs > 0


@pytest.mark.parametrize("pairs", [1426, 6000])
def test_additional_captions_keep_the_number_of_pairs_and_steps(pairs):
    sweep = TABLES["oner-transfer-emoji"]
    steps = []
    for arm, row in sweep.arms.items():
        num_samples = round(pairs * row.sample_fraction)
        config = sweep.config(arm, 0, num_samples)
        steps.append(round(config.epochs * (num_samples // config.batch_size)))
        assert config.batch_size * (row.train_fraction if row.unpaired_captions else 1) == sweep.batch_size
    assert len(set(steps)) == 1


def test_other_tables_take_what_the_search_chose():
    arms = json.loads((ROOT / "results/headline-emoji-concepts.json").read_text())["search"]["arms"]
    searched = [name for name in arms if name in recipes()]
    assert set(CHOSEN) == set(searched)
    for name in searched:
        found, choice = arms[name]["chosen"], chosen(name)
        assert dataclasses.asdict(choice.settings) == pytest.approx(found["settings"])
        assert (choice.epochs, choice.shortest) == (found["epochs"], found["shortest"])
        assert TABLES["emoji-vendor"].arms.get(name, tuned_arm(name)).choice == choice


def test_unknown_table_suggests_known_names():
    with pytest.raises(UserError, match="declip-emoji"):
        table("declip-emojis")
