"""evaluate(): evaluates a model on tasks, each `KIND:DATA`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalign.data.scenes.source import Scenes
from coalign.data.sources.benchmarks.classification import DATASETS, open_dataset
from coalign.data.sources.open import open_source
from coalign.errors import UserError
from coalign.evaluation.encoder_wrappers import cached, in_bfloat16, shard_texts
from coalign.evaluation.suite import suite_row
from coalign.runs.folder import check_output
from coalign.runs.run import Run, check_device
from coalign.training.distributed import World, join_world
from coalign.types import DualEncoder
from coalign.workflows.evaluate.context import EvalContext
from coalign.workflows.evaluate.detection_tasks import DETECTION_TASKS, open_detection_task
from coalign.workflows.evaluate.eval_model import EvalModel, open_eval_model
from coalign.workflows.evaluate.eval_report import print_results, write_page, write_results
from coalign.workflows.evaluate.samples import select_split
from coalign.workflows.evaluate.scene_tasks import SCENE_TASKS
from coalign.workflows.evaluate.tasks import TASKS, TRAINING_TASKS

KINDS = (*TASKS, *SCENE_TASKS, *DETECTION_TASKS)
NOT_IN_BFLOAT16 = ("finetune", "finetune-retrieval", "bootstrap", *SCENE_TASKS, *DETECTION_TASKS)
SUITES = {"suite11": "zeroshot", "suite11-probe": "probe"}  # all of DATASETS by one kind of task


def evaluate(
    model: str | Path | Run | DualEncoder,
    tasks: Sequence[str],
    *,
    weights: str = "last",
    split: str | None = None,
    classes: Path | None = None,
    label: str | None = None,
    prompts: str | None = None,
    data_root: Path | None = None,
    preprocess: str | None = None,
    precision: str = "fp32",
    cache: Path | None = None,
    epochs: int = 10,
    train_data: str | None = None,
    device: str = "cpu",
    workers: int = 0,
    on_result: Callable[[dict[str, dict[str, Any]]], None] = lambda results: None,
) -> dict[str, dict[str, Any]]:
    """Evaluates a model on tasks. Returns task -> metrics as plain values, with the split and the numbers of samples and unreadable ones.

    `model`: see `open_eval_model`. A task is one of:

    - `retrieval:DATA`, `retrieval-1k:DATA` (in folds of 1,000 images), `zeroshot:DATA`
    - probes of frozen image features: `probe:`, `probe-mct:`, `probe-slip:`, `fewshot:`, `knn:`, `tagging:`, `vse:`
    - `finetune:` and `finetune-retrieval:`
    - detectors: `detection:`, `detection-c4:`, `segmentation:`, on data for `open_detection`
    - `bootstrap:` (zero-shot with its own first predictions beside the image), if the model embeds image and text jointly
    - `foils:` (true or false captions) on scenes and SugarCrepe, and `pairs:` on Winoground
    - on scenes: `localization:` (maps against the objects' masks), and `guided:` (sizes of the objects that a text names)
    - `suite11` and `suite11-probe`: zero-shot and probe on all datasets of DeCLIP's Table 6

    DATA is anything that `open_source` accepts, or one of those eleven datasets below `data_root`, with its own classes, prompts and
    splits. `split`: train, val, test, … or all; by default the run's held-out pairs if DATA is its training data, else DATA's test or val
    split, else all of it. Classes are the values of the fact `label` (default: the first of label, class, category, folder in the data), or
    those of the file `classes`. Under torchrun the processes share the embedding work. `on_result` is called with the results so far after
    each task. Raises UserError for invalid options and data.
    """
    if not tasks:
        raise UserError("There is nothing to evaluate; give --tasks, such as retrieval:my-images, after the model.")
    kinds = [_parse_task(task) for task in _expand_suites(tasks)]
    _check_options(kinds, precision, epochs)
    _check_dataset_folders([data for _, data in kinds if _is_benchmark(data, data_root)], data_root)
    world = join_world(check_device(device))
    eval_model = open_eval_model(model, weights, str(world.device), preprocess)
    eval_model.encoder = _wrap_encoder(eval_model, precision, cache, world)
    runner = TaskRunner(eval_model, world, split, classes, label, prompts, data_root, epochs, train_data, workers)
    # open all data before the first task runs, which may take hours
    opened = {f"{kind}:{data}": runner.open(kind, data) for kind, data in kinds}
    results: dict[str, dict[str, Any]] = {}
    for task, run in opened.items():
        results[task] = run()
        on_result(results)
    suites = {task: suite_row(results, SUITES[task], DATASETS) for task in tasks if task in SUITES}
    return {**results, **suites}


@dataclass
class TaskRunner:
    """The model and the options of an evaluation."""

    model: EvalModel
    world: World
    split: str | None
    classes: Path | None
    label: str | None
    prompts: str | None
    data_root: Path | None
    epochs: int
    train_data: str | None
    workers: int

    def open(self, kind: str, data: str) -> Callable[[], dict[str, Any]]:
        """Opens the data of a task. Returns a function that runs the task."""
        if kind in DETECTION_TASKS:
            return open_detection_task(
                self.model, kind, data, self.train_data, self.split, self.epochs, self.world.device
            )
        root = self.data_root
        source = open_dataset(data, root) if root is not None and _is_benchmark(data, root) else open_source(data)
        name, indices = select_split(source, data, self.model.run, self.split)
        context = EvalContext(
            self.model, source, indices, self.classes, self.label, self.prompts, self.workers, self.world, self.epochs
        )
        if kind in TRAINING_TASKS and not len(context.train_indices()):
            raise UserError(
                f"{kind}:{data} has nothing to train on: all of its samples are evaluated; add a train split, or evaluate another --split."
            )

        def run() -> dict[str, Any]:
            result = _run_scene_task(kind, context) if kind in SCENE_TASKS else TASKS[kind](context)
            return {"data": data, "split": name, "samples": len(indices), **result}

        return run


def evaluate_and_write(
    model: str, tasks: Sequence[str], *, json: Path | None, report: Path | None, device: str, **options: Any
) -> None:
    """Runs `evaluate`, prints the results, and writes them to the JSON file and the page if given."""
    for path in (json, report):
        if path:
            check_output(path)  # fail before the work
    is_first = join_world(check_device(device)).is_first

    def show(results: dict[str, dict[str, Any]]) -> None:
        """Prints and writes the newest result at once, as a later task may fail or be interrupted."""
        if is_first:
            print_results(dict([list(results.items())[-1]]))
            if json:
                write_results(results, json)

    results = evaluate(model, tasks, device=device, on_result=show, **options)
    if not is_first:
        return
    suites = {task: values for task, values in results.items() if task in SUITES}
    print_results(suites)
    if json and suites:
        write_results(results, json)
    if report:
        write_page(results, Path(model).name, report)
        print(f"Report: {report}")


def _wrap_encoder(model: EvalModel, precision: str, cache: Path | None, world: World) -> DualEncoder:
    """Returns the model's encoder with the precision, the cache and the sharding of the evaluation."""
    encoder = model.encoder
    if precision == "bf16":
        if model.library == "onnx":
            raise UserError(f"The precision of {encoder.name} was fixed at its export to ONNX; omit --precision.")
        encoder = in_bfloat16(encoder, world.device.type)
    if cache is not None:
        encoder = cached(encoder, cache, precision)
    # outermost, so that all processes take part in every collective, whatever is in their caches
    return shard_texts(encoder, world.rank, world.size, world.gather_objects) if world.size > 1 else encoder


def _run_scene_task(kind: str, context: EvalContext) -> dict[str, Any]:
    if not isinstance(context.source, Scenes):
        raise UserError(f"{kind} needs the ground truth of every object, which only scenes:… have.")
    return {"unreadable": {}, **SCENE_TASKS[kind](context.model, context.source, context.indices)}


# ---------------------------------------------------------------- tasks and options


def _check_options(kinds: Sequence[tuple[str, str]], precision: str, epochs: int) -> None:
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision is {precision!r}, but must be fp32 or bf16.")
    in_float32 = [kind for kind, _ in kinds if kind in NOT_IN_BFLOAT16]
    if precision == "bf16" and in_float32:
        raise UserError(f"--precision bf16 is not supported by {in_float32[0]}, which needs float32; omit it.")
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}, but must be at least 1.")


def _expand_suites(tasks: Sequence[str]) -> list[str]:
    """Returns the tasks with every suite replaced by its tasks."""
    return [
        task
        for name in tasks
        for task in ([f"{SUITES[name]}:{dataset}" for dataset in DATASETS] if name in SUITES else [name])
    ]


def _parse_task(task: str) -> tuple[str, str]:
    kind, _, data = task.partition(":")
    if kind not in KINDS or not data:
        raise UserError(
            f"{task!r} is not a task; use {' or '.join(SUITES)}, or KIND:DATA such as retrieval:my-images, where KIND is one of "
            f"{', '.join(KINDS)}."
        )
    return kind, data


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
