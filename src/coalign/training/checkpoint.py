"""Checkpoints that survive a crash at any moment, and the lock that keeps a second writer out of a run directory.

A checkpoint is a directory: model.safetensors, state.safetensors and state.json (optimiser and trainer), and
manifest.json with the size and the SHA-256 of each. It is written under the name NAME.new, made durable, and only then
becomes NAME, while the one before it becomes NAME.previous and stays until the next save. Nothing is pickled.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coalign.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"(last|best|step-\d+)(\.new|\.previous)?")


@dataclass
class Checkpoint:
    """What was saved. `optimiser` and `trainer` are None for one that holds weights only. Tensors are on the CPU."""

    path: Path
    model: dict[str, Tensor]
    optimiser: Any
    trainer: Any
    warnings: list[str] = field(default_factory=list)  # which damaged one was passed over, and why


class _DamagedError(Exception):
    pass


# ---------------------------------------------------------------- saving


def save(run_dir: Path, name: str, model: Mapping[str, Tensor], optimiser: Any = None, trainer: Any = None) -> Path:
    """Save as run_dir/name ("last", "best", "step-120"); returns that path.

    model: name -> tensor; those that share memory are saved as separate copies. optimiser, trainer: nested dicts,
    lists and tuples of tensors, strings, numbers, bools, None. Without an optimiser one cannot resume from it.
    Whatever happens, a complete checkpoint that was there stays. Raises UserError if it cannot be written (disk full).
    """
    assert _NAME.fullmatch(f"{name}.new"), f"not a checkpoint name: {name}"
    final, new, previous = (run_dir / f"{name}{suffix}" for suffix in ("", ".new", ".previous"))
    try:
        _tidy(final, new, previous)
        new.mkdir(parents=True)
        _write_files(new, model, optimiser, trainer, sequence=1 + max(map(_sequence, _directories(run_dir)), default=0))
        _swap(final, new, previous)
    except (OSError, SafetensorError) as error:
        if final.exists() or not previous.exists():  # else it failed between the two renames, and `new` is complete
            shutil.rmtree(new, ignore_errors=True)
        kept = "; the one before it is intact" if final.exists() or previous.exists() else ""
        raise UserError(f"The checkpoint {final} could not be written ({_reason(error)}){kept}.") from error
    _written.add(final)
    return final


_written: set[Path] = set()  # by this process, hence known to be whole


def _tidy(final: Path, new: Path, previous: Path) -> None:
    """Finish what a crash interrupted, then make room: at most two checkpoints of a name exist at any time."""
    if final not in _written or not final.exists():
        if _is_whole(new):
            _swap(final, new, previous)
        elif not _is_whole(final) and _is_whole(previous):
            _remove(final)
            os.replace(previous, final)
            _fsync(final.parent)
    _remove(new)
    _remove(previous)


def _swap(final: Path, new: Path, previous: Path) -> None:
    if final.exists():
        _remove(previous)
        os.replace(final, previous)
    os.replace(new, final)
    _fsync(final.parent)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _write_files(directory: Path, model: Mapping[str, Tensor], optimiser: Any, trainer: Any, sequence: int) -> None:
    tensors: dict[str, Tensor] = {}
    tree = _flatten({"optimiser": optimiser, "trainer": trainer}, "", tensors)
    save_file(_independent(model), directory / "model.safetensors", metadata={"format": "pt"})
    save_file(_independent(tensors), directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(tree))
    files = {}
    for path in sorted(directory.iterdir()):
        _fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    # Last, so that a manifest that can be read vouches for files that are on the disk.
    manifest = {"format": FORMAT, "sequence": sequence, "resumable": optimiser is not None, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _fsync(directory / MANIFEST)
    _fsync(directory)


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, which the format asks for."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; its tensors go to `tensors`, under names that say where they were."""
    if isinstance(value, Tensor):
        name = name.rstrip("/")
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):  # as pairs, since keys may be numbers
        assert all(isinstance(key, (str, int)) for key in value), f"{name}: keys must be strings or whole numbers"
        return {"dict": [[key, _flatten(item, f"{name}{key}/", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{name}{position}/", tensors) for position, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    assert value is None or isinstance(value, (str, int, float)), f"{name}: {type(value).__name__} cannot be saved"
    return value


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return {key: _unflatten(item, tensors) for key, item in content}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
        return "the disk is full: free some space, then resume"
    return getattr(error, "strerror", None) or str(error)


# ---------------------------------------------------------------- loading


def load(path: Path) -> Checkpoint:
    """Load the checkpoint `path` (run_dir/name), every byte checked; if damaged, the one before it and a warning.

    Raises UserError if there is no whole one.
    """
    candidates = [path.with_name(path.name + suffix) for suffix in ("", ".new", ".previous")]
    found = _first_whole([candidate for candidate in candidates if candidate.is_dir()])
    if found is None:
        raise UserError(f"There is no checkpoint at {path}; give a run's directory followed by /last or /best.")
    return found


def load_latest(run_dir: Path) -> Checkpoint | None:
    """Load the newest whole checkpoint from which the run can be resumed; None if there never was one.

    Damaged ones are passed over with a warning line. Raises UserError if there are only damaged ones.
    """
    return _first_whole(_directories(run_dir), only_resumable=True)


def _first_whole(paths: list[Path], only_resumable: bool = False) -> Checkpoint | None:
    lines = []
    for path in sorted(paths, key=lambda path: _sequence(path) or math.inf, reverse=True):
        if path.suffix and not _sequence(path):
            continue  # half written or half removed when a process died: nothing is lost
        try:
            if only_resumable and not _manifest(path)["resumable"]:
                continue
            _verify(path)
            checkpoint = _read(path)
        except _DamagedError as damage:
            lines.append(f"The checkpoint {path} is damaged ({damage}) and was passed over.")
            continue
        checkpoint.warnings = lines
        return checkpoint
    if lines:
        raise UserError(f"{lines[0][:-1]}, and there is no whole one beside it: start anew in another directory.")
    return None


def _directories(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.glob("*") if path.is_dir() and _NAME.fullmatch(path.name))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise _DamagedError("it was written by a newer version of coalign")
        kinds = {"sequence": int, "resumable": bool, "files": dict}
        if not all(isinstance(manifest[name], kind) for name, kind in kinds.items()):
            raise TypeError
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{MANIFEST} is missing or unreadable") from error


def _sequence(path: Path) -> int:
    """Checkpoints of a run are numbered in the order of saving; 0 if there is no telling. (A clock may be set back.)"""
    try:
        return _manifest(path)["sequence"]
    except _DamagedError:
        return 0


def _verify(path: Path) -> None:
    for name, expected in _manifest(path)["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise _DamagedError(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
            if _sha256(path / name) != expected["sha256"]:
                raise _DamagedError(f"{name} does not match its checksum")
        except OSError as error:
            raise _DamagedError(f"{name}: {error.strerror}") from error


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except _DamagedError:
        return False
    return True


def _read(path: Path) -> Checkpoint:
    try:
        tensors = load_file(path / "state.safetensors")
        tree = _unflatten(json.loads((path / "state.json").read_bytes()), tensors)
        return Checkpoint(path, load_file(path / "model.safetensors"), tree["optimiser"], tree["trainer"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _DamagedError(str(error)) from error


# ---------------------------------------------------------------- one writer


class RunLock:
    """Holds a run directory for one process (a context manager); the system lets go of it when the process dies.

    Creates the directory. Raises UserError, saying who holds it, if another process does.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            file = open(self.run_dir / "run.lock", "a+")  # noqa: SIM115  held until release
        except OSError as error:
            raise UserError(f"The output directory {self.run_dir} cannot be used: {error.strerror}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            where = f"The output directory {self.run_dir}"
            raise UserError(f"{where} is in use by {holder}: wait for that run, stop it, or choose another.") from error
        except OSError as error:  # some network file systems know no locks
            warnings.warn(f"{self.run_dir} cannot be locked ({error.strerror}): let no other run use it", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        self._file = file
        _held.add(self)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            _held.discard(self)


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _drop_inherited() -> None:
    for lock in list(_held):
        lock.release()


# A forked loader worker inherits the open file and with it the lock, and would keep it when its parent is killed.
os.register_at_fork(after_in_child=_drop_inherited)
