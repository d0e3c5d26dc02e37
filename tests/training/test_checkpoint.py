from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.training import checkpoint
from coalign.training.checkpoint import RunLock, load, load_latest, save


class Crash(BaseException):
    """The process dies here. Not an Exception: nothing may tidy up after it."""


def save_number(run_dir: Path, number: int, name: str = "last") -> None:
    save(
        run_dir,
        name,
        {"weight": torch.full((5,), float(number))},
        {"moment": torch.full((2,), number)},
        {"step": number},
    )


def check_number(found: checkpoint.Checkpoint | None) -> int:
    """All parts of a checkpoint must be of the same save."""
    assert found is not None
    number = found.trainer["step"]
    assert torch.equal(found.model["weight"], torch.full((5,), float(number)))
    assert torch.equal(found.optimiser["moment"], torch.full((2,), number))
    return number


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    checkpoint._written.clear()


# ---------------------------------------------------------------- what is saved comes back


def test_every_kind_of_tensor_and_value_comes_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "float": torch.randn(3, 2),
        "half": torch.randn(4).half(),
        "brain": torch.randn(4).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "whole": torch.tensor([2**40, -1]),
        "truth": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "no_dimension": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "empty_too": torch.empty(0),
        "not_finite": torch.tensor([float("nan"), float("inf")]),
        "transposed": base.T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "all": base,
        "same": base,
        "a_row": base[1],
        "parameter": nn.Parameter(torch.randn(2)),
    }
    trainer = {
        "step": 7,
        "best": 0.1 + 0.2,
        "name": "Grüße",
        "none": None,
        "on": True,
        "list": [1, [2.5, torch.tensor(4)]],
    }
    optimiser = {
        "state": {0: {"step": torch.tensor(5.0), "betas": (0.9, 0.98)}, 1: {}},
        "a/b": torch.ones(1),
        "a": {"b": base},
    }
    found = load(save(tmp_path, "last", model, optimiser, trainer))
    assert found.warnings == []
    assert set(found.model) == set(model)
    for name, tensor in model.items():
        back = found.model[name]
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        torch.testing.assert_close(back, tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.trainer["list"][1].pop(), torch.tensor(4))
    trainer["list"][1].pop()
    assert found.trainer == trainer
    assert found.optimiser["state"][0]["betas"] == (0.9, 0.98)
    assert found.optimiser["state"][1] == {}
    assert torch.equal(found.optimiser["state"][0]["step"], torch.tensor(5.0))
    assert torch.equal(found.optimiser["a/b"], torch.ones(1))
    assert torch.equal(found.optimiser["a"]["b"], base)


def test_tied_weights_and_torch_optimisers_go_through(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model = build()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).square().sum().backward()
    optimiser.step()
    found = load(save(tmp_path, "last", model.state_dict(), optimiser.state_dict(), {}))
    other = build()
    other.load_state_dict(found.model)
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[1].weight is other[0].weight
    again = torch.optim.AdamW(other.parameters())
    again.load_state_dict(found.optimiser)
    for one, two in ((model, optimiser), (other, again)):
        one.zero_grad()
        one(torch.arange(5)).square().sum().backward()
        two.step()
    assert torch.equal(other[0].weight, model[0].weight)


def test_what_cannot_be_saved_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="trainer/a/1/: object"):
        save(tmp_path, "last", {}, {}, {"a": [1, object()]})
    for name in ("last.new", "../last", "step-x", ""):
        with pytest.raises(AssertionError, match="not a checkpoint name"):
            save(tmp_path, name, {})


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_number(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "last").iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((tmp_path / "last" / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "last").iterdir()} - {"manifest.json"}


# ---------------------------------------------------------------- which one is loaded


def test_latest_is_the_last_saved_that_can_be_resumed(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    save_number(tmp_path, 10, "step-10")
    save_number(tmp_path, 20)
    save(tmp_path, "best", {"weight": torch.ones(1)})
    assert check_number(load_latest(tmp_path)) == 20
    assert load(tmp_path / "best").optimiser is None
    save_number(tmp_path, 15, "step-15")  # resumed from an older one: the latest is what was saved last
    assert check_number(load_latest(tmp_path)) == 15
    assert check_number(load(tmp_path / "last")) == 20


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
    save_number(tmp_path, 1)
    save_number(tmp_path, 2)
    damage(tmp_path / "last" / file)
    for found in (load(tmp_path / "last"), load_latest(tmp_path)):
        assert check_number(found) == 1
        (warning,) = found.warnings
        assert file in warning
        assert str(tmp_path / "last") in warning
    damage(tmp_path / "last.previous" / file)
    for attempt in (lambda: load(tmp_path / "last"), lambda: load_latest(tmp_path)):
        with pytest.raises(UserError, match=r"is damaged .* no whole one beside it"):
            attempt()


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_number(tmp_path, 1)
    save_number(tmp_path, 2)
    checkpoint._written.clear()
    truncate(tmp_path / "last" / "model.safetensors")
    assert check_number(load_latest(tmp_path)) == 1
    monkeypatch.setattr(checkpoint, "save_file", lambda *args, **more: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        save_number(tmp_path, 3)
    assert check_number(load_latest(tmp_path)) == 1


def test_absent_and_foreign_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load(tmp_path / "last")
    save_number(tmp_path, 1)
    manifest = json.loads((tmp_path / "last" / "manifest.json").read_text())
    (tmp_path / "last" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="newer version"):
        load(tmp_path / "last")


# ---------------------------------------------------------------- crashes


class CrashAt:
    """Lets file operations pass until the k-th, which dies, at its start or half-way through writing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
        self.count, self.k = 0, k
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.wrap(lambda descriptor: None))  # the real one takes its time
        monkeypatch.setattr(checkpoint, "save_file", self.wrap(checkpoint.save_file, self.half_tensors))
        monkeypatch.setattr(Path, "write_text", self.wrap(Path.write_text, self.half_text))

    def wrap(self, operation: Callable, half: Callable | None = None) -> Callable:
        def call(*args, **more):
            for torn in (False, True) if half else (False,):
                self.count += 1
                if self.count == self.k:
                    if torn:
                        half(*args)
                    raise Crash
            return operation(*args, **more)

        return call

    @staticmethod
    def half_tensors(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")

    @staticmethod
    def half_text(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())


def count_operations(run_dir: Path, number: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        counter = CrashAt(patch, None)
        save_number(run_dir, number)
    return counter.count


def crash_in_save(run_dir: Path, number: int, k: int) -> None:
    checkpoint._written.clear()
    with pytest.MonkeyPatch.context() as patch:
        CrashAt(patch, k)
        with pytest.raises(Crash):
            save_number(run_dir, number)
    checkpoint._written.clear()


def test_a_crash_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for before in (1, 2):  # with and without a previous one to delete
        start = tmp_path / f"start{before}"
        for number in range(before):
            save_number(start, number)
        shutil.copytree(start, tmp_path / f"counted{before}")
        operations = count_operations(tmp_path / f"counted{before}", before)
        assert operations >= 15
        seen = set()
        for k in range(1, operations + 1):
            run_dir = tmp_path / f"{before}-{k}"
            shutil.copytree(start, run_dir)
            crash_in_save(run_dir, before, k)
            number = check_number(load_latest(run_dir))
            assert number in (before - 1, before)
            assert check_number(load(run_dir / "last")) == number
            seen.add(number)
            save_number(run_dir, before + 1)  # and the run goes on
            found = load_latest(run_dir)
            assert check_number(found) == before + 1
            assert found.warnings == []
            assert not (run_dir / "last.new").exists()
        assert seen == {before - 1, before}


def test_a_second_crash_while_going_on_after_a_crash(tmp_path: Path) -> None:
    save_number(tmp_path / "start", 0)
    save_number(tmp_path / "start", 1)
    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    operations = count_operations(tmp_path / "counted", 2)
    for first in range(1, operations + 1):
        once = tmp_path / f"once{first}"
        shutil.copytree(tmp_path / "start", once)
        crash_in_save(once, 2, first)
        reached = check_number(load_latest(once))
        for second in itertools.count(1):
            twice = tmp_path / "twice"
            shutil.copytree(once, twice)
            checkpoint._written.clear()
            crashed = False
            with pytest.MonkeyPatch.context() as patch:
                CrashAt(patch, second)
                try:
                    save_number(twice, 3)
                except Crash:
                    crashed = True
            found = load_latest(twice)
            assert check_number(found) in ((reached, 3) if crashed else (3,))
            assert found.warnings == []
            shutil.rmtree(twice)
            if not crashed:
                break


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_number(tmp_path, 1)
    for place in ((os, "mkdir"), (checkpoint, "save_file"), (Path, "write_text"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(*place, no_space)
            with pytest.raises(UserError, match=r"last could not be written \(the disk is full.*before it is intact"):
                save_number(tmp_path, 2)
        assert check_number(load_latest(tmp_path)) == 1
        assert not (tmp_path / "last.new").exists()
    save_number(tmp_path, 3)
    assert check_number(load_latest(tmp_path)) == 3


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A real failure of the safetensors writer, by a limit on the size of files."""
    save_number(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written .*File too large.* intact"):
            save(tmp_path, "last", {"big": torch.zeros(100_000)}, {}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert check_number(load_latest(tmp_path)) == 1


SAVE_IN_A_LOOP = """
import os, sys, torch
from pathlib import Path
from coalign.training.checkpoint import RunLock, load_latest, save

def work(run_dir):
    with RunLock(run_dir):
        found = load_latest(run_dir)
        number = found.trainer["step"] if found else 0
        while True:
            number += 1
            save(run_dir, "last", {"weight": torch.full((5,), float(number)), "bulk": torch.zeros(50_000)},
                 {"moment": torch.full((2,), number)}, {"step": number})
            print(os.getpid(), number, flush=True)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(Path(line.strip()))
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kill_9_of_a_real_process(tmp_path: Path) -> None:
    """Many times in one directory: the lock is free again, and nothing that was reported as saved is lost."""
    command = [sys.executable, "-c", SAVE_IN_A_LOOP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        reached = 0
        for attempt in range(12):
            starter.stdin.write(f"{tmp_path}\n")
            starter.stdin.flush()
            pid, number = map(int, starter.stdout.readline().split())
            assert number == reached + 1
            time.sleep(0.003 * attempt)
            os.kill(pid, signal.SIGKILL)
            for line in iter(starter.stdout.readline, "dead\n"):
                number = int(line.split()[1])
            reached = check_number(load_latest(tmp_path))
            assert reached in (number, number + 1)
        starter.stdin.close()


# ---------------------------------------------------------------- the lock


def test_one_writer_in_a_process(tmp_path: Path) -> None:
    with RunLock(tmp_path / "deep" / "run"):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+ since"):
            RunLock(tmp_path / "deep" / "run").acquire()
        with RunLock(tmp_path / "other"):
            pass
    with RunLock(tmp_path / "deep" / "run"):
        pass


HOLD = """
import os, sys, time
from pathlib import Path
from coalign.training.checkpoint import RunLock
with RunLock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader worker, which may outlive its parent for a while
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""


def test_one_writer_among_processes_and_release_by_kill_9(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid} on"):
            RunLock(tmp_path).acquire()
        child.kill()
        child.wait()
        with RunLock(tmp_path):  # although the forked worker still lives
            os.killpg(child.pid, 0)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run cannot be used: File exists"):
        RunLock(tmp_path / "run").acquire()
