"""The eleven classification data sets of DeCLIP's Table 6, as torchvision unpacks them, with CLIP's class names and the papers' splits.

A data set's classes are called as CLIP called them (Radford et al. 2021; data/prompts.md of openai/CLIP): the names in the data with spaces
for underscores (and for SUN397's slashes), but for those listed here and Flowers', which are a table. ImageNet's come from open_clip; two
pairs of them are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coalign.data.common import Splits, is_image_name, printable, read_image_file
from coalign.errors import UserError
from coalign.types import Record

_RENAMED = {
    "caltech101": {
        "BACKGROUND_Google": "background",
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a crocodile",
        "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
}

Images = Sequence[Any]  # paths, or decoded pictures, uint8 [height, width, 3]


@dataclass(frozen=True)
class Contents:
    """What a reader finds: the classes as the data call them, and for each split its images and their classes."""

    classes: Sequence[str]
    parts: Mapping[str, tuple[Images, Sequence[int]]]


@dataclass(frozen=True)
class DataSet:
    """A line of DeCLIP's Table 6. `train` counts what the data divide into train and val."""

    folder: str  # below the data root
    read: Callable[[Path], Contents]  # from the data root
    classes: int
    train: int
    test: int
    metric: Literal["acc1", "mean_per_class_recall"] = "acc1"


class ClassificationSource:
    """A data set: images with a class each, as the fact `label`, and without captions."""

    def __init__(self, name: str, data_set: DataSet, contents: Contents) -> None:
        renamed = _RENAMED.get(name, {})
        self.name, self.prompts, self.metric = name, name, data_set.metric
        self.classnames = [renamed.get(c, c.replace("_", " ").strip()) for c in contents.classes]
        self.splits: Splits = {}
        self._images: list[Any] = []
        self.labels: list[int] = []  # class of each sample
        for split, (images, labels) in contents.parts.items():
            self.splits[split] = np.arange(len(self._images), len(self._images) + len(images))
            self._images.extend(images)
            self.labels.extend(int(label) for label in labels)
        self._data_set = data_set

    def differences(self, learning: bool) -> list[str]:
        """What differs from DeCLIP's Table 6, such as "1,800 test instead of 1,880"; the training part only where it is learnt from."""
        learnt = sum(len(indices) for split, indices in self.splits.items() if split != "test")
        found = {"classes": len(self.classnames), "train": learnt, "test": len(self.splits["test"])}
        expected = {name: getattr(self._data_set, name) for name in found if learning or name != "train"}
        return [f"{found[what]:,} {what} instead of {n:,}" for what, n in expected.items() if found[what] != n]

    def __len__(self) -> int:
        return len(self._images)

    def record(self, index: int) -> Record:
        image = self._images[index]
        key = printable(str(image)) if isinstance(image, (str, Path)) else f"{self.name}[{index}]"
        return Record(key, (), facts={"label": self.classnames[self.labels[index]]})

    def image(self, index: int) -> bytes | np.ndarray:
        image = self._images[index]
        return read_image_file(image) if isinstance(image, (str, Path)) else image


def open_data_set(name: str, root: Path) -> ClassificationSource:
    """One of DATA_SETS below `root`. UserError for what is absent or cannot be read."""
    data_set = DATA_SETS[name]
    where = root / data_set.folder
    if not where.is_dir():
        raise UserError(f"{name} is not there: {where} is expected, as torchvision unpacks it.")
    try:
        contents = data_set.read(root)
    except Exception as error:  # of whatever kind the readers of JSON, MATLAB's files and pickles have
        reason = str(error).split("You can use")[0].strip() or type(error).__name__
        raise UserError(f"{name} in {where} cannot be read, or is not whole: {reason}") from error
    if not all(len(images) for images, _ in contents.parts.values()):
        raise UserError(f"{name} in {where} has no images in a part of it; unpack it again.")
    return ClassificationSource(name, data_set, contents)


# ---------------------------------------------------------------- the readers


def _of_torchvision(
    make: Callable[[str], Any], splits: dict[str, str], images: str = "_image_files", labels: str = "_labels"
) -> Contents:
    """`make` opens a part; `splits`: our name -> the library's."""
    found = {ours: make(theirs) for ours, theirs in splits.items()}
    classes = next(iter(found.values())).classes
    return Contents(classes, {ours: (getattr(part, images), getattr(part, labels)) for ours, part in found.items()})


def _cifar(kind: str) -> Callable[[Path], Contents]:
    def read(root: Path) -> Contents:
        from torchvision import (
            datasets,  # it compares the files' checksums with the published ones before it unpickles them
        )

        found = {split: getattr(datasets, kind)(root, train=split == "train") for split in ("train", "test")}
        return Contents(found["test"].classes, {split: (part.data, part.targets) for split, part in found.items()})

    return read


def _food(root: Path) -> Contents:
    from torchvision.datasets import Food101

    return _of_torchvision(lambda split: Food101(root, split), {"train": "train", "test": "test"})


def _pets(root: Path) -> Contents:
    from torchvision.datasets import OxfordIIITPet

    return _of_torchvision(
        lambda split: OxfordIIITPet(root, split), {"train": "trainval", "test": "test"}, images="_images"
    )


_THREE = {"train": "train", "val": "val", "test": "test"}


def _flowers(root: Path) -> Contents:
    from torchvision.datasets import Flowers102

    names = (files("coalign.data") / "tables" / "flowers102.txt").read_text().splitlines()  # the data have only numbers
    found = {split: Flowers102(root, split) for split in _THREE}
    return Contents(names, {split: (part._image_files, part._labels) for split, part in found.items()})


def _dtd(root: Path) -> Contents:
    from torchvision.datasets import DTD

    return _of_torchvision(lambda split: DTD(root, split), _THREE)


def _aircraft(root: Path) -> Contents:
    from torchvision.datasets import FGVCAircraft

    return _of_torchvision(lambda split: FGVCAircraft(root, split), _THREE)


def _cars(root: Path) -> Contents:
    from torchvision.datasets import StanfordCars

    found = {split: StanfordCars(root, split) for split in ("train", "test")}
    parts = {
        split: ([path for path, _ in d._samples], [label for _, label in d._samples]) for split, d in found.items()
    }
    return Contents(found["test"].classes, parts)


def _sun(root: Path) -> Contents:
    """The first of the published partitions, as CLIP took; torchvision knows none. The lists lie in SUN397 or in its folder Partitions."""
    folder = root / "SUN397"
    lists = next((place for place in (folder, folder / "Partitions") if (place / "Testing_01.txt").is_file()), None)
    if lists is None:
        raise ValueError(f"Training_01.txt and Testing_01.txt of its Partitions.zip are expected in {folder}")
    classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines() if line.strip()]
    number = {name: i for i, name in enumerate(classes)}
    parts = {}
    for split, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        names = [line.strip().lstrip("/") for line in (lists / file).read_text().splitlines() if line.strip()]
        parts[split] = [folder / name for name in names], [number[str(Path(name).parent)[2:]] for name in names]
    return Contents([name.replace("/", " ") for name in classes], parts)


def _caltech(root: Path) -> Contents:
    """Thirty images of each class for training, drawn at random (which ones is published nowhere); the rest is the test."""
    folders = _class_folders(root / "caltech101" / "101_ObjectCategories")
    train, test = ([], []), ([], [])  # type: ignore[var-annotated]
    for label, folder in enumerate(folders):
        images = _images_in(folder)
        chosen = set(np.random.default_rng(label).permutation(len(images))[:30].tolist())
        for i, image in enumerate(images):
            part = train if i in chosen else test
            part[0].append(image)
            part[1].append(label)
    return Contents([folder.name for folder in folders], {"train": train, "test": test})


def _imagenet(root: Path) -> Contents:
    """Folders val and train of WordNet's numbers; val, whose labels are public, is the test, and without train there is only that."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    parts: dict[str, tuple[list[Path], list[int]]] = {}
    wanted: list[str] = []
    for split, folder in (("test", "val"), ("train", "train")):
        if split == "train" and not (root / "imagenet" / folder).is_dir():
            continue  # zero-shot has no use for it
        folders = _class_folders(root / "imagenet" / folder)
        wanted = wanted or [each.name for each in folders]
        if [each.name for each in folders] != wanted or len(folders) != len(IMAGENET_CLASSNAMES):
            raise ValueError(
                f"{len(IMAGENET_CLASSNAMES):,} folders of classes, such as n01440764, are expected in {folder}"
            )
        listed = [(image, label) for label, each in enumerate(folders) for image in _images_in(each)]
        parts[split] = [image for image, _ in listed], [label for _, label in listed]
    return Contents(list(IMAGENET_CLASSNAMES), parts)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image_name(path.name))


_MEAN_PER_CLASS: Literal["mean_per_class_recall"] = "mean_per_class_recall"
DATA_SETS = {  # in the order of DeCLIP's Table 3
    "oxford_pets": DataSet("oxford-iiit-pet", _pets, 37, 3_680, 3_669, _MEAN_PER_CLASS),
    "cifar10": DataSet("cifar-10-batches-py", _cifar("CIFAR10"), 10, 50_000, 10_000),
    "cifar100": DataSet("cifar-100-python", _cifar("CIFAR100"), 100, 50_000, 10_000),
    "sun397": DataSet("SUN397", _sun, 397, 19_850, 19_850),
    "food101": DataSet("food-101", _food, 101, 75_750, 25_250),
    "flowers102": DataSet("flowers-102", _flowers, 102, 2_040, 6_149, _MEAN_PER_CLASS),
    "stanford_cars": DataSet("stanford_cars", _cars, 196, 8_144, 8_041),
    "caltech101": DataSet("caltech101", _caltech, 102, 3_060, 6_085, _MEAN_PER_CLASS),
    "fgvc_aircraft": DataSet("fgvc-aircraft-2013b", _aircraft, 100, 6_667, 3_333, _MEAN_PER_CLASS),
    "dtd": DataSet("dtd", _dtd, 47, 3_760, 1_880),
    "imagenet": DataSet("imagenet", _imagenet, 1_000, 1_281_167, 50_000),
}
