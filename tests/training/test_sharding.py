"""Weights divided over two processes: the same step as one process with all of them, and the same run."""

import copy
from unittest.mock import MagicMock

import pytest
import torch
from builders import TRANSFORMER, build_method, make_batch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import ResidualAttentionBlock
from processes import on_two_processes
from test_step_equality import ALONE, BATCH, BATCH_NORM, MODELS, STEP, batch_for, takes
from torch import nn

from coalign.divided import is_divided
from coalign.methods import METHODS
from coalign.optim import OptimiserConfig, build_optimisers, clip_gradients
from coalign.training import sharding
from coalign.training.distributed import RankGather
from coalign.training.sharding import gathered, load_weights, shard, whole
from coalign.training.step import forward_backward, move_statistics

CASES = [(name, "transformer") for name in METHODS]
CASES += [(name, "batch norm") for name in METHODS if takes(name, BATCH_NORM)]
OPTIMISER = OptimiserConfig(lr=1e-3, weight_decay=0.1)


def run_steps(method, batch, world, slices=None, state=None):
    """Loss, norm, weights and moments after two steps of the optimiser, the second with a clipped gradient."""
    optimisers = build_optimisers(method.parameter_groups(), OPTIMISER, method)
    if state is not None:
        load_weights(method, state[0])
        optimisers.load_state_dict(state[1])
    for number in range(2):
        optimisers.set_lr(5, 10)
        result = forward_backward(method, batch, STEP, world, slices=slices)
        norm = clip_gradients(optimisers.parameters(), 0.05 if number else None)
        optimisers.step()
        move_statistics(method, world, keep=True)
        method.after_step(result.features, result.targets, RankGather(world), STEP)
        optimisers.zero_grad()
    return result.loss, norm, gathered(method.state_dict(), True), gathered(optimisers.state_dict(), True)


def divided_steps(world, folder, cases):
    found = []
    for name, model, slices, state in cases:
        method = build_method(name, folder, MODELS[model])
        shard(method, world, least=64)
        divided = sum(is_divided(p) for p in method.parameters())
        half = batch_for(method)[slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)]
        found.append((divided, run_steps(method, half, world, slices, state)))
        if world.is_first:  # one process alone, while the other waits: a forward must ask it for nothing
            alone = build_method(name, folder, MODELS[model])
            alone.load_state_dict(found[-1][1][2])
            alone.eval()
        method.eval()
        with whole(method), torch.no_grad():
            if world.is_first:
                ids = make_batch(method.view_plan, 2)
                view = next(iter(ids.images.values()))
                torch.testing.assert_close(
                    method.encode_image(view.pixels), alone.encode_image(view.pixels), rtol=0, atol=0
                )
    return found


def flat(values, name=""):
    if isinstance(values, dict):
        return {key: item for own, value in values.items() for key, item in flat(value, f"{name}/{own}").items()}
    return {name: values}


def assert_equal(ours, theirs):
    (loss, norm, weights, moments), (other_loss, other_norm, other_weights, other_moments) = ours, theirs
    assert loss == pytest.approx(other_loss, rel=1e-9)
    assert float(norm) == pytest.approx(float(other_norm), rel=1e-9)
    for one, other, slack in ((weights, other_weights, 1e-7), (flat(moments), flat(other_moments), 1e-12)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Adam moves a bias whose gradient is zero up to rounding by its sign: hence the slack of weights
            torch.testing.assert_close(value, other[name], rtol=1e-6, atol=slack, msg=name)


def test_what_is_read_without_a_call_stays_whole(monkeypatch):
    """Of torch's attention and of the pooling of CLIP's ResNets the weights are arguments of one function."""
    divided = []
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(sharding, "fully_shard", lambda layer, **_: divided.append(layer) or MagicMock())
    model = nn.ModuleDict(
        {"pool": AttentionPool2d(2, 16, 2), "block": ResidualAttentionBlock(16, 2), "out": nn.Linear(16, 16)}
    )
    shard(model, ALONE, least=64)
    assert divided == [model["block"].mlp.c_fc, model["block"].mlp.c_proj, model["out"]]


@pytest.mark.slow
def test_a_step_is_that_of_one_process_with_all_weights(tmp_path):
    wholes, cases = {}, []
    for name, model in CASES:
        method = build_method(name, tmp_path, MODELS[model])
        wholes[name, model] = run_steps(method, batch_for(method), ALONE)
        cases += [(name, model, slices, None) for slices in (None, [slice(0, 2), slice(2, 4)])]
    ranks = on_two_processes(divided_steps, tmp_path, cases)
    for found in ranks:
        for (name, model, _, _), (divided, steps) in zip(cases, found, strict=True):
            assert divided >= 4, (name, model)
            assert_equal(steps, wholes[name, model])


def test_what_was_saved_whole_is_taken_up_divided(tmp_path):
    method = build_method("mcd", tmp_path, TRANSFORMER)
    first = copy.deepcopy(run_steps(method, batch_for(method), ALONE))  # what is whole is not copied
    again = run_steps(method, batch_for(method), ALONE, state=first[2:])
    for found in on_two_processes(divided_steps, tmp_path, [("mcd", "transformer", None, first[2:])]):
        assert_equal(found[0][1], again)
