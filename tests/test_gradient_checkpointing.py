"""Gradient checkpointing changes no value: loss, gradients, running statistics and the method's state are equal bit for bit."""

from pathlib import Path

import pytest
import torch
from helpers.builders import BATCH_NORM, HUGGING_FACE, TRANSFORMER, build_method, make_batch
from helpers.processes import on_two_processes
from helpers.steps import ALONE, STEP, assert_equal_steps, batch_for, rank_share, run_step, takes

from coalign.dtensor import is_sharded
from coalign.methods import METHODS
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.checkpointing import checkpoint_blocks, find_blocks
from coalign.networks.open_clip_parts import AttentionPool2d
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec, find_towers
from coalign.training.sharding import full_tensors, shard
from coalign.training.step import forward_backward

DEEP_VIT = {**TRANSFORMER["vision_cfg"], "layers": 2}
DEEP_TEXT = {**TRANSFORMER["text_cfg"], "layers": 2}
MODELS = {
    "transformer": {**TRANSFORMER, "vision_cfg": DEEP_VIT, "text_cfg": DEEP_TEXT},
    "patch dropout": {**TRANSFORMER, "vision_cfg": {**DEEP_VIT, "patch_dropout": 0.5}, "text_cfg": DEEP_TEXT},
    "timm": BATCH_NORM,
    "CLIP's ResNet": {
        **TRANSFORMER,
        "vision_cfg": {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "head_width": 8},
    },
    "drop path": {
        **TRANSFORMER,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_vit",
            "timm_kwargs": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5},
        },
    },
}
CASES = [(name, "transformer") for name in METHODS]
CASES += [(name, model) for name in METHODS for model in ("timm", "CLIP's ResNet") if takes(name, MODELS[model])]
CASES += [("mcd", "patch dropout"), ("mcd", "drop path"), ("clip-strong", "transformer")]
SLICES = [slice(0, 4), slice(4, 6), slice(6, 8)]


def build(name, folder, model, checkpointed):
    method = build_method(name, folder, MODELS[model] if isinstance(model, str) else model)
    if checkpointed:
        assert all(map(checkpoint_blocks, find_towers(method)))
    return method


def assert_identical(one, other):
    (loss, gradients, state), (other_loss, other_gradients, other_state) = one, other
    assert loss == other_loss
    for values, others in ((gradients, other_gradients), (state, other_state)):
        assert values.keys() == others.keys()
        for name, value in values.items():
            assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("slices", [None, SLICES], ids=["whole", "slices"])
@pytest.mark.parametrize(("name", "model"), CASES)
def test_steps_are_identical(tmp_path, name, model, slices):
    steps = []
    for checkpointed in (False, True):
        method = build(name, tmp_path, model, checkpointed)
        steps.append(run_step(method, batch_for(method), ALONE, slices))
    assert_identical(*steps)


def test_dropout_and_drop_path_are_random(tmp_path):
    """Otherwise, `test_steps_are_identical` would not show that random numbers are the same in the recomputed pass."""
    for name, model in (("mcd", "patch dropout"), ("mcd", "drop path"), ("clip-strong", "transformer")):
        method = build(name, tmp_path, model, True)
        batch = batch_for(method)
        losses = [forward_backward(method, batch, STEP, ALONE, seed=seed).loss for seed in (0, 1)]
        assert losses[0] != losses[1]


def test_bfloat16_steps_are_identical(tmp_path):
    """The recomputed pass uses autocast, too."""
    losses, gradients = [], []
    for checkpointed in (False, True):
        method = build("mcd", tmp_path, "transformer", checkpointed).float()
        losses.append(forward_backward(method, batch_for(method), STEP, ALONE, autocast=torch.bfloat16).loss)
        gradients.append([p.grad for p in method.parameters() if p.requires_grad])
    assert losses[0] == losses[1]
    assert all(map(torch.equal, *gradients))


def test_hugging_face_towers(tmp_path):
    pytest.importorskip("transformers")
    steps = []
    for checkpointed in (False, True):
        method = build("clip", tmp_path, HUGGING_FACE, checkpointed)
        steps.append(run_step(method, batch_for(method), ALONE))
    assert_identical(*steps)
    assert len(find_blocks(method.text)) == 2


def half_steps(world, folder, cases):
    """Returns each process's share of the steps."""
    steps = []
    for name, model, slices in cases:
        method = build(name, folder, model, True)
        steps.append(run_step(method, rank_share(batch_for(method), world), world, slices))
    return steps


@pytest.mark.slow
def test_two_processes(tmp_path):
    halves = [slice(0, 2), slice(2, 4)]
    # a process and a slice draw what they drop, so these differ from one process
    drops = ("patch dropout", "drop path", "clip-strong")
    cases = [(name, model, halves) for name, model in CASES if name not in drops and model not in drops]
    ranks = on_two_processes(half_steps, tmp_path, cases)
    for number, (name, model, _) in enumerate(cases):
        whole = run_step(method := build(name, tmp_path, model, False), batch_for(method), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])


def sharded_gradients(world, folder, cases):
    """Returns the full gradients of sharded weights, without and with checkpointing."""
    results = []
    for name, model in cases:
        gradients = []
        for checkpointed in (False, True):
            method = build(name, folder, model, checkpointed)
            shard(method, world, (AttentionPool2d,), min_numel=64)
            assert any(is_sharded(p) for p in method.parameters())
            forward_backward(method, rank_share(batch_for(method), world), STEP, world)
            gradients.append(full_tensors({n: p.grad for n, p in method.named_parameters() if p.requires_grad}, True))
        results.append(gradients)
    return results


@pytest.mark.slow
def test_sharded_weights(tmp_path):
    cases = [("mcd", "transformer"), ("clip", "timm"), ("slip", "CLIP's ResNet"), ("oner", "transformer")]
    for rank in on_two_processes(sharded_gradients, tmp_path, cases):
        for plain, checkpointed in rank:
            assert plain.keys() == checkpointed.keys()
            for name, gradient in plain.items():
                assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "timm"])
def test_compiled_towers(tmp_path, model):
    steps = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        method = build("mcd", tmp_path, model, checkpointed)
        if checkpointed:
            method.image.compile(backend="aot_eager")
        steps.append(run_step(method, batch_for(method), ALONE))
    assert_equal_steps(*steps)


def test_statistics_are_recorded_once(tmp_path):
    method = build("clip", tmp_path, "timm", True)
    forward_backward(method, batch_for(method), STEP, ALONE)
    norms = [module for module in method.modules() if isinstance(module, GroupedBatchNorm2d)]
    assert {len(norm.pending) for norm in norms} == {4}  # groups of 2 in a batch of 8


def test_blocks_of_trunks(tmp_path):
    """A block is the smallest repeated part: a residual block, not a stage or a layer."""
    expected = {
        "timm:resnet18": 8,
        "timm:convnext_atto": 12,
        "timm:efficientnet_lite0": 16,
        "timm:swin_tiny_patch4_window7_224": 12,
        "timm:vit_tiny_patch16_224": 12,
        "RN50": 16,
        "timm:vgg11": 0,
    }
    for name, count in expected.items():
        tower = build_image_tower(TowerSpec(name, vocab_size=50))
        assert len(find_blocks(tower)) == count, name
        assert checkpoint_blocks(tower) == bool(count)


def test_memory_falls(tmp_path, monkeypatch):
    """Peak of all tensors in a step, with six equal blocks in each tower."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import TensorPeak

    model = {
        **TRANSFORMER,
        "vision_cfg": {**DEEP_VIT, "layers": 6, "patch_size": 4},
        "text_cfg": {**DEEP_TEXT, "layers": 6},
    }
    peaks = []
    for checkpointed in (False, True):
        method = build("clip", tmp_path, model, checkpointed)
        batch = make_batch(method.view_plan, 64)
        with TensorPeak() as memory:
            forward_backward(method, batch, STEP, ALONE)
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0]
