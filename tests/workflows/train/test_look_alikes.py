"""The final evaluation counts held-out pairs with look-alikes in training, and evaluates retrieval with and without them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny
from PIL import Image

import coalign
from coalign.cli import main as cli


def trained(folder, **options):
    model = tiny.write_model(folder / "model")
    args = tiny.train_args(folder / "data", folder / "run", model, epochs=1, evals=1, **options)
    assert cli.main(args) == 0
    return json.loads((folder / "run" / "results.json").read_text())


def recalls(encoder, files, captions):
    """R@1 of images and of captions, if each image has one caption and all captions differ."""
    images = encoder.encode_image(coalign.load_images(files, encoder))
    scores = images @ encoder.encode_text(captions).T
    return [(each.argmax(1) == torch.arange(len(files))).double().mean().item() for each in (scores, scores.T)]


def test_retrieval_with_and_without_planted_look_alikes(tmp_path):
    tiny.write_pairs(tmp_path / "data" / "train", 64, seed=0)
    copies = {"val": 3, "test": 5}
    for number, (split, count) in enumerate(copies.items(), 1):
        folder = tiny.write_pairs(tmp_path / "data" / split, 16, seed=number)
        for file in sorted((tmp_path / "data" / "train").rglob("*.png"))[:count]:
            Image.open(file).save(folder / f"copy of {file.stem}.bmp")
    results = trained(tmp_path, test_splits="test")
    assert results["look_alikes_in_train"] == copies
    encoder = coalign.load(tmp_path / "run", device="cpu").encoder()
    for split, task in {"val": "retrieval", "test": "retrieval_test"}.items():
        everything, others = (results["tasks"][name]["metrics"] for name in (task, f"{task}_without_look_alikes"))
        directions = ("image_to_text.r1", "text_to_image.r1")
        counts = [[metrics[name]["count"] for name in directions] for metrics in (everything, others)]
        assert counts == [[16 + copies[split]] * 2, [16] * 2]
        assert all(others[name]["title"].endswith("R@1") for name in directions)
        assert all("ithout look-alikes" in others[name]["title"] for name in directions)
        files = sorted(file for file in (tmp_path / "data" / split).rglob("*.png"))
        captions = [file.stem.replace("_", " ") for file in files]
        by_hand = recalls(encoder, files, captions)
        assert [others[name]["value"] for name in directions] == pytest.approx(by_hand)
    page = (tmp_path / "run" / "report.html").read_text()
    for split, count in copies.items():
        note = (
            f"{count} of {16 + count} held-out pairs ({split}) have an image that is in training too, or looks like one"
        )
        assert f"{note}; metrics without look-alikes are on the others." in page


def test_look_alikes_of_a_drawn_split_are_on_one_side(tmp_path):
    folder = tiny.write_pairs(tmp_path / "data", 64, seed=0)
    for file in sorted(folder.rglob("*.png")):
        Image.open(file).save(folder / f"copy of {file.stem}.bmp")
    results = trained(tmp_path, val_fraction=0.2)
    assert results["look_alikes_in_train"] == {"val": 0}
    assert set(results["tasks"]) == {"retrieval"}
    assert "0 of " in (tmp_path / "run" / "report.html").read_text()
