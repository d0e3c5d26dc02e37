"""evaluate(): a model against tasks, each `KIND:DATA`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.loader import image_batches
from coalign.data.scenes import Scenes
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits
from coalign.errors import BadSample, UserError
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.prompts import read_classes, templates
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.run.model import Run, check_output, load, write_file
from coalign.run.scene_tasks import SCENE_TASKS
from coalign.types import Source

TASKS = ("retrieval", "zeroshot", "bootstrap", *SCENE_TASKS)
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

    A task is `retrieval:DATA`, `zeroshot:DATA` or, for a model that takes image and text together, `bootstrap:DATA`, zero-shot with its
    own first answers beside the image. On scenes also `foils:`, two-way choices between a true and a false caption, `localization:`,
    maps against the objects' masks, and `guided:`, the size of the object that a text beside the image names.

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
    encoder = run.encoder()
    results: dict[str, dict[str, Any]] = {}
    for task, (kind, data) in zip(tasks, kinds):
        source = open_source(data)
        name, indices = select_split(source, data, run, split)
        if kind in SCENE_TASKS:
            if not isinstance(source, Scenes):
                raise UserError(f"{task} needs data that know what their pictures show; only scenes:… do.")
            samples = {"data": data, "split": name, "samples": len(indices), "unreadable": {}}
            results[task] = {**samples, **SCENE_TASKS[kind](run, source, indices)}
            continue
        labels = label_function(source, indices, classes, label) if kind != "retrieval" else None
        wanted = indices if labels is None else np.array(sorted(labels.of_index), dtype=np.int64)
        batches = image_batches(source, wanted, encoder.image_size, workers=workers)
        if labels is not None and kind == "bootstrap":
            guided = bootstrapped_guidance(
                encoder, run.joint_encoder(), list(batches), labels.of_index, labels.classnames, templates(prompts)
            )
            results[task] = {"data": data, "split": name, "samples": len(indices), "unreadable": {}, **guided.to_json()}
            continue
        if labels is None:
            evaluation = retrieve(encoder, batches, captions_of(source))
        else:
            evaluation = classify(encoder, batches, labels.of_index, labels.classnames, templates(prompts))
        bad = Counter(entry.reason for entry in evaluation.images.bad)
        results[task] = {
            "data": data,
            "split": name,
            "samples": len(indices),
            "unreadable": dict(bad),
            **({} if labels is None else {"unlabelled": labels.unlabelled}),
            **evaluation.result.to_json(),
        }
    return results


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
