"""A step of a method, whole, in slices or as a process's share, and what must be equal of two steps."""

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.builders import BATCH_NORM, HUGGING_FACE, TRANSFORMER, build_method, make_batch

from coalign.errors import UserError
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward, move_statistics
from coalign.types import StepInfo

BATCH, STEP = 8, StepInfo(3, 10)
ALONE = World(0, 1, torch.device("cpu"))
MODELS = {"transformer": TRANSFORMER, "batch norm": BATCH_NORM, "hugging face": HUGGING_FACE}


def takes(name, model):
    """Whether a method can be built with a model: one may need a Transformer, and says so."""
    with tempfile.TemporaryDirectory() as folder, suppress(UserError):
        build_method(name, Path(folder), model)
        return True
    return False


def batch_for(method):
    """A batch with, where a method takes them, texts without an image: none in the first slice, all of the last one."""
    batch = make_batch(method.view_plan, BATCH)
    if method.view_plan.imageless:
        batch.has_image = torch.tensor([True, True, True, True, True, False, False, False])
    return batch


def rank_share(batch, world):
    """Returns this rank's half of the batch, with captions padded to the longest of this half only, as the loader pads them."""
    half = batch[slice(world.rank * len(batch) // 2, (world.rank + 1) * len(batch) // 2)]
    return replace(half, texts={name: trim(view) for name, view in half.texts.items()})


def trim(view):
    longest = int(view.lengths.max())
    return replace(view, ids=view.ids[:, :longest], labels=None if view.labels is None else view.labels[:, :longest])


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


def half_steps(world, folder, cases):
    """A process's share of the step of every case."""
    steps = []
    for name, model, changes, cls, slices in cases:
        method = build_method(name, folder, MODELS[model], cls=cls, **changes)
        steps.append(run_step(method, rank_share(batch_for(method), world), world, slices))
    return steps


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
    """Every parameter is in one group of the optimizer, and has a gradient."""
    grouped = [id(p) for group in method.parameter_groups().values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    assert {name for name, p in method.named_parameters() if p.requires_grad} == step[1].keys()
