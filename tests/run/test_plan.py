"""What a recipe would take on GPUs, against the same arithmetic by hand."""

import gc
from dataclasses import replace

import pytest
import torch
from builders import build_method, make_batch

from coalign.methods import METHODS
from coalign.recipes import recipe
from coalign.run.cost import measure_step, step_cost
from coalign.run.dry_run import duration
from coalign.run.plan import AS_DECLIP, GOOD, SPARE, Device, plan, plans

GPU = Device("GPU", flops=1e9, memory=1e12, within=1e6, between=1e5)


@pytest.fixture
def measured(tmp_path):
    method = build_method("declip", tmp_path).float()
    return measure_step(method, make_batch(method.view_plan, 8), None)


@pytest.fixture
def config():
    return replace(recipe("declip")(5000), batch_size=64)


def test_time_is_operations_and_bytes_over_what_a_gpu_does(measured, config):
    one, eight, many = (plan(measured, config, 100, GPU, count, 0.01) for count in (1, 8, 64))
    whole = sum(step_cost(measured, config, 1).flops.values())
    assert one.hours == pytest.approx(100 * whole / (GOOD * 1e9) / 3600)
    assert one.slow_hours == pytest.approx(one.hours * GOOD / AS_DECLIP)
    assert one.communication == 0
    weights = 4 * sum(p.numel() for p in measured.method.parameters() if p.requires_grad)
    for each, bandwidth in ((eight, 1e6), (many, 1e5)):
        cost = step_cost(measured, config, each.count)
        sent = (1 - 1 / each.count) * (2 * weights + 3 * cost.gathered) / bandwidth
        computed = sum(cost.flops.values()) / (GOOD * 1e9)
        assert each.hours == pytest.approx(100 * (computed + sent) / 3600)
        assert each.communication == pytest.approx(sent / (computed + sent))
        assert each.gpu_hours == pytest.approx(each.count * each.hours)
        assert each.cores == pytest.approx(64 / each.count / (computed + sent) * 0.01)


def test_gathered_are_the_features_that_are_compared(tmp_path):
    """CLIP's: an image and a text of 16 numbers in float32."""
    method = build_method("clip", tmp_path).float()
    found = measure_step(method, make_batch(method.view_plan, 8), None)
    assert step_cost(found, replace(recipe("clip")(5000), batch_size=64), 8).gathered == 64 * 2 * 16 * 4


def test_a_share_that_does_not_fit_is_sliced(measured, config):
    whole = plan(measured, config, 100, GPU, 1, 0.01)
    assert whole.micro_batch is None
    small = plan(measured, config, 100, replace(GPU, memory=0.6 * whole.memory), 1, 0.01)
    assert small.fits
    assert small.micro_batch in (32, 16, 8)
    assert small.memory <= 0.6 * whole.memory
    assert small.hours > whole.hours  # each is encoded once more
    none = plan(measured, config, 100, replace(GPU, memory=1000), 1, 0.01)
    assert not none.fits


def test_only_counts_that_share_the_batch(measured, config):
    assert {each.count for each in plans(measured, replace(config, batch_size=24), 10, 0.01)} == {1, 8}


@pytest.mark.parametrize("name", METHODS)
def test_measuring_leaves_nothing(tmp_path, name):
    """A graph that its own hooks hold is never freed."""

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        method = build_method(name, tmp_path)
        measure_step(method, make_batch(method.view_plan, 8), None)
        del method
        counts.append(tensors())
    assert counts[2] <= counts[1]


def test_memory_is_with_what_operations_need(measured, config):
    assert plan(measured, config, 1, GPU, 1, 0.01).memory == pytest.approx(
        SPARE * sum(step_cost(measured, config, 1).memory.values())
    )


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.0001, "0.36 s"), (0.05, "3 min"), (1.5, "90 min"), (5, "5 h"), (47, "47 h"), (240, "10 days")],
)
def test_duration(hours, said):
    assert duration(hours) == said
