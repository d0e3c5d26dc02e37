"""classify: probabilities of labels, against loops and `eval`; files, folders and broken images."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image

from coalign.cli.main import main
from coalign.data.text import prompts as prompts_module
from coalign.devices import device_line
from coalign.errors import UserError
from coalign.types import DualEncoder
from coalign.workflows.collection import classify as module
from coalign.workflows.collection.classify import (
    classified_lines,
    classify,
    classify_data,
    label_embeds,
    probabilities,
    read_labels,
)
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.image_files import load_images

LABELS = {"red": ["a red thing", "red"], "green": ["a green thing"], "blue": ["blue", "a blue boat", "the sky"]}
VECTORS: dict[str, torch.Tensor] = {}


def encode_image(pixels):
    """The mean color and its square: float [batch, 6]."""
    mean = pixels.float().mean((2, 3)) / 255
    return torch.cat([mean, mean**2], 1)


def encode_text(texts):
    """A random but fixed vector for each text, not normalized."""
    for text in texts:
        VECTORS.setdefault(text, 3 * torch.randn(6, generator=torch.Generator().manual_seed(len(VECTORS))))
    return torch.stack([VECTORS[text] for text in texts])


class Two(NamedTuple):
    first: torch.Tensor  # [sample, 6]
    second: torch.Tensor


def two(embeds):
    return Two(embeds, embeds.flip(1))


def larger_product(images, texts):
    return torch.maximum(images.first @ texts.first.T, images.second @ texts.first.T)


COSINES = DualEncoder(encode_image, encode_text, 8, logit_scale=17.0)
OWN = DualEncoder(
    lambda pixels: two(encode_image(pixels)), lambda texts: two(encode_text(texts)), 8, logit_scale=5.0,
    similarity=larger_product,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    return tiny.write_pairs(tmp_path / "photos", 10)


def expected(encoder, path):
    """Probabilities by loops over labels and prompts."""
    (image,) = encode_image(load_images(path, encoder))
    logits = []
    for own in LABELS.values():
        vectors = encode_text(own)
        if encoder is COSINES:
            mean = sum(vector / vector.norm() for vector in vectors)
            similarity = (image / image.norm()) @ (mean / mean.norm())
        else:
            similarity = sum(max(image @ vector, image.flip(0) @ vector) for vector in vectors) / len(vectors)
        logits.append(encoder.logit_scale * float(similarity))
    exponentials = np.exp(np.array(logits) - max(logits))
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("encoder", [COSINES, OWN], ids=["cosine", "own similarity"])
def test_probabilities_are_the_softmax_at_the_models_scale(photos, encoder):
    files = sorted(photos.rglob("*.png"))
    found = classify(EvalModel(encoder), files, LABELS)
    assert found.shape == (10, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected(encoder, file) for file in files], rtol=1e-4, atol=1e-6)
    assert len(set(found.argmax(1).tolist())) > 1  # not trivial


def test_images_of_pillow_are_classified_like_their_files(photos):
    file = next(photos.rglob("*.png"))
    turned = Image.open(file).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90° clockwise
    turned.save(photos / "turned.png", exif=exif)
    found = classify(EvalModel(COSINES), [file, Image.open(file), Image.open(photos / "turned.png")], LABELS)
    np.testing.assert_allclose(found[1:], found[:1].repeat(2, 0), atol=1e-6)
    assert classify(EvalModel(COSINES), [], LABELS).shape == (0, 3)


def test_embedded_images_are_classified_alike(photos):
    model, files = EvalModel(OWN), sorted(photos.rglob("*.png"))
    embeds = OWN.encode_image(load_images(files, OWN))
    found = probabilities(model, embeds, label_embeds(model, LABELS))
    np.testing.assert_allclose(found, classify(model, files, LABELS), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_invalid_images_and_labels_are_refused(photos):
    (photos / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"The image .*broken\.png cannot be used"):
        classify(EvalModel(COSINES), [photos / "broken.png"], LABELS)
    with pytest.raises(UserError, match="at least two labels"):
        classify(EvalModel(COSINES), sorted(photos.rglob("*.png")), {"red": ["red"]})


# ---------------------------------------------------------------- labels


def test_labels_are_names_or_a_file(tmp_path):
    assert read_labels(["cat", " dog "]) == {"cat": ["a photo of a cat."], "dog": ["a photo of a dog."]}
    assert read_labels(["cat", "dog"], ["a {}", "{}"]) == {"cat": ["a cat", "cat"], "dog": ["a dog", "dog"]}
    (tmp_path / "labels.json").write_text(json.dumps({"cat": ["a tabby", "one {}"], "dog": []}))
    assert read_labels([str(tmp_path / "labels.json")], ["a {}"]) == {"cat": ["a tabby", "one cat"], "dog": ["a dog"]}
    (tmp_path / "labels.txt").write_text("cat\nn02 = dog\n")
    assert read_labels([str(tmp_path / "labels.txt")], ["{}"]) == {"cat": ["cat"], "dog": ["dog"]}


def test_the_prompts_of_a_run_on_class_names_are_the_default():
    def model(captions_from):
        reading = SimpleNamespace(captions_from=captions_from, prompts=("a drawing of a {}",))
        return EvalModel(COSINES, SimpleNamespace(config=SimpleNamespace(reading=reading)))

    assert read_labels(["cat", "dog"], (), model("folder"))["cat"] == ["a drawing of a cat"]
    assert read_labels(["cat", "dog"], ["a {}"], model("folder"))["cat"] == ["a cat"]
    assert read_labels(["cat", "dog"], (), model(None))["cat"] == [prompts_module.DEFAULT[0].replace("{}", "cat")]


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["cat", "cat"], "'cat' is repeated"), (["cat", " "], "A label is empty"), (["gone.json"], "Cannot read")],
)
def test_invalid_labels(labels, message):
    with pytest.raises(UserError, match=message):
        read_labels(labels)


# ---------------------------------------------------------------- data


def test_a_folder_with_broken_images(monkeypatch, photos, tmp_path):
    """All images are in the file, in order; unreadable ones are empty rows, counted and listed."""
    monkeypatch.setattr(module, "_BATCH", 3)
    files = sorted(photos.rglob("*.png"))
    for number in (0, 4):
        files[number].write_bytes(files[number].read_bytes()[:40])
    out = tmp_path / "new" / "labels.csv"
    result = classify_data(EvalModel(COSINES), photos, ["red", "green", "a, b"], out)
    header, *rows = csv.reader(out.open(encoding="utf-8", newline=""))
    assert header == ["image", "red", "green", "a, b"]
    assert [row[0] for row in rows] == [file.relative_to(photos).as_posix() for file in files]
    assert [number for number, row in enumerate(rows) if row[1:] == ["", "", ""]] == [0, 4]
    good = [file for number, file in enumerate(files) if number not in (0, 4)]
    found = classify(EvalModel(COSINES), good, read_labels(["red", "green", "a, b"]))
    written = np.array([row[1:] for row in rows if row[1]], float)
    np.testing.assert_allclose(written, found, rtol=1e-4)
    names = list(result.labels)
    assert result.counts == {name: n for name in names if (n := (found.argmax(1) == names.index(name)).sum())}
    assert (result.num_images, [entry.key for entry in result.bad]) == (8, [rows[0][0], rows[4][0]])
    lines = "\n".join(classified_lines(result, 3, out))
    assert "Unreadable images: 2" in lines
    assert all(rows[number][0] in lines for number in (0, 4))


def test_files_and_datasets(photos, tmp_path):
    model, files = EvalModel(COSINES), sorted(photos.rglob("*.png"))
    keys = [key for key, _ in classify_data(model, files[:2], ["red", "blue"]).shown]
    assert keys == [str(file) for file in files[:2]]
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\n" + "".join(f"{file},x\n" for file in files))
    assert classify_data(model, [str(table)], ["red", "blue"]).num_images == 10
    with pytest.raises(UserError, match=r"Several images must all be image files, but .*pairs\.csv"):
        classify_data(model, [files[0], table], ["red", "blue"])
    with pytest.raises(UserError, match="No such file"):
        classify_data(model, tmp_path / "gone.png", ["red", "blue"])
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable image \(1 bad\)"):
        classify_data(model, files[0], ["red", "blue"])
    out = tmp_path / "labels.csv"
    out.write_text("kept")
    with pytest.raises(UserError, match=r"no readable image \(1 bad\)"):
        classify_data(model, files[0], ["red", "blue"], out)
    assert out.read_text() == "kept"


def test_a_full_disk_keeps_the_old_file(monkeypatch, photos, tmp_path):
    def full(rows, file):
        raise OSError(28, "No space left on device")

    out = tmp_path / "labels.csv"
    out.write_text("before")
    monkeypatch.setattr(module.csv, "writer", lambda file: SimpleNamespace(writerow=lambda row: full(row, file)))
    with pytest.raises(UserError, match=r"could not be written to .*labels\.csv: No space left"):
        classify_data(EvalModel(COSINES), photos, ["red", "blue"], out)
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["labels.csv"]


def test_the_command_prints_the_most_probable_labels(monkeypatch, photos, capsys):
    monkeypatch.setattr(module, "open_eval_model", lambda path, device: EvalModel(COSINES))
    monkeypatch.setattr(module, "MAX_SHOWN", 4)
    monkeypatch.chdir(photos.parent)
    assert (
        main(["classify", "model", "photos", "--labels", "red", "green", "blue", "--prompts", "{}", "--top", "2"]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == device_line("cpu")
    files = sorted(photos.rglob("*.png"))
    found = classify(EvalModel(COSINES), files[:1], {name: [name] for name in ("red", "green", "blue")})[0]
    best = sorted(zip(found.tolist(), ("red", "green", "blue")), reverse=True)[:2]
    assert printed[1].split() == [
        files[0].relative_to(photos).as_posix(), *(word for p, name in best for word in (name, f"{p:.3f}"))
    ]  # fmt: skip
    assert printed[5] == "… and 6 more; write all to a file with --out FILE.csv"
    assert printed[6].startswith("Most probable label of 10 images: ")
    assert printed[7] == "Probabilities: softmax of 17 × similarity over 3 labels"
    assert main(["classify", "model", "photos", "--labels", "red", "green", "--out", "found.csv"]) == 0
    assert "Table: found.csv" in capsys.readouterr().out
    assert len(Path("found.csv").read_text().splitlines()) == 11
    assert main(["classify", "model", "photos", "--labels", "red", "green", "--top", "0"]) == 2
