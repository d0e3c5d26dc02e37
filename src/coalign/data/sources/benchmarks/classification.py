"""The eleven classification datasets of DeCLIP's Table 6, as unpacked by torchvision, with CLIP's class names and the papers' splits.

Class names follow CLIP (Radford et al. 2021; data/prompts.md of openai/CLIP): the dataset's names with underscores (in SUN397 also slashes)
replaced by spaces, except those renamed below and those of Flowers102, which come from a table. ImageNet's names come from open_clip; two
pairs of them are identical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coalign.data.sources.base import Source, Splits, is_image_name, read_image_file
from coalign.data.text.captions import printable
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

Images = Sequence[Any]  # paths, or decoded images, uint8 [height, width, 3]


@dataclass(frozen=True)
class DatasetContent:
    """Class names as in the dataset's files, and images and labels by split."""

    classes: Sequence[str]
    by_split: Mapping[str, tuple[Images, Sequence[int]]]


@dataclass(frozen=True)
class DatasetInfo:
    """A row of DeCLIP's Table 6. `train` counts the images of both train and val."""

    folder: str  # relative to the data root
    read: Callable[[Path], DatasetContent]  # takes the data root
    classes: int
    train: int
    test: int
    metric: Literal["acc1", "mean_per_class_recall"] = "acc1"


class ClassificationSource(Source):
    """A classification dataset: images without captions, with their class names as the fact `label`."""

    def __init__(self, name: str, info: DatasetInfo, content: DatasetContent) -> None:
        renamed = _RENAMED.get(name, {})
        self.name, self.prompts, self.metric = name, (name,), info.metric
        self.classnames = [renamed.get(c, c.replace("_", " ").strip()) for c in content.classes]
        self.splits: Splits = {}
        self._images: list[Any] = []
        self.labels: list[int] = []  # of each sample
        for split, (images, labels) in content.by_split.items():
            self.splits[split] = np.arange(len(self._images), len(self._images) + len(images))
            self._images.extend(images)
            self.labels.extend(int(label) for label in labels)
        self._info = info

    def differences(self, include_train: bool) -> list[str]:
        """Counts that differ from DeCLIP's Table 6, such as "1,800 test instead of 1,880"; those of train only if `include_train`."""
        num_train = sum(len(indices) for split, indices in self.splits.items() if split != "test")
        counts = {"classes": len(self.classnames), "train": num_train, "test": len(self.splits["test"])}
        expected = {name: getattr(self._info, name) for name in counts if include_train or name != "train"}
        return [f"{counts[name]:,} {name} instead of {n:,}" for name, n in expected.items() if counts[name] != n]

    def __len__(self) -> int:
        return len(self._images)

    def record(self, index: int) -> Record:
        image = self._images[index]
        key = printable(str(image)) if isinstance(image, (str, Path)) else f"{self.name}[{index}]"
        return Record(key, (), facts={"label": self.classnames[self.labels[index]]})

    def image(self, index: int) -> bytes | np.ndarray:
        image = self._images[index]
        return read_image_file(image) if isinstance(image, (str, Path)) else image


def open_dataset(name: str, root: Path) -> ClassificationSource:
    """Opens one of DATASETS below `root`. Raises UserError if it is missing, incomplete or unreadable."""
    info = DATASETS[name]
    folder = root / info.folder
    if not folder.is_dir():
        raise UserError(f"Dataset {name} not found: expected {folder}, as unpacked by torchvision.")
    try:
        content = info.read(root)
    except Exception as error:  # the readers of JSON, MATLAB files and pickles raise many types
        reason = str(error).split("You can use")[0].strip() or type(error).__name__
        raise UserError(f"Cannot read {name} in {folder}; it may be incomplete: {reason}") from error
    if not all(len(images) for images, _ in content.by_split.values()):
        raise UserError(f"A split of {name} in {folder} has no images; unpack the dataset again.")
    return ClassificationSource(name, info, content)


# ---------------------------------------------------------------- readers


def _from_torchvision(
    open_split: Callable[[str], Any], splits: dict[str, str], images: str = "_image_files", labels: str = "_labels"
) -> DatasetContent:
    """Reads `splits` (our name -> torchvision's) from the attributes `images` and `labels` of torchvision's datasets."""
    datasets = {ours: open_split(theirs) for ours, theirs in splits.items()}
    classes = next(iter(datasets.values())).classes
    return DatasetContent(classes, {name: (getattr(d, images), getattr(d, labels)) for name, d in datasets.items()})


def _cifar(kind: str) -> Callable[[Path], DatasetContent]:
    def read(root: Path) -> DatasetContent:
        from torchvision import datasets  # verifies the published checksums before unpickling

        opened = {split: getattr(datasets, kind)(root, train=split == "train") for split in ("train", "test")}
        return DatasetContent(opened["test"].classes, {split: (d.data, d.targets) for split, d in opened.items()})

    return read


def _food(root: Path) -> DatasetContent:
    from torchvision.datasets import Food101

    return _from_torchvision(lambda split: Food101(root, split), {"train": "train", "test": "test"})


def _pets(root: Path) -> DatasetContent:
    from torchvision.datasets import OxfordIIITPet

    return _from_torchvision(
        lambda split: OxfordIIITPet(root, split), {"train": "trainval", "test": "test"}, images="_images"
    )


_TRAIN_VAL_TEST = {"train": "train", "val": "val", "test": "test"}


def _flowers(root: Path) -> DatasetContent:
    from torchvision.datasets import Flowers102

    names = (files("coalign.data") / "tables" / "flowers102.txt").read_text().splitlines()  # the dataset has only ids
    opened = {split: Flowers102(root, split) for split in _TRAIN_VAL_TEST}
    return DatasetContent(names, {split: (d._image_files, d._labels) for split, d in opened.items()})


def _dtd(root: Path) -> DatasetContent:
    from torchvision.datasets import DTD

    return _from_torchvision(lambda split: DTD(root, split), _TRAIN_VAL_TEST)


def _aircraft(root: Path) -> DatasetContent:
    from torchvision.datasets import FGVCAircraft

    return _from_torchvision(lambda split: FGVCAircraft(root, split), _TRAIN_VAL_TEST)


def _cars(root: Path) -> DatasetContent:
    from torchvision.datasets import StanfordCars

    opened = {split: StanfordCars(root, split) for split in ("train", "test")}
    by_split = {
        split: ([path for path, _ in d._samples], [label for _, label in d._samples]) for split, d in opened.items()
    }
    return DatasetContent(opened["test"].classes, by_split)


def _sun(root: Path) -> DatasetContent:
    """Reads the first published partition, as CLIP does; torchvision has no splits. The lists are in SUN397 or SUN397/Partitions."""
    folder = root / "SUN397"
    lists = next((path for path in (folder, folder / "Partitions") if (path / "Testing_01.txt").is_file()), None)
    if lists is None:
        raise ValueError(f"expected Training_01.txt and Testing_01.txt of its Partitions.zip in {folder}")
    classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines() if line.strip()]
    label_of = {name: label for label, name in enumerate(classes)}
    by_split = {}
    for split, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        names = [line.strip().lstrip("/") for line in (lists / file).read_text().splitlines() if line.strip()]
        by_split[split] = [folder / name for name in names], [label_of[str(Path(name).parent)[2:]] for name in names]
    return DatasetContent([name.replace("/", " ") for name in classes], by_split)


def _caltech(root: Path) -> DatasetContent:
    """Reads Caltech101 with 30 random training images per class (the papers do not publish theirs); all others are the test split."""
    folders = _class_folders(root / "caltech101" / "101_ObjectCategories")
    train, test = ([], []), ([], [])  # type: ignore[var-annotated]
    for label, folder in enumerate(folders):
        images = _images_in(folder)
        chosen = set(np.random.default_rng(label).permutation(len(images))[:30].tolist())
        for i, image in enumerate(images):
            split = train if i in chosen else test
            split[0].append(image)
            split[1].append(label)
    return DatasetContent([folder.name for folder in folders], {"train": train, "test": test})


def _imagenet(root: Path) -> DatasetContent:
    """Reads the folders train (optional) and val, each with one folder per WordNet id. val is the test split: its labels are public."""
    from open_clip import IMAGENET_CLASSNAMES

    by_split: dict[str, tuple[list[Path], list[int]]] = {}
    wordnet_ids: list[str] = []
    for split, folder in (("test", "val"), ("train", "train")):
        if split == "train" and not (root / "imagenet" / folder).is_dir():
            continue  # zero-shot evaluation does not need it
        folders = _class_folders(root / "imagenet" / folder)
        wordnet_ids = wordnet_ids or [each.name for each in folders]
        if [each.name for each in folders] != wordnet_ids or len(folders) != len(IMAGENET_CLASSNAMES):
            raise ValueError(f"expected {len(IMAGENET_CLASSNAMES):,} class folders, such as n01440764, in {folder}")
        samples = [(image, label) for label, each in enumerate(folders) for image in _images_in(each)]
        by_split[split] = [image for image, _ in samples], [label for _, label in samples]
    return DatasetContent(list(IMAGENET_CLASSNAMES), by_split)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image_name(path.name))


_MEAN_PER_CLASS: Literal["mean_per_class_recall"] = "mean_per_class_recall"
DATASETS = {  # in the order of DeCLIP's Table 3
    "oxford_pets": DatasetInfo("oxford-iiit-pet", _pets, 37, 3_680, 3_669, _MEAN_PER_CLASS),
    "cifar10": DatasetInfo("cifar-10-batches-py", _cifar("CIFAR10"), 10, 50_000, 10_000),
    "cifar100": DatasetInfo("cifar-100-python", _cifar("CIFAR100"), 100, 50_000, 10_000),
    "sun397": DatasetInfo("SUN397", _sun, 397, 19_850, 19_850),
    "food101": DatasetInfo("food-101", _food, 101, 75_750, 25_250),
    "flowers102": DatasetInfo("flowers-102", _flowers, 102, 2_040, 6_149, _MEAN_PER_CLASS),
    "stanford_cars": DatasetInfo("stanford_cars", _cars, 196, 8_144, 8_041),
    "caltech101": DatasetInfo("caltech101", _caltech, 102, 3_060, 6_085, _MEAN_PER_CLASS),
    "fgvc_aircraft": DatasetInfo("fgvc-aircraft-2013b", _aircraft, 100, 6_667, 3_333, _MEAN_PER_CLASS),
    "dtd": DatasetInfo("dtd", _dtd, 47, 3_760, 1_880),
    "imagenet": DatasetInfo("imagenet", _imagenet, 1_000, 1_281_167, 50_000),
}
