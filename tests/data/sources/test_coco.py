"""The Karpathy splits and SugarCrepe, on small folders with the layout of the real ones."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from coalign.config import DataConfig
from coalign.data.sources.benchmarks.sugarcrepe import KINDS, SugarCrepe
from coalign.data.sources.coco import open_karpathy
from coalign.data.sources.open import open_source
from coalign.errors import BadSample, UserError


def write_image(path, gray=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), gray, np.uint8)).save(path)


def karpathy(folder, with_folders):
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "test"]):
        name = f"{number:06}.jpg"
        extra = {"filepath": "val2014"} if with_folders else {}
        sentences = [{"raw": f" Caption {number}, {k} ", "tokens": ["caption"], "sentid": k} for k in range(5)]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, **extra})
        write_image(folder / "images" / extra.get("filepath", "") / name, 10 * number)
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


@pytest.mark.parametrize("with_folders", [True, False], ids=["coco", "flickr30k"])
def test_karpathy_splits_with_all_five_captions(tmp_path, with_folders):
    path = karpathy(tmp_path, with_folders)
    for source in (open_source(str(path)), open_source(f"coco:{path}:{tmp_path / 'images'}")):
        assert {name: rows.tolist() for name, rows in source.splits.items()} == {
            "train": [0, 1],
            "val": [2],
            "test": [3, 4],
        }
        assert source.record(3).captions == tuple(f"Caption 3, {k}" for k in range(5))
        assert (
            source.image(4) == (tmp_path / "images" / ("val2014" if with_folders else "") / "000004.jpg").read_bytes()
        )


@pytest.mark.parametrize("missing", [[0], [0, 1, 3, 4]])
def test_the_folder_is_found_although_images_are_missing(tmp_path, missing):
    path = karpathy(tmp_path, True)
    for number in missing:
        (tmp_path / "images" / "val2014" / f"{number:06}.jpg").unlink()
    source = open_source(str(path))
    assert source.image(2)
    with pytest.raises(BadSample, match="missing"):
        source.image(0)


def test_a_given_folder_without_the_images_is_an_error(tmp_path):
    """Also if another folder near it has them: the user meant other images."""
    path = karpathy(tmp_path, True)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=rf"are not in {tmp_path}/train, but in {tmp_path}/images; give that folder"):
        open_source(f"coco:{path}:{tmp_path / 'train'}")
    assert open_source(f"coco:{path}:{tmp_path}").image(2)


def test_options_for_columns_are_refused(tmp_path):
    """Captions are where the format has them; an option without effect would go unnoticed."""
    path, reading = karpathy(tmp_path, True), DataConfig(caption_column=("sentences",))
    message = "dataset.json has no table with columns, which --caption-column needs"
    for spec in (str(path), f"coco:{path}"):
        with pytest.raises(UserError, match=message):
            open_source(spec, reading=reading)
    (tmp_path / "x.csv").write_text("image,caption,sentences\nimages/val2014/000000.jpg,one,two\n")
    mixture = open_source(f"{path} + {tmp_path / 'x.csv'}", reading=reading)  # it has an effect on the table
    assert mixture.record(len(mixture) - 1).captions == ("two",)
    with pytest.raises(UserError, match="scenes has no table with columns, which --tag-column needs"):
        open_source("scenes:20", reading=DataConfig(tag_column="topics"))


def test_broken_entries_of_coco_captions_are_left_out(tmp_path):
    write_image(tmp_path / "0.jpg")
    images = [3, {"id": [1], "file_name": "x" * 5000 + ".jpg"}, {"file_name": "1.jpg"}, {"id": 0, "file_name": "0.jpg"}]
    annotations = [4, {"caption": "of none"}, {"image_id": [1], "caption": "long"}, {"image_id": 0, "caption": "a dog"}]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    source = open_source(str(path))
    assert [source.record(i).captions for i in range(len(source))] == [("long",), (), ("a dog",)]
    with pytest.raises(BadSample, match="cannot be read"):
        source.image(0)
    reasons = {each.reason: each.count for each in source.left_out}
    assert reasons == {"broken JSON": 1, "caption of an unknown image_id": 2}


def test_karpathy_without_images_is_an_error(tmp_path):
    path = karpathy(tmp_path / "a" / "b", True)
    shutil.rmtree(tmp_path / "a" / "b" / "images")
    with pytest.raises(UserError, match="Cannot find the images"):
        open_source(str(path))
    path.write_text(json.dumps({"images": [{"filename": "a.jpg"}]}))
    with pytest.raises(UserError, match="not Karpathy's"):
        open_karpathy(path)


def sugarcrepe(folder, kinds=KINDS):
    for number, kind in enumerate(kinds):
        items = {
            str(k): {
                "filename": f"{k:012}.jpg",
                "caption": f"a true thing {k}",
                "negative_caption": f"a false {kind} {k}",
            }
            for k in (number, number + 1)
        }
        (folder / f"{kind}.json").write_text(json.dumps(items))
    for number in range(len(kinds) + 1):
        write_image(folder / "val2017" / f"{number:012}.jpg")
    return folder


def test_sugarcrepe_items(tmp_path):
    source = open_source(f"sugarcrepe:{sugarcrepe(tmp_path)}")
    assert len(source) == 8
    assert source.record(2).captions == ("a true thing 2",)
    assert source.image(0)
    foils = source.foils(np.arange(8))
    assert [foil.kind for foil in foils] == [kind for kind in KINDS for _ in range(2)]
    assert {foil.how for foil in foils} == {"replace", "swap", "add"}
    chosen = source.foils(np.array([3]))
    assert {(foil.kind, foil.true, foil.false) for foil in chosen} == {
        ("replace_rel", "a true thing 3", "a false replace_rel 3"),
        ("swap_obj", "a true thing 3", "a false swap_obj 3"),
    }
    (tmp_path / "val2017" / "000000000003.jpg").unlink()
    with pytest.raises(BadSample, match="missing"):
        source.image(3)


def test_invalid_sugarcrepe_folders_are_rejected(tmp_path):
    with pytest.raises(UserError, match="none of the SugarCrepe files"):
        SugarCrepe(tmp_path)
    (tmp_path / "add_obj.json").write_text("[1]")
    with pytest.raises(UserError, match="not a SugarCrepe file: invalid item"):
        SugarCrepe(tmp_path)
    (tmp_path / "add_obj.json").write_text("{}")
    with pytest.raises(UserError, match="no items"):
        SugarCrepe(tmp_path)
    sugarcrepe(tmp_path, KINDS[:2])
    (tmp_path / "add_obj.json").unlink()
    with pytest.raises(UserError, match=r"image folder .* does not exist"):
        open_source(f"sugarcrepe:{tmp_path}:{tmp_path / 'absent'}")
