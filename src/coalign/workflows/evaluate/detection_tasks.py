"""The detection tasks: train a detector on a model's image encoder, and evaluate it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import open_clip
import torch

from coalign.data.sources.benchmarks.detection import DetectionSource, open_detection
from coalign.errors import UserError
from coalign.evaluation.finetune.detection import DetectionConfig, evaluate_detector, train_detector
from coalign.networks.detector import build_detector
from coalign.workflows.evaluate.eval_model import EvalModel


class Detector(NamedTuple):
    kind: Literal["fpn", "c4"]
    with_masks: bool


DETECTION_TASKS: Mapping[str, Detector] = {
    "detection-c4": Detector("c4", False),  # Faster R-CNN of MCT's Table 2
    "detection": Detector("fpn", False),
    "segmentation": Detector("fpn", True),  # Mask R-CNN of MCT's Table 3
}


def open_detection_task(
    model: EvalModel,
    task: str,
    data: str,
    train_data: str | None = None,
    split: str | None = None,
    epochs: int = 10,
    device: torch.device | str = "cpu",
) -> Callable[[], dict[str, Any]]:
    """Opens the data and returns a function that trains a detector and evaluates it.

    It trains on the train split of `data`, or on `train_data` (its train split, or all of it), and evaluates on the split `split` of `data`
    (default: test, val or all). Raises UserError if the data has no boxes, the image encoder lacks a ResNet's stages, or there is nothing
    to train on.
    """
    source = open_detection(data)
    name, indices = _select_split(source, split)
    train_source = source if train_data is None else open_detection(train_data)
    train_indices = (train_source.splits or {}).get("train", np.arange(len(train_source)))
    if train_data is None:
        train_indices = np.setdiff1d(train_indices, indices)
    if not len(train_indices):
        raise UserError(f"{data} has no train split, and all of it is evaluated; pass other data with --train-data.")
    if train_source.classnames != source.classnames:
        raise UserError(f"{train_data} has different classes from {data}; train on data with the same classes.")
    if model.encoder.modules is None:
        raise UserError(f"{model.encoder.name} does not expose its image encoder, which detectors need.")
    kind, with_masks = DETECTION_TASKS[task]
    if with_masks and not (source.has_masks and train_source.has_masks):
        raise UserError(f"{task} needs masks, which some of the data does not have; use detection.")
    if find_spec("pycocotools") is None:  # checked before training
        raise UserError('Average precision needs the extra "detection": pip install "coalign[detection]".')
    detector = build_detector(
        model.encoder.modules()[0].cpu(), kind, with_masks, len(source.classnames), source.side, source.regions,
        open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip

    def run() -> dict[str, Any]:
        bad = train_detector(detector, train_source, train_indices, DetectionConfig(epochs=epochs), device)
        result = evaluate_detector(detector, source, indices, bad, device)
        counts = dict(Counter(error.reason for error in bad))
        return {"data": data, "split": name, "samples": len(indices), "unreadable": counts, **result.to_json()}

    return run


def _select_split(source: DetectionSource, split: str | None) -> tuple[str, np.ndarray]:
    splits = source.splits or {}
    if split is None:
        split = next((name for name in ("test", "val") if name in splits), "all")
    if split != "all" and split not in splits:
        raise UserError(f"{source.name} has no split named {split!r}; choose from {', '.join([*splits, 'all'])}.")
    return split, np.arange(len(source)) if split == "all" else splits[split]
