"""Cost per step, against arithmetic by hand, counted calls, and measurements of larger batches than the estimate's two pairs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch

from coalign.config import OptimizerConfig, RoleConfig
from coalign.methods import METHODS, recipe
from coalign.networks.checkpointing import checkpoint_blocks
from coalign.networks.towers.spec import find_towers
from coalign.training.distributed import RankGather, World
from coalign.workflows.train import step_cost as cost
from coalign.workflows.train.step_cost import measure_step


def settings(name="clip", **changes):
    return replace(recipe(name)(5000), **{"batch_size": 64, "micro_batch": None, **changes})


def estimate(method, batch_size=64, processes=1, autocast=None, seed=0, **changes):
    batch = make_batch(method.view_plan, 8, seed=seed)
    return step_cost(method, batch, settings(batch_size=batch_size, **changes), processes, autocast)


def step_cost(method, batch, config, processes, autocast):
    return cost.step_cost(measure_step(method, batch, autocast), config, processes)


def build(name, folder, *args, **options):
    """A small method in float32, as in training."""
    return build_method(name, folder, *args, **options).float()


# ---------------------------------------------------------------- passes


# method -> (trained passes, teacher passes)
PASSES = {
    "clip": ({"image": 1, "text": 1}, {}),
    "slip": ({"image": 3, "text": 1}, {}),
    "declip": ({"image": 2, "text": 2}, {}),
    "uniclip": ({"image": 3, "text": 1}, {}),
    "mcd": ({"image": 2, "text": 1}, {"image": 2}),
    "oner": ({"image": 1, "text": 1, "image and text": 1}, {"image": 1, "text": 1, "image and text": 1}),
    "mct": ({"image": 1, "text": 1}, {"image": 1, "text": 1}),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_match_the_papers(tmp_path, name):
    estimated = estimate(build(name, tmp_path))
    trained, teacher = PASSES[name]
    assert estimated.passes == trained
    assert estimated.target_passes == teacher
    assert ("teacher forward" in estimated.flops) == bool(teacher)


def test_passes_are_counted_from_calls(tmp_path):
    method = build("clip", tmp_path)
    encode = method.encode

    def twice(batch, step):
        method.image(batch.images["image"].pixels)
        return encode(batch, step)

    method.encode = twice
    assert estimate(method).passes == {"image": 2, "text": 1}


# ---------------------------------------------------------------- FLOPs


def test_flops_of_clip_by_hand(tmp_path):
    method = build("clip", tmp_path)
    batch = make_batch(method.view_plan, 8)
    batch.texts["caption"].lengths[:] = 5
    flops = step_cost(method, batch, settings(), 1, None).flops
    tokens, width, patch = 5, 32, 16  # 2 × 2 patches and a class token
    # the last block computes queries and MLP of one token, and keys and values of all
    last_block = 2 * width**2 * (1 + 2 * tokens + 1 + 8)
    image = 4 * 2 * 3 * patch**2 * width + last_block + 2 * 2 * tokens * width + 2 * width * 16
    length, width = 5, 16
    text = 2 * width**2 * (1 + 2 * length + 1 + 8) + 2 * 2 * length * width + 2 * width * 16
    assert flops["encoder forward"] == 64 * (image + text)
    assert flops["objective forward"] == pytest.approx(2 * 64 * 64 * 16)  # both directions
    assert flops["backward"] == 2 * (flops["encoder forward"] + flops["objective forward"])


def test_frozen_trunks_have_no_backward_pass(tmp_path):
    method = build("clip", tmp_path)
    for tower in (method.image, method.text):
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name.startswith("projection."))
    flops, whole = estimate(method).flops, estimate(build("clip", tmp_path)).flops
    assert flops["encoder forward"] == whole["encoder forward"]
    projections = 64 * 2 * (32 + 16) * 16  # the gradients of the two matrices
    assert flops["backward"] == pytest.approx(projections + 2 * flops["objective forward"])


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_of_a_larger_batch_is_predicted_from_two_pairs(tmp_path, name):
    """FLOPs and saved bytes, against a measurement on 24 pairs."""
    method = build(name, tmp_path)
    batch = make_batch(method.view_plan, 24)
    gather, step = RankGather(World(0, 1, torch.device("cpu"))), cost.MIDWAY
    with torch.no_grad():
        features, targets = method.encode(batch, step), method.encode_targets(batch, step)
        others = {key: value + 1 if value.dtype == torch.int64 else value for key, value in features.items()}
        method.objective(others, targets, gather, step)
        method.after_step(others, targets, gather, step)
    features = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in features.items()}
    usage = cost._measure(method, lambda: method.objective(features, targets, gather, step))[1]
    method = build(name, tmp_path)
    estimated = estimate(method, batch_size=24)
    assert estimated.flops["objective forward"] == pytest.approx(usage.flops, rel=0.05)
    assert estimated.memory["objective activations"] == pytest.approx(usage.saved_bytes, rel=0.05)


def test_flops_with_several_processes_and_micro_batches(tmp_path):
    def flops(**options):
        return estimate(build("clip", tmp_path), **options).flops

    whole, half, sliced = flops(), flops(processes=2), flops(micro_batch=16)
    assert half["encoder forward"] == whole["encoder forward"] / 2
    assert half["objective forward"] == pytest.approx(whole["objective forward"] / 2)  # own rows, all columns
    assert sliced["encoder recompute (--micro-batch)"] == whole["encoder forward"]
    assert flops(micro_batch=32, processes=2) == half  # one slice per process


# ---------------------------------------------------------------- memory


def test_weights_gradients_moments_teachers_and_queues(tmp_path):
    method = build("mcd", tmp_path)
    memory = estimate(method).memory
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    teacher = 4 * sum(p.numel() for p in method.teacher.parameters())
    assert memory["trained weights"] == memory["gradients"] == trained
    assert memory["optimizer state"] == 2 * trained
    assert memory["teachers and other frozen weights"] == teacher
    declip = build("declip", tmp_path, queue_size=1000)
    assert estimate(declip).memory["queues and other buffers"] > 1000 * 4 * 16
    text = 4 * sum(p.numel() for p in declip.parameter_groups()["text"])
    optimizer = OptimizerConfig(roles={"text": RoleConfig(kind="sgd")})
    memory = estimate(declip, optimizer=optimizer).memory
    assert memory["optimizer state"] == 2 * memory["trained weights"] - text


def bytes_saved_by_encode(method, batch):
    return cost._measure(method, lambda: method.encode(batch, cost.MIDWAY))[1].saved_bytes


@pytest.mark.parametrize(("name", "model"), [("clip", TRANSFORMER), ("slip", BATCH_NORM)])
def test_activations_of_a_larger_batch_are_predicted(tmp_path, name, model):
    method = build(name, tmp_path, model)
    batch = make_batch(method.view_plan, 24)
    for text in batch.texts.values():
        text.lengths[:] = 7  # with different lengths, two captions represent the others only approximately
    saved = bytes_saved_by_encode(method, batch)
    memory = step_cost(method, batch[:6], settings(batch_size=24), 1, None).memory
    (name,) = [name for name in memory if name.startswith("encoder activations")]
    assert name == "encoder activations, 24 pairs"
    assert memory[name] == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("model", [TRANSFORMER, BATCH_NORM])
def test_gradient_checkpointing_keeps_inputs_of_blocks_and_one_block(tmp_path, monkeypatch, model):
    """Compared with the peak of all tensors in forward and backward pass."""
    layers = {"image_size": 32, "layers": 6, "width": 32, "patch_size": 8, "head_width": 16}
    model = {**model, "vision_cfg": layers} if model is TRANSFORMER else model

    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from memory import TensorPeak

    def peak_of_encode(method, batch):
        with TensorPeak() as memory:
            features = method.encode(batch, cost.MIDWAY)
            sum(x.sum() for x in features.values() if x.requires_grad).backward()
        return memory.peak * 2**30

    def activations(method):
        batch = make_batch(method.view_plan, 64)
        memory = step_cost(method, batch, settings(batch_size=64), 1, None).memory
        return memory["encoder activations, 64 pairs"], batch

    plain, checkpointed = build("clip", tmp_path, model), build("clip", tmp_path, model)
    for tower in find_towers(checkpointed):
        checkpoint_blocks(tower)
    (full, batch), (reduced, _) = activations(plain), activations(checkpointed)
    peaks = [peak_of_encode(method, batch) for method in (plain, checkpointed)]
    assert reduced / full == pytest.approx(peaks[1] / peaks[0], rel=0.15)


def test_gradient_checkpointing_recomputes_the_blocks(tmp_path):
    plain, checkpointed = build("clip", tmp_path), build("clip", tmp_path)
    for tower in find_towers(checkpointed):
        checkpoint_blocks(tower)
    before, after = estimate(plain).flops, estimate(checkpointed).flops
    name = "block recompute (--gradient-checkpointing)"
    assert 0 < after[name] < before["encoder forward"]
    assert {key: value for key, value in after.items() if key != name} == before


def test_with_micro_batches_only_the_larger_activations_count(tmp_path):
    def activations(**options):
        memory = estimate(build("clip", tmp_path), **options).memory
        return {name: size for name, size in memory.items() if "activations" in name}

    whole, sliced, tiny_slices = activations(), activations(micro_batch=16), activations(batch_size=8192, micro_batch=2)
    assert list(sliced) == ["encoder activations, 16 pairs"]
    assert next(iter(sliced.values())) == pytest.approx(whole["encoder activations, 64 pairs"] / 4)
    assert list(tiny_slices) == ["objective activations"]


def test_casts_of_weights_do_not_grow_with_the_batch(tmp_path):
    """Autocast also saves the half-precision copies of the weights, once."""
    method = build("clip", tmp_path)
    batch = make_batch(method.view_plan, 32)
    for text in batch.texts.values():
        text.lengths[:] = 7
    with torch.autocast("cpu", torch.bfloat16):
        saved = bytes_saved_by_encode(method, batch)
    memory = step_cost(method, batch, settings(batch_size=32), 1, torch.bfloat16).memory
    assert memory["encoder activations, 32 pairs"] == pytest.approx(saved, rel=0.03)


def test_batch_norm_groups_may_be_larger_than_two(tmp_path):
    method = build("clip", tmp_path, BATCH_NORM)
    for module in method.modules():
        if hasattr(module, "group"):
            module.group = 32
    assert estimate(method).passes == {"image": 1, "text": 1}
