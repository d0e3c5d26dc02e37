"""Detection and instance segmentation on a pretrained image tower (MCT, Tables 2 and 3): training by SGD, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coalign.data.sources.benchmarks.detection import DetectionSource, Objects
from coalign.errors import BadSample, UserError
from coalign.evaluation.metrics import LEVEL, Estimate
from coalign.metric import Metric

REPLICATES = 50  # of the bootstrap over images; each one recomputes the average precision


@dataclass(frozen=True)
class DetectionConfig:
    """The schedule of MCT's detectors, as fractions of a run.

    The learning rate warms up over the first 100 steps, and is multiplied by 0.1 after 3/4 and after 11/12 of the steps.
    """

    epochs: int = 12
    batch_size: int = 8
    lr: float = 0.02 / 16  # per image of a batch
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    max_grad_norm: float = 10.0


def load_samples(
    source: DetectionSource, indices: Iterable[int], bad: list[BadSample]
) -> Iterator[tuple[int, Tensor, Objects]]:
    """Yields the index, the pixels, float32 [3, height, width] in [0, 1], and the objects; unreadable samples are appended to `bad`."""
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
    """Trains on the images of `indices` that have objects, with random flips. Returns the samples unreadable in the first epoch.

    Raises UserError if no image is readable, or the loss is not finite.
    """
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=config.weight_decay)
    total_steps, step, first_bad = config.epochs * -(-len(indices) // config.batch_size), 0, []
    detector.to(device).train()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the detector's sampling of regions
        for epoch in range(config.epochs):
            order = rng.permutation(indices)
            bad: list[BadSample] = []
            for start in range(0, len(order), config.batch_size):
                batch_indices = order[start : start + config.batch_size].tolist()
                batch = [
                    _flip(pixels, _target(objects)) if rng.random() < 0.5 else (pixels, _target(objects))
                    for _, pixels, objects in load_samples(source, batch_indices, bad)
                    if not objects.ignored.all()
                ]
                if batch:
                    for group in optimizer.param_groups:
                        group["lr"] = _lr(step, total_steps, config) * len(batch)
                    inputs = [pixels.to(device) for pixels, _ in batch]
                    targets = [{name: value.to(device) for name, value in target.items()} for _, target in batch]
                    loss = torch.stack(list(detector(inputs, targets).values())).sum()
                    if not torch.isfinite(loss):
                        raise UserError(
                            f"The detector's loss is not finite at step {step:,}; its training on this image encoder diverged."
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                step += 1
            if epoch == 0:
                first_bad = bad
                if len(bad) == len(order):
                    raise UserError(f"There is nothing to train on: none of {len(order)} training images can be read.")
    return first_bad


def _lr(step: int, total_steps: int, config: DetectionConfig) -> float:
    warmup = min(1.0, (step + 1) / max(1, min(config.warmup_steps, total_steps // 4)))
    return config.lr * warmup * 0.1 ** sum(step >= total_steps * fraction for fraction in (3 / 4, 11 / 12))


def _target(objects: Objects) -> dict[str, Tensor]:
    kept = ~objects.ignored
    target = {
        "boxes": torch.from_numpy(objects.boxes[kept]),
        "labels": torch.from_numpy(objects.labels[kept]) + 1,  # 0 is the background
    }
    if objects.masks is not None:
        target["masks"] = torch.from_numpy(objects.masks[kept].astype(np.uint8))
    return target


def _flip(pixels: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = pixels.shape[2]
    flipped = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(2)
    return pixels.flip(2), flipped


@torch.no_grad()
def evaluate_detector(
    detector: nn.Module,
    source: DetectionSource,
    indices: np.ndarray,
    bad: list[BadSample],
    device: torch.device | str = "cpu",
) -> list[Metric]:
    """Returns COCO's average precision on the images of `indices`, of boxes and, if there are any, of masks.

    AP is over IoU 0.5 to 0.95, AP50 at 0.5, AP75 at 0.75. Unreadable images are appended to `bad`.

    Raises UserError if no image is readable.
    """
    detector.to(device).eval()
    targets, predictions, with_masks = [], [], True
    for index, pixels, objects in load_samples(source, indices.tolist(), bad):
        output = {name: value.cpu().numpy() for name, value in detector([pixels.to(device)])[0].items()}
        targets.append((index, pixels.shape[1:], objects))
        predictions.append((index, output))
        with_masks = with_masks and "masks" in output and objects.masks is not None
    if not targets:
        raise UserError("There is nothing to evaluate: no test image can be read.")
    metrics = []
    for title, kind in (("Box", "bbox"), ("Mask", "segm")) if with_masks else (("Box", "bbox"),):
        for name, found in average_precision(targets, predictions, len(source.classnames), kind).items():
            key, heading = f"{title.lower()}_{name}", f"{title} {name.upper()}"
            metrics.append(Metric(key, heading, "rate", found.value, found.low, found.high, count=found.count))
    return metrics


def average_precision(
    targets: Sequence[tuple[int, Sequence[int], Objects]],
    predictions: Sequence[tuple[int, dict[str, np.ndarray]]],
    num_classes: int,
    kind: str = "bbox",
) -> dict[str, Estimate]:
    """Returns pycocotools' AP, AP50 and AP75, with intervals from resampling images.

    targets: (index, (height, width), objects). predictions: (index, output of a torchvision detector, with labels from 1).
    kind: bbox or segm.
    """
    # imported late: an optional dependency, which the task checks before training
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encode(mask: np.ndarray) -> Any:
        return coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for index, (height, width), objects in targets:
        images.append({"id": index, "height": int(height), "width": int(width)})
        for number, ((left, top, right, bottom), label) in enumerate(
            zip(objects.boxes.tolist(), objects.labels.tolist())
        ):
            box = [left, top, right - left, bottom - top]
            entry = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "bbox": box}
            entry |= {"area": box[2] * box[3], "iscrowd": int(objects.ignored[number])}
            if kind == "segm":
                assert objects.masks is not None
                entry |= {"segmentation": encode(objects.masks[number]), "area": float(objects.masks[number].sum())}
            annotations.append(entry)
    for index, output in predictions:
        for number, ((left, top, right, bottom), label) in enumerate(
            zip(output["boxes"].tolist(), output["labels"].tolist())
        ):
            entry = {"image_id": index, "category_id": label, "score": float(output["scores"][number])}
            if kind == "segm":
                entry["segmentation"] = encode(output["masks"][number, 0] >= 0.5)
            else:
                entry["bbox"] = [left, top, right - left, bottom - top]
            detections.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        reference = COCO()
        categories = [{"id": number + 1, "name": str(number)} for number in range(num_classes)]
        reference.dataset = {"images": images, "annotations": annotations, "categories": categories}
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections) if detections else COCO(), kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        if not detections:
            return {name: Estimate(0.0, 0.0, 0.0, len(targets)) for name in ("ap", "ap50", "ap75")}
        evaluation.evaluate()
        return _with_intervals(evaluation, len(targets))


def _with_intervals(evaluation: Any, num_images: int) -> dict[str, Estimate]:
    """Returns the average precision over all images, with bootstrap intervals; an image drawn twice counts twice."""
    by_class = np.array(evaluation.evalImgs, object).reshape(-1, num_images)  # [class, image]

    def compute(rows: np.ndarray) -> list[float]:
        evaluation.evalImgs = by_class[:, rows].ravel().tolist()
        evaluation.params.imgIds = evaluation._paramsEval.imgIds = list(range(len(rows)))
        evaluation.accumulate()
        precision = evaluation.eval["precision"][..., 0, 0]  # [IoU, recall, class]; -1 for a class without objects
        thresholds = evaluation.params.iouThrs
        slices = [precision, precision[np.isclose(thresholds, 0.5)], precision[np.isclose(thresholds, 0.75)]]
        return [float(part[part > -1].mean()) if (part > -1).any() else 0.0 for part in slices]

    values = compute(np.arange(num_images))
    rng = np.random.default_rng(0)
    draws = np.array([compute(rng.integers(0, num_images, num_images)) for _ in range(REPLICATES)])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    names = ("ap", "ap50", "ap75")
    return {name: Estimate(values[i], float(low[i]), float(high[i]), num_images) for i, name in enumerate(names)}
