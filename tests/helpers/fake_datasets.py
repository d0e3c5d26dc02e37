"""Tiny versions of the eleven classification datasets, with the layout of the real ones. An image's color encodes its class."""

import hashlib
import json
import pickle

import numpy as np
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102

COLORS = np.array([(220, 30, 30), (30, 200, 40), (40, 60, 220)], np.uint8)


def write_image(path, label):
    """Writes an image in the color of the class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(COLORS[label % 3], (20, 24, 3))).save(path)


def write_all(root, monkeypatch):
    """Writes all datasets below `root`, and sets torchvision's checksums to those of the written files."""
    for write in (pets, sun, food, cars, caltech, aircraft, dtd, imagenet):
        write(root)
    cifar(root, monkeypatch, CIFAR10, "labels", 10)
    cifar(root, monkeypatch, CIFAR100, "fine_labels", 100)
    flowers(root, monkeypatch)
    return root


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(root, monkeypatch, kind, key, classes):
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    names = [f"class_{number}" for number in range(classes)]
    for attribute in ("train_list", "test_list"):
        listed = []
        for number, (name, _) in enumerate(getattr(kind, attribute)):
            labels = [(number + i) % 3 for i in range(6)]
            data = np.repeat(COLORS[labels], 32 * 32, axis=1).reshape(6, -1)  # planes of red, green and blue
            (folder / name).write_bytes(pickle.dumps({"data": data, key: labels}))
            listed.append([name, md5(folder / name)])
        monkeypatch.setattr(kind, attribute, listed)
    path = folder / kind.meta["filename"]
    path.write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(path)})


def pets(root):
    folder = root / "oxford-iiit-pet"
    names = ("Abyssinian", "great_pyrenees", "pug")
    for split, numbers in (("trainval", range(4)), ("test", range(4, 6))):
        lines = []
        for label, name in enumerate(names):
            for number in numbers:
                write_image(folder / "images" / f"{name}_{number}.jpg", label)
                lines.append(f"{name}_{number} {label + 1} 1 1")
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def sun(root):
    folder = root / "SUN397"
    names = ("a/abbey", "a/airplane_cabin", "a/apartment_building/outdoor")
    (folder / "Partitions").mkdir(parents=True)
    (folder / "ClassName.txt").write_text("".join(f"/{name}\n" for name in names))
    for file, numbers in (("Training_01.txt", range(4)), ("Testing_01.txt", range(4, 6))):
        lines = []
        for label, name in enumerate(names):
            for number in numbers:
                write_image(folder / name / f"sun_{number}.jpg", label)
                lines.append(f"/{name}/sun_{number}.jpg\n")
        (folder / "Partitions" / file).write_text("".join(lines))


def food(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in ("apple_pie", "baklava", "pho")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for label, names in enumerate(listed.values()):
            for name in names:
                write_image(folder / "images" / f"{name}.jpg", label)


def flowers(root, monkeypatch):
    folder = root / "flowers-102"
    labels = [1 + i % 3 for i in range(18)]
    for number, label in enumerate(labels, 1):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", label - 1)
    ids = np.arange(1, 19)
    savemat(folder / "setid.mat", {"trnid": ids[:6], "valid": ids[6:12], "tstid": ids[12:]})
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels)})
    checked = {
        name: (file, md5(folder / file)) for name, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", checked)


def cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"], object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kind = [("class", "O"), ("fname", "O")]
    for images, file in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        rows = [(1 + i % 3, f"{i:05d}.jpg") for i in range(9)]
        for label, name in rows:
            write_image(folder / images / name, label - 1)
        savemat(folder / file, {"annotations": np.array(rows, kind)})


def caltech(root):
    folder = root / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(("BACKGROUND_Google", "Faces_easy", "yin_yang")):
        for number in range(33):
            write_image(folder / name / f"image_{number:04d}.jpg", label)


def aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    names = ("707-320", "A300B4", "F-16A/B")
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("".join(f"{name}\n" for name in names))
    for split, numbers in (("train", range(2)), ("val", range(2, 4)), ("test", range(4, 6))):
        lines = []
        for label, name in enumerate(names):
            for number in numbers:
                write_image(data / "images" / f"{label}{number}.jpg", label)
                lines.append(f"{label}{number} {name}\n")
        (data / f"images_variant_{split}.txt").write_text("".join(lines))


def dtd(root):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split, numbers in (("train", range(2)), ("val", range(2, 4)), ("test", range(4, 6))):
        lines = []
        for label, name in enumerate(("banded", "polka-dotted", "zigzagged")):
            for number in numbers:
                write_image(folder / "images" / name / f"{name}_{number}.jpg", label)
                lines.append(f"{name}/{name}_{number}.jpg\n")
        (folder / "labels" / f"{split}1.txt").write_text("".join(lines))


def imagenet(root):
    """Writes an image of every class to val, since all 1,000 classes are required, and of three classes to train."""
    for split, count in (("val", 1), ("train", 2)):
        for label in range(len(IMAGENET_CLASSNAMES)):
            for number in range(count if label < 3 else split == "val"):
                write_image(root / "imagenet" / split / f"n{10_000_000 + label}" / f"{split}{number}.JPEG", label)
            (root / "imagenet" / split / f"n{10_000_000 + label}").mkdir(exist_ok=True)


def color_of(pixels):
    """The class of each image, by its color: int64 [batch]."""
    mean = pixels.float().mean((2, 3)).numpy()
    return np.abs(mean[:, None] - COLORS[None].astype(float)).sum(2).argmin(1)
