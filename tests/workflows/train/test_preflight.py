"""The stop before training on data whose results would mean nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import pytest

from coalign.config import TrainConfig
from coalign.data.sources.base import Classes, Source
from coalign.data.sources.folders.folder import caption_from_name
from coalign.errors import BadSample, UserError
from coalign.types import Record
from coalign.workflows.train import preflight as module
from coalign.workflows.train.batches import TrainingData
from coalign.workflows.train.file_names import looks_like_file_name, meaningless
from coalign.workflows.train.preflight import Preflight, check_before_training, check_context, problems


@dataclass
class Memory(Source):
    captions: list
    folders: list = field(default_factory=list)
    name: str = "memory"
    readable: bool = True
    reads: list = field(default_factory=list)

    def __len__(self):
        return len(self.captions)

    def record(self, index):
        self.reads.append(index)
        if self.captions[index] is None:
            raise BadSample("broken")
        facts = {"folder": self.folders[index % len(self.folders)]} if self.folders else {}
        caption = self.captions[index]
        return Record(f"image {index}", (caption,) if caption else (), facts=facts)

    def image(self, index):
        if not self.readable:
            raise BadSample("not an image")
        return np.zeros((8, 8, 3), np.uint8)


def found(captions, num_val=10, **options):
    source = Memory(list(captions), **options)
    return problems(Preflight(source, np.arange(len(source)), num_val))


FILE_NAMES = {
    "camera": [f"IMG_{n:04d}.JPG" for n in range(20)],
    "camera without a separator": [f"DSC{n:05d}.jpg" for n in range(20)],
    "nikon": [f"DSCN{n:04d}.jpg" for n in range(20)],
    "fuji": [f"DSCF{n:04d}.jpg" for n in range(20)],
    "panasonic": [f"P10{n:05d}.JPG" for n in range(20)],
    "sony": [f"_DSC{n:04d}.ARW.jpg" for n in range(20)],
    "pixel": [f"PXL_20210304_1011{n:02d}789.jpg" for n in range(20)],
    "android": [f"IMG_20200101_1200{n:02d}.jpg" for n in range(20)],
    "phone edits": [f"IMG_E{n:04d}-edited.jpg" for n in range(20)],
    "drone": [f"DJI_{n:04d}.JPG" for n in range(20)],
    "action camera": [f"GOPR{n:04d}.JPG" for n in range(20)],
    "mac screenshots": [f"Screenshot 2021-01-{n:02d} at 10.00.{n:02d} PM.png" for n in range(1, 21)],
    "german screenshots": [f"Bildschirmfoto 2021-01-{n:02d} um 10.00.00.png" for n in range(1, 21)],
    "android screenshots": [f"Screenshot_20210101-1000{n:02d}.png" for n in range(20)],
    "messenger": [f"WhatsApp Image 2021-01-01 at 10.{n:02d}.00.jpeg" for n in range(20)],
    "messenger on a phone": [f"IMG-20210101-WA00{n:02d}.jpg" for n in range(20)],
    "chinese messenger": [f"微信图片_202101011200{n:02d}.jpg" for n in range(20)],
    "scans": [f"scan{n:03d}.png" for n in range(20)],
    "frames": [f"frame_{n}.png" for n in range(20)],
    "copies": [f"image ({n}).png" for n in range(20)],
    "uuids": [f"f47ac1{n:02d}-58cc-4abc-bead-0e02b2c3d479.png" for n in range(20)],
    "hashes": [f"d41d8cd98f00b204e98009{n:02d}ecf8427e.jpg" for n in range(20)],
    "flickr": [f"10002682{n:02d}_693b08cb0e.jpg" for n in range(20)],
    "imagenet": [f"n01440764_{n}.JPEG" for n in range(20)],
    "videos": [f"dQw4w9W{n:02d}XcQ.jpg" for n in range(20)],
}


@pytest.mark.parametrize("kind", FILE_NAMES)
def test_captions_made_of_meaningless_file_names_stop(kind):
    first, *more = found([caption_from_name(name) for name in FILE_NAMES[kind]])
    assert not more
    assert re.search(r"look like file names|captions are the same, such as '(frame|image)' of", first)
    assert re.search(r"such as '.*' of image \d+ and '.*' of image \d+; ", first)
    for remedy in ("--captions-from folder", "--caption-column", ".txt"):
        assert remedy in first


MEANINGLESS = {
    "file names": [f"IMG_{n:04d}.HEIC" for n in range(20)],
    "names of images": [f"{noun}.jpeg" for noun in ("cat", "dog", "a red owl", "hen")],
    "paths": [f"images/train/{n}.png" for n in range(20)],
    "Windows paths": [rf"C:\photos\me\{n}.JPG" for n in range(20)],
    "URLs": [f"https://example.com/photos/cat-{n}?size=2" for n in range(20)],
    "buckets": [f"s3://bucket/{n:05d}" for n in range(20)],
    "numbers": ["0", "-5", "3.14", "1,234", "1e-05", "12 %", "٣"],
    "times": ["2021-05-01", "2021-05-01T10:30:00Z", "20200101_123456", "10:30"],
    "placeholders": ["n/a", "N/A", "None", "null", "NaN", "-", "?", "...", "no caption", "No description."],
    "series": [f"sample_{n:03d}" for n in range(20)],
    "COCO": [f"COCO_train2014_{n:012d}" for n in range(20)],
    "short series": [f"a{n}" for n in range(20)],
    "screenshots of apps": [f"Screenshot_20200101-1234{n}_Chrome" for n in range(10, 30)],
    "a mixture": ["IMG_0001.jpg", "42", "n/a", "f47ac10b-58cc-4372-a567-0e02b2c3d479", "DSC_0001"] * 4,
}


@pytest.mark.parametrize("kind", MEANINGLESS)
def test_captions_of_a_table_that_are_no_words_stop(kind):
    (problem,) = found(MEANINGLESS[kind])
    assert "look like file names, numbers, codes or placeholders" in problem


def test_numbers_as_names_leave_no_captions():
    (problem,) = found([caption_from_name(f"{n:05d}.jpg") for n in range(20)])
    assert "have no caption, such as 'image 0' and 'image 1'" in problem


@pytest.mark.parametrize(
    "captions",
    [
        [f"a photo of dog {n}" for n in range(20)],
        [f"red circle {n}" for n in range(20)],
        ["a cat", "a dog"] * 10,
        ["red", "green", "blue", "x", "A", "portrait", "landscape", "screen", "video", "original"] * 4,
        ["portrait"] * 15 + ["landscape"] * 6,
        ["none", "scratch"] * 10,
        ["IMG of a cat", "7 up can", "SKU-12345 red chair", "Canon EOS 5D Mark IV", "a red.green thing"] * 4,
        ["😀", "🐱", "👨‍👩‍👧", "★", "❤️", "#️⃣"] * 4,
        ["猫", "狗", "红色", "3只猫在沙发上"] * 5,
        [f"class{n % 20}" for n in range(100)],
        [f"A{n}" for n in (310, 318, 319, 320, 321, 330, 340, 350, 380)] * 4,
        ["Boeing 747", "Airbus A320", "iPhone 12", "Route 66", "9 to 5", "2 dogs"] * 4,
        ["图片里有一只猫", "一只狗"] * 10,
        ["image of a facade", "photo of 3 cats", "portrait of a lady", "dead beef", "a decade"] * 4,
        [f"IMG_{n}" for n in range(9)] + [f"a dog in place {'abcdefghijklmn'[n]}" for n in range(11)],
    ],
)
def test_words_pass(captions):
    assert not found(captions)
    assert not any(looks_like_file_name(caption) for caption in captions if not caption.startswith("IMG"))
    assert len(meaningless(captions)) <= len(captions) / 2


def test_one_caption_for_nearly_all_images_stops():
    (problem,) = found(["product photo"] * 95 + [f"a vase in color {n}" for n in range(5)])
    assert (
        "95 of 100 sampled captions are the same, such as 'product photo' of image 0 and 'product photo' of image 1"
        in problem
    )
    assert not found(["product photo"] * 80 + [f"a vase in color {n}" for n in range(20)])


@pytest.mark.parametrize(
    "writings",
    [
        ["product photo", "Product Photo.", "PRODUCT PHOTO", " product  photo!"],
        ["product photo", "product photo"],
        ["ＡＢＣ", "abc", "a b c"],
        ["一张照片", "一张照片。"],
    ],
)
def test_one_caption_in_several_writings_stops(writings):
    (problem,) = found(writings * 20)
    assert "sampled captions are the same" in problem


def test_the_class_folders_are_named():
    (problem,) = found(["IMG"] * 30, folders=["red_circle", "blue_square"])
    assert "such as 'red_circle' and 'blue_square', with --captions-from folder" in problem


@pytest.mark.parametrize("names", [["0", "1", "2"], ["n01440764", "n01443537"], ["only"], ["data7"]])
def test_class_names_are_checked_and_not_the_captions_made_of_them(names):
    source = Memory([f"a photo of a {names[n % len(names)]}." for n in range(30)])
    source.classes = Classes(names, np.arange(30) % len(names), ("a photo of a {}.",))
    (problem,) = problems(Preflight(source, np.arange(30), 5))
    assert "--captions-from" in problem
    assert ("All images have the same class" in problem) == (len(names) == 1)
    source.classes = Classes(["cat", "dog"], np.arange(30) % 2, ("a photo of a {}.",))
    assert not problems(Preflight(source, np.arange(30), 5))


def test_nothing_held_out_stops_unless_nothing_should_be():
    captions = [f"words {n}" for n in range(20)]
    (problem,) = found(captions, num_val=0)
    assert "--val-fraction" in problem
    assert not found(captions, num_val=None)
    assert not found(captions, num_val=2)
    assert not found(captions[:1], num_val=0)  # one pair, or images that are not any: the loader says so
    assert not found(captions, num_val=0, readable=False)


def pairs(captions):
    source = Memory(captions)
    return TrainingData(source, np.arange(len(source)), source, np.arange(5))


def test_a_single_held_out_pair_is_mentioned():
    data = pairs([f"words {n}" for n in range(20)])
    for count in (1, 2):
        data.val = np.arange(count)
        assert any("Only one pair is held out" in line for line in data.account()) == (count == 1)


def config(**options):
    return TrainConfig(method="clip", method_config=None, **options)


class Words:
    """A tokenizer of words, with start and end tokens."""

    def num_tokens(self, text):
        return len(text.split()) + 2


def test_many_captions_longer_than_the_context_stop():
    """More than a tenth of them; a run that passed the checks before is not stopped."""

    def check(num_cut, **options):
        captions = [f"a short caption {n}" for n in range(100 - num_cut)] + [
            f"{'word ' * 30}{n}" for n in range(num_cut)
        ]
        settings = config(context_length=20)
        preflight = check_before_training(pairs(captions), settings)
        return check_context(preflight, settings, Words(), **options)

    assert check(0) is None
    for line in (check(10), check(40, resumed=True)):
        assert "longer than the context of 20 tokens" in line
        assert "--context-length 33 keeps them whole" in line
    with pytest.raises(
        UserError, match=r"11 of 100 sampled captions \(11.0 %\).*--context-length 33.*--skip-data-checks"
    ):
        check(11)


def test_one_option_goes_on(monkeypatch):
    data = pairs(["IMG"] * 20)
    check_before_training(data, config(), resumed=True)
    with pytest.raises(UserError, match=r"[^.]*; --skip-data-checks trains anyway\.$"):
        check_before_training(data, config())
    check_before_training(data, config(skip_data_checks=True))
    monkeypatch.setattr(module, "CHECKS", (lambda preflight: f"{len(preflight.train)} pairs are too few.",))
    with pytest.raises(UserError, match="20 pairs are too few; --skip"):  # a check of its own plugs in
        check_before_training(data, config())


def test_large_data_is_sampled_the_same_way_every_time():
    reads = []
    for _ in range(2):
        source = Memory([f"words {n}" for n in range(50_000)] + [None])
        assert not problems(Preflight(source, np.arange(len(source)), 100))
        reads.append(source.reads)
    assert reads[0] == reads[1]
    assert 900 <= len(reads[0]) <= 1000
