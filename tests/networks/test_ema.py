import math

import pytest
import torch
from torch import nn

from coalign.networks.ema import cosine_momentum, ema_copy, momentum_for, update_ema
from coalign.types import StepInfo


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def perturb(module):
    """Changes parameters, running statistics and the batch counter, like a training step."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    module.train()(torch.randn(5, 3, dtype=torch.float64))


def test_ema_copy_is_a_frozen_deep_copy():
    student = network()
    teacher = ema_copy(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    perturb(student)
    assert teacher.state_dict().keys() == before.keys()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_update_averages_parameters_and_running_statistics():
    student = network()
    teacher = ema_copy(student)
    expected = {name: value.clone() for name, value in teacher.state_dict().items()}
    for momentum in (0.9, 0.996, 0.5):
        perturb(student)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        for name, value in student.state_dict().items():
            mixed = momentum * expected[name] + (1 - momentum) * value
            expected[name] = mixed if value.is_floating_point() else value.clone()
        update_ema(teacher, student, momentum)
        for name, value in teacher.state_dict().items():
            torch.testing.assert_close(value, expected[name])
        for name, value in student.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert teacher[1].num_batches_tracked == 3
    assert teacher[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize(("momentum", "which"), [(1.0, "teacher"), (0.0, "student")])
def test_momentum_zero_and_one_are_exact(momentum, which):
    student = network()
    teacher = ema_copy(student)
    perturb(student)
    expected = {name: p.clone() for name, p in (teacher if which == "teacher" else student).named_parameters()}
    update_ema(teacher, student, momentum)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)


def test_different_shapes_are_rejected():
    with pytest.raises(ValueError, match="different shapes"):
        update_ema(nn.Linear(3, 4), nn.Linear(4, 3), 0.9)


def test_cosine_momentum_rises_from_its_start_to_one():
    assert cosine_momentum(0.996, StepInfo(0, 100)) == pytest.approx(0.996, abs=1e-15)
    assert cosine_momentum(0.996, StepInfo(50, 100)) == pytest.approx(0.998, abs=1e-12)
    assert cosine_momentum(0.996, StepInfo(100, 100)) == 1
    values = [cosine_momentum(0.9, StepInfo(step, 100)) for step in range(100)]
    for step, value in enumerate(values):
        assert value == pytest.approx(0.95 - 0.05 * math.cos(math.pi * step / 100))
    assert values == sorted(values)
    assert values[-1] < 1


@pytest.mark.parametrize(
    ("steps", "momentum"), [(1, 0.9), (600, 1 - 113 / 600), (2000, 1 - 113 / 2000), (29_000, 0.996), (10**6, 0.996)]
)
def test_momentum_by_run_length(steps, momentum):
    assert momentum_for(steps) == pytest.approx(max(0.9, momentum))
    shorter = 1 - min(max(46 / steps, 0.001), 0.1)
    assert momentum_for(steps, 46, 0.001) == pytest.approx(shorter)
    assert momentum_for(steps, 46, 0.001, max_rate=0.01) == pytest.approx(max(0.99, shorter))
