"""Tar shards behind a URL (s3://, gs://, https://, …): copied once into the cache folder, where they are read like any others.

Copied whole, since a shard must be read whole to be indexed, and since the samples of a batch come from everywhere.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalign.data.common import cache_folder
from coalign.errors import UserError

_ASKED, _COPIED = 64, 8  # shards at once
_SPARE = 1 << 30  # bytes that are left free on the disk
_log = logging.getLogger(__name__)


def is_remote(spec: str) -> bool:
    return "://" in spec


def local_copies(spec: str, expand: Callable[[str], Sequence[str]]) -> list[str]:
    """The paths of the copies of the shards that the URL names: one, a glob, or, by `expand`, a pattern with braces.

    What is there already is kept as long as the original has the same size and time or tag. UserError for what is missing, cannot be
    reached, or does not fit the disk; what was copied until then stays.
    """
    filesystem, urls = _call(spec, lambda: _matching(spec, expand))
    if not urls:
        raise UserError(f"no shards match {spec}")
    with ThreadPoolExecutor(_ASKED) as pool:
        infos = list(pool.map(lambda url: _info(filesystem, url), urls))
    if missing := [url for url, info in zip(urls, infos) if info is None]:
        raise UserError(f"{len(missing)} of {len(urls)} shards of {spec} are missing, the first is {missing[0]}")
    copies = [
        _Copy(filesystem, url, _place(url), int(info["size"]), _state(info)) for url, info in zip(urls, infos) if info
    ]
    if wanted := [copy for copy in copies if not copy.is_there()]:
        _check_space(spec, sum(copy.size for copy in wanted))
        _log.info("copying %s shards of %s", f"{len(wanted):,}", spec)
        with ThreadPoolExecutor(_COPIED) as pool:
            running = [pool.submit(_call, copy.url, copy.make) for copy in wanted]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [str(copy.place) for copy in copies]


@dataclass
class _Copy:
    """A shard's copy, and beside it in a file of the same name and .state what the original was like."""

    filesystem: Any
    url: str
    place: Path
    size: int
    state: str

    @property
    def _note(self) -> Path:
        return self.place.with_name(f"{self.place.name}.state")

    def is_there(self) -> bool:
        return self.place.exists() and self._note.exists() and self._note.read_text() == self.state

    def make(self) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with open(self.place.with_name(f"{self.place.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this machine may want it too
            if self.is_there():
                return
            self._note.unlink(missing_ok=True)
            temporary = self.place.with_name(f"{self.place.name}.part")
            try:
                with self.filesystem.open(self.url, "rb") as remote, open(temporary, "wb") as file:
                    shutil.copyfileobj(remote, file, 1 << 22)
                if (got := temporary.stat().st_size) != self.size:
                    raise OSError(f"{got:,} of {self.size:,} bytes came")
                os.replace(temporary, self.place)
            finally:
                temporary.unlink(missing_ok=True)  # of what broke off; a full disk has room again
            self._note.write_text(self.state)


def _matching(spec: str, expand: Callable[[str], Sequence[str]]) -> tuple[Any, list[str]]:
    import fsspec

    protocol = spec.split("://")[0]
    filesystem = fsspec.filesystem(protocol)
    if "{" in spec:
        return filesystem, list(expand(spec))
    if any(mark in spec for mark in "*?["):
        return filesystem, sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(spec))
    return filesystem, [spec]


def _info(filesystem: Any, url: str) -> dict[str, Any] | None:
    """Size and what changes with the content; None if there is no such file."""

    def ask() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = filesystem.info(url)
        except FileNotFoundError as error:
            cause = error.__cause__
            if cause is not None and (isinstance(cause, OSError) or getattr(cause, "status", 404) != 404):
                raise cause from None  # behind http any failure is called a missing file
            return None
        if found.get("size") is None:
            raise UserError(f"{url} does not tell its size; copy the shards yourself and name the copies.")
        return found

    found: dict[str, Any] | None = _call(url, ask)
    return found


def _state(info: dict[str, Any]) -> str:
    changes = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if info.get(key)), ""
    )
    return f"{info['size']} {changes}"


def _place(url: str) -> Path:
    """As in their own place, so that samples have the same names."""
    protocol, _, path = url.partition("://")
    parts = [part for part in path.split("?")[0].split("/") if part]
    if ".." in parts:
        raise UserError(f"{url} has .. in its path; write it without.")
    return cache_folder().joinpath("remote", protocol, *parts)


def _check_space(spec: str, needed: int) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - _SPARE
    if needed > free:
        raise UserError(
            f"The shards of {spec} are {needed / 1e9:,.1f} GB, of which {max(0, free) / 1e9:,.1f} GB fit into {folder}; let "
            "XDG_CACHE_HOME name a larger disk, or train on fewer shards."
        )


def _call(what: str, work: Callable[[], Any]) -> Any:
    """`work`, with whatever a file system raises as a sentence."""
    try:
        return work()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f'{what} needs a package ({error}): pip install "coalign[remote]", or that one.') from None
    except Exception as error:  # every file system has its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} cannot be read: {reason}") from error
