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
from torch import nn

from coalign.errors import UserError
from coalign.training import checkpoint
from coalign.training.checkpoint import RunLock, load, load_latest, save


class Crash(BaseException):
    """Simulates the death of the process. Not an Exception, so that no handler cleans up."""


def save_number(run_dir: Path, number: int, name: str = "last") -> None:
    save(
        run_dir,
        name,
        {"weight": torch.full((5,), float(number))},
        {"moment": torch.full((2,), number)},
        {"step": number},
    )


def check_number(loaded: checkpoint.Checkpoint | None) -> int:
    """Asserts that all parts of a checkpoint are from the same save, and returns its number."""
    assert loaded is not None
    number = loaded.trainer["step"]
    assert torch.equal(loaded.model["weight"], torch.full((5,), float(number)))
    assert torch.equal(loaded.optimizer["moment"], torch.full((2,), number))
    return number


@pytest.fixture(autouse=True)
def forget_saved_checkpoints() -> None:
    """Starts each test as a new process would."""
    checkpoint._written.clear()


# ---------------------------------------------------------------- round trips


def test_tensors_and_values_of_every_kind_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "float": torch.randn(3, 2),
        "half": torch.randn(4).half(),
        "bfloat16": torch.randn(4).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "int64": torch.tensor([2**40, -1]),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "zero_dimensional": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "empty_too": torch.empty(0),
        "non_finite": torch.tensor([float("nan"), float("inf")]),
        "transposed": base.T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "base": base,
        "alias": base,
        "row": base[1],
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
    optimizer = {
        "state": {0: {"step": torch.tensor(5.0), "betas": (0.9, 0.98)}, 1: {}},
        "a/b": torch.ones(1),
        "a": {"b": base},
    }
    loaded = load(save(tmp_path, "last", model, optimizer, trainer))
    assert loaded.warnings == []
    assert set(loaded.model) == set(model)
    for name, tensor in model.items():
        actual = loaded.model[name]
        assert actual.dtype == tensor.dtype
        assert actual.shape == tensor.shape
        torch.testing.assert_close(actual, tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.trainer["list"][1].pop(), torch.tensor(4))
    trainer["list"][1].pop()
    assert loaded.trainer == trainer
    assert loaded.optimizer["state"][0]["betas"] == (0.9, 0.98)
    assert loaded.optimizer["state"][1] == {}
    assert torch.equal(loaded.optimizer["state"][0]["step"], torch.tensor(5.0))
    assert torch.equal(loaded.optimizer["a/b"], torch.ones(1))
    assert torch.equal(loaded.optimizer["a"]["b"], base)


def test_tied_weights_and_torch_optimizers_round_trip(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    loaded = load(save(tmp_path, "last", model.state_dict(), optimizer.state_dict(), {}))
    restored = build()
    restored.load_state_dict(loaded.model)
    assert torch.equal(restored[0].weight, model[0].weight)
    assert restored[1].weight is restored[0].weight
    restored_optimizer = torch.optim.AdamW(restored.parameters())
    restored_optimizer.load_state_dict(loaded.optimizer)
    for module, own_optimizer in ((model, optimizer), (restored, restored_optimizer)):
        module.zero_grad()
        module(torch.arange(5)).square().sum().backward()
        own_optimizer.step()
    assert torch.equal(restored[0].weight, model[0].weight)


def test_unsupported_values_and_names_are_rejected(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------- loading


def test_latest_is_the_last_saved_resumable_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    save_number(tmp_path, 10, "step-10")
    save_number(tmp_path, 20)
    save(tmp_path, "best", {"weight": torch.ones(1)})
    assert check_number(load_latest(tmp_path)) == 20
    assert load(tmp_path / "best").optimizer is None
    save_number(tmp_path, 15, "step-15")  # after resuming from an older one: the order of saving counts, not the step
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
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    save_number(tmp_path, 1)
    save_number(tmp_path, 2)
    damage(tmp_path / "last" / file)
    for loaded in (load(tmp_path / "last"), load_latest(tmp_path)):
        assert check_number(loaded) == 1
        (warning,) = loaded.warnings
        assert file in warning
        assert str(tmp_path / "last") in warning
    damage(tmp_path / "last.previous" / file)
    for attempt in (lambda: load(tmp_path / "last"), lambda: load_latest(tmp_path)):
        with pytest.raises(UserError, match=r"is damaged .* no intact checkpoint is left"):
            attempt()


def test_a_damaged_checkpoint_never_replaces_an_intact_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_number(tmp_path, 1)
    save_number(tmp_path, 2)
    checkpoint._written.clear()
    truncate(tmp_path / "last" / "model.safetensors")
    assert check_number(load_latest(tmp_path)) == 1
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *args, **kwargs: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        save_number(tmp_path, 3)
    assert check_number(load_latest(tmp_path)) == 1


def test_missing_and_newer_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load(tmp_path / "last")
    save_number(tmp_path, 1)
    manifest = json.loads((tmp_path / "last" / "manifest.json").read_text())
    (tmp_path / "last" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="newer version"):
        load(tmp_path / "last")


# ---------------------------------------------------------------- crashes


class CrashAt:
    """Crashes in the k-th file operation, either before it or halfway through writing. None only counts the operations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
        self.count, self.k = 0, k
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.wrap(lambda descriptor: None))  # the real one is slow
        monkeypatch.setattr(checkpoint, "save_tensors", self.wrap(checkpoint.save_tensors, self.write_partial_tensors))
        monkeypatch.setattr(Path, "write_text", self.wrap(Path.write_text, self.write_partial_text))

    def wrap(self, operation: Callable, write_partial: Callable | None = None) -> Callable:
        def call(*args, **kwargs):
            for partial in (False, True) if write_partial else (False,):
                self.count += 1
                if self.count == self.k:
                    if partial:
                        write_partial(*args)
                    raise Crash
            return operation(*args, **kwargs)

        return call

    @staticmethod
    def write_partial_tensors(path: Path, *_: object) -> None:
        path.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")

    @staticmethod
    def write_partial_text(path: Path, text: str) -> None:
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


def test_a_crash_in_any_operation_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    for before in (1, 2):  # with and without a previous one to delete
        start = tmp_path / f"start{before}"
        for number in range(before):
            save_number(start, number)
        shutil.copytree(start, tmp_path / f"count{before}")
        operations = count_operations(tmp_path / f"count{before}", before)
        assert operations >= 15
        survivors = set()
        for k in range(1, operations + 1):
            run_dir = tmp_path / f"{before}-{k}"
            shutil.copytree(start, run_dir)
            crash_in_save(run_dir, before, k)
            number = check_number(load_latest(run_dir))
            assert number in (before - 1, before)
            assert check_number(load(run_dir / "last")) == number
            survivors.add(number)
            save_number(run_dir, before + 1)  # the run can continue
            loaded = load_latest(run_dir)
            assert check_number(loaded) == before + 1
            assert loaded.warnings == []
            assert not (run_dir / "last.new").exists()
        assert survivors == {before - 1, before}


def test_a_second_crash_after_a_crash(tmp_path: Path) -> None:
    save_number(tmp_path / "start", 0)
    save_number(tmp_path / "start", 1)
    shutil.copytree(tmp_path / "start", tmp_path / "count")
    operations = count_operations(tmp_path / "count", 2)
    for first in range(1, operations + 1):
        once = tmp_path / f"once{first}"
        shutil.copytree(tmp_path / "start", once)
        crash_in_save(once, 2, first)
        survivor = check_number(load_latest(once))
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
            loaded = load_latest(twice)
            assert check_number(loaded) in ((survivor, 3) if crashed else (3,))
            assert loaded.warnings == []
            shutil.rmtree(twice)
            if not crashed:
                break


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_number(tmp_path, 1)
    for operation in (
        (os, "mkdir"),
        (checkpoint, "save_tensors"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "replace"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*operation, no_space)
            with pytest.raises(
                UserError, match=r"last could not be written \(the disk is full.*previous checkpoint is intact"
            ):
                save_number(tmp_path, 2)
        assert check_number(load_latest(tmp_path)) == 1
        assert not (tmp_path / "last.new").exists()
    save_number(tmp_path, 3)
    assert check_number(load_latest(tmp_path)) == 3


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A real failure of the safetensors writer, caused by a limit on file sizes."""
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
        latest = load_latest(run_dir)
        number = latest.trainer["step"] if latest else 0
        while True:
            number += 1
            save(run_dir, "last", {"weight": torch.full((5,), float(number)), "bulk": torch.zeros(50_000)},
                 {"moment": torch.full((2,), number)}, {"step": number})
            os.write(1, b"%d %d\\n" % (os.getpid(), number))  # in one piece: print may write part of a line

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(Path(line.strip()))
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_kill_9_of_a_real_process(tmp_path: Path) -> None:
    """Repeated in one folder: the lock is released each time, and no checkpoint reported as saved is lost."""
    command = [sys.executable, "-c", SAVE_IN_A_LOOP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        saved = 0
        for attempt in range(12):
            parent.stdin.write(f"{tmp_path}\n")
            parent.stdin.flush()
            pid, number = map(int, parent.stdout.readline().split())
            assert number == saved + 1
            time.sleep(0.003 * attempt)
            os.kill(pid, signal.SIGKILL)
            for line in iter(parent.stdout.readline, "dead\n"):
                number = int(line.split()[1])
            saved = check_number(load_latest(tmp_path))
            assert saved in (number, number + 1)
        parent.stdin.close()


# ---------------------------------------------------------------- the lock


def test_a_second_writer_in_the_process_is_refused(tmp_path: Path) -> None:
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
    if os.fork() == 0:  # like a loader worker, which may outlive its parent
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""


def test_a_second_writing_process_is_refused_and_kill_9_releases_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid} on"):
            RunLock(tmp_path).acquire()
        child.kill()
        child.wait()
        with RunLock(tmp_path):  # although the forked worker is still alive
            os.killpg(child.pid, 0)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.stdout.close()


def test_a_file_in_place_of_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run cannot be used: File exists"):
        RunLock(tmp_path / "run").acquire()
