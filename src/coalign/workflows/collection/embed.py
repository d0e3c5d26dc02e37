"""embed(): writes the embeddings of a dataset to files; update_embeddings(): brings them up to date."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from rich.console import Console

from coalign.config import DETECT, DataConfig
from coalign.cores import num_cores
from coalign.data.account import account_lines
from coalign.data.sources.base import MAX_NAMED, Source
from coalign.devices import device_line
from coalign.errors import UserError
from coalign.progress import progress
from coalign.runs.run import Run
from coalign.training.checkpoint import RunLock
from coalign.training.distributed import World, join_world
from coalign.types import DualEncoder
from coalign.workflows.collection.embed_chunks import ChunkEncoder, Vectors, image_vectors, join_cut
from coalign.workflows.collection.embedding_files import (
    LOCK,
    MANIFEST,
    part_files,
    read_groups,
    read_manifest,
    read_metadata,
    read_part,
    remove_leftovers,
    require_pyarrow,
    schema,
    state_of,
    write_file,
    write_manifest,
    write_part,
)
from coalign.workflows.collection.embedding_plan import Plan, SampleReader, Task, make_plan
from coalign.workflows.collection.embedding_settings import Settings, difference, new_manifest, reading_in
from coalign.workflows.evaluate.eval_model import EvalModel, open_eval_model
from coalign.workflows.evaluate.samples import open_as_trained, reading_of, select_split

T = TypeVar("T")
Model = str | Path | Run | DualEncoder | EvalModel
_PATIENCE = timedelta(days=30)  # a process waits for the others, which may have slower disks or GPUs
_FEW = 512  # images that are read faster by a thread than by processes that start first


@dataclass(frozen=True)
class Update:
    """What has changed since the embeddings were written before.

    Attributes:
        added: Samples that are new, and were embedded.
        changed: Samples that were embedded again.
        deleted: Samples that are gone from the data.
        unchanged: Samples whose embeddings were kept.
        bad: Samples that cannot be used, or only in part, new or not.
    """

    added: int
    changed: int
    deleted: int
    unchanged: int
    bad: int


@dataclass(frozen=True)
class Embedded:
    """What `embed` has written.

    Attributes:
        path: The folder or file.
        manifest: What it is made of; see `EmbeddingFiles`.
        update: What has changed since the last call on the same folder.
        account: Sentences on texts that were cut, and on what opening the data left out.
        is_first: Whether this is the first of several processes.
    """

    path: Path
    manifest: Mapping[str, Any]
    update: Update
    account: tuple[str, ...] = ()
    is_first: bool = True

    def lines(self) -> list[str]:
        """Returns what the command line prints."""
        counts, update = self.manifest["counts"], self.update
        embedded = " and ".join(f"{counts[name]:,} {name}" for name in ("images", "texts") if self.manifest[name])
        size = f"{self.manifest['dim']} dimensions, {self.manifest['precision']}"
        lines = [f"{self.path}: {counts['samples']:,} samples, of which {embedded} are embedded; {size}"]
        if update.changed or update.deleted or update.unchanged:
            lines.append(
                f"New: {update.added:,}, changed: {update.changed:,}, deleted: {update.deleted:,}, kept: {update.unchanged:,}"
            )
        for reason, skipped in self.manifest["skipped"].items():
            lines.append(f"Skipped: {skipped['count']:,} ({reason}), such as {skipped['keys'][0]}")
        return [*lines, *self.account]


def embed(
    model: Model,
    data: str,
    out: str | Path,
    *,
    split: str = "all",
    precision: str = "float16",
    chunk: int = 4096,
    texts: bool = True,
    images: bool = True,
    similarity: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    reading: DataConfig = DETECT,
    console: Console | None = None,
) -> Embedded:
    """Embeds all images and captions of a dataset, and writes the embeddings to Parquet files.

    If it was interrupted, call it again to resume: at most one chunk per process is embedded again. A finished folder is brought up to
    date: only new and changed samples are embedded. Under `torchrun`, the processes share the work. Memory is bounded by a chunk.

    Args:
        model: A run or its folder, an exported folder, `open_clip:…`, `transformers:…`, or a `DualEncoder`.
        data: As in `open_data`.
        out: A folder, which receives a Parquet file for each chunk, or a file whose name ends in `.parquet`.
        split: train, val, test, … or all.
        precision: "float16" or "float32".
        chunk: Samples that are written at once.
        texts: Whether to embed captions. The embedding of a sample's captions is the normalized mean of theirs.
        images: Whether to embed images.
        similarity: The similarity of a run, if its method has several; OneR has vectors with "projector". None: as configured.
        device: cpu, cuda, cuda:N or mps. None: the best there is.
        workers: Number of loader processes per process. None: one per CPU core, at most 8.
        reading: The columns of a table to read.
        console: Where the device is printed. None: nowhere.

    Returns:
        The manifest of the files and what was done. `EmbeddingFiles` reads the files.

    Raises:
        UserError: The model or the data cannot be opened, the model does not compare vectors by their cosine, `out` cannot be written or
            holds embeddings of another model, of other data or with other settings.

    Example:
        ```python
        coalign.embed("runs/clip", "photos", "vectors")
        vectors, rows = coalign.EmbeddingFiles.open("vectors").images()  # float32 [image, dim]
        ```
    """
    settings = Settings(split, precision, chunk, texts, images, similarity)
    require_pyarrow()
    out = Path(out)
    _check_out(out, data)
    is_file = out.suffix == ".parquet"
    if is_file and out.exists():
        raise UserError(f"{out} exists; delete it to write it again, or give a folder, which can be updated.")
    return _embed(model, data, out, settings, is_file, device, workers, reading, console)


def update_embeddings(
    model: Model,
    data: str,
    folder: str | Path,
    *,
    device: str | None = None,
    workers: int | None = None,
    reading: DataConfig | None = None,
    console: Console | None = None,
) -> Update:
    """Brings a folder of embeddings up to date with its data: embeds new and changed samples, and removes those that are gone.

    Files without a change stay as they are. Settings are those of the folder; reading: None, as the data was read before. Raises
    UserError as `embed`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    reading = reading_in(manifest) if reading is None else reading
    return _embed(model, data, folder, Settings.of(manifest), False, device, workers, reading, console).update


# ---------------------------------------------------------------- the work of all processes


def _embed(
    model: Model,
    data: str,
    out: Path,
    settings: Settings,
    is_file: bool,
    device: str | None,
    workers: int | None,
    reading: DataConfig,
    console: Console | None,
) -> Embedded:
    with _joined(join_world(device)) as team:
        console = console if team.world.is_first else None
        if console is not None:
            console.print(device_line(team.world.device))
        if not isinstance(model, EvalModel):
            model = open_eval_model(model, device=str(team.world.device), similarity=settings.similarity)
        _check_model(model)
        source = open_as_trained(data, model.run, reading)
        reading = reading_of(data, model.run, reading)
        indices = select_split(source, data, model.run, settings.split)[1]
        if not len(indices):
            raise UserError(f"The split {settings.split} of {data} has no samples; choose another --split.")
        manifest = new_manifest(model, data, source, reading, settings)
        folder = out.with_name(f"{out.name}.parts") if is_file else out
        reader = SampleReader(source)
        team.on_first(lambda: _check_folder(folder))
        with team.locked(folder):
            plan = team.on_first(lambda: _prepare(folder, manifest, reader, indices, settings.chunk))
            if not all(team.gather((folder / MANIFEST).exists())):
                raise UserError(f"Not all processes see {folder}; choose a folder that all machines share with --out.")
            columns = schema(manifest["dim"], settings.precision, settings.images, settings.texts)
            root = Path(data) if Path(data).is_dir() else Path(data).parent if Path(data).is_file() else None
            encoder = ChunkEncoder(model.encoder, reader, columns, manifest["dim"], root)
            own = plan.tasks[team.world.rank :: team.world.size]
            _write_parts(encoder, source, own, folder, _num_workers(workers, own, team.world))
            cut = join_cut(team.gather(encoder.cut)).line("texts")  # waits for all processes
            done = team.on_first(lambda: _finish(folder, manifest, plan, out, columns if is_file else None))
        if is_file and team.world.is_first:
            rmtree(folder)
    update = Update(plan.added, plan.changed, plan.deleted, plan.unchanged, done["counts"]["unusable"])
    return Embedded(out, done, update, (*([cut] if cut else []), *account_lines(source)), team.world.is_first)


@dataclass(frozen=True)
class _Team:
    """The processes, which wait for each other much longer than in training."""

    world: World
    group: Any = None

    def on_first(self, work: Callable[[], T]) -> T:
        """Returns what the first process computes, on all of them. A UserError is raised on all."""
        if self.world.size == 1:
            return work()
        holder: list[Any] = [None, None]
        if self.world.is_first:
            try:
                holder[0] = work()
            except UserError as error:
                holder[1] = str(error)
        dist.broadcast_object_list(holder, src=0, group=self.group)
        if holder[1] is not None:
            raise UserError(holder[1])
        return holder[0]

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Creates a folder and holds its lock in the first process. Raises UserError on all if another command holds it."""
        lock = RunLock(folder, LOCK)
        self.on_first(lock.acquire)
        try:
            yield
        finally:
            lock.release()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, on all of them."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def _joined(world: World) -> Iterator[_Team]:
    if world.size == 1:
        yield _Team(world)
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    yield _Team(world, group)
    dist.destroy_process_group(group)


def _prepare(
    folder: Path,
    manifest: dict[str, Any],
    reader: SampleReader,
    indices: np.ndarray,
    chunk: int,
) -> Plan:
    """Returns what to write to a locked folder. Raises UserError if it holds other embeddings."""
    stamp, trusted = manifest["data"]["stamp"], True
    if (folder / MANIFEST).exists():
        old = read_manifest(folder)
        if differs := difference(old, manifest):
            raise UserError(f"{folder} holds embeddings {differs}; choose another --out, or delete it.")
        trusted = stamp is not None and stamp == old["data"]["stamp"]
        remove_leftovers(folder)
    with progress("Reading samples", len(indices)) as task:
        plan = make_plan(reader, indices, folder, chunk, trusted, task.update)
    if plan.tasks or plan.removed:
        # while rows of changed data are mixed with older ones, a stamp would vouch for them
        kept = {**manifest["data"], "stamp": stamp if trusted else None}
        write_manifest(folder, {**manifest, "data": kept})
    return plan


def _write_parts(encoder: ChunkEncoder, source: Source, tasks: list[Task], folder: Path, workers: int) -> None:
    """Embeds and writes parts, one after the other."""
    indices = np.concatenate([np.empty(0, np.int64), *(task.embedded for task in tasks)])
    with progress("Embedding", len(indices)) as shown:
        if "image" in encoder.columns.names:
            images: Generator[Any, None, None] = image_vectors(encoder.encoder, source, indices, workers, shown.update)
        else:
            images = _no_images(len(indices), shown.update)
        with closing(images):
            for task in tasks:
                vectors: Vectors = list(islice(images, len(task.embedded)))
                old = read_part(folder / task.name) if (task.kept >= 0).any() else None
                write_part(folder / task.name, encoder.table(task, vectors, old))


def _no_images(count: int, on_progress: Callable[[int], None]) -> Generator[None, None, None]:
    for number in range(count):
        yield
        on_progress(number + 1)


def _finish(folder: Path, manifest: dict[str, Any], plan: Plan, out: Path, columns: Any) -> dict[str, Any]:
    """Removes parts without rows, and writes the manifest with its counts; for `columns`, everything to one file. Returns the manifest."""
    for name in plan.removed:
        (folder / name).unlink(missing_ok=True)
    files = part_files(folder)
    counts: Counter[str] = Counter({"samples": 0, "images": 0, "texts": 0})
    skipped: dict[str, dict[str, Any]] = {}
    for path in files:
        counts.update(read_metadata(path))
        for batch in read_groups(path, ["key", "problem"]):
            for key, problem in zip(batch["key"].to_pylist(), batch["problem"].to_pylist()):
                if problem is not None:
                    entry = skipped.setdefault(problem, {"count": 0, "keys": []})
                    entry["count"] += 1
                    entry["keys"] += [key] if len(entry["keys"]) < MAX_NAMED else []
    counts["unusable"] = sum(entry["count"] for entry in skipped.values())
    state = state_of(batch for path in files for batch in read_groups(path, ["key", "stamp"]))
    done = {**manifest, "complete": True, "counts": dict(counts), "skipped": skipped, "state": state}
    if columns is None:
        write_manifest(folder, done)
    else:
        write_file(out, files, columns, done)
    return done


# ---------------------------------------------------------------- checks


def _check_model(model: EvalModel) -> None:
    if not model.encoder.compares_cosines:
        has_others = model.run is not None and hasattr(model.run.config.method_config, "similarity")
        raise UserError(
            f"{model.name} compares images and texts by a similarity of its own, not by the cosine of two vectors, so it has no embeddings "
            f"to write; {'add --similarity projector, or ' if has_others else ''}use another model."
        )


def _check_out(out: Path, data: str) -> None:
    if Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{out} is inside the data, {data}, which would then contain it; choose an --out beside it.")
    if out.is_file() and out.suffix != ".parquet":
        raise UserError(f"{out} is a file; choose a folder, or a file name that ends in .parquet.")


def _check_folder(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}:
        raise UserError(f"{folder} exists and holds no embeddings; choose a new or empty folder with --out.")


def _num_workers(workers: int | None, tasks: list[Task], world: World) -> int:
    if workers is not None:
        return workers
    return 0 if sum(len(task.embedded) for task in tasks) < _FEW else max(1, min(8, num_cores() // world.size))
