"""Weights sharded over two processes take the same steps as unsharded weights in one process."""

import copy
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from helpers.processes import on_two_processes
from helpers.steps import ALONE, MODELS, STEP, batch_for, rank_share, takes
from torch import nn

from coalign.config import OptimizerConfig
from coalign.dtensor import is_sharded
from coalign.methods import METHODS
from coalign.networks.open_clip_parts import AttentionPool2d, ResidualAttentionBlock
from coalign.optim import build_optimizers, clip_gradients
from coalign.training import sharding
from coalign.training.distributed import RankGather
from coalign.training.sharding import full_tensors, load_weights, shard, unsharded
from coalign.training.step import forward_backward, move_statistics

CASES = [(name, "transformer") for name in METHODS]
CASES += [(name, "batch norm") for name in METHODS if takes(name, BATCH_NORM)]
CASES += [("declip", "hugging face")] if find_spec("transformers") else []
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1)


def run_steps(method, batch, world, slices=None, state=None):
    """Returns loss, gradient norm, weights and moments after two optimizer steps, the second with a clipped gradient."""
    optimizers = build_optimizers(method.parameter_groups(), OPTIMIZER, method)
    if state is not None:
        load_weights(method, state[0])
        optimizers.load_state_dict(state[1])
    for index in range(2):
        optimizers.set_lr(5, 10)
        result = forward_backward(method, batch, STEP, world, slices=slices)
        norm = clip_gradients(optimizers.parameters(), 0.05 if index else None)
        optimizers.step()
        move_statistics(method, world, keep=True)
        method.after_step(result.features, result.targets, RankGather(world), STEP)
        optimizers.zero_grad()
    return result.loss, norm, full_tensors(method.state_dict(), True), full_tensors(optimizers.state_dict(), True)


def sharded_steps(world, folder, cases):
    """Returns the number of sharded parameters and the `run_steps` of every case, on this process's half of the batch."""
    results = []
    for name, model, slices, state in cases:
        method = build_method(name, folder, MODELS[model])
        shard(method, world, (AttentionPool2d,), min_numel=64)
        num_sharded = sum(is_sharded(p) for p in method.parameters())
        half = rank_share(batch_for(method), world)
        results.append((num_sharded, run_steps(method, half, world, slices, state)))
        if world.is_first:
            reference = build_method(name, folder, MODELS[model])
            reference.load_state_dict(results[-1][1][2])
            reference.eval()
        method.eval()
        with unsharded(method), torch.no_grad():
            if world.is_first:  # a forward pass must not wait for a collective with the other process
                view = next(iter(make_batch(method.view_plan, 2).images.values()))
                torch.testing.assert_close(
                    method.encode_image(view.pixels), reference.encode_image(view.pixels), rtol=0, atol=0
                )
    return results


def flat(values, name=""):
    if isinstance(values, dict):
        return {path: item for key, value in values.items() for path, item in flat(value, f"{name}/{key}").items()}
    return {name: values}


def assert_equal(actual, expected):
    (loss, norm, weights, moments), (other_loss, other_norm, other_weights, other_moments) = actual, expected
    assert loss == pytest.approx(other_loss, rel=1e-9)
    assert float(norm) == pytest.approx(float(other_norm), rel=1e-9)
    for one, other, atol in ((weights, other_weights, 1e-7), (flat(moments), flat(other_moments), 1e-12)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # the weights need a tolerance: if a gradient is zero up to rounding, Adam steps by its sign
            torch.testing.assert_close(value, other[name], rtol=1e-6, atol=atol, msg=name)


def test_weights_read_without_a_layer_call_are_not_sharded(monkeypatch):
    """torch's attention and the pooling of CLIP's ResNets pass their weights to a function."""
    sharded = []
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(sharding, "fully_shard", lambda layer, **_: sharded.append(layer) or MagicMock())
    parts = {"pool": AttentionPool2d(2, 16, 2), "attention": nn.MultiheadAttention(16, 2)}
    model = nn.ModuleDict({**parts, "block": ResidualAttentionBlock(16, 2), "out": nn.Linear(16, 16)})
    shard(model, ALONE, (AttentionPool2d,), min_numel=64)
    own = [] if isinstance(model["block"].attn, nn.MultiheadAttention) else [model["block"].attn.out_proj]
    assert sharded == [*own, model["block"].mlp.c_fc, model["block"].mlp.c_proj, model["out"]]


@pytest.mark.slow
def test_sharded_steps_equal_unsharded_steps(tmp_path):
    expected, cases = {}, []
    for name, model in CASES:
        method = build_method(name, tmp_path, MODELS[model])
        expected[name, model] = run_steps(method, batch_for(method), ALONE)
        cases += [(name, model, slices, None) for slices in (None, [slice(0, 2), slice(2, 4)])]
    for results in on_two_processes(sharded_steps, tmp_path, cases):
        for (name, model, _, _), (num_sharded, steps) in zip(cases, results, strict=True):
            assert num_sharded >= 4, (name, model)
            assert_equal(steps, expected[name, model])


@pytest.mark.slow
def test_an_unsharded_state_is_loaded_into_a_sharded_model(tmp_path):
    method = build_method("mcd", tmp_path, TRANSFORMER)
    first = copy.deepcopy(run_steps(method, batch_for(method), ALONE))  # `full_tensors` does not copy unsharded tensors
    expected = run_steps(method, batch_for(method), ALONE, state=first[2:])
    for results in on_two_processes(sharded_steps, tmp_path, [("mcd", "transformer", None, first[2:])]):
        assert_equal(results[0][1], expected)
