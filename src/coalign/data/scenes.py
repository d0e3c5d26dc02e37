"""The embedded data set: pictures of a few coloured shapes, made by code, with exact ground truth.

A picture, its captions and its facts are pure functions of (seed, split, number), the same on every machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from operator import and_
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from coalign.data.randomness import generator, stable_hash
from coalign.data.scene_captions import (
    KINDS,
    Fact,
    Wording,
    as_fact,
    choose_facts,
    make_captions,
    repeated_shapes,
    say,
    sayable,
    true_facts,
    truth_after_view,
)
from coalign.data.scene_drawing import draw, masks
from coalign.data.scene_foils import foils
from coalign.data.scene_layout import COLOURS, SHAPES, SPLITS, Draws, Scene, make_scene
from coalign.errors import UserError
from coalign.types import AugmentationParams, Foil, Record

TRAIN_SIZE = 8000
EVALUATION_SIZE = 2000  # images in each split but train
NUM_CAPTIONS = 4
MAX_KEPT = 256 << 20  # bytes of pictures that a source keeps once they are drawn: the second time they cost nothing


class Scenes:
    """A `Source` of scenes: one split, or all of them, one after another, in one index space.

    The scene with a given number in a split depends on neither the size of the split nor on what else is opened, so
    smaller train sets are the beginnings of larger ones. `swap` is the share of train images that show another image's
    scene than their captions and tags tell of; `Record.facts["swapped"]` marks them.
    """

    name = "scenes"

    def __init__(
        self, train: int = TRAIN_SIZE, *, seed: int = 0, size: int = 64, swap: float = 0.0, split: str | None = None
    ) -> None:
        self.seed, self.size, self.swap = seed, size, swap
        self._drawn: dict[int, np.ndarray] = {}
        self.splits: dict[str, np.ndarray] = {}
        start = 0
        for name in SPLITS if split is None else (split,):
            length = train if name == "train" else EVALUATION_SIZE
            self.splits[name] = np.arange(start, start + length)
            start += length
        self._length = start

    def __len__(self) -> int:
        return self._length

    def _locate(self, index: int) -> tuple[str, int]:
        """The split and the number in it."""
        for name, rows in self.splits.items():
            if rows[0] <= index <= rows[-1]:
                return name, int(index - rows[0])
        raise IndexError(f"scene {index} of {self._length}")

    def _rows(self, split: str) -> np.ndarray:
        if split not in self.splits:
            raise UserError(f"These scenes have no split {split!r}; choose one of {', '.join(self.splits)}.")
        return self.splits[split]

    def scene(self, index: int) -> Scene:
        return make_scene(self.seed, *self._locate(index))

    def image(self, index: int) -> np.ndarray:
        picture = self._drawn.get(index)
        if picture is None:
            picture = draw(self.scene(index), self.size)
            picture.setflags(write=False)
            if (len(self._drawn) + 1) * picture.nbytes <= MAX_KEPT:
                self._drawn[index] = picture
        return picture

    def masks(self, index: int) -> np.ndarray:
        """Where each object is, bool [objects, size, size], in the order of `Record.facts["objects"]`."""
        return masks(self.scene(index), self.size)

    def record(self, index: int) -> Record:
        """`facts`: the picture's `objects` (boxes are left, top, right, bottom in fractions of the frame), for every
        caption the list of facts it states (`captions`), whether the captions were `swapped`, and of one object alone a
        `label`, such as "pink heart"."""
        split, number = self._locate(index)
        swapped = split == "train" and stable_hash(self.seed, "swap", number // 2) / 2**63 < self.swap
        texts, stated, tags = _told(self.seed, split, number ^ swapped)
        objects = _objects(make_scene(self.seed, split, number))
        facts: dict[str, Any] = {
            "split": split,
            "number": number,
            "objects": objects,
            "captions": [[fact._asdict() for fact in caption] for caption in stated],
            "swapped": swapped,
        }
        if len(objects) == 1:
            facts["label"] = "{colour} {shape}".format(**objects[0])
        return Record(f"{split}-{number:06d}", texts, tags, facts)

    def truth_after_view(self, index: int, params: AugmentationParams) -> list[list[bool]]:
        """For every caption and each of its facts, whether it holds in the view made with these parameters."""
        stated = self.record(index).facts["captions"]
        return [truth_after_view(self.scene(index), caption, params) for caption in stated]

    # ------------------------------------------------------------ evaluation

    def foil_items(self, split: str, kind: str, n: int = 2000) -> list[Foil]:
        """Two-way choices between a true caption and its foil of one kind; images come again until there are n."""
        if kind not in KINDS:
            raise UserError(f"There are no foils of the kind {kind!r}; choose one of {', '.join(KINDS)}.")
        items: dict[Foil, None] = {}
        rows = self._rows(split)
        for turn in range(64):
            for index in map(int, rows):
                made = foils(self.scene(index), kind, self._generator(split, index - rows[0], turn, f"foils/{kind}"))
                if made is not None:
                    items[Foil(index, kind, made[2], *made[:2])] = None
                if len(items) == n:
                    return list(items)
        raise UserError(f"The {len(rows)} scenes of {split!r} give {len(items)} foils of the kind {kind}, not {n}.")

    def foils(self, indices: np.ndarray, per_kind: int = 500) -> list[Foil]:
        """Foils of every kind for the images of one split, as many of each."""
        split, _ = self._locate(int(indices[0]))
        wanted = set(indices.tolist())
        kinds = (self.foil_items(split, kind, per_kind) for kind in KINDS)
        return [foil for items in kinds for foil in items if foil.index in wanted]

    def retrieval_pool(self, split: str, size: int = 500) -> tuple[np.ndarray, list[str]]:
        """Indices of `size` images and a caption of each that fits none of the other images of the pool."""
        rows = self._rows(split)
        holds: dict[Fact, int] = defaultdict(int)  # the images where a fact holds, one bit each
        for number, index in enumerate(map(int, rows)):
            for fact in true_facts(self.scene(index)):
                holds[fact] |= 1 << number
        indices: list[int] = []
        captions: list[str] = []
        in_pool = told = 0  # the images of the pool, and those that its captions fit
        for number, index in enumerate(map(int, rows)):
            if told >> number & 1 or len(indices) == size:
                continue
            scene, draws = self.scene(index), Draws(self._generator(split, number, 0, "pool"))
            facts_by_kind, repeated = sayable(scene), repeated_shapes(scene)
            choices = []
            for _ in range(12):
                said = choose_facts(facts_by_kind, repeated, draws, 3)
                choices.append((reduce(and_, (holds[as_fact(fact)] for fact in said)), said))
            fits, said = min(choices, key=lambda choice: choice[0].bit_count())
            if not fits & in_pool:
                indices.append(index)
                captions.append(say(said, Wording.drawn(draws), repeated))
                in_pool, told = in_pool | 1 << number, told | fits
        if len(indices) < size:
            raise UserError(f"The scenes of {split!r} give a pool of {len(indices)} unambiguous captions, not {size}.")
        return np.array(indices), captions

    def zero_shot_set(
        self, split: str, by: Literal["shape", "colour", "shape_colour"]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The images of one object: indices [images], labels [images] and the names of the classes."""
        names = {
            "shape": list(SHAPES),
            "colour": list(COLOURS),
            "shape_colour": [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS],
        }
        if by not in names:
            raise UserError(f"There are no zero-shot classes by {by!r}; choose one of {', '.join(names)}.")
        indices, labels = [], []
        for index in map(int, self._rows(split)):
            objects = self.scene(index).objects
            if len(objects) == 1:
                item = objects[0]
                name = {"shape": item.shape, "colour": item.colour}.get(by, f"{item.colour} {item.shape}")
                indices.append(index)
                labels.append(names[by].index(name))
        return np.array(indices, np.int64), np.array(labels, np.int64), names[by]

    def _generator(self, split: str, number: int, turn: int, use: str) -> np.random.Generator:
        return generator(self.seed, 0, number, turn, f"scenes/{split}/{use}")


@lru_cache(maxsize=16384)
def _told(seed: int, split: str, number: int) -> tuple[tuple[str, ...], list[list[Fact]], tuple[str, ...]]:
    """The captions, the facts that they state, and the tags."""
    scene = make_scene(seed, split, number)
    made = make_captions(scene, generator(seed, 0, number, 0, f"scenes/{split}/captions"), NUM_CAPTIONS)
    tags = dict.fromkeys(word for item in scene.objects for word in (item.shape, item.colour, item.size))
    return tuple(text for text, _ in made), [facts for _, facts in made], tuple(tags)


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "shape": item.shape,
            "colour": item.colour,
            "size": item.size,
            "cell": list(item.cell),
            "box": [round(edge, 5) for edge in item.box],
            "texture": item.texture.kind,
        }
        for item in scene.objects
    ]


# ---------------------------------------------------------------- opening and writing

_RANGES: dict[str, tuple[type, float, float]] = {
    "train": (int, 1, 10_000_000),
    "seed": (int, 0, 2**31 - 1),
    "size": (int, 16, 1024),
    "swap": (float, 0, 1),
}


def open_scenes(options: str = "", split: str | None = None) -> Scenes:
    """The scenes that options such as "8000,seed=3,size=64,swap=0.1" describe: first the number of training images.

    Without a split the source holds all of them, and its `splits` say which indices belong to which.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"The scenes have no split {split!r}; choose one of {', '.join(SPLITS)}.")
    values: dict[str, Any] = {}
    for position, part in enumerate(options.split(",") if options.strip() else []):
        name, equals, text = part.strip().partition("=")
        if position == 0 and not equals:
            name, text = "train", name
        if name not in _RANGES:
            raise UserError(
                f"The scenes have no option {name!r}; use a number of training images, then seed=, size=, swap=, "
                'as in "scenes:8000,seed=3,size=64,swap=0.1".'
            )
        kind, low, high = _RANGES[name]
        try:
            values[name] = kind(text)
        except ValueError:
            values[name] = float("nan")
        if not low <= values[name] <= high:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"The scenes' option {name} must be {what} from {low} to {high}, not {text!r}.")
    return Scenes(**values, split=split)


def write_scenes(
    out: Path, options: str = "", *, num_foils: int = 2000, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Writes all splits as a folder: images/*.png, metadata.jsonl, and the foils of the test images by kind.

    metadata.jsonl has the columns image, captions, tags, split, objects, facts, swapped. The folder appears when it is
    complete; `progress` is called with the images done and their number. Returns the number of images of each split.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another name for the scenes or empty it.")
    source = open_scenes(options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"The scenes cannot be written to {out}: {error.strerror}; choose another folder.") from error
    try:
        _write(source, unfinished, num_foils, progress)
        unfinished.chmod(0o755)
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return {name: len(rows) for name, rows in source.splits.items()}


def _write(source: Scenes, folder: Path, num_foils: int, progress: Callable[[int, int], None] | None) -> None:
    (folder / "images").mkdir()
    paths = []
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(len(source)):
            record = source.record(index)
            paths.append(f"images/{record.key}.png")
            Image.fromarray(source.image(index)).save(folder / paths[-1])
            row = {
                "image": paths[-1],
                "captions": record.captions,
                "tags": record.tags,
                "split": record.facts["split"],
                "objects": record.facts["objects"],
                "facts": record.facts["captions"],
                "swapped": record.facts["swapped"],
            }
            _print(row, lines)
            if progress is not None:
                progress(index + 1, len(source))
    for kind in KINDS:
        with (folder / f"foils_{kind}.jsonl").open("w", encoding="utf-8") as lines:
            for item in source.foil_items("test", kind, num_foils):
                _print(
                    {"image": paths[item.index], "kind": kind, "how": item.how, "true": item.true, "false": item.false},
                    lines,
                )


def _print(row: Mapping[str, Any], lines: Any) -> None:
    print(json.dumps(row, ensure_ascii=False), file=lines)
