"""evaluate(): a model against tasks, each `KIND:DATA`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.evaluation_views import image_batches
from coalign.data.scenes import Scenes
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits
from coalign.data.sugarcrepe import SugarCrepe
from coalign.errors import BadSample, UserError
from coalign.evaluation.compositionality import choose_captions
from coalign.evaluation.embed import embed_images
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.prompts import read_classes, templates
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.run.model import Run, check_output, load, write_file
from coalign.run.probe import Labelled, probe
from coalign.run.scene_tasks import SCENE_TASKS
from coalign.types import Source

LABEL_FACTS = ("label", "class", "category", "folder")  # looked for in this order


@dataclass
class Labels:
    """Classes, and which samples belong to them."""

    classnames: list[str]
    of_index: dict[int, int]  # sample index -> class
    unlabelled: int  # samples that are of none of the classes


def evaluate(
    model: str | Run,
    tasks: Sequence[str],
    *,
    weights: str = "last",
    split: str | None = None,
    classes: Path | None = None,
    label: str | None = None,
    prompts: str = "default",
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, dict[str, Any]]:
    """Task -> its figures as plain values, with the split and how many samples could not be read.

    A task is `retrieval:DATA`, `zeroshot:DATA`, `probe:DATA`, a linear classifier on frozen image features, or, for a model that takes
    image and text together, `bootstrap:DATA`, zero-shot with its own first answers beside the image. On scenes and SugarCrepe also
    `foils:`, two-way choices between a true and a false caption; on scenes `localization:`, maps against the objects' masks, and `guided:`,
    the size of the object that a text beside the image names.

    `split`: train, val, test, … or all; by default the pairs that the run held out where DATA is what it was trained on, else DATA's own
    test or val split, else all of it. Classes are the values of the fact `label` (default: the first of label, class, category, folder
    that the data have), or those of the file `classes`. UserError for the rest.
    """
    if not tasks:
        raise UserError(
            "There is nothing to evaluate; give --tasks, such as retrieval:my-images, after the run's folder."
        )
    kinds = [_parse_task(task) for task in tasks]
    run = load(model, weights, device) if isinstance(model, str) else model
    results: dict[str, dict[str, Any]] = {}
    for task, (kind, data) in zip(tasks, kinds):
        source = open_source(data)
        name, indices = select_split(source, data, run, split)
        asked = Question(run, source, indices, classes, label, prompts, workers)
        if kind in SCENE_TASKS:
            if not isinstance(source, Scenes):
                raise UserError(f"{task} needs data that know what their pictures show; only scenes:… do.")
            figures = {"unreadable": {}, **SCENE_TASKS[kind](run, source, indices)}
        else:
            figures = TASKS_OF_ANY_DATA[kind](asked)
        results[task] = {"data": data, "split": name, "samples": len(indices), **figures}
    return results


@dataclass
class Question:
    """What a task is asked of: a run, and samples of a source with, for some tasks, their classes."""

    run: Run
    source: Source
    indices: np.ndarray
    classes: Path | None
    label: str | None
    prompts: str
    workers: int

    def labels(self, indices: np.ndarray | None = None) -> Labels:
        return label_function(self.source, self.indices if indices is None else indices, self.classes, self.label)

    def batches(self, indices: Iterable[int]) -> Generator[tuple[list[int], Tensor, list[Any]], None, None]:
        chosen = np.array(list(indices), dtype=np.int64)
        return image_batches(self.source, chosen, self.run.encoder().image_size, workers=self.workers)


def _retrieval(asked: Question) -> dict[str, Any]:
    evaluation = retrieve(asked.run.encoder(), asked.batches(asked.indices), captions_of(asked.source))
    return {"unreadable": _counted(evaluation.images.bad), **evaluation.result.to_json()}


def _zero_shot(asked: Question) -> dict[str, Any]:
    labels = asked.labels()
    batches = asked.batches(sorted(labels.of_index))
    names, prompts = labels.classnames, templates(asked.prompts)
    evaluation = classify(asked.run.encoder(), batches, labels.of_index, names, prompts)
    figures = evaluation.result.to_json()
    return {"unreadable": _counted(evaluation.images.bad), "unlabelled": labels.unlabelled, **figures}


def _bootstrap(asked: Question) -> dict[str, Any]:
    encode_joint = asked.run.joint_encoder()  # first: it says if there is none
    labels = asked.labels()
    batches = list(asked.batches(sorted(labels.of_index)))
    names, prompts = labels.classnames, templates(asked.prompts)
    result = bootstrapped_guidance(asked.run.encoder(), encode_joint, batches, labels.of_index, names, prompts)
    bad = [entry for _, _, found in batches for entry in found]
    return {"unreadable": _counted(bad), "unlabelled": labels.unlabelled, **result.to_json()}


def _probe(asked: Question) -> dict[str, Any]:
    """The asked samples are the test part; what the probe learns from is the source's train part, or what was not asked for."""
    own: dict[str, np.ndarray] = getattr(asked.source, "splits", None) or {}
    rest = np.setdiff1d(own.get("train", np.arange(len(asked.source))), asked.indices)
    val = np.setdiff1d(own.get("val", rest[:0]), asked.indices)
    labels = asked.labels(np.concatenate([asked.indices, rest, val]))
    found = Labelled(asked.source, labels.of_index)
    train, held_out, test = (found.among(indices) for indices in (rest, val, asked.indices))
    evaluation = probe(
        asked.run.encoder(), train, held_out if len(val) else None, test, labels.classnames, asked.workers
    )
    return {"unreadable": _counted(evaluation.images.bad), **evaluation.result.to_json()}


def _foils(asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, (Scenes, SugarCrepe)):
        raise UserError(
            f"{asked.source.name} has no false captions beside its true ones; scenes:… and sugarcrepe:FOLDER have."
        )
    options = {"per_kind": 2000} if isinstance(asked.source, Scenes) else {}
    foils = asked.source.foils(asked.indices, **options)
    images = embed_images(asked.run.encoder(), asked.batches(sorted({foil.index for foil in foils})))
    figures = choose_captions(asked.run.encoder(), images, foils).result.to_json()
    return {"unreadable": _counted(images.bad), **figures}


TASKS_OF_ANY_DATA: Mapping[str, Callable[[Question], dict[str, Any]]] = {
    "retrieval": _retrieval,
    "zeroshot": _zero_shot,
    "bootstrap": _bootstrap,
    "probe": _probe,
    "foils": _foils,
}
TASKS = (*TASKS_OF_ANY_DATA, *SCENE_TASKS)


def _counted(bad: Iterable[Any]) -> dict[str, int]:
    return dict(Counter(entry.reason for entry in bad))


def _parse_task(task: str) -> tuple[str, str]:
    kind, _, data = task.partition(":")
    if kind not in TASKS or not data:
        raise UserError(
            f"{task!r} is no task; a task is KIND:DATA with KIND one of {', '.join(TASKS)}, such as retrieval:my-images."
        )
    return kind, data


def select_split(source: Source, data: str, run: Run | None, split: str | None) -> tuple[str, np.ndarray]:
    """The name and the sample indices of the split to evaluate (see `evaluate`)."""
    everything = np.arange(len(source))
    if split == "all":
        return "all", everything
    own: dict[str, np.ndarray] | None = getattr(source, "splits", None)
    trained_on = run is not None and _same_data(run.data, data)
    if trained_on and split in (None, "train", "val") and run is not None and run.config.val_data is None:
        splits = assign_splits(source, run.config.val_fraction)[0]
        return split or "val", splits[split or "val"]
    if split is None:
        split = next((name for name in ("test", "val") if own and len(own.get(name, ()))), None)
        return (split, own[split]) if own and split else ("all", everything)
    if not own or split not in own:
        known = ", ".join([*(own or {}), "all"])
        raise UserError(f"{data} has no split named {split!r}; there is {known}.")
    return split, own[split]


def _same_data(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


# ---------------------------------------------------------------- captions and classes


def captions_of(source: Source) -> Callable[[int], Sequence[str]]:
    """The captions of a sample; none where its record is bad, which the image batches list."""

    def captions(index: int) -> Sequence[str]:
        try:
            return source.record(index).captions
        except BadSample:
            return ()

    return captions


def label_function(
    source: Source, indices: np.ndarray, classes: Path | None = None, label: str | None = None
) -> Labels:
    """The class of every sample that has one: by the fact `label`, or by the classes file, whose labels are looked for among the sample's
    label fact and its tags (the first class that fits)."""
    values: dict[int, list[str]] = {}
    facts = (label,) if label else LABEL_FACTS
    for index in indices.tolist():
        try:
            record = source.record(index)
        except BadSample:
            values[index] = []
            continue
        fact = next((str(record.facts[name]) for name in facts if record.facts.get(name) not in (None, "")), None)
        values[index] = ([fact] if fact is not None else []) + (list(record.tags) if classes else [])
    if classes:
        entries = read_classes(classes)
        names, number = [entry.name for entry in entries], {entry.label: i for i, entry in enumerate(entries)}
    else:
        found = sorted({value for listed in values.values() for value in listed})
        names, number = [value.replace("_", " ") for value in found], {value: i for i, value in enumerate(found)}
    of_index = {
        index: next(number[value] for value in listed if value in number)
        for index, listed in values.items()
        if set(listed) & set(number)
    }
    if not of_index:
        looked = f"labels are looked for in the samples' {' or '.join(facts)}"
        found = sorted({value for listed in values.values() for value in listed})[:5]
        if classes:
            there = f"there are {', '.join(map(repr, found))}, for example" if found else "there are none"
            raise UserError(f"No sample of {source.name} is of a class in {classes}; {looked} and tags, and {there}.")
        raise UserError(f"No sample of {source.name} belongs to a class; {looked}: name the right one with --label.")
    return Labels(names, of_index, len(indices) - len(of_index))


def write_json(results: dict[str, Any], path: Path) -> None:
    check_output(path)
    text = json.dumps(results, indent=2, default=str) + "\n"
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(text)
        else:
            write_file(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise UserError(f"The results could not be written to {path}: {error.strerror}.") from error
