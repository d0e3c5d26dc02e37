"""The detection tasks: a detector is built on a model's image tower, trained, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import open_clip
import torch

from coalign.data.detection import DetectionSource, open_detection
from coalign.errors import UserError
from coalign.evaluation.detection import DetectionConfig, measure_detector, train_detector
from coalign.networks.detector import build_detector
from coalign.run.subject import Subject


class Detector(NamedTuple):
    kind: Literal["fpn", "c4"]
    with_masks: bool


DETECTION_TASKS: Mapping[str, Detector] = {
    "detection-c4": Detector("c4", False),  # Faster R-CNN of MCT's Table 2
    "detection": Detector("fpn", False),
    "segmentation": Detector("fpn", True),  # Mask R-CNN of its Table 3
}


def open_detector(
    subject: Subject,
    task: str,
    data: str,
    learn_from: str | None = None,
    split: str | None = None,
    epochs: int = 10,
    device: torch.device | str = "cpu",
) -> Callable[[], dict[str, Any]]:
    """What trains a detector on the train part of `data`, or all of `learn_from`, and measures it on the part `split` of `data` (default:
    its test part, or all). UserError for data without boxes, a tower without a ResNet's stages, and with nothing to learn from."""
    source = open_detection(data)
    name, asked = _part(source, split)
    learnt_from = source if learn_from is None else open_detection(learn_from)
    rest = (learnt_from.splits or {}).get("train", np.arange(len(learnt_from)))
    if learn_from is None:
        rest = np.setdiff1d(rest, asked)
    if not len(rest):
        raise UserError(f"{data} has no train part, and all of it is asked for; name other data by --learn-from.")
    if learnt_from.classnames != source.classnames:
        raise UserError(f"{learn_from} has other classes than {data}.")
    if subject.encoder.modules is None:
        raise UserError(f"{subject.encoder.name} does not give its image encoder, which a detector is built on.")
    kind, with_masks = DETECTION_TASKS[task]
    if with_masks and not (source.has_masks and learnt_from.has_masks):
        raise UserError(f"{task} needs masks, which not all of these data have; use detection.")
    if find_spec("pycocotools") is None:  # before the training
        raise UserError('Average precision needs the extra "detection": pip install "coalign[detection]".')
    detector = build_detector(
        subject.encoder.modules()[0].cpu(), kind, with_masks, len(source.classnames), source.side, source.regions,
        open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip

    def answer() -> dict[str, Any]:
        bad = train_detector(detector, learnt_from, rest, DetectionConfig(epochs=epochs), device)
        result = measure_detector(detector, source, asked, bad, device)
        counts = dict(Counter(error.reason for error in bad))
        return {"data": data, "split": name, "samples": len(asked), "unreadable": counts, **result.to_json()}

    return answer


def _part(source: DetectionSource, split: str | None) -> tuple[str, np.ndarray]:
    own = source.splits or {}
    if split is None:
        split = next((name for name in ("test", "val") if name in own), "all")
    if split != "all" and split not in own:
        raise UserError(f"{source.name} has no split named {split!r}; there is {', '.join([*own, 'all'])}.")
    return split, np.arange(len(source)) if split == "all" else own[split]
