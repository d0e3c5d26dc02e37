"""Downloads tar shards from URLs (s3://, gs://, https://, …) into the cache folder, once.

Shards are downloaded whole: indexing reads all of a shard, and a batch draws samples from all shards.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.files import cache_folder, write_atomically, write_text
from coalign.locks import lock

_MAX_REQUESTS, _MAX_DOWNLOADS = 64, 8  # at once
_SPARE = 1 << 30  # bytes to leave free on the disk
_log = logging.getLogger(__name__)


def is_remote(spec: str) -> bool:
    return "://" in spec


def local_copies(spec: str, expand: Callable[[str], Sequence[str]]) -> list[str]:
    """Paths of local copies of remote shards, downloading those that are missing or outdated.

    `spec` is the URL of one shard, a glob, or a brace pattern, which `expand` expands. A copy is up to date if size and modification time
    or tag are unchanged. Raises UserError if a shard is missing, cannot be read or does not fit on the disk; finished downloads are kept.
    """
    filesystem, urls = _call(spec, lambda: _matching(spec, expand))
    if not urls:
        raise UserError(f"No shards match {spec}")
    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        infos = list(pool.map(lambda url: _info(filesystem, url), urls))
    if missing := [url for url, info in zip(urls, infos) if info is None]:
        raise UserError(f"{len(missing)} of {len(urls)} shards of {spec} are missing, starting with {missing[0]}")
    copies = [
        _Copy(filesystem, url, _cache_path(url), int(info["size"]), _state(info))
        for url, info in zip(urls, infos)
        if info
    ]
    if outdated := [copy for copy in copies if not copy.is_current()]:
        _check_space(spec, sum(copy.size for copy in outdated))
        _log.info("downloading %s shards of %s", f"{len(outdated):,}", spec)
        with ThreadPoolExecutor(_MAX_DOWNLOADS) as pool:
            running = [pool.submit(_call, copy.url, copy.update) for copy in outdated]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [str(copy.path) for copy in copies]


@dataclass
class _Copy:
    """A local copy of a shard. A file next to it (.state) stores the state of the original at download time."""

    filesystem: Any
    url: str
    path: Path
    size: int
    state: str

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.state")

    def is_current(self) -> bool:
        return self.path.exists() and self._state_path.exists() and self._state_path.read_text() == self.state

    def update(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f"{self.path.name}.lock"), "w") as held:
            lock(held, wait=True)  # other processes on this machine may download it too
            if self.is_current():
                return
            self._state_path.unlink(missing_ok=True)
            write_atomically(self.path, self._download, temporary=self.path.with_name(f"{self.path.name}.part"))
            write_text(self._state_path, self.state)

    def _download(self, to: Path) -> None:
        with self.filesystem.open(self.url, "rb") as remote, open(to, "wb") as file:
            shutil.copyfileobj(remote, file, 1 << 22)
        if (received := to.stat().st_size) != self.size:
            raise OSError(f"received {received:,} of {self.size:,} bytes")


def _matching(spec: str, expand: Callable[[str], Sequence[str]]) -> tuple[Any, list[str]]:
    """The file system of `spec`, and the URLs that it matches."""
    import fsspec

    protocol = spec.split("://")[0]
    filesystem = fsspec.filesystem(protocol)
    if "{" in spec:
        return filesystem, list(expand(spec))
    if any(character in spec for character in "*?["):
        return filesystem, sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(spec))
    return filesystem, [spec]


def _info(filesystem: Any, url: str) -> dict[str, Any] | None:
    """File information, with at least `size`; None if the file does not exist."""

    def request() -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = filesystem.info(url)
        except FileNotFoundError as error:
            cause = error.__cause__
            if cause is not None and (isinstance(cause, OSError) or getattr(cause, "status", 404) != 404):
                raise cause from None  # fsspec's HTTP file system reports every failure as a missing file
            return None
        if info.get("size") is None:
            raise UserError(f"The size of {url} is unknown; download the shards yourself and use the local files.")
        return info

    info: dict[str, Any] | None = _call(url, request)
    return info


def _state(info: dict[str, Any]) -> str:
    """Size and tag or modification time, which change when the file changes."""
    tag_or_time = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if info.get(key)), ""
    )
    return f"{info['size']} {tag_or_time}"


def _cache_path(url: str) -> Path:
    """Local path of a shard: mirrors the URL, so that sample keys are the same as for the original folder."""
    protocol, _, path = url.partition("://")
    parts = [part for part in path.split("?")[0].split("/") if part]
    if ".." in parts:
        raise UserError(f"The path of {url} contains '..'; write the resolved path.")
    return cache_folder().joinpath("remote", protocol, *parts)


def _check_space(spec: str, needed: int) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - _SPARE
    if needed > free:
        raise UserError(
            f"The shards of {spec} take {needed / 1e9:,.1f} GB, but {folder} has room for {max(0, free) / 1e9:,.1f} GB; "
            "set XDG_CACHE_HOME to a folder on a larger disk, or train on fewer shards."
        )


def _call(url: str, work: Callable[[], Any]) -> Any:
    """Runs `work`, and turns any error of a file system into a UserError."""
    try:
        return work()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f'Reading {url} requires a missing package ({error}): pip install "coalign[remote]", or install that package'
        ) from None
    except Exception as error:  # every file system has its own error types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot read {url}: {reason}") from error
