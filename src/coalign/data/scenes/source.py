"""The built-in scenes dataset: images of a few colored shapes, drawn by code, with captions and exact ground truth.

Images, captions and facts are pure functions of (seed, split, number), the same on every machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import numpy as np
from PIL import Image

from coalign.data.scenes.captions import (
    KINDS,
    Fact,
    make_captions,
    truth_after_view,
)
from coalign.data.scenes.drawing import draw, masks
from coalign.data.scenes.foils import foils
from coalign.data.scenes.full_captions import (
    SIMPLE_KINDS,
    SIMPLE_PROMPTS,
    STANDARD_KINDS,
    STANDARD_PROMPTS,
    full_foils,
    simple_caption,
    standard_captions,
)
from coalign.data.scenes.layout import SPLITS, Scene, make_scene
from coalign.data.sources.base import Source
from coalign.errors import UserError
from coalign.progress import track
from coalign.randomness import generator, stable_hash
from coalign.types import AugmentationParams, Foil, Record

TRAIN_SIZE = 8000
EVALUATION_SIZE = 2000  # images in each split except train
NUM_CAPTIONS = 4  # per image; 1 if they are simple
Level = Literal["simple", "standard", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)
_KINDS = {"simple": SIMPLE_KINDS, "standard": STANDARD_KINDS, "hard": KINDS}  # of foils
_PROMPTS = {"simple": SIMPLE_PROMPTS, "standard": STANDARD_PROMPTS, "hard": Source.prompts}
MAX_CACHE_BYTES = 256 << 20  # of drawn images kept in memory


class Scenes(Source):
    """Drawn images with captions and ground truth: one split, or all splits, concatenated.

    A scene depends only on the seed, the split, its number in the split, and whether the level is simple, so smaller training sets are
    prefixes of larger ones. Simple scenes have one or two large objects, and captions of their colors, shapes and sides. Standard and hard
    scenes are the same, with other captions: standard ones describe every object (see `full_captions`), hard ones state one to three facts
    of many kinds in many words. `swap` is the fraction of training samples with the captions and tags of another image, marked by
    `Record.facts["swapped"]`.
    """

    name = "scenes"

    def __init__(
        self,
        train: int = TRAIN_SIZE,
        *,
        level: Level = "simple",
        seed: int = 0,
        size: int = 64,
        swap: float = 0.0,
        split: str | None = None,
    ) -> None:
        self.level, self.seed, self.size, self.swap = level, seed, size, swap
        self.kinds, self.prompts = _KINDS[level], _PROMPTS[level]
        self._cache: dict[int, np.ndarray] = {}
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
        """Returns the split of a sample and its number in the split."""
        for name, indices in self.splits.items():
            if indices[0] <= index <= indices[-1]:
                return name, int(index - indices[0])
        raise IndexError(f"scene {index} of {self._length}")

    def _indices(self, split: str) -> np.ndarray:
        if split not in self.splits:
            raise UserError(
                f"The scenes dataset was opened without a split {split!r}; available: {', '.join(self.splits)}."
            )
        return self.splits[split]

    def scene(self, index: int) -> Scene:
        return make_scene(self.seed, *self._locate(index), simple=self.level == "simple")

    def image(self, index: int) -> np.ndarray:
        image = self._cache.get(index)
        if image is None:
            image = draw(self.scene(index), self.size)
            image.setflags(write=False)
            if (len(self._cache) + 1) * image.nbytes <= MAX_CACHE_BYTES:
                self._cache[index] = image
        return image

    def masks(self, index: int) -> np.ndarray:
        """Returns the mask of each object, bool [objects, size, size], in the order of `Record.facts["objects"]`."""
        return masks(self.scene(index), self.size)

    def record(self, index: int) -> Record:
        """Returns captions, tags and ground truth of a sample.

        `Record.facts` has the `objects` of the image (a box is left, top, right, bottom in fractions of the frame), the list of facts that
        each caption states (`captions`), whether the captions are `swapped`, and for images of a single object its `label`, such as
        "pink heart".
        """
        split, number = self._locate(index)
        swapped = split == "train" and stable_hash(self.seed, "swap", number // 2) / 2**63 < self.swap
        captions, stated_facts, tags = _captions_and_tags(self.level, self.seed, split, number ^ swapped)
        objects = _objects(self.scene(index))
        facts: dict[str, Any] = {
            "split": split,
            "number": number,
            "objects": objects,
            "captions": [[fact._asdict() for fact in stated] for stated in stated_facts],
            "swapped": swapped,
        }
        if len(objects) == 1:
            facts["label"] = "{colour} {shape}".format(**objects[0])
        return Record(f"{split}-{number:06d}", captions, tags, facts)

    def truth_after_view(self, index: int, params: AugmentationParams) -> list[list[bool]]:
        """Returns for each fact of each caption whether it holds in the view with these parameters."""
        return [truth_after_view(self.scene(index), facts, params) for facts in self.record(index).facts["captions"]]

    # ------------------------------------------------------------ evaluation

    def foil_items(self, split: str, kind: str, num_foils: int = 2000) -> list[Foil]:
        """Samples `num_foils` pairs of a true caption and its foil of one kind. Images are repeated as often as necessary."""
        if kind not in self.kinds:
            raise UserError(f"There are no foils of kind {kind!r}; available: {', '.join(self.kinds)}.")
        items: dict[Foil, None] = {}
        indices = self._indices(split)
        for repetition in range(64):
            for index in map(int, indices):
                rng = generator(self.seed, 0, index - indices[0], repetition, f"scenes/{split}/foils/{kind}")
                if foil := self._foil(index, kind, rng):
                    true, false, how = foil
                    items[Foil(index, kind, how, true, false)] = None
                if len(items) == num_foils:
                    return list(items)
        raise UserError(
            f"The {len(indices)} scenes of {split!r} yield only {len(items)} foils of kind {kind!r}, "
            f"but {num_foils} are requested."
        )

    def _foil(self, index: int, kind: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
        if self.level == "hard":
            return foils(self.scene(index), kind, rng)
        return full_foils(self.scene(index), kind, rng, simple=self.level == "simple")

    def foils(self, indices: np.ndarray, per_kind: int = 2000) -> list[Foil]:
        """Returns foils of all kinds for samples of one split: those among the first `per_kind` foils of each kind in the split."""
        split, _ = self._locate(int(indices[0]))
        selected = set(indices.tolist())
        kinds = (self.foil_items(split, kind, per_kind) for kind in self.kinds)
        return [foil for items in kinds for foil in items if foil.index in selected]


@lru_cache(maxsize=16384)
def _captions_and_tags(
    level: Level, seed: int, split: str, number: int
) -> tuple[tuple[str, ...], list[list[Fact]], tuple[str, ...]]:
    """Returns the captions, the facts that each states, and the tags."""
    scene = make_scene(seed, split, number, simple=level == "simple")
    if level == "simple":
        captions = [simple_caption(scene)]
    else:
        make = make_captions if level == "hard" else standard_captions
        captions = make(scene, generator(seed, 0, number, 0, f"scenes/{split}/captions"), NUM_CAPTIONS)
    tags = dict.fromkeys(word for item in scene.objects for word in (item.shape, item.color, item.size))
    return tuple(text for text, _ in captions), [facts for _, facts in captions], tuple(tags)


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "shape": item.shape,
            "colour": item.color,
            "size": item.size,
            "cell": list(item.cell),
            "box": [round(edge, 5) for edge in item.box],
            "texture": item.texture.kind,
        }
        for item in scene.objects
    ]


# ---------------------------------------------------------------- opening and writing

_RANGES: dict[str, tuple[type, float, float]] = {
    "N": (int, 1, 10_000_000),
    "seed": (int, 0, 2**31 - 1),
    "size": (int, 16, 1024),
    "swap": (float, 0, 1),
}
_SPELLING = (
    "write scenes:N:LEVEL,seed=SEED,size=PIXELS,swap=FRACTION, as in scenes:8000:standard,seed=3,size=64,swap=0.1"
)


def open_scenes(options: str = "", split: str | None = None) -> Scenes:
    """Opens the scenes dataset with options such as "8000:standard,seed=3,size=64,swap=0.1", of which each may be omitted.

    They begin with the number of training images, and after it the level of the captions. Without `split`, the source has all splits, and
    its attribute `splits` maps their names to indices. Raises UserError if an option or the split is invalid.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"The scenes dataset has no split {split!r}; available: {', '.join(SPLITS)}.")
    values: dict[str, Any] = {}
    first, *others = [part.strip() for part in options.split(",")]
    if "=" in first:
        others.insert(0, first)
    elif first:
        train, colon, level = first.partition(":")
        values["train"] = _number("N", train)
        if colon and level not in LEVELS:
            raise UserError(
                f"The level of scenes is {level!r}, but must be {', '.join(LEVELS[:-1])} or {LEVELS[-1]}; {_SPELLING}."
            )
        values["level"] = level or LEVELS[0]
    for part in others:
        name, _, text = part.partition("=")
        if name not in _RANGES or name == "N":
            raise UserError(f"The scenes dataset has no option {name!r}; {_SPELLING}.")
        values[name] = _number(name, text)
    return Scenes(**values, split=split)


def _number(name: str, text: str) -> Any:
    kind, low, high = _RANGES[name]
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise UserError(f"The scenes option {name} is {text!r}, but must be {what} from {low} to {high}; {_SPELLING}.")
    return value


def write_scenes(out: Path, options: str = "", *, num_foils: int = 2000) -> dict[str, int]:
    """Writes all splits to a folder: images/*.png, metadata.jsonl, and the foils of the test split in one file per kind.

    metadata.jsonl has the columns image, captions, tags, split, objects, facts, swapped. The folder is created when it is complete.
    Returns the number of images per split. Raises UserError if `out` is not empty or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another folder or empty it.")
    source = open_scenes(options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"The scenes cannot be written to {out}: {error.strerror}; choose another folder.") from error
    try:
        _write(source, temporary, num_foils)
        temporary.chmod(0o755)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {name: len(indices) for name, indices in source.splits.items()}


def _write(source: Scenes, folder: Path, num_foils: int) -> None:
    (folder / "images").mkdir()
    paths = []
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index in track(range(len(source)), "Drawing scenes"):
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
            _write_line(lines, row)
    for kind in source.kinds:
        with (folder / f"foils_{kind}.jsonl").open("w", encoding="utf-8") as lines:
            for item in source.foil_items("test", kind, num_foils):
                sentences = {"true": item.true, "false": item.false}
                _write_line(lines, {"image": paths[item.index], "kind": kind, "how": item.how, **sentences})


def _write_line(lines: TextIO, row: Mapping[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), file=lines)
