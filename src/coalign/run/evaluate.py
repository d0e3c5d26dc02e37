"""evaluate(): a model against tasks, each `KIND:DATA`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalign.data.classification import DATA_SETS, open_data_set
from coalign.data.scenes import Scenes
from coalign.data.sources import open_source
from coalign.errors import UserError
from coalign.evaluation.encoders import cached, in_bfloat16, shared_texts
from coalign.evaluation.suite import suite_row
from coalign.run.detect import DETECTION_TASKS, open_detector
from coalign.run.findings import print_results, write_json, write_page
from coalign.run.model import Run, check_output, known_device
from coalign.run.question import Question
from coalign.run.samples import select_split
from coalign.run.scene_tasks import SCENE_TASKS
from coalign.run.subject import Subject, open_subject
from coalign.run.tasks import LEARNING, TASKS
from coalign.training.distributed import World, join_world
from coalign.types import DualEncoder

KINDS = (*TASKS, *SCENE_TASKS, *DETECTION_TASKS)
NOT_IN_BFLOAT16 = ("finetune", "finetune-retrieval", "bootstrap", *SCENE_TASKS, *DETECTION_TASKS)
SUITES = {"suite11": "zeroshot", "suite11-probe": "probe"}  # all of DATA_SETS by one kind of task


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
    learn_from: str | None = None,
    device: str = "cpu",
    workers: int = 0,
    done: Callable[[dict[str, dict[str, Any]]], None] = lambda results: None,
) -> dict[str, dict[str, Any]]:
    """Task -> its figures as plain values, with the split and how many samples could not be read.

    `model`: what `run.subject.open_subject` takes. A task is `retrieval:DATA`, `retrieval-1k:`, `zeroshot:`, a question to frozen image
    features (`probe:`, `probe-mct:`, `probe-slip:`, `fewshot:`, `knn:`, `tagging:`, `vse:`), `finetune:` or `finetune-retrieval:`, a
    detector (`detection:`, `detection-c4:`, `segmentation:` of what `open_detection` takes), or, for a model that takes image and text as
    one, `bootstrap:DATA`, zero-shot with its own first answers beside the image. On scenes and SugarCrepe also `foils:`, two-way choices
    between a true and a false caption, on Winoground `pairs:`; on scenes `localization:`, maps against the objects' masks, and `guided:`,
    the size of the object that a text beside the image names. `suite11` and `suite11-probe` are zero-shot and probe on all data sets of
    DeCLIP's Table 6.

    DATA is anything that `open_source` takes, or one of those eleven below `data_root`, with its own classes, prompts and splits. `split`:
    train, val, test, … or all; by default the pairs that the run held out where DATA is what it was trained on, else DATA's own test or val
    split, else all of it. Classes are the values of the fact `label` (default: the first of label, class, category, folder that the data
    have), or those of the file `classes`. Under torchrun the processes share the embedding. `done` is given the
    results so far after each task. UserError for the rest.
    """
    if not tasks:
        raise UserError("There is nothing to evaluate; give --tasks, such as retrieval:my-images, after the model.")
    kinds = [_parse_task(task) for task in _expanded(tasks)]
    _check_options(kinds, precision, epochs)
    _check_there([data for _, data in kinds if _is_named(data, data_root)], data_root)
    world = join_world(known_device(device))
    subject = open_subject(model, weights, str(world.device), preprocess)
    subject.encoder = _encoder(subject, precision, cache, world)
    asker = _Asker(subject, world, split, classes, label, prompts, data_root, epochs, learn_from, workers)
    # all data are opened before the first question is answered, which may take hours
    answers = {f"{kind}:{data}": asker.open(kind, data) for kind, data in kinds}
    results: dict[str, dict[str, Any]] = {}
    for task, answer in answers.items():
        results[task] = answer()
        done(results)
    suites = {task: suite_row(results, SUITES[task], DATA_SETS) for task in tasks if task in SUITES}
    return {**results, **suites}


@dataclass
class _Asker:
    """What is asked, and how."""

    subject: Subject
    world: World
    split: str | None
    classes: Path | None
    label: str | None
    prompts: str | None
    data_root: Path | None
    epochs: int
    learn_from: str | None
    workers: int

    def open(self, kind: str, data: str) -> Callable[[], dict[str, Any]]:
        """Opens the data of a task, and gives what answers it."""
        if kind in DETECTION_TASKS:
            return open_detector(self.subject, kind, data, self.learn_from, self.split, self.epochs, self.world.device)
        root = self.data_root
        source = open_data_set(data, root) if root is not None and _is_named(data, root) else open_source(data)
        name, indices = select_split(source, data, self.subject.run, self.split)
        asked = Question(
            self.subject, source, indices, self.classes, self.label, self.prompts, self.workers, self.world, self.epochs
        )
        if kind in LEARNING and not len(asked.rest()):
            raise UserError(
                f"{kind}:{data}: there is nothing to learn from, as the data have no train part and all of them are asked for."
            )

        def answer() -> dict[str, Any]:
            figures = _scene_task(kind, asked) if kind in SCENE_TASKS else TASKS[kind](asked)
            return {"data": data, "split": name, "samples": len(indices), **figures}

        return answer


def evaluate_and_write(
    model: str, tasks: Sequence[str], *, json: Path | None, report: Path | None, device: str, **options: Any
) -> None:
    """The same for people: prints the figures, and writes them to a JSON file and a page if asked to."""
    for path in (json, report):
        if path:
            check_output(path)  # before the work
    is_first = join_world(known_device(device)).is_first

    def show(results: dict[str, dict[str, Any]]) -> None:
        """The newest figures at once: what comes after may fail, or be stopped."""
        if is_first:
            print_results(dict([list(results.items())[-1]]))
            if json:
                write_json(results, json)

    results = evaluate(model, tasks, device=device, done=show, **options)
    if not is_first:
        return
    suites = {task: values for task, values in results.items() if task in SUITES}
    print_results(suites)
    if json and suites:
        write_json(results, json)
    if report:
        write_page(results, Path(model).name, report)
        print(f"Report: {report}")


def _encoder(subject: Subject, precision: str, cache: Path | None, world: World) -> DualEncoder:
    """The model as it is to encode."""
    encoder = subject.encoder
    if precision == "bf16":
        if subject.library == "onnx":
            raise UserError(f"{encoder.name} computes as it was exported; leave --precision away.")
        encoder = in_bfloat16(encoder, world.device.type)
    if cache is not None:
        encoder = cached(encoder, cache, precision)
    # outermost, so that all processes come to every exchange whatever each has in its cache
    return shared_texts(encoder, world.rank, world.size, world.gather_objects) if world.size > 1 else encoder


def _scene_task(kind: str, asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, Scenes):
        raise UserError(f"{kind} needs data that know what their pictures show; only scenes:… do.")
    return {"unreadable": {}, **SCENE_TASKS[kind](asked.subject, asked.source, asked.indices)}


# ---------------------------------------------------------------- the words of a task


def _check_options(kinds: Sequence[tuple[str, str]], precision: str, epochs: int) -> None:
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision is {precision!r}, but must be fp32 or bf16.")
    in_float32 = [kind for kind, _ in kinds if kind in NOT_IN_BFLOAT16]
    if precision == "bf16" and in_float32:
        raise UserError(f"--precision bf16 is for embeddings alone; {in_float32[0]} is computed in float32.")
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}, but must be at least 1.")


def _expanded(tasks: Sequence[str]) -> list[str]:
    """The tasks with those of a suite in its place."""
    return [
        task
        for given in tasks
        for task in ([f"{SUITES[given]}:{name}" for name in DATA_SETS] if given in SUITES else [given])
    ]


def _parse_task(task: str) -> tuple[str, str]:
    kind, _, data = task.partition(":")
    if kind not in KINDS or not data:
        raise UserError(
            f"{task!r} is no task; a task is {' or '.join(SUITES)}, or KIND:DATA with KIND one of {', '.join(KINDS)}, such as "
            "retrieval:my-images."
        )
    return kind, data


def _is_named(data: str, root: Path | None) -> bool:
    return data in DATA_SETS and (root is not None or not Path(data).exists())


def _check_there(names: Sequence[str], root: Path | None) -> None:
    """UserError for data sets that are not below the root, all at once."""
    if not names:
        return
    if root is None:
        raise UserError(f"{names[0]} needs --data-root, the folder with {DATA_SETS[names[0]].folder} in it.")
    absent = [name for name in dict.fromkeys(names) if not (root / DATA_SETS[name].folder).is_dir()]
    if absent:
        wanted = ", ".join(f"{root / DATA_SETS[name].folder} ({name})" for name in absent)
        raise UserError(f"Not there below --data-root: {wanted}; each as torchvision unpacks it.")
