"""Detectors: what they are built of, a step of training, and average precision against pycocotools' own summary."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from boxes import voc
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coalign.data.detection import Objects, open_detection
from coalign.errors import UserError
from coalign.evaluation.detection import (
    DetectionConfig,
    _flipped,
    _target,
    average_precision,
    measure_detector,
    train_detector,
)
from coalign.networks.detector import build_detector
from coalign.run.evaluate import evaluate
from coalign.run.findings import print_results
from coalign.types import DualEncoder

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def trunk():
    torch.manual_seed(0)
    return timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[16, 32, 48, 64], num_classes=0)


@pytest.mark.parametrize(("kind", "with_masks"), [("fpn", False), ("fpn", True), ("c4", False)])
def test_a_detector_trains_and_finds(kind, with_masks):
    """A step moves the tower, but not its statistics; what is found has boxes within the image."""
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
    result = measure_detector(detector, source, np.arange(2), bad)
    assert (result.masks is not None) == with_masks
    assert result.images == 2
    assert set(result.to_json()["intervals"]) >= {"box_ap", "box_ap50", "box_ap75"}


@pytest.mark.slow
def test_the_task_on_vocs_layout(tmp_path, capsys):
    """From the data to the printed table; of the crops of 800 pixels nothing is learnt in a step."""
    for split, names in (("trainval", ["1", "2"]), ("test", ["3", "4"])):
        voc(tmp_path, "VOC2007", split, names)
    (tmp_path / "VOC2007" / "JPEGImages" / "4.jpg").write_bytes(b"")
    encoder = DualEncoder(None, None, 64, "a ResNet", modules=lambda: (trunk(), None))
    task = f"detection-c4:voc:{tmp_path}"
    result = evaluate(encoder, [task], epochs=1)[task]
    assert (result["split"], result["samples"], result["images"], result["unreadable"]) == (
        "test",
        2,
        1,
        {"empty file": 1},
    )
    print_results({task: result})
    assert "box AP50" in capsys.readouterr().out
    with pytest.raises(UserError, match="segmentation needs masks"):
        evaluate(encoder, [f"segmentation:voc:{tmp_path}"])
    for model, options, words in (
        (encoder, {"split": "all"}, "has no train part, and all of it is asked for; name other data by --learn-from"),
        (encoder, {"split": "val"}, "has no split named 'val'; there is train, test, all"),
        (encoder, {"learn_from": "scenes:8,size=32"}, "has other classes than"),
        (replace(encoder, modules=None), {}, "does not give its image encoder"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(model, [task], **options)


def test_a_tower_without_stages():
    with pytest.raises(UserError, match="stages of a ResNet, which this image tower has not"):
        build_detector(timm.create_model("vit_tiny_patch16_224"), "fpn", False, 8, 64, 16, MEAN, STD)
    with pytest.raises(UserError, match="Masks need the feature pyramid"):
        build_detector(trunk(), "c4", True, 8, 64, 16, MEAN, STD)


def test_flipping_twice_changes_nothing_and_once_moves_boxes_with_pixels():
    source = open_detection("scenes:8,size=32")
    pixels = torch.from_numpy(np.array(source.image(1))).permute(2, 0, 1).float()
    target = _target(source.objects(1))
    turned, moved = _flipped(pixels, target)
    for box, mask in zip(moved["boxes"].long().tolist(), moved["masks"]):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
    again, back = _flipped(turned, moved)
    assert torch.equal(again, pixels)
    assert all(torch.equal(value, target[name]) for name, value in back.items())


def scattered(count, seed=0):
    """Truth, and detections that are off by some pixels, of the wrong class, or of nothing."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for index in range(count):
        corners = rng.integers(0, 60, (3, 2))
        sizes = rng.integers(8, 30, (3, 2))
        boxes = np.concatenate([corners, corners + sizes], 1).astype(np.float32)
        labels = rng.integers(0, 4, 3)
        masks = np.zeros((3, 100, 100), bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
            mask[top:bottom, left:right] = True
        truth.append((index, (100, 100), Objects(boxes, labels, rng.random(3) < 0.1, masks)))
        moved = boxes + rng.normal(0, 2, boxes.shape).astype(np.float32)
        guessed = np.where(rng.random(3) < 0.8, labels, rng.integers(0, 4, 3)) + 1
        output = {
            "boxes": moved,
            "labels": guessed,
            "scores": rng.random(3).astype(np.float32),
            "masks": masks[:, None] * 0.9,
        }
        found.append((index, output))
    return truth, found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_pycocotools(kind):
    """Its default summary of the same boxes, in which every area and 100 detections are the first three lines."""
    truth, found = scattered(12)
    ours = average_precision(truth, found, 4, kind)
    annotations, detections = [], []
    for index, _, objects in truth:
        for (left, top, right, bottom), label, crowd, mask in zip(
            objects.boxes, objects.labels, objects.ignored, objects.masks
        ):
            polygon = [[left, top, right, top, right, bottom, left, bottom]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": index, "category_id": int(label) + 1, "iscrowd": int(crowd),
                "area": float(mask.sum()),
                "bbox": [float(left), float(top), float(right - left), float(bottom - top)], "segmentation": polygon,
            })  # fmt: skip
    for index, output in found:
        for (left, top, right, bottom), label, score in zip(output["boxes"], output["labels"], output["scores"]):
            entry = {"image_id": index, "category_id": int(label), "score": float(score)}
            detections.append(entry | {"bbox": [float(left), float(top), float(right - left), float(bottom - top)]})
    if kind == "segm":
        assert ours["ap50"].value > ours["ap"].value * 0.99  # the masks are exact: all thresholds agree
        assert 0.3 < ours["ap"].value < 1
        return
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "images": [{"id": index, "height": 100, "width": 100} for index, *_ in truth],
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


def test_perfect_and_absent_detections():
    truth, _ = scattered(5)
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
        for index, _, o in truth
    ]
    for kind in ("bbox", "segm"):
        assert average_precision(truth, perfect, 4, kind)["ap"].value == pytest.approx(1)
    nothing = [(i, {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}) for i in range(5)]
    assert average_precision(truth, nothing, 4)["ap50"].value == 0
