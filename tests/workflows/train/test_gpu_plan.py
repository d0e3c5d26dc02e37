"""Predictions of training time and memory on GPUs, against the same arithmetic by hand."""

import gc
from dataclasses import replace

import pytest
import torch
from helpers.builders import build_method, make_batch

from coalign.methods import METHODS, recipe
from coalign.workflows.train.gpu_plan import DECLIP_MFU, GOOD_MFU, GPU, MEMORY_OVERHEAD, plan, plans
from coalign.workflows.train.step_cost import measure_step, step_cost

SLOW_GPU = GPU("slow", flops=1e9, memory=1e12, intra_node_bandwidth=1e6, inter_node_bandwidth=1e5)


@pytest.fixture
def measured(tmp_path):
    method = build_method("declip", tmp_path).float()
    return measure_step(method, make_batch(method.view_plan, 8), None)


@pytest.fixture
def config():
    return replace(recipe("declip")(5000), batch_size=64)


def test_time_is_the_sum_of_compute_and_communication(measured, config):
    one, eight, many = (plan(measured, config, 100, SLOW_GPU, count, 0.01) for count in (1, 8, 64))
    flops = sum(step_cost(measured, config, 1).flops.values())
    assert one.hours == pytest.approx(100 * flops / (GOOD_MFU * 1e9) / 3600)
    assert one.slow_hours == pytest.approx(one.hours * GOOD_MFU / DECLIP_MFU)
    assert one.communication == 0
    weights = 4 * sum(p.numel() for p in measured.method.parameters() if p.requires_grad)
    for each, bandwidth in ((eight, 1e6), (many, 1e5)):
        cost = step_cost(measured, config, each.count)
        communication = (1 - 1 / each.count) * (2 * weights + 3 * cost.gathered) / bandwidth
        step = sum(cost.flops.values()) / (GOOD_MFU * 1e9) + communication
        assert each.hours == pytest.approx(100 * step / 3600)
        assert each.communication == pytest.approx(communication / step)
        assert each.gpu_hours == pytest.approx(each.count * each.hours)
        assert each.cores == pytest.approx(64 / each.count / step * 0.01)


def test_gathered_bytes_are_those_of_the_embeddings(tmp_path):
    """CLIP: one image and one text embedding of 16 float32 numbers per pair."""
    method = build_method("clip", tmp_path).float()
    measured = measure_step(method, make_batch(method.view_plan, 8), None)
    assert step_cost(measured, replace(recipe("clip")(5000), batch_size=64), 8).gathered == 64 * 2 * 16 * 4


def test_a_share_that_does_not_fit_gets_a_micro_batch(measured, config):
    whole = plan(measured, config, 100, SLOW_GPU, 1, 0.01)
    assert whole.micro_batch is None
    small = plan(measured, config, 100, replace(SLOW_GPU, memory=0.6 * whole.memory), 1, 0.01)
    assert small.fits
    assert small.micro_batch in (32, 16, 8)
    assert small.memory <= 0.6 * whole.memory
    assert small.hours > whole.hours  # encoders are recomputed
    none = plan(measured, config, 100, replace(SLOW_GPU, memory=1000), 1, 0.01)
    assert not none.fits


def test_only_gpu_counts_that_divide_the_batch_size(measured, config):
    assert {each.count for each in plans(measured, replace(config, batch_size=24), 10, 0.01)} == {1, 8}


@pytest.mark.parametrize(
    "name", ["mcd", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "mcd")]
)
def test_measuring_leaks_no_tensors(tmp_path, name):
    """An autograd graph that its own hooks reference would never be freed."""

    def num_tensors():
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    counts = []
    for _ in range(3):
        method = build_method(name, tmp_path)
        measure_step(method, make_batch(method.view_plan, 8), None)
        del method
        counts.append(num_tensors())
    assert counts[2] <= counts[1]


def test_memory_includes_the_workspace_of_operations(measured, config):
    assert plan(measured, config, 1, SLOW_GPU, 1, 0.01).memory == pytest.approx(
        MEMORY_OVERHEAD * sum(step_cost(measured, config, 1).memory.values())
    )
