"""evaluate(): evaluates a model on tasks, each `TASK:DATA`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.account import account_lines
from coalign.data.sources.base import Source
from coalign.data.sources.benchmarks.classification import DATASETS, open_dataset
from coalign.data.sources.benchmarks.detection import open_detection
from coalign.data.sources.labeled import label_by_captions
from coalign.data.sources.open import check_columns, open_any
from coalign.devices import device_line
from coalign.errors import UserError
from coalign.evaluation.encoder_wrappers import TextCounter, cached, in_bfloat16, shard_texts
from coalign.evaluation.suite import suite_metrics
from coalign.metric import metrics_from_json
from coalign.progress import waiting
from coalign.runs.folder import check_output
from coalign.runs.run import Run
from coalign.training.distributed import World, join_world
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.context import EvalContext, TaskResult
from coalign.workflows.evaluate.eval_model import EvalModel, device_for, open_eval_model
from coalign.workflows.evaluate.eval_report import print_results, write_page, write_results
from coalign.workflows.evaluate.needs import check_needs
from coalign.workflows.evaluate.samples import Samples, has_labels, is_trained_on, reading_of, same_data, select_split
from coalign.workflows.evaluate.tasks import SUITES, Task, parse_task

Results = dict[str, dict[str, Any]]


def evaluate(
    model: str | Path | Run | DualEncoder,
    tasks: Sequence[str],
    config: EvalConfig | None = None,
    on_result: Callable[[Results], None] | None = None,
) -> Results:
    """Evaluates a model on tasks. Whatever the tasks need is checked before the first one runs.

    Under `torchrun`, the processes share the embedding work.

    Args:
        model: A run or its folder; a folder that `coalign export` wrote for open_clip, transformers or ONNX;
            `open_clip:ViT-B-32:laion2b_s34b_b79k`; `transformers:openai/clip-vit-base-patch32`; or a `DualEncoder`.
        tasks: Each `TASK:DATA`, such as "retrieval:photos" or "zeroshot:photos"; `coalign eval --help` lists the tasks. DATA is as in
            `open_data` (for detectors, as in that help), or the name of one of the eleven datasets of DeCLIP's Table 6 below
            `config.data_root`. The suites "suite11" and "suite11-probe" are zero-shot classification and the linear probe on all eleven.
        config: How to open the model and to select samples. None: the defaults of `EvalConfig`.
        on_result: Called after each task with the results so far.

    Returns:
        For each task its results as plain values: `metrics` (name to the fields of a `Metric`), `main_metric` (a name), `split`, `samples`
            (the number), `unreadable` (reason to number), `notes` (sentences), and values of the task's own.

    Raises:
        UserError: The model cannot be opened, an option or the data is invalid, or a task needs what the model or the data does not have.

    Example:
        ```python
        results = coalign.evaluate("runs/clip", ["retrieval:photos"])
        metric = results["retrieval:photos"]["metrics"]["image_to_text.r1"]
        print(metric["value"], metric["low"], metric["high"], metric["chance"])
        ```
    """
    config = config or EvalConfig()
    if not tasks:
        raise UserError("There is nothing to evaluate; give --tasks, such as retrieval:my-images, after the model.")
    parsed = parse_tasks(tasks, config)
    world = join_world(config.device)
    eval_model = open_eval_model(model, config.weights, str(world.device), config.preprocess, config.similarity)
    results: Results = {}
    for each in open_tasks(eval_model, parsed, config, world).run():
        results[each.name] = each.to_json()
        if on_result is not None:
            on_result(results)
    for suite in (text for text in tasks if text in SUITES):
        results[suite] = _suite(results, suite)
    return results


def evaluate_and_write(
    model: str, tasks: Sequence[str], config: EvalConfig, json: Path | None, report: Path | None
) -> None:
    """Runs `evaluate`, prints the results, and writes them to the JSON file and the page if given."""
    for path in (json, report):
        if path:
            check_output(path)  # fail before the work
    world = join_world(config.device)
    is_first = world.is_first
    if is_first:
        print(device_line(device_for(model, str(world.device))))

    def show(results: Results) -> None:
        """Prints and writes the newest result at once, as a later task may fail or be interrupted."""
        if is_first:
            print_results(dict([list(results.items())[-1]]))
            if json:
                write_results(results, json)

    results = evaluate(model, tasks, config, on_result=show)
    if not is_first:
        return
    suites = {task: values for task, values in results.items() if task in SUITES}
    print_results(suites)
    if json and suites:
        write_results(results, json)
    if report:
        write_page(results, Path(model).name, report)
        print(f"Report: {report}")


def _wrap_encoder(model: EvalModel, config: EvalConfig, world: World) -> DualEncoder:
    """Returns the model's encoder with the precision, the cache and the sharding of the evaluation."""
    encoder = model.encoder
    if config.precision == "bf16":
        if model.library == "onnx":
            raise UserError(f"The precision of {encoder.name} was fixed at its export to ONNX; omit --precision.")
        encoder = in_bfloat16(encoder, world.device.type)
    if config.cache is not None:
        encoder = cached(encoder, config.cache, config.precision)
    # outermost, so that all processes take part in every collective, whatever is in their caches
    return shard_texts(encoder, world.rank, world.size, world.gather_objects) if world.size > 1 else encoder


# ---------------------------------------------------------------- open tasks


@dataclass
class Evaluated:
    """The result of a task, and the samples that it evaluated."""

    name: str  # TASK:DATA
    split: str
    samples: Samples
    result: TaskResult
    notes: list[str]  # on texts that were cut, and on what opening the data left out

    def to_json(self) -> dict[str, Any]:
        counts = {"data": self.name.partition(":")[2], "split": self.split, "samples": len(self.samples.indices)}
        result = self.result.to_json()
        return {**counts, **result, "notes": [*result["notes"], *self.notes]}


@dataclass
class OpenTasks:
    """Tasks that can run: their data is open, and it and the model have what they need."""

    tasks: list[tuple[Task, str, EvalContext]]  # with the split; tasks on the same data share a context
    texts: TextCounter

    def run(self) -> Iterator[Evaluated]:
        """Runs the tasks, once, and yields their results."""
        while self.tasks:
            task, split, context = self.tasks.pop(0)  # frees its embeddings
            with waiting(f"Evaluating {task.name}:{context.data}"):
                result = task.load()(context)
            notes = [*self.texts.take_lines(), *account_lines(context.source, with_notes=False)]
            yield Evaluated(f"{task.name}:{context.data}", split, context.test, result, notes)


def parse_tasks(tasks: Sequence[str], config: EvalConfig) -> list[tuple[Task, str]]:
    """Returns each task with its data, suites replaced by their tasks. Raises UserError for a task that does not exist, a named dataset
    without a folder, and a precision that a task does not allow."""
    parsed = list(dict.fromkeys(parse_task(text) for text in _expand_suites(tasks)))
    _check_precision([task for task, _ in parsed], config)
    specs = [data for _, data in parsed] + ([config.train_data] if config.train_data else [])
    _check_dataset_folders([data for data in specs if _is_benchmark(data, config.data_root)], config.data_root)
    return parsed


def open_tasks(model: EvalModel, parsed: Sequence[tuple[Task, str]], config: EvalConfig, world: World) -> OpenTasks:
    """Opens the data of the tasks, and wraps the model's encoder. Raises UserError if a task lacks something that it needs."""
    texts = TextCounter()
    model.encoder = texts.counting(_wrap_encoder(model, config, world))
    keys = [(data, "boxes" in task.needs) for task, data in parsed]
    contexts = {key: _open(key[0], model, config, world, with_boxes=key[1]) for key in dict.fromkeys(keys)}
    opened = [each.source for _, context in contexts.values() for each in (context.test, context.train)]
    check_columns(opened, config.reading)
    for (task, _), key in zip(parsed, keys):
        check_needs(task, contexts[key][1])  # before the first task runs, which may take hours
    return OpenTasks([(task, *contexts[key]) for (task, _), key in zip(parsed, keys)], texts)


# ---------------------------------------------------------------- data


def _open(data: str, model: EvalModel, config: EvalConfig, world: World, with_boxes: bool) -> tuple[str, EvalContext]:
    """Opens the data of a task. Returns the name of the split to evaluate, and the context."""
    source = _open_source(data, model, config, with_boxes)
    name, indices = select_split(source, data, None if with_boxes else model.origin, config.split)
    own = config.train_data is None or same_data(config.train_data, data)
    train_source = source if own else _open_source(config.train_data or data, model, config, with_boxes)
    splits = train_source.splits or {}
    train = splits.get("train", np.arange(len(train_source)))
    val = splits.get("val", np.empty(0, np.int64))
    if own:
        train, val = np.setdiff1d(train, indices), np.setdiff1d(val, indices)
    context = EvalContext(
        model, data, Samples(source, indices), Samples(train_source, train), Samples(train_source, val), config, world
    )
    return name, context


def _open_source(data: str, model: EvalModel, config: EvalConfig, with_boxes: bool) -> Source:
    if with_boxes:
        return open_detection(data)
    root = config.data_root
    if root is not None and _is_benchmark(data, root):
        return open_dataset(data, root)
    source = open_any(data, reading_of(data, model.origin, config.reading))
    own = model.origin is not None and is_trained_on(model.origin, data)
    return label_by_captions(source) if own or not has_labels(source) else source  # its own data is read as by the run


def _is_benchmark(data: str, root: Path | None) -> bool:
    return data in DATASETS and (root is not None or not Path(data).exists())


def _check_dataset_folders(names: Sequence[str], root: Path | None) -> None:
    """Raises one UserError for all benchmark datasets without a folder below the root."""
    if not names:
        return
    if root is None:
        raise UserError(f"{names[0]} needs --data-root, the folder that contains {DATASETS[names[0]].folder}.")
    missing = [name for name in dict.fromkeys(names) if not (root / DATASETS[name].folder).is_dir()]
    if missing:
        folders = ", ".join(f"{root / DATASETS[name].folder} ({name})" for name in missing)
        raise UserError(f"Missing below --data-root: {folders}; unpack each as torchvision does.")


# ---------------------------------------------------------------- tasks and suites


def _check_precision(tasks: Sequence[Task], config: EvalConfig) -> None:
    in_float32 = [task.name for task in tasks if not task.allows_bf16]
    if config.precision == "bf16" and in_float32:
        raise UserError(f"--precision bf16 is not supported by {in_float32[0]}, which needs float32; omit it.")


def _expand_suites(tasks: Sequence[str]) -> list[str]:
    """Returns the tasks with every suite replaced by its tasks."""
    return [
        task
        for name in tasks
        for task in ([f"{SUITES[name]}:{dataset}" for dataset in DATASETS] if name in SUITES else [name])
    ]


def _suite(results: Results, suite: str) -> dict[str, Any]:
    """Returns the row of a table: the main metric on each of DATASETS, and their average."""
    by_dataset = {name: results[f"{SUITES[suite]}:{name}"] for name in DATASETS}
    main = {
        name: next(metric for metric in metrics_from_json(result["metrics"]) if metric.name == result["main_metric"])
        for name, result in by_dataset.items()
    }
    names = {name: metric.name for name, metric in main.items()}
    return TaskResult(suite_metrics(main), details={"metric_of": names}, main_metric="average").to_json()
