"""The gradient of a step depends on the global batch alone: whole, in unequal slices, or on two processes. Sweeps the registry."""

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from processes import on_two_processes

from coalign.errors import UserError
from coalign.methods import METHODS, config_class
from coalign.methods.clip import CLIP
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward, move_statistics
from coalign.types import StepInfo

BATCH, STEP = 8, StepInfo(3, 10)
ALONE = World(0, 1, torch.device("cpu"))
CONTROL = "foreign_parameters"  # UniCLIP's, for batches that are encoded whole: it takes what is told to the head from the row before
MODELS = {"transformer": TRANSFORMER, "batch norm": BATCH_NORM}


def switched(name):
    """Changes to a method's configuration: none, and each of its switches turned over."""
    values = vars(config_class(name)())
    switches = [switch for switch, value in values.items() if isinstance(value, bool) and switch != CONTROL]
    return [{}, *({switch: not values[switch]} for switch in switches)]


def takes(name, model):
    """Whether a method can be built with a model: one may need a Transformer, and says so."""
    with tempfile.TemporaryDirectory() as folder, suppress(UserError):
        build_method(name, Path(folder), model)
        return True
    return False


CASES = [(name, "transformer", changes) for name in METHODS for changes in switched(name)]
CASES += [(name, "batch norm", {}) for name in METHODS if takes(name, BATCH_NORM)]


class WrongCount(CLIP):
    """A planted fault: each rank counts one whatever it holds, so the loss depends on the number of ranks."""

    def objective(self, features, targets, gather, step):
        terms = super().objective(features, targets, gather, step)
        for term in terms:
            term.count = 1
        return terms


def batch_for(method):
    """A batch with, where a method takes them, texts without an image: none in the first slice, all of the last one."""
    batch = make_batch(method.view_plan, BATCH)
    if method.view_plan.imageless:
        batch.has_image = torch.tensor([True, True, True, True, True, False, False, False])
    return batch


def run_step(method, batch, world, slices=None):
    """The loss, the gradients and what is not trained after a step that follows another: queues hold rows by then, and teachers lag."""
    for _ in range(2):
        method.zero_grad()
        result = forward_backward(method, batch, STEP, world, slices=slices)
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        move_statistics(method, world, keep=True)
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                if name in gradients:
                    parameter -= 1e-3 * gradients[name]
        method.after_step(result.features, result.targets, RankGather(world), STEP)
    state = method.state_dict(keep_vars=True).items()
    return result.loss, gradients, {name: value.clone() for name, value in state if not value.requires_grad}


def assert_equal_steps(one, other):
    (loss, gradients, buffers), (other_loss, other_gradients, other_buffers) = one, other
    assert loss == pytest.approx(other_loss, rel=1e-9)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - other_gradients[name]).norm()
        assert error <= 1e-9 * gradient.norm() + 1e-13, f"{name}: {error / gradient.norm():.1e}"
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, other_buffers[name], rtol=1e-9, atol=1e-12, msg=name)


def assert_complete(method, step):
    """Every parameter is in one group of the optimiser, and has a gradient."""
    grouped = [id(p) for group in method.parameter_groups().values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    assert {name for name, p in method.named_parameters() if p.requires_grad} == step[1].keys()


@pytest.mark.parametrize(("name", "model", "changes"), CASES)
def test_slices(tmp_path, name, model, changes):
    method = build_method(name, tmp_path, MODELS[model], **changes)
    batch = batch_for(method)
    whole = run_step(method, batch, ALONE)
    assert_complete(method, whole)
    method = build_method(name, tmp_path, MODELS[model], **changes)
    assert_equal_steps(whole, run_step(method, batch, ALONE, [slice(0, 4), slice(4, 6), slice(6, 8)]))


def half_steps(world, folder, cases):
    """A process's share of the step of every case."""
    steps = []
    for name, model, changes, cls, slices in cases:
        method = build_method(name, folder, MODELS[model], cls=cls, **changes)
        half = batch_for(method)[slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)]
        steps.append(run_step(method, half, world, slices))
    return steps


def test_two_processes(tmp_path):
    cases = [(*case, None, slices) for case in CASES for slices in (None, [slice(0, 2), slice(2, 4)])]
    cases.append(("clip", "transformer", {}, WrongCount, None))
    ranks = on_two_processes(half_steps, tmp_path, cases)
    for number, (name, model, changes, cls, _) in enumerate(cases):
        method = build_method(name, tmp_path, MODELS[model], cls=cls, **changes)
        whole = run_step(method, batch_for(method), ALONE)
        for rank in ranks:
            if cls is WrongCount:
                with pytest.raises(AssertionError):
                    assert_equal_steps(whole, rank[number])
            else:
                assert_equal_steps(whole, rank[number])
