"""Images with boxes and masks: scenes, COCO's instances, and PASCAL VOC."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coalign.data.coco import image_folder
from coalign.data.common import Splits, read_image_file
from coalign.data.images import open_image
from coalign.data.scene_drawing import masks
from coalign.data.scene_layout import SHAPES
from coalign.data.scenes import Scenes, open_scenes
from coalign.data.tabular import load_json
from coalign.errors import UserError

# VOC's twenty classes, in the order of its development kit.
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


PUBLISHED_SIDE, PUBLISHED_REGIONS = (
    800,
    512,
)  # pixels of the shorter side, and regions of an image, in the papers' schedules


@dataclass(frozen=True)
class Objects:
    """What is in an image, in its pixels."""

    boxes: np.ndarray  # float32 [object, 4]: left, top, right, bottom
    labels: np.ndarray  # int64 [object], 0 … classes - 1
    ignored: np.ndarray  # bool [object]: crowds and VOC's difficult ones, which count neither way
    masks: np.ndarray | None = None  # bool [object, height, width]


class DetectionSource(Protocol):
    name: str
    classnames: list[str]
    side: int  # to which detectors resize the shorter side of its images
    regions: int  # of an image, from which a detector's heads learn in a step
    has_masks: bool

    @property
    def splits(self) -> Splits | None: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Upright RGB pixels, uint8 [height, width, 3]. BadSample for what cannot be decoded."""
        ...

    def objects(self, index: int) -> Objects: ...


def open_detection(spec: str) -> DetectionSource:
    """`scenes…` (objects by shape, with masks), `coco:instances.json:images` (with masks), or `voc:VOCdevkit` (trainval of every year that
    is there for training, VOC2007's test for the test). UserError for the rest."""
    if spec == "scenes" or spec.startswith("scenes:"):
        return SceneObjects(open_scenes(spec.partition(":")[2]))
    if spec.startswith("coco:"):
        path, _, images = spec[5:].partition(":")
        return CocoObjects(Path(path), Path(images) if images else None)
    if spec.startswith("voc:"):
        return VocObjects(Path(spec[4:]))
    raise UserError(f"{spec} has no boxes; give scenes:…, coco:instances.json:images or voc:VOCdevkit.")


def _stacked(boxes: list[Any], labels: list[int], ignored: list[bool], drawn: np.ndarray | None) -> Objects:
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(ignored, bool), drawn
    )


class SceneObjects:
    """The objects of scenes by their shape."""

    has_masks = True

    def __init__(self, scenes: Scenes) -> None:
        self.scenes, self.name, self.splits = scenes, scenes.name, scenes.splits
        self.classnames, self.side, self.regions = list(SHAPES), 2 * scenes.size, 16

    def __len__(self) -> int:
        return len(self.scenes)

    def image(self, index: int) -> np.ndarray:
        return self.scenes.image(index)

    def objects(self, index: int) -> Objects:
        scene = self.scenes.scene(index)
        drawn = masks(scene, self.scenes.size)
        boxes, labels = [], []
        for mask, item in zip(drawn, scene.objects):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            labels.append(SHAPES.index(item.shape))
        return _stacked(boxes, labels, [False] * len(labels), drawn)


class CocoObjects:
    """COCO's instances JSON and the folder of its images, which is searched for beside it where not given."""

    splits: Splits | None = None
    side, regions = PUBLISHED_SIDE, PUBLISHED_REGIONS

    def __init__(self, path: Path, images: Path | None = None) -> None:
        if not path.is_file():
            raise UserError(f"there is no {path}")
        content, self.name = load_json(path), str(path)
        try:
            categories = sorted(content["categories"], key=lambda entry: entry["id"])
            number = {entry["id"]: i for i, entry in enumerate(categories)}
            self._images = list(content["images"])
            of_image: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in self._images}
            for annotation in content["annotations"]:
                if min(annotation["bbox"][2:4]) > 0:
                    of_image[annotation["image_id"]].append(annotation | {"class": number[annotation["category_id"]]})
            files = [str(entry["file_name"]) for entry in self._images]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no instances of COCO's form: {type(error).__name__} {error}") from error
        if not files:
            raise UserError(f"{path} holds no images")
        self.classnames = [str(entry["name"]) for entry in categories]
        self._annotations = [of_image[entry["id"]] for entry in self._images]
        self.has_masks = all("segmentation" in annotation for own in self._annotations for annotation in own)
        self.folder = image_folder(path, files[0], images)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        return open_image(read_image_file(self.folder / self._images[index]["file_name"])).decode(1.0)

    def objects(self, index: int) -> Objects:
        entries, entry = self._annotations[index], self._images[index]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (a["bbox"] for a in entries)]
        drawn = None
        if self.has_masks:
            height, width = entry["height"], entry["width"]
            drawn = np.array([_mask(a["segmentation"], height, width) for a in entries], bool).reshape(
                -1, height, width
            )
        return _stacked(boxes, [a["class"] for a in entries], [bool(a.get("iscrowd")) for a in entries], drawn)


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons or run lengths as pixels, bool [height, width]."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError('COCO\'s masks need the extra "detection": pip install "coalign[detection]".') from None
    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return mask.decode(segmentation).astype(bool)


class VocObjects:
    """A VOCdevkit folder with VOC2007, VOC2012 or both."""

    has_masks = False
    side, regions = PUBLISHED_SIDE, PUBLISHED_REGIONS

    def __init__(self, root: Path) -> None:
        self.name, self.classnames = str(root), list(VOC_CLASSES)
        years = [folder for folder in sorted(root.glob("VOC20*")) if (folder / "ImageSets" / "Main").is_dir()]
        if not years:
            raise UserError(f"{root} holds no VOC2007 or VOC2012, with ImageSets/Main in it")
        self._samples: list[tuple[Path, str]] = []
        self.splits: Splits = {}
        for split, file, folders in (
            ("train", "trainval.txt", years),
            ("test", "test.txt", [folder for folder in years if folder.name == "VOC2007"]),
        ):
            first = len(self._samples)
            for folder in folders:
                listed = folder / "ImageSets" / "Main" / file
                if listed.is_file():
                    self._samples += [
                        (folder, line.strip()) for line in listed.read_text().splitlines() if line.strip()
                    ]
            if len(self._samples) > first:
                self.splits[split] = np.arange(first, len(self._samples))
        if not self._samples:
            raise UserError(f"{root} lists no images in ImageSets/Main")

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, index: int) -> np.ndarray:
        folder, name = self._samples[index]
        return open_image(read_image_file(folder / "JPEGImages" / f"{name}.jpg")).decode(1.0)

    def objects(self, index: int) -> Objects:
        folder, name = self._samples[index]
        path = folder / "Annotations" / f"{name}.xml"
        boxes, labels, ignored = [], [], []
        try:
            for entry in ElementTree.parse(path).iter("object"):
                corners = [float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                boxes.append((corners[0] - 1, corners[1] - 1, corners[2], corners[3]))  # VOC counts pixels from 1
                labels.append(VOC_CLASSES.index(entry.findtext("name", "")))
                ignored.append(entry.findtext("difficult", "0").strip() == "1")
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise UserError(f"{path} is no annotation of VOC's: {error}") from error
        return _stacked(boxes, labels, ignored, None)
