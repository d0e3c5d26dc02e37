"""Detection and instance segmentation on a pre-trained image tower (MCT, Tables 2 and 3): training by SGD, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coalign.data.detection import DetectionSource, Objects
from coalign.errors import BadSample, UserError
from coalign.evaluation.metrics import LEVEL, Metric

REPLICATES = 50  # of the bootstrap over images; each sums up the precision anew


@dataclass(frozen=True)
class DetectionConfig:
    """The schedule of MCT's detectors, as shares of a run: the rate rises over the first 100 steps, and falls to a tenth after three
    quarters and after eleven twelfths."""

    epochs: int = 12
    batch_size: int = 8
    lr: float = 0.02 / 16  # for each image of a batch
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 10.0


@dataclass
class DetectionResult:
    """COCO's average precision: over IoU from 0.5 to 0.95, at 0.5, and at 0.75."""

    boxes: dict[str, Metric]
    masks: dict[str, Metric] | None
    images: int

    def to_json(self) -> dict[str, Any]:
        found = {f"box_{name}": metric.to_json() for name, metric in self.boxes.items()}
        found |= {f"mask_{name}": metric.to_json() for name, metric in (self.masks or {}).items()}
        return {"task": "detection", "images": self.images, "intervals": found}


def samples(
    source: DetectionSource, indices: Iterable[int], bad: list[BadSample]
) -> Iterator[tuple[int, Tensor, Objects]]:
    """index, pixels float32 [3, height, width] in 0 … 1, and the objects; what cannot be read goes to `bad`."""
    for index in indices:
        try:
            pixels = torch.from_numpy(np.array(source.image(index))).permute(2, 0, 1).float() / 255
        except BadSample as error:
            bad.append(error)
            continue
        yield index, pixels, source.objects(index)


def train_detector(
    detector: nn.Module,
    source: DetectionSource,
    indices: np.ndarray,
    config: DetectionConfig,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[BadSample]:
    """Trains on the images of `indices` that have objects, half of them flipped. Gives what could not be read in the first epoch. UserError
    where nothing is left."""
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=config.weight_decay)
    total, step, first_bad = config.epochs * -(-len(indices) // config.batch_size), 0, []
    detector.to(device).train()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the regions that are sampled
        for epoch in range(config.epochs):
            order = rng.permutation(indices)
            bad: list[BadSample] = []
            for start in range(0, len(order), config.batch_size):
                chosen = [
                    _flipped(pixels, _target(objects)) if rng.random() < 0.5 else (pixels, _target(objects))
                    for _, pixels, objects in samples(source, order[start : start + config.batch_size].tolist(), bad)
                    if not objects.ignored.all()
                ]
                if chosen:
                    for group in optimiser.param_groups:
                        group["lr"] = _rate(step, total, config) * len(chosen)
                    inputs = [pixels.to(device) for pixels, _ in chosen]
                    targets = [{name: value.to(device) for name, value in target.items()} for _, target in chosen]
                    loss = torch.stack(list(detector(inputs, targets).values())).sum()
                    if not torch.isfinite(loss):
                        raise UserError(
                            f"The detector's loss is not finite at step {step:,}; this tower cannot be trained so."
                        )
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimiser.step()
                step += 1
            if epoch == 0:
                first_bad = bad
                if len(bad) == len(order):
                    raise UserError(
                        f"There is nothing to learn from: none of {len(order)} training images can be read."
                    )
    return first_bad


def _rate(step: int, total: int, config: DetectionConfig) -> float:
    rise = min(1.0, (step + 1) / max(1, min(config.warmup_steps, total // 4)))
    return config.lr * rise * 0.1 ** sum(step >= total * share for share in (3 / 4, 11 / 12))


def _target(objects: Objects) -> dict[str, Tensor]:
    kept = ~objects.ignored
    target = {
        "boxes": torch.from_numpy(objects.boxes[kept]),
        "labels": torch.from_numpy(objects.labels[kept]) + 1,  # 0 is the background
    }
    if objects.masks is not None:
        target["masks"] = torch.from_numpy(objects.masks[kept].astype(np.uint8))
    return target


def _flipped(pixels: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = pixels.shape[2]
    turned = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        turned["masks"] = target["masks"].flip(2)
    return pixels.flip(2), turned


@torch.no_grad()
def measure_detector(
    detector: nn.Module,
    source: DetectionSource,
    indices: np.ndarray,
    bad: list[BadSample],
    device: torch.device | str = "cpu",
) -> DetectionResult:
    """Average precision on the images of `indices`. UserError where none can be read."""
    detector.to(device).eval()
    truth, found, with_masks = [], [], True
    for index, pixels, objects in samples(source, indices.tolist(), bad):
        output = {name: value.cpu().numpy() for name, value in detector([pixels.to(device)])[0].items()}
        truth.append((index, pixels.shape[1:], objects))
        found.append((index, output))
        with_masks = with_masks and "masks" in output and objects.masks is not None
    if not truth:
        raise UserError("There is nothing to evaluate: no test image can be read.")
    kinds = ("bbox", "segm") if with_masks else ("bbox",)
    measured = {kind: average_precision(truth, found, len(source.classnames), kind) for kind in kinds}
    return DetectionResult(measured["bbox"], measured.get("segm"), len(truth))


def average_precision(
    truth: Sequence[tuple[int, Sequence[int], Objects]],
    found: Sequence[tuple[int, dict[str, np.ndarray]]],
    num_classes: int,
    kind: str = "bbox",
) -> dict[str, Metric]:
    """pycocotools' AP, AP50 and AP75 with intervals from resampling images. truth: (index, (height, width), objects); found: (index, what a
    torchvision detector gives, with labels from 1). kind: bbox or segm."""
    # not at the top: it is an extra, which the task asks for before it trains
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encoded(mask: np.ndarray) -> Any:
        return coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for index, (height, width), objects in truth:
        images.append({"id": index, "height": int(height), "width": int(width)})
        for number, ((left, top, right, bottom), label) in enumerate(
            zip(objects.boxes.tolist(), objects.labels.tolist())
        ):
            box = [left, top, right - left, bottom - top]
            entry = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "bbox": box}
            entry |= {"area": box[2] * box[3], "iscrowd": int(objects.ignored[number])}
            if kind == "segm":
                assert objects.masks is not None
                entry |= {"segmentation": encoded(objects.masks[number]), "area": float(objects.masks[number].sum())}
            annotations.append(entry)
    for index, output in found:
        for number, ((left, top, right, bottom), label) in enumerate(
            zip(output["boxes"].tolist(), output["labels"].tolist())
        ):
            entry = {"image_id": index, "category_id": label, "score": float(output["scores"][number])}
            if kind == "segm":
                entry["segmentation"] = encoded(output["masks"][number, 0] >= 0.5)
            else:
                entry["bbox"] = [left, top, right - left, bottom - top]
            detections.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        reference = COCO()
        categories = [{"id": number + 1, "name": str(number)} for number in range(num_classes)]
        reference.dataset = {"images": images, "annotations": annotations, "categories": categories}
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections) if detections else COCO(), kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        if not detections:
            return {name: Metric(0.0, 0.0, 0.0, len(truth)) for name in ("ap", "ap50", "ap75")}
        evaluation.evaluate()
        return _with_intervals(evaluation, len(truth))


def _with_intervals(evaluation: Any, count: int) -> dict[str, Metric]:
    """The figures of all images, and of resamples: an image that is drawn twice counts as two."""
    by_class = np.array(evaluation.evalImgs, object).reshape(-1, count)  # [class, image]

    def figures(rows: np.ndarray) -> list[float]:
        evaluation.evalImgs = by_class[:, rows].ravel().tolist()
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(len(rows)))
        evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0, 0]  # [IoU, recall, class]; -1 for a class without objects
        thresholds = evaluation.params.iouThrs
        chosen = [precision, precision[np.isclose(thresholds, 0.5)], precision[np.isclose(thresholds, 0.75)]]
        return [float(part[part > -1].mean()) if (part > -1).any() else 0.0 for part in chosen]

    values = figures(np.arange(count))
    rng = np.random.default_rng(0)
    draws = np.array([figures(rng.integers(0, count, count)) for _ in range(REPLICATES)])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: Metric(values[i], float(low[i]), float(high[i]), count) for i, name in enumerate(("ap", "ap50", "ap75"))
    }
