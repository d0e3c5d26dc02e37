"""Detectors: construction, training, and average precision against pycocotools' own summary."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers.boxes import write_voc
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coalign.data.sources.benchmarks.detection import Objects, open_detection
from coalign.errors import UserError
from coalign.evaluation.finetune.detection import (
    DetectionConfig,
    _flip,
    _target,
    average_precision,
    evaluate_detector,
    train_detector,
)
from coalign.networks.detector import build_detector
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_report import print_results
from coalign.workflows.evaluate.evaluate import evaluate

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def trunk():
    torch.manual_seed(0)
    return timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[16, 32, 48, 64], num_classes=0)


@pytest.mark.parametrize(("kind", "with_masks"), [("fpn", False), ("fpn", True), ("c4", False)])
def test_detector_trains_and_predicts(kind, with_masks):
    """Training updates the tower, but not its BatchNorm statistics."""
    source = open_detection("scenes:8,size=32")
    tower = trunk()
    before = copy.deepcopy(tower.state_dict())
    detector = build_detector(tower, kind, with_masks, 8, source.side, 16, MEAN, STD)
    bad = train_detector(detector, source, np.arange(4), DetectionConfig(epochs=2, batch_size=2, warmup_steps=1))
    assert bad == []
    after = tower.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer4.0.conv2.weight"} <= changed
    assert not any("running" in name or "tracked" in name for name in changed)
    detector.roi_heads.score_thresh = 0.0
    found = evaluate_detector(detector, source, np.arange(2), bad)
    assert [(metric.name, metric.title) for metric in found] == [
        (f"{what.lower()}_{name.lower()}", f"{what} {name}")
        for what in (["Box", "Mask"] if with_masks else ["Box"])
        for name in ("AP", "AP50", "AP75")
    ]
    for metric in found:
        assert (metric.kind, metric.chance, metric.count) == ("rate", None, 2)
        assert metric.low <= metric.value <= metric.high


@pytest.mark.slow
def test_detection_task_on_voc(tmp_path, capsys):
    """From the data to the printed table; one step is too few to learn anything."""
    for split, names in (("trainval", ["1", "2"]), ("test", ["3", "4"])):
        write_voc(tmp_path, "VOC2007", split, names)
    (tmp_path / "VOC2007" / "JPEGImages" / "4.jpg").write_bytes(b"")
    encoder = DualEncoder(None, None, 64, "a ResNet", modules=lambda: (trunk(), None))
    task = f"detection-c4:voc:{tmp_path}"
    result = evaluate(encoder, [task], EvalConfig(epochs=1))[task]
    assert (result["split"], result["samples"], result["unreadable"]) == ("test", 2, {"empty file": 1})
    assert list(result["metrics"]) == ["box_ap", "box_ap50", "box_ap75"]
    assert result["metrics"]["box_ap50"]["count"] == 1
    print_results({task: result})
    assert "Box AP50" in capsys.readouterr().out
    with pytest.raises(UserError, match="segmentation needs masks"):
        evaluate(encoder, [f"segmentation:voc:{tmp_path}"])
    for model, options, message in (
        (encoder, {"split": "all"}, "has nothing to train on: all of its samples are evaluated"),
        (encoder, {"split": "val"}, "has no split named 'val'; choose from train, test, all"),
        (encoder, {"train_data": "scenes:8,size=32"}, "has different classes from"),
        (replace(encoder, modules=None), {}, "a ResNet does not expose its encoders, which detection-c4 needs"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(model, [task], EvalConfig(**options))


def test_unsupported_towers_raise():
    with pytest.raises(UserError, match="Detection needs a ResNet image tower"):
        build_detector(timm.create_model("vit_tiny_patch16_224"), "fpn", False, 8, 64, 16, MEAN, STD)
    with pytest.raises(UserError, match="Masks need the feature pyramid"):
        build_detector(trunk(), "c4", True, 8, 64, 16, MEAN, STD)


def test_flip_moves_boxes_with_pixels_and_is_an_involution():
    source = open_detection("scenes:8,size=32")
    pixels = torch.from_numpy(np.array(source.image(1))).permute(2, 0, 1).float()
    target = _target(source.objects(1))
    flipped, flipped_target = _flip(pixels, target)
    for box, mask in zip(flipped_target["boxes"].long().tolist(), flipped_target["masks"]):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
    restored, restored_target = _flip(flipped, flipped_target)
    assert torch.equal(restored, pixels)
    assert all(torch.equal(value, target[name]) for name, value in restored_target.items())


def random_detections(count, seed=0):
    """Returns targets, and predictions that are off by some pixels or of the wrong class."""
    rng = np.random.default_rng(seed)
    targets, predictions = [], []
    for index in range(count):
        corners = rng.integers(0, 60, (3, 2))
        sizes = rng.integers(8, 30, (3, 2))
        boxes = np.concatenate([corners, corners + sizes], 1).astype(np.float32)
        labels = rng.integers(0, 4, 3)
        masks = np.zeros((3, 100, 100), bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
            mask[top:bottom, left:right] = True
        targets.append((index, (100, 100), Objects(boxes, labels, rng.random(3) < 0.1, masks)))
        shifted = boxes + rng.normal(0, 2, boxes.shape).astype(np.float32)
        predicted = np.where(rng.random(3) < 0.8, labels, rng.integers(0, 4, 3)) + 1
        output = {
            "boxes": shifted,
            "labels": predicted,
            "scores": rng.random(3).astype(np.float32),
            "masks": masks[:, None] * 0.9,
        }
        predictions.append((index, output))
    return targets, predictions


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_matches_pycocotools(kind):
    """The first three values of its default summary: all areas, 100 detections."""
    targets, predictions = random_detections(12)
    ours = average_precision(targets, predictions, 4, kind)
    annotations, detections = [], []
    for index, _, objects in targets:
        for (left, top, right, bottom), label, crowd, mask in zip(
            objects.boxes, objects.labels, objects.ignored, objects.masks
        ):
            polygon = [[left, top, right, top, right, bottom, left, bottom]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": index, "category_id": int(label) + 1, "iscrowd": int(crowd),
                "area": float(mask.sum()),
                "bbox": [float(left), float(top), float(right - left), float(bottom - top)], "segmentation": polygon,
            })  # fmt: skip
    for index, output in predictions:
        for (left, top, right, bottom), label, score in zip(output["boxes"], output["labels"], output["scores"]):
            entry = {"image_id": index, "category_id": int(label), "score": float(score)}
            detections.append(entry | {"bbox": [float(left), float(top), float(right - left), float(bottom - top)]})
    if kind == "segm":
        assert ours["ap50"].value > ours["ap"].value * 0.99  # exact masks: all thresholds agree
        assert 0.3 < ours["ap"].value < 1
        return
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "images": [{"id": index, "height": 100, "width": 100} for index, *_ in targets],
            "annotations": annotations,
            "categories": [{"id": number + 1, "name": str(number)} for number in range(4)],
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [ours[name].value for name in ("ap", "ap50", "ap75")] == pytest.approx(evaluation.stats[:3].tolist())
    for metric in ours.values():
        assert metric.low <= metric.value <= metric.high
        assert metric.high > metric.low


def test_perfect_and_missing_detections():
    targets, _ = random_detections(5)
    perfect = [
        (
            index,
            {
                "boxes": o.boxes,
                "labels": o.labels + 1,
                "scores": np.ones(3, np.float32),
                "masks": o.masks[:, None] * 1.0,
            },
        )
        for index, _, o in targets
    ]
    for kind in ("bbox", "segm"):
        assert average_precision(targets, perfect, 4, kind)["ap"].value == pytest.approx(1)
    nothing = [(i, {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}) for i in range(5)]
    assert average_precision(targets, nothing, 4)["ap50"].value == 0
