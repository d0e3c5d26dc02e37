"""The papers' eleven datasets, on tiny folders with the layout of the real ones."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fake_datasets
from open_clip import IMAGENET_CLASSNAMES

from coalign.cli import main as cli
from coalign.data.sources.benchmarks.classification import DATASETS, open_dataset
from coalign.data.text.prompts import templates
from coalign.errors import UserError
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield fake_datasets.write_all(tmp_path_factory.mktemp("sets"), patch)


NAMES = {
    "oxford_pets": ["Abyssinian", "Great Pyrenees", "Pug"],
    "sun397": ["abbey", "airplane cabin", "apartment building outdoor"],
    "food101": ["apple pie", "baklava", "pho"],
    "stanford_cars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"],
    "caltech101": ["background", "centered face", "yin and yang symbol"],
    "fgvc_aircraft": ["707-320", "A300B4", "F-16A/B"],
    "dtd": ["banded", "polka-dotted", "zigzagged"],
    "cifar10": ["class 0", "class 1", "class 2"],
    "cifar100": ["class 0", "class 1", "class 2"],
    "flowers102": ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"],
    "imagenet": list(IMAGENET_CLASSNAMES[:3]),
}
SIZES = {  # of the train, val and test splits that `fake_datasets` writes
    "oxford_pets": (12, 0, 6), "cifar10": (30, 0, 6), "cifar100": (6, 0, 6), "sun397": (12, 0, 6), "food101": (12, 0, 6),
    "flowers102": (6, 6, 6), "stanford_cars": (9, 0, 9), "caltech101": (90, 0, 9), "fgvc_aircraft": (6, 6, 6), "dtd": (6, 6, 6),
    "imagenet": (6, 0, 1000),
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_names_splits_and_images(root, name):
    source = open_dataset(name, root)
    assert source.classnames[:3] == NAMES[name]
    assert tuple(len(source.splits.get(split, ())) for split in ("train", "val", "test")) == SIZES[name]
    for split, indices in source.splits.items():
        images = [np.asarray(source.image(i)) if "cifar" in name else decode(source.image(i)) for i in indices[:12]]
        colors = fake_datasets.color_of(torch.tensor(np.stack([x[:20, :20] for x in images])).permute(0, 3, 1, 2))
        assert colors.tolist() == [source.labels[i] % 3 for i in indices[:12]], split
    record = source.record(int(source.splits["test"][0]))
    assert record.facts["label"] == source.classnames[source.labels[int(source.splits["test"][0])]]
    assert record.captions == ()
    assert templates(*source.prompts)


def decode(data):
    from coalign.data.images.decode import open_image

    return open_image(data).decode(1.0)


def test_datasets_match_declip_table_6():
    """DeCLIP's Table 6: classes, training and test images, and the metric (accuracy or mean per class)."""
    text = """
        cifar10 10 50,000 10,000 a | cifar100 100 50,000 10,000 a | food101 101 75,750 25,250 a | oxford_pets 37 3,680 3,669 m
        flowers102 102 2,040 6,149 m | sun397 397 19,850 19,850 a | stanford_cars 196 8,144 8,041 a | dtd 47 3,760 1,880 a
        caltech101 102 3,060 6,085 m | fgvc_aircraft 100 6,667 3,333 m | imagenet 1000 1,281,167 50,000 a
    """
    expected = {}
    for line in re.split(r"[|\n]", text.strip()):
        name, classes, train, test, metric = line.replace(",", "").split()
        expected[name] = int(classes), int(train), int(test), {"a": "acc1", "m": "mean_per_class_recall"}[metric]
    assert {name: (d.classes, d.train, d.test, d.metric) for name, d in DATASETS.items()} == expected


def oracle(root):
    """A model that embeds class names as the colors of their images; for ImageNet, only the first three classes."""
    prompts = {}
    for name in DATASETS:
        source = open_dataset(name, root)
        for number, classname in enumerate(source.classnames[:3]):
            for template in templates(*source.prompts):
                prompts[template.replace("{}", classname)] = number

    def encode_text(texts):
        other = torch.tensor([0.0, 0.0, 0.0, 1.0])
        return torch.stack([torch.eye(4)[prompts[text]] if text in prompts else other for text in texts])

    def features(pixels):
        return torch.eye(4)[torch.tensor(fake_datasets.color_of(pixels))]

    return DualEncoder(features, encode_text, 16, image_features=features)


def test_zero_shot_suite(root):
    results = evaluate(oracle(root), ["suite11"], EvalConfig(data_root=root))
    assert list(results) == [*(f"zeroshot:{name}" for name in DATASETS), "suite11"]
    row = results["suite11"]["metrics"]
    assert list(row) == [*DATASETS, "average"]
    for name in set(DATASETS) - {"imagenet"}:
        assert row[name]["value"] == 1, name
        assert results[f"zeroshot:{name}"]["split"] == "test"
        assert results[f"zeroshot:{name}"]["main_metric"] == DATASETS[name].metric
        assert results[f"zeroshot:{name}"]["notes"][0].startswith("differs from the papers' data: ")
    # ImageNet's other classes share the colors, and a single embedding
    assert row["imagenet"]["value"] == pytest.approx(3 / 1000)
    assert len(results["zeroshot:imagenet"]["per_class"]) == 1000
    assert results["suite11"]["main_metric"] == "average"
    average = row["average"]
    assert average["value"] == pytest.approx((10 + 3 / 1000) / 11)
    assert average["low"] <= average["value"] <= average["high"]


def test_dataset_name_may_be_a_folder_in_the_root(root, monkeypatch):
    """The name still refers to the dataset if it is also a folder in the working directory."""
    monkeypatch.chdir(root)
    result = evaluate(oracle(root), ["zeroshot:dtd"], EvalConfig(data_root=Path()))["zeroshot:dtd"]
    assert (result["split"], result["samples"], result["main_metric"]) == ("test", 6, "acc1")


def test_differences_from_the_papers_cover_used_splits_only(root):
    zero_shot, knn = evaluate(oracle(root), ["zeroshot:imagenet", "knn:dtd"], EvalConfig(data_root=root)).values()
    assert zero_shot["notes"] == ["differs from the papers' data: 1,000 test instead of 50,000"]
    assert "12 train instead of 3,760" in knn["notes"][0]


def test_probe_suite(root):
    """Probes train on the train split, and the val split if there is one. ImageNet's train split has three classes."""
    results = evaluate(oracle(root), ["suite11-probe"], EvalConfig(data_root=root))
    row = results["suite11-probe"]["metrics"]
    assert list(row) == [*DATASETS, "average"]
    for name in DATASETS:
        assert row[name]["value"] == (pytest.approx(3 / 1000) if name == "imagenet" else 1), name


def test_command_prints_results_and_writes_a_page(trained, root, tmp_path, capsys):
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    arguments = ["eval", str(trained), "--tasks", "zeroshot:dtd", "zeroshot:oxford_pets", "--data-root", str(root)]
    assert cli.main([*arguments, "--json", str(out), "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "differs from the papers' data: 3 classes instead of 47; 6 test instead of 1,880" in " ".join(
        printed.split()
    )
    assert json.loads(out.read_text())["zeroshot:dtd"]["main_metric"] == "acc1"
    assert "polka-dotted" in page.read_text()
    assert "Evaluation of run" in page.read_text()


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("zeroshot:dtd", None, "dtd needs --data-root, the folder that contains dtd"),
        (
            "suite11",
            lambda root: shutil.rmtree(root / "dtd"),
            r"Missing below --data-root: .*/dtd \(dtd\); unpack each as",
        ),
        ("zeroshot:cifar10", lambda root: truncate(root / "cifar-10-batches-py/test_batch"), "not found or corrupted"),
        (
            "zeroshot:sun397",
            lambda root: shutil.rmtree(root / "SUN397/Partitions"),
            r"Training_01.txt and Testing_01.txt",
        ),
        ("zeroshot:food101", lambda root: truncate(root / "food-101/meta/test.json"), "Cannot read food101 in"),
        (
            "zeroshot:fgvc_aircraft",
            lambda root: (root / "fgvc-aircraft-2013b/data/variants.txt").unlink(),
            "Cannot read",
        ),
        ("zeroshot:stanford_cars", lambda root: truncate(root / "stanford_cars/devkit/cars_meta.mat"), "Cannot read"),
        (
            "suite11-probe",
            lambda root: shutil.rmtree(root / "imagenet/train"),
            "probe:imagenet has nothing to train on",
        ),
        ("zeroshot:stanford_cars", lambda root: shutil.rmtree(root / "stanford_cars/cars_test"), "Cannot read"),
        ("zeroshot:imagenet", lambda root: shutil.rmtree(root / "imagenet/val/n10000007"), "1,000 class folders"),
        ("zeroshot:imagenette", lambda root: None, "No such file or folder: imagenette"),
    ],
)
def test_missing_or_damaged_datasets_raise(root, tmp_path, task, damage, message):
    copy = None
    if damage:
        copy = tmp_path / "sets"
        copy.mkdir()
        for folder in root.iterdir():
            shutil.copytree(folder, copy / folder.name)
        damage(copy)
    with pytest.raises(UserError, match=message):
        evaluate(oracle(root), [task], EvalConfig(data_root=copy))


def truncate(path):
    path.write_bytes(Path(path).read_bytes()[:20])
