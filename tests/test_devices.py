"""The device that commands choose, and what an Apple GPU, which no test has, must not be given."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.builders import build_method
from helpers.steps import ALONE, batch_for, run_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coalign.cli.main import main
from coalign.devices import best_device, copies_asynchronously, device_line
from coalign.errors import UserError
from coalign.methods import METHODS
from coalign.training.distributed import World, join_world
from coalign.training.trainer import autocast_dtype


def machine(monkeypatch, cuda=0, mps=False):
    """Makes PyTorch find these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (2, True, "cuda")]
)
def test_the_best_device_is_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, best):
    machine(monkeypatch, cuda, mps)
    assert best_device(None) == best
    assert best_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["tpu", "gpu", "meta", "", "cuda:2", "cuda:x", "mps"])
def test_an_absent_or_unknown_device_is_refused(monkeypatch, device):
    machine(monkeypatch, cuda=2)
    assert best_device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match=f"There is no device '{device}'.*--device"):
        best_device(device)


def test_the_line_names_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"number {device.index}")
    assert device_line("cuda:1") == "Device: cuda:1 (number 1)"
    assert device_line("mps") == "Device: mps (Apple GPU)"
    for threads, words in ((1, "1 thread"), (4, "4 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert device_line("cpu") == f"Device: cpu ({words})"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "scenes:64", "--out", "run"],
        ["profile", "--data", "scenes:64"],
        ["eval", "run", "--tasks", "retrieval:scenes:64"],
        ["search", "run", "--data", "photos", "--text", "a"],
        ["localize", "run", "--image", "a.png", "--text", "a", "--out", "a.png"],
        ["space", "run", "--data", "photos", "--out", "a.png"],
        ["interpolate", "start", "run", "--out", "between"],
        ["data", "paraphrase", "photos", "--out", "more", "--marian", "a", "b"],
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_an_absent_device_before_the_work(monkeypatch, tmp_path, capsys, words):
    machine(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--device", "mps"]) == 2
    assert capsys.readouterr().err == (
        "coalign: There is no device 'mps': PyTorch finds no Apple GPU here; choose another --device.\n"
    )


# ---------------------------------------------------------------- Apple GPUs


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors that depend on others, as Apple GPUs do. The CPU stands for the GPU; constants are of the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()}
        made = {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        assert torch.float64 not in made or given <= {torch.float64}, function
        return result


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_an_apple_gpu_computes_nothing_in_float64(tmp_path, name):
    method = build_method(name, tmp_path).float()
    batch = batch_for(method)
    with NoFloat64():
        run_step(method, batch, World(0, 1, torch.device("mps")))
    assert all(x.dtype != torch.float64 for x in (*method.buffers(), *method.parameters()))
    with NoFloat64(), pytest.raises(AssertionError):
        run_step(method, batch, ALONE)  # sums in float64 elsewhere


def test_apple_gpus_train_in_float32_and_in_one_process(monkeypatch):
    machine(monkeypatch, mps=True)
    assert autocast_dtype("auto", torch.device("mps")) is None
    assert join_world().device == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Several processes cannot compute on an Apple GPU"):
        join_world()


def test_only_copies_to_cuda_are_asynchronous():
    assert [name for name in ("cpu", "cuda:0", "mps") if copies_asynchronously(name)] == ["cuda:0"]


@pytest.mark.parametrize(
    ("platform", "given", "expected"), [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, None)]
)
def test_missing_operations_of_apple_gpus_run_on_the_cpu(platform, given, expected):
    code = f"import sys, os; sys.platform = {platform!r}; import coalign; print(os.environ.get('PYTORCH_ENABLE_MPS_FALLBACK'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    if given is not None:
        environment["PYTORCH_ENABLE_MPS_FALLBACK"] = given
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(expected)
