"""Towers in two threads: they run at once, forward and backward, and a step's values do not change in any bit."""

import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method
from helpers.equal_runs import assert_equal_runs
from helpers.steps import ALONE, STEP, batch_for, run_step

from coalign.config import TrainConfig
from coalign.methods import METHODS, method_class
from coalign.methods.clip.config import CLIPConfig
from coalign.methods.clip.method import CLIP
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both, side_by_side, suit_side_by_side
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.training.step import forward_backward
from coalign.workflows.train.setup import step_threads

NAMES = [name for name in METHODS if method_class(name).encodes_both]
SLICES = [slice(0, 2), slice(2, 8)]


def test_methods_with_two_towers_use_it():
    assert set(NAMES) == set(METHODS) - {"oner", "mct"}


@pytest.mark.parametrize("slices", [None, SLICES], ids=["whole", "slices"])
@pytest.mark.parametrize("model", [TRANSFORMER, BATCH_NORM], ids=["transformer", "batch norm"])
@pytest.mark.parametrize("name", [*NAMES, "clip-strong"])  # which draws dropout in the second thread
def test_a_step_has_the_same_bits(tmp_path, name, model, slices):
    steps = []
    for context in (nullcontext(), side_by_side()):
        method = build_method(name, tmp_path, model)
        with context:
            steps.append(run_step(method, batch_for(method), ALONE, slices))
    (loss, gradients, buffers), (other_loss, other_gradients, other_buffers) = steps
    assert loss == other_loss
    for values, others in ((gradients, other_gradients), (buffers, other_buffers)):
        assert values.keys() == others.keys()
        assert all(torch.equal(values[key], others[key]) for key in values)


@pytest.mark.parametrize("slices", [None, SLICES], ids=["whole", "slices"])
def test_a_step_in_bfloat16_has_the_same_bits(tmp_path, slices):
    """A weight that is used twice, as MCD's text tower by two passes, has one cast, to which both gradients are added."""
    gradients = []
    for context in (nullcontext(), side_by_side()):
        method = build_method("mcd", tmp_path, TRANSFORMER, contrast_masked_text=False).float()
        with context:
            forward_backward(method, batch_for(method), STEP, ALONE, slices=slices, autocast=torch.bfloat16)
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class Meets(torch.autograd.Function):
    """The identity, which in both passes waits until another thread is in the same place."""

    barrier: threading.Barrier

    @staticmethod
    def forward(ctx, x):
        Meets.barrier.wait()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Meets.barrier.wait()
        return 2 * gradient


def test_both_passes_run_at_once():
    Meets.barrier = threading.Barrier(2, timeout=60)
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    with side_by_side():
        features = both(lambda: {"x": Meets.apply(x), "ids": torch.arange(3)}, lambda: {"y": Meets.apply(y)})
        (features["x"] * features["y"] * features["ids"]).sum().backward()
    assert list(features) == ["x", "ids", "y"]
    assert not features["ids"].requires_grad
    assert x.grad.tolist() == y.grad.tolist() == [0, 2, 4]


def test_modes_are_those_of_the_calling_thread():
    def modes():
        return {"modes": torch.tensor([torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")])}

    with side_by_side(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert both(dict, modes)["modes"].tolist() == [False, True]
    with side_by_side():
        assert both(dict, modes)["modes"].tolist() == [True, False]


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_in_either_thread_is_raised(place):
    def fail():
        raise ValueError("no image")

    functions = [dict, dict]
    functions[place] = fail
    with side_by_side(), pytest.raises(ValueError, match="no image"):
        both(*functions)


def test_each_thread_has_half_of_torchs_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with side_by_side():
            counts = both(
                lambda: {"first": torch.tensor(torch.get_num_threads())},
                lambda: {"second": torch.tensor(torch.get_num_threads())},
            )
        assert (counts["first"], counts["second"], torch.get_num_threads()) == (2, 2, 4)
    finally:
        torch.set_num_threads(before)


def test_a_waiting_thread_gets_the_gil_sooner():
    """One that waits for it would else idle for up to 5 ms, as long as whole operations."""
    before = sys.getswitchinterval()
    with side_by_side():
        assert sys.getswitchinterval() < 0.001 < before
    assert sys.getswitchinterval() == before


# ---------------------------------------------------------------- which towers


def towers(name="tiny", size=48):
    spec = TowerSpec(name, vocab_size=300, image_size=size)
    return build_image_tower(spec), build_text_tower(spec, attention="causal", pooling="end")


@pytest.mark.parametrize(("name", "size", "num_images", "suited"), [
    ("tiny", 48, 1, True),
    ("tiny", 48, 2, True),
    ("tiny", 48, 8, False),  # the images take nearly all of the time
    ("small", 128, 1, False),
])  # fmt: skip
def test_neither_tower_does_nearly_all_of_the_work(name, size, num_images, suited):
    assert suit_side_by_side(*towers(name, size), num_images, 1) == suited


def test_towers_that_draw_random_numbers_are_not_suited():
    image, text = towers()
    image.trunk = torch.nn.Sequential(image.trunk, torch.nn.Dropout(0.1))
    assert not suit_side_by_side(image, text, 1, 1)


def test_batch_norms_are_as_before():
    image, text = towers()
    before = {name: value.clone() for name, value in image.state_dict().items()}
    suit_side_by_side(image, text, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in image.state_dict().items())
    assert all(module.training for module in image.modules())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_runs_use_it_where_it_is_faster(tmp_path):
    config = TrainConfig(method="clip", method_config=CLIPConfig())
    tiny_model = CLIP(CLIPConfig(), TowerSpec("tiny", vocab_size=300, image_size=48))

    def threads(method=tiny_model, **changes):
        with step_threads(method, replace(config, **changes), ALONE):
            return torch.get_num_threads()

    assert threads() == 1
    assert threads(gradient_checkpointing=True) == 2
    assert threads(compile=True) == 2
    assert threads(build_method("oner", tmp_path)) == 2  # has one tower
    torch.set_num_threads(1)
    assert isinstance(step_threads(tiny_model, config, ALONE), nullcontext)


@pytest.mark.slow
def test_a_run_on_two_cores_has_the_bits_of_one_core(tmp_path):
    """Of a model whose towers run side by side; others split sums among threads."""
    data = tiny.write_pairs(tmp_path / "pairs")
    runs = []
    for threads in (1, 2):
        runs.append(tmp_path / f"run{threads}")
        args = tiny.train_args(data, runs[-1], "tiny", image_size=32, epochs=1, device="cpu")
        process = tiny.start(args, threads)
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    assert_equal_runs(*runs)
