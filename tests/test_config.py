"""Settings of a run: the marks of every field, and the checks of their values."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from coalign.config import TUNING, TrainConfig, fields_marked, from_json, marks, to_json
from coalign.errors import UserError
from coalign.methods import recipe

CONFIG = recipe("clip")(5000)
INVALID = {  # setting -> invalid values, and the words of the error
    "image_tuning": (["none", "last", "last:-1", "LOCKED"], TUNING.requirement),
    "text_tuning": (["last:x"], TUNING.requirement),
    "image_layer_decay": ([0, 1.1, math.nan], "more than 0 and at most 1"),
    "text_layer_decay": ([0, 1.1], "more than 0 and at most 1"),
    "head_epochs": ([-1, math.nan], "at least 0"),
    "feature_views": ([-1], "at least 0"),
    "image_size": ([0, -1], "at least 1"),
    "context_length": ([2], "at least 3: start token, one token, end token"),
    "micro_batch": ([0, -1], "at least 1"),
    "epochs": ([0, -1.0, math.nan], "more than 0"),
    "max_grad_norm": ([0.0, math.nan], "more than 0"),
    "batch_norm_group": ([0], "at least 1"),
    "workers": ([-1], "at least 0"),
    "image_cache": ([-0.5, math.nan], "at least 0"),
    "val_fraction": ([-0.1, 1.0, math.nan], "at least 0 and less than 1"),
    "test_fraction": ([-0.1, 1.0, math.nan], "at least 0 and less than 1"),
    "train_fraction": ([0.0, 1.1, math.nan], "more than 0 and at most 1"),
    "evals": ([-1], "at least 0"),
    "patience": ([0], "at least 1"),
    "save_every": ([0], "at least 1"),
    "max_bad_fraction": ([-0.1, 1.1, math.nan], "between 0 and 1"),
    "max_non_finite": ([0], "at least 1"),
}


def test_every_setting_states_its_marks():
    for field in fields(TrainConfig):
        assert field.metadata.keys() == marks().keys(), field.name


def test_marks_agree_with_each_other():
    names = {field.name for field in fields(TrainConfig)}
    may_change, compared, trial, card = (
        set(fields_marked(TrainConfig, mark))
        for mark in ("may_change_on_resume", "compared", "identifies_trial", "on_card")
    )
    assert names - compared == may_change - {"patience"} | {"seed"}  # patience changes the length of a run
    assert trial <= compared - may_change  # runs of different tables are never averaged
    assert card.isdisjoint(may_change)  # what may change is not known from the configuration
    assert min(map(len, (may_change, compared, trial, card))) > 5


@pytest.mark.parametrize("name", INVALID)
def test_invalid_values_are_rejected(name):
    values, requirement = INVALID[name]
    for value in values:
        with pytest.raises(UserError) as caught:
            replace(CONFIG, **{name: value})
        assert str(caught.value) == f"--{name.replace('_', '-')} is {value}, but must be {requirement}."


def test_every_range_is_tested():
    assert INVALID.keys() == set(fields_marked(TrainConfig, "valid"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("context_length", [3]),
        ("workers", [0, None]),
        ("image_size", [1, None]),
        ("max_grad_norm", [1e-9, None]),
        ("val_fraction", [0.0]),
        ("train_fraction", [1.0, 1e-3]),
        ("max_bad_fraction", [0, 1]),
        ("patience", [1, None]),
        ("evals", [0]),
    ],
)
def test_limits_of_the_ranges_are_valid(name, values):
    for value in values:
        assert getattr(replace(CONFIG, **{name: value}), name) == value


def test_settings_that_need_another_setting():
    with pytest.raises(UserError, match=r"^--probe needs classes; give them with --classes FILE\.$"):
        replace(CONFIG, probe=True)
    replace(CONFIG, probe=True, classes=Path("classes.txt"))
    with pytest.raises(
        UserError, match=r"^--unpaired-captions needs a --train-fraction below 1; otherwise, no captions"
    ):
        replace(CONFIG, unpaired_captions=True)
    replace(CONFIG, unpaired_captions=True, train_fraction=0.5)
    with pytest.raises(UserError, match=r"^--shard does not support --precision fp16; use bf16 or fp32"):
        replace(CONFIG, shard=True, precision="fp16")
    replace(CONFIG, shard=True, precision="bf16")


def test_a_saved_configuration_is_checked():
    saved = {**to_json(CONFIG), "method_config": None}
    assert from_json(TrainConfig, saved) == replace(CONFIG, method_config=None)
    with pytest.raises(UserError, match="--epochs is 0, but must be more than 0"):
        from_json(TrainConfig, {**saved, "epochs": 0})
