"""Boxes and masks of scenes, COCO instances and VOC, on tiny folders with the layout of the real ones."""

import json

import numpy as np
import pytest
from helpers.boxes import write_voc
from PIL import Image

from coalign.data.sources.benchmarks.detection import open_detection
from coalign.errors import UserError


def test_scenes():
    source = open_detection("scenes:16,size=48")
    assert len(source.classnames) == 8
    for index in range(4):
        objects = source.objects(index)
        facts = source.scenes.record(index).facts["objects"]
        assert [source.classnames[label] for label in objects.labels] == [fact["shape"] for fact in facts]
        for box, mask, fact in zip(objects.boxes, objects.masks, facts):
            left, top, right, bottom = box.astype(int)
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert np.abs(box / 48 - fact["box"]).max() < 2 / 48
        assert source.image(index).shape == (48, 48, 3)


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "images" / name)
    square = [[10, 5, 20, 5, 20, 15, 10, 15]]
    content = {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 30, "width": 40},
            {"id": 5, "file_name": "b.jpg", "height": 30, "width": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 5, 10, 10], "segmentation": square, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 1], "iscrowd": 1,
             "segmentation": {"size": [30, 40], "counts": [0, 1] + [29, 1] * 39 + [29]}},
            {"id": 3, "image_id": 1, "category_id": 3, "bbox": [3, 3, 0, 5], "segmentation": square, "iscrowd": 0},
        ],
    }  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_coco(coco):
    source = open_detection(f"coco:{coco / 'instances.json'}:{coco / 'images'}")
    assert (source.classnames, len(source)) == (["cat", "dog"], 2)
    objects = source.objects(0)  # omits a box of zero width
    assert objects.boxes.tolist() == [[10, 5, 20, 15], [0, 0, 40, 1]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.ignored.tolist() == [False, True]
    assert objects.masks[0].sum() == pytest.approx(100, abs=25)
    assert objects.masks[0][6:14, 11:19].all()
    assert objects.masks[1].sum() == objects.masks[1][0].sum() == 40
    assert source.objects(1).boxes.shape == (0, 4)
    assert source.image(1).shape == (30, 40, 3)


def test_voc_of_both_years(tmp_path):
    write_voc(tmp_path, "VOC2007", "trainval", ["000001", "000002"])
    write_voc(tmp_path, "VOC2007", "test", ["000003"], difficult="1")
    write_voc(tmp_path, "VOC2012", "trainval", ["2008_000001"])
    source = open_detection(f"voc:{tmp_path}")
    assert {name: len(part) for name, part in source.splits.items()} == {"train": 3, "test": 1}
    objects = source.objects(int(source.splits["test"][0]))
    assert objects.boxes.tolist() == [[0, 0, 20, 30], [10, 4, 50, 40]]
    assert [source.classnames[label] for label in objects.labels] == ["dog", "person"]
    assert objects.ignored.tolist() == [False, True]
    assert objects.masks is None


def test_data_without_boxes_is_rejected(tmp_path, coco):
    write_voc(tmp_path / "bad", "VOC2007", "test", ["1"])
    (tmp_path / "bad" / "VOC2007" / "Annotations" / "1.xml").write_text("<annotation><object>")
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    for spec, message in (
        ("photos", "photos has no boxes; use scenes"),
        (f"voc:{tmp_path}", "contains no folder VOC2007 or VOC2012"),
        (f"coco:{tmp_path / 'nowhere.json'}", "No such file"),
        (f"coco:{tmp_path / 'captions.json'}", "is not COCO instances JSON"),
    ):
        with pytest.raises(UserError, match=message):
            open_detection(spec)
    with pytest.raises(UserError, match=r"1.xml is not a valid VOC annotation"):
        open_detection(f"voc:{tmp_path / 'bad'}").objects(0)
