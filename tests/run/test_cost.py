"""What a step costs, by hand, by counting real calls, and by measuring a larger batch than the two pairs of the estimate."""

from dataclasses import replace

import pytest
import torch
from builders import BATCH_NORM, TRANSFORMER, build_method, make_batch

from coalign.methods import METHODS
from coalign.optim import OptimiserConfig, RoleConfig
from coalign.recipes import recipe
from coalign.run import cost
from coalign.run.cost import measure_step
from coalign.training.distributed import RankGather, World


def settings(name="clip", **changes):
    return replace(recipe(name)(5000), **{"batch_size": 64, "micro_batch": None, **changes})


def estimate(method, batch_size=64, processes=1, autocast=None, seed=0, **changes):
    batch = make_batch(method.view_plan, 8, seed=seed)
    return step_cost(method, batch, settings(batch_size=batch_size, **changes), processes, autocast)


def step_cost(method, batch, config, processes, autocast):
    return cost.step_cost(measure_step(method, batch, autocast), config, processes)


def single(method):
    """In float32, as in training."""
    return method.float()


# ---------------------------------------------------------------- passes


# the trained passes, and the teacher's
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
def test_passes_are_those_of_the_papers(tmp_path, name):
    found = estimate(single(build_method(name, tmp_path)))
    trained, teacher = PASSES[name]
    assert found.passes == trained
    assert found.target_passes == teacher
    assert ("teachers" in found.flops) == bool(teacher)


def test_passes_are_counted_not_read_from_the_plan(tmp_path):
    method = single(build_method("clip", tmp_path))
    encode = method.encode

    def twice(batch, step):
        method.image(batch.images["image"].pixels)
        return encode(batch, step)

    method.encode = twice
    assert estimate(method).passes == {"image": 2, "text": 1}


# ---------------------------------------------------------------- operations


def test_operations_of_clip_by_hand(tmp_path):
    method = single(build_method("clip", tmp_path))
    batch = make_batch(method.view_plan, 8)
    batch.texts["caption"].lengths[:] = 5
    found = step_cost(method, batch, settings(), 1, None).flops
    tokens, width, patch = 5, 32, 16  # 2 × 2 patches and a class token
    one_read = (
        2 * width**2 * (1 + 2 * tokens + 1 + 8)
    )  # the last block: queries and MLP of one token, keys and values of all
    image = 4 * 2 * 3 * patch**2 * width + one_read + 2 * 2 * tokens * width + 2 * width * 16
    length, width = 5, 16
    text = 2 * width**2 * (1 + 2 * length + 1 + 8) + 2 * 2 * length * width + 2 * width * 16
    assert found["encoders, forward"] == 64 * (image + text)
    assert found["objective, forward"] == pytest.approx(2 * 64 * 64 * 16)  # both directions
    assert found["backward"] == 2 * (found["encoders, forward"] + found["objective, forward"])


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_of_a_whole_batch_is_foreseen_from_two_pairs(tmp_path, name):
    """Against running it on 24 real pairs, in operations and in bytes kept for the backward pass."""
    method = single(build_method(name, tmp_path))
    batch = make_batch(method.view_plan, 24)
    gather, step = RankGather(World(0, 1, torch.device("cpu"))), cost.MIDWAY
    with torch.no_grad():
        features, targets = method.encode(batch, step), method.encode_targets(batch, step)
        others = {key: value + 1 if value.dtype == torch.int64 else value for key, value in features.items()}
        method.objective(others, targets, gather, step)
        method.after_step(others, targets, gather, step)
    features = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in features.items()}
    used = cost._measured(method, lambda: method.objective(features, targets, gather, step))[1]
    method = single(build_method(name, tmp_path))
    found = estimate(method, batch_size=24)
    assert found.flops["objective, forward"] == pytest.approx(used.flops, rel=0.05)
    assert found.memory["activations of the objective"] == pytest.approx(used.saved, rel=0.05)


def test_processes_and_micro_batches_share_the_work(tmp_path):
    def flops(**options):
        return estimate(single(build_method("clip", tmp_path)), **options).flops

    whole, half, sliced = flops(), flops(processes=2), flops(micro_batch=16)
    assert half["encoders, forward"] == whole["encoders, forward"] / 2
    assert half["objective, forward"] == pytest.approx(whole["objective, forward"] / 2)  # own rows, all columns
    assert sliced["encoders once more, for --micro-batch"] == whole["encoders, forward"]
    assert flops(micro_batch=32, processes=2) == half  # a slice is the whole share


# ---------------------------------------------------------------- memory


def test_weights_gradients_moments_teachers_and_queues(tmp_path):
    method = single(build_method("mcd", tmp_path))
    found = estimate(method).memory
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    teacher = 4 * sum(p.numel() for p in method.teacher.parameters())
    assert found["trained weights"] == found["gradients"] == trained
    assert found["optimiser state"] == 2 * trained
    assert found["teachers and other fixed weights"] == teacher
    declip = single(build_method("declip", tmp_path, queue_size=1000))
    assert estimate(declip).memory["queues and other buffers"] > 1000 * 4 * 16
    text = 4 * sum(p.numel() for p in declip.parameter_groups()["text"])
    optimiser = OptimiserConfig(roles={"text": RoleConfig(kind="sgd")})
    found = estimate(declip, optimiser=optimiser).memory
    assert found["optimiser state"] == 2 * found["trained weights"] - text


def saved_by_encode(method, batch):
    return cost._measured(method, lambda: method.encode(batch, cost.MIDWAY))[1].saved


@pytest.mark.parametrize(("name", "model"), [("clip", TRANSFORMER), ("slip", BATCH_NORM)])
def test_activations_of_a_larger_batch_are_foreseen(tmp_path, name, model):
    method = single(build_method(name, tmp_path, model))
    batch = make_batch(method.view_plan, 24)
    for text in batch.texts.values():
        text.lengths[:] = 7  # else the two typical captions stand for the others only about
    used = saved_by_encode(method, batch)
    found = step_cost(method, batch[:6], settings(batch_size=24), 1, None).memory
    (name,) = [name for name in found if name.startswith("activations of the encoders")]
    assert name == "activations of the encoders, 24 pairs"
    assert found[name] == pytest.approx(used, rel=0.03)


def test_micro_batches_bound_the_activations_to_the_larger_part(tmp_path):
    def activations(**options):
        found = estimate(single(build_method("clip", tmp_path)), **options).memory
        return {name: size for name, size in found.items() if name.startswith("activations")}

    whole, sliced, tiny_slices = activations(), activations(micro_batch=16), activations(batch_size=8192, micro_batch=2)
    assert list(sliced) == ["activations of the encoders, 16 pairs"]
    assert next(iter(sliced.values())) == pytest.approx(whole["activations of the encoders, 64 pairs"] / 4)
    assert list(tiny_slices) == ["activations of the objective"]


def test_casts_of_weights_do_not_grow_with_the_batch(tmp_path):
    """Under autocast, the copies of the weights in half precision are kept as well, once."""
    method = single(build_method("clip", tmp_path))
    batch = make_batch(method.view_plan, 32)
    for text in batch.texts.values():
        text.lengths[:] = 7
    with torch.autocast("cpu", torch.bfloat16):
        used = saved_by_encode(method, batch)
    found = step_cost(method, batch, settings(batch_size=32), 1, torch.bfloat16).memory
    assert found["activations of the encoders, 32 pairs"] == pytest.approx(used, rel=0.03)


def test_batch_norm_groups_larger_than_two_are_no_hindrance(tmp_path):
    method = single(build_method("clip", tmp_path, BATCH_NORM))
    for module in method.modules():
        if hasattr(module, "group"):
            module.group = 32
    assert estimate(method).passes == {"image": 1, "text": 1}
