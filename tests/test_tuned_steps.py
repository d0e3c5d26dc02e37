"""Steps with frozen parts: equal in micro-batches, on two processes and with sharded weights; runs resume bit-identically."""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers.builders import make_batch
from helpers.equal_runs import assert_equal_weights
from helpers.processes import on_two_processes
from helpers.steps import ALONE, STEP, assert_equal_steps, batch_for, rank_share, run_step
from helpers.tuned import tuned

from coalign.config import OptimizerConfig, TrainConfig
from coalign.dtensor import is_sharded
from coalign.optim import build_optimizers
from coalign.training import checkpoint
from coalign.training.distributed import RankGather
from coalign.training.sharding import full_tensors, shard
from coalign.training.step import forward_backward, move_statistics
from coalign.training.trainer import Trainer

MODES = {
    "locked": {"image_tuning": "locked", "text_tuning": "locked"},
    "last": {"image_tuning": "last:1", "text_tuning": "last:0"},
    "mixed": {"image_tuning": "locked", "text_layer_decay": 0.5},
    "heads": {"head_epochs": 1},
}
METHODS = [("clip", "transformer"), ("clip", "batch norm"), ("slip", "transformer"), ("declip", "transformer"),
           ("uniclip", "batch norm"), ("mcd", "transformer"), ("mcd", "batch norm"), ("mct", "batch norm"),
           ("filip", "transformer")]  # fmt: skip
CASES = [(*method, mode) for method in METHODS for mode in MODES]
OPTIMIZER = OptimizerConfig(lr=1e-3, new_lr=1e-2, weight_decay=0.1, warmup_fraction=0)


def build(name, folder, model, mode):
    method, tuning = tuned(name, folder, model, settings={"optimizer": OPTIMIZER}, **MODES[mode])
    tuning.set_heads_only(mode == "heads")
    return method.train(), tuning


@pytest.mark.parametrize(("name", "model", "mode"), CASES)
def test_micro_batches(tmp_path, name, model, mode):
    method, _ = build(name, tmp_path, model, mode)
    batch = batch_for(method)
    whole = run_step(method, batch, ALONE)
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    assert whole[1].keys() == trained
    method, _ = build(name, tmp_path, model, mode)
    assert_equal_steps(whole, run_step(method, batch, ALONE, [slice(0, 4), slice(4, 6), slice(6, 8)]))


def test_frozen_batch_norms_take_micro_batches_of_any_size(tmp_path):
    for slices in (None, [slice(0, 3), slice(3, 4), slice(4, 8)]):
        method, _ = build("clip", tmp_path, "batch norm", "locked")
        step = run_step(method, batch_for(method), ALONE, slices)
        if slices is None:
            whole = step
    assert_equal_steps(whole, step)


def half_steps(world, folder, cases):
    steps = []
    for name, model, mode in cases:
        method, _ = build(name, folder, model, mode)
        steps.append(run_step(method, rank_share(batch_for(method), world), world, [slice(0, 2), slice(2, 4)]))
    return steps


def test_two_processes(tmp_path):
    ranks = on_two_processes(half_steps, tmp_path, CASES)
    for number, (name, model, mode) in enumerate(CASES):
        method, _ = build(name, tmp_path, model, mode)
        whole = run_step(method, batch_for(method), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])


# ---------------------------------------------------------------- sharded weights


def optimizer_steps(method, tuning, batch, world, mode):
    """Two steps; those with heads first are one of each phase. Returns the loss, and the weights and moments."""
    tuning.set_heads_only(False)
    optimizers = build_optimizers(tuning.groups(), OPTIMIZER, method, tuning.rates())
    for index in range(3):
        tuning.set_heads_only(mode == "heads" and index < 1)
        optimizers.set_lr(index, 10, head_steps=1 if mode == "heads" else 0)
        result = forward_backward(method, batch, STEP, world)
        optimizers.step()
        move_statistics(method, world, keep=True)
        method.after_step(result.features, result.targets, RankGather(world), STEP)
        optimizers.zero_grad()
    return result.loss, full_tensors(method.state_dict(), True), full_tensors(optimizers.state_dict(), True)


def sharded_steps(world, folder, cases):
    results = []
    for name, model, mode in cases:
        method, tuning = tuned(name, folder, model, settings={"optimizer": OPTIMIZER}, **MODES[mode])
        shard(method.train(), world, (), min_numel=64)
        assert any(is_sharded(p) for p in method.parameters())
        results.append(optimizer_steps(method, tuning, rank_share(batch_for(method), world), world, mode))
    return results


@pytest.mark.slow
def test_sharded_steps_equal_unsharded_steps(tmp_path):
    cases = [case for case in CASES if case[0] in ("clip", "slip", "mcd")]
    ranks = on_two_processes(sharded_steps, tmp_path, cases)
    for number, (name, model, mode) in enumerate(cases):
        method, tuning = tuned(name, tmp_path, model, settings={"optimizer": OPTIMIZER}, **MODES[mode])
        loss, weights, moments = optimizer_steps(method.train(), tuning, batch_for(method), ALONE, mode)
        for rank in ranks:
            other_loss, other_weights, other_moments = rank[number]
            assert loss == pytest.approx(other_loss, rel=1e-9)
            assert_equal_weights(weights, other_weights, rtol=1e-6, atol=1e-7)
            assert moments.keys() == other_moments.keys()


# ---------------------------------------------------------------- resume


@dataclass
class Loaded:
    batch: object
    bad: list


class Stop(Exception):
    """Ends a run without a checkpoint, as a crash does."""


def run(folder, model_folder, mode, stop=None, *, name):
    """Trains 6 steps, of which heads-only runs have 3, or crashes before step `stop`."""
    method, tuning = tuned(name, model_folder, "batch norm", settings={"optimizer": OPTIMIZER}, **MODES[mode])
    method.float()
    config = TrainConfig(
        name, method.config, batch_size=8, precision="fp32", evals=0, save_every=1, optimizer=OPTIMIZER
    )

    def batches(first, last):
        for step in range(first, last):
            if step == stop:
                raise Stop
            yield Loaded(make_batch(method.view_plan, 8, seed=step), [])

    trainer = Trainer(
        method, replace(config, **MODES[mode]), ALONE, folder, batches=batches, num_pairs=32, total_steps=6,
        tuning=tuning, head_steps=3 if mode == "heads" else 0,
    )  # fmt: skip
    trainer.resume()
    trainer.fit()


@pytest.mark.parametrize(("name", "mode"), [*(("mcd", mode) for mode in MODES), ("clip-strong", "heads")])
def test_resumed_runs_are_bit_identical(tmp_path, name, mode):
    """Crashes in the head phase, at its end, and after it. `clip-strong` has dropout."""
    run(tmp_path / "whole", tmp_path, mode, name=name)
    for stop in (2, 3, 5):
        with pytest.raises(Stop):
            run(tmp_path / "resumed", tmp_path, mode, stop, name=name)
    run(tmp_path / "resumed", tmp_path, mode, name=name)
    whole, resumed = (checkpoint.load(tmp_path / each / "last") for each in ("whole", "resumed"))
    assert_equal_weights(whole.model, resumed.model)
    assert whole.optimizer.keys() == resumed.optimizer.keys()
    for key, values in whole.optimizer.items():
        assert all(torch.equal(value, resumed.optimizer[key][each]) for each, value in values.items()), key
