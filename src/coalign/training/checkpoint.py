"""Crash-safe checkpoints, and the lock that allows one writer per run folder.

A checkpoint is a folder: model.safetensors, state.safetensors and state.json (optimizer and trainer), and manifest.json with the size
and SHA-256 of each file. It is written as NAME.new and fsynced, then renamed to NAME. The previous checkpoint becomes NAME.previous and
stays until the next save. Nothing is pickled.
"""

from __future__ import annotations

import errno
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
from safetensors.torch import load_file
from torch import Tensor

from coalign.errors import UserError
from coalign.files import save_tensors
from coalign.locks import lock

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"(last|best|stable|start|step-\d+)(\.new|\.previous)?")


@dataclass
class Checkpoint:
    """A loaded checkpoint, with tensors on the CPU. `optimizer` and `trainer` are None if only weights were saved."""

    path: Path
    model: dict[str, Tensor]
    optimizer: Any
    trainer: Any
    warnings: list[str] = field(default_factory=list)  # which damaged checkpoints were skipped, and why


class _DamagedError(Exception):
    pass


# ---------------------------------------------------------------- saving


def save(run_dir: Path, name: str, model: Mapping[str, Tensor], optimizer: Any = None, trainer: Any = None) -> Path:
    """Saves to run_dir/name ("last", "best", "stable", "start", "step-120") and returns that path.

    model: name -> tensor; tensors that share memory are saved as separate copies. optimizer, trainer: nested dicts, lists and tuples of
    tensors, strings, numbers, bools and None; a checkpoint without an optimizer cannot be resumed from. If saving fails at any point,
    the previous complete checkpoint stays. Raises UserError if the checkpoint cannot be written (disk full).
    """
    assert _NAME.fullmatch(f"{name}.new"), f"not a checkpoint name: {name}"
    final, new, previous = (run_dir / f"{name}{suffix}" for suffix in ("", ".new", ".previous"))
    try:
        _recover(final, new, previous)
        new.mkdir(parents=True)
        _write_files(new, model, optimizer, trainer, sequence=1 + max(map(_sequence, _directories(run_dir)), default=0))
        _swap(final, new, previous)
    except (OSError, SafetensorError) as error:
        # otherwise it failed between the two renames, and `new` is complete
        if final.exists() or not previous.exists():
            shutil.rmtree(new, ignore_errors=True)
        kept = "; the previous checkpoint is intact" if final.exists() or previous.exists() else ""
        raise UserError(f"The checkpoint {final} could not be written ({_reason(error)}){kept}.") from error
    _written.add(final)
    return final


_written: set[Path] = set()  # checkpoints of this process, which need no verification


def _recover(final: Path, new: Path, previous: Path) -> None:
    """Completes a save that a crash interrupted, then removes all but `final`: at most two checkpoints of a name exist at a time."""
    if final not in _written or not final.exists():
        if _is_intact(new):
            _swap(final, new, previous)
        elif not _is_intact(final) and _is_intact(previous):
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


def _write_files(directory: Path, model: Mapping[str, Tensor], optimizer: Any, trainer: Any, sequence: int) -> None:
    tensors: dict[str, Tensor] = {}
    tree = _to_json({"optimizer": optimizer, "trainer": trainer}, "", tensors)
    save_tensors(directory / "model.safetensors", _unshared(model), {"format": "pt"})
    save_tensors(directory / "state.safetensors", _unshared(tensors))
    (directory / "state.json").write_text(json.dumps(tree))
    files = {}
    for path in sorted(directory.iterdir()):
        _fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    # written last: a readable manifest implies that all files are on disk
    manifest = {"format": FORMAT, "sequence": sequence, "resumable": optimizer is not None, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _fsync(directory / MANIFEST)
    _fsync(directory)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which share memory, as safetensors requires."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON. Its tensors are moved to `tensors`, keyed by their path in the value."""
    if isinstance(value, Tensor):
        name = name.rstrip("/")
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):  # as pairs: JSON keys cannot be integers
        assert all(isinstance(key, (str, int)) for key in value), f"{name}: keys must be strings or integers"
        return {"dict": [[key, _to_json(item, f"{name}{key}/", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, f"{name}{index}/", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    assert value is None or isinstance(value, (str, int, float)), f"{name}: {type(value).__name__} cannot be saved"
    return value


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_from_json(item, tensors) for item in content)
    return {key: _from_json(item, tensors) for key, item in content}


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows syncs no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs no read-only files
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
    """Loads and verifies the checkpoint `path` (run_dir/name). If it is damaged, loads the previous one and records a warning.

    Raises UserError if there is no intact checkpoint.
    """
    candidates = [path.with_name(path.name + suffix) for suffix in ("", ".new", ".previous")]
    checkpoint = _newest_intact([candidate for candidate in candidates if candidate.is_dir()])
    if checkpoint is None:
        raise UserError(f"There is no checkpoint at {path}; give RUN/last or RUN/best.")
    return checkpoint


def load_latest(run_dir: Path) -> Checkpoint | None:
    """Loads the newest intact checkpoint that can be resumed from, or returns None if none was ever saved.

    Damaged checkpoints are skipped with a warning. Raises UserError if all are damaged.
    """
    return _newest_intact(_directories(run_dir), only_resumable=True)


def exists(run_dir: Path) -> bool:
    """Returns whether there is a checkpoint that `load_latest` may load."""
    return any(_sequence(path) and _manifest(path)["resumable"] for path in _directories(run_dir))


def _newest_intact(paths: list[Path], only_resumable: bool = False) -> Checkpoint | None:
    skipped = []
    for path in sorted(paths, key=lambda path: _sequence(path) or math.inf, reverse=True):
        if path.suffix and not _sequence(path):
            continue  # partly written or partly removed when a process died: nothing is lost
        try:
            if only_resumable and not _manifest(path)["resumable"]:
                continue
            _verify(path)
            checkpoint = _read(path)
        except _DamagedError as damage:
            skipped.append(f"The checkpoint {path} is damaged ({damage}) and was skipped.")
            continue
        checkpoint.warnings = skipped
        return checkpoint
    if skipped:
        raise UserError(f"{skipped[0][:-1]}; no intact checkpoint is left: start a new run in another folder.")
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
    """The checkpoint's number in the order of saving, 0 if unknown. (Timestamps are unreliable: clocks can be set back.)"""
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


def _is_intact(path: Path) -> bool:
    try:
        _verify(path)
    except _DamagedError:
        return False
    return True


def _read(path: Path) -> Checkpoint:
    try:
        tensors = load_file(path / "state.safetensors")
        tree = _from_json(json.loads((path / "state.json").read_bytes()), tensors)
        return Checkpoint(path, load_file(path / "model.safetensors"), tree["optimizer"], tree["trainer"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _DamagedError(str(error)) from error


# ---------------------------------------------------------------- one writer


class RunLock:
    """Locks a run folder for one process (a context manager). The system releases the lock when the process dies.

    Creates the folder. Raises UserError, naming the holder, if another process holds the lock.
    """

    def __init__(self, run_dir: Path, name: str = "run.lock") -> None:
        self.run_dir, self.name = run_dir, name
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            file = open(self.run_dir / self.name, "a+")  # noqa: SIM115  held until release
        except OSError as error:
            raise UserError(f"The output folder {self.run_dir} cannot be used: {error.strerror}.") from error
        try:
            lock(file, wait=False)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"The output folder {self.run_dir} is in use by {holder}: wait until that run ends, stop it, or choose another folder."
            ) from error
        except OSError as error:  # some network file systems do not support locks
            warnings.warn(
                f"{self.run_dir} cannot be locked ({error.strerror}); do not start another run in it", stacklevel=2
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        self._file = file
        _held_locks.add(self)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            _held_locks.discard(self)


_held_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _release_inherited_locks() -> None:
    for held in list(_held_locks):
        held.release()


# A forked loader worker inherits the open file and its lock, and would keep the lock if its parent were killed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_inherited_locks)
