import dataclasses

import pytest

from coalign.config import flatten, to_json
from coalign.errors import UserError
from coalign.recipes.tables import STEP_COST, TABLES, table


@pytest.mark.parametrize("name", TABLES)
def test_arms_of_a_table_differ_in_what_they_declare_alone(name):
    sweep = TABLES[name]
    first_row = next(iter(sweep.arms.values()))
    first = flatten(to_json(sweep.config(next(iter(sweep.arms)), 0, round(6000 * first_row.share))))
    for arm, row in sweep.arms.items():
        config = sweep.config(arm, 3, round(6000 * row.share))
        settings = flatten(to_json(config))
        differ = {key for key in first.keys() & settings.keys() if first[key] != settings[key]}
        allowed = {
            "method",
            "seed",
            *(["model"] if row.recipe == "oner" else []),
            *(["epochs"] if row.epochs != 1 else []),
            *(["epochs", "train_fraction"] if row.train_fraction != first_row.train_fraction else []),
            *(["rest_as_texts"] if row.rest_as_texts else []),
            *(["batch_size"] if row.batch != 1 else []),
            *(["optimiser.roles.image.lr"] if row.image_lr != first_row.image_lr else []),
        }
        allowed |= {key for key in differ if key.startswith("method_config.")}
        assert differ <= allowed
        assert config.seed == 3
        if row.train_fraction == 1:
            assert config.epochs == sweep.epochs * row.epochs
        for field, value in row.changes.items():
            assert getattr(config.method_config, field) == value
        dataclasses.replace(config.method_config)  # its own checks pass


@pytest.mark.parametrize("pairs", [1426, 6000])
def test_an_arm_on_fewer_pairs_takes_as_many_steps_with_the_same_model(pairs):
    sweep = TABLES["fractions-openclipart"]
    whole = sweep.config("uniclip", 0, pairs)
    for share in (0.5, 0.25):
        few = sweep.config(f"uniclip, {100 * share:g} %", 0, round(pairs * share))
        steps = [round(c.epochs * (n // c.batch_size)) for c, n in ((whole, pairs), (few, round(pairs * share)))]
        assert steps[0] == steps[1]
        assert (few.train_fraction, few.model) == (share, whole.model)


@pytest.mark.parametrize("pairs", [1426, 6000])
def test_more_captions_come_to_as_many_pairs_in_as_many_steps(pairs):
    sweep = TABLES["oner-transfer-openclipart"]
    steps = []
    for arm, row in sweep.arms.items():
        config, number = sweep.config(arm, 0, round(pairs * row.share)), round(pairs * row.share)
        steps.append(round(config.epochs * (number // config.batch_size)))
        assert config.batch_size * (row.train_fraction if row.rest_as_texts else 1) == sweep.batch_size
    assert len(set(steps)) == 1


def test_equal_time_is_equal_epochs_over_what_a_step_costs():
    for data, costs in STEP_COST.items():
        sweep = TABLES[f"two-towers-{data}"]
        for name, cost in costs.items():
            assert sweep.arms[f"{name}, CLIP's time"].epochs * cost == pytest.approx(1)


def test_an_unknown_table_is_answered_with_the_known():
    with pytest.raises(UserError, match="two-towers-scenes"):
        table("two-towers-scene")
