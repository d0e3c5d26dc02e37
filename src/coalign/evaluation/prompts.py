"""Prompt templates and class names for zero-shot classification.

The templates of the papers' eleven data sets are those published with CLIP (Radford et al. 2021; data/prompts.md of
openai/CLIP), and ImageNet's eighty come from open_clip, so that figures can be compared. In a template, `{}` is the
place of the class name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coalign.errors import UserError

DEFAULT = ("a photo of a {}.",)


def _articles(*patterns: str) -> tuple[str, ...]:
    """Each pattern with "a" and with "the" in the place of `*`."""
    return tuple(pattern.replace("*", article) for article in ("a", "the") for pattern in patterns)


_CIFAR = _articles(
    "a photo of * {}.",
    *(
        f"a {kind} photo of * {{}}."
        for kind in ("blurry", "black and white", "low contrast", "high contrast", "bad", "good")
    ),
    "a photo of * small {}.",
    "a photo of * big {}.",
)
_CALTECH = _articles(
    "a photo of * {}.",
    *(
        f"a {kind} of * {{}}."
        for kind in ("painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
    ),
    *(f"* {kind} {{}}." for kind in ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")),
    "* {} in a video game.",
    "art of * {}.",
    "graffiti of * {}.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "default": DEFAULT,
    "caltech101": _CALTECH,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "dtd": _articles(*(f"a photo of * {{}} {kind}." for kind in ("texture", "pattern", "thing", "object"))),
    "fgvc_aircraft": _articles("a photo of * {}, a type of aircraft."),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": (
        *_articles("a photo of * {}."),
        *(f"a photo of my {kind}{{}}." for kind in ("", "dirty ", "clean ", "new ", "old ")),
        "i love my {}!",
    ),
    "sun397": _articles("a photo of * {}."),
}


class ClassName(NamedTuple):
    label: str  # what the data call the class: a folder, a tag, a column's value
    name: str  # what the prompt calls it


def templates(name: str) -> list[str]:
    """The templates of a data set (a key of TEMPLATES, or "imagenet"), or of a text file with one template a line."""
    if name == "imagenet":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if name in TEMPLATES:
        return list(TEMPLATES[name])
    if not Path(name).is_file():
        known = ", ".join([*TEMPLATES, "imagenet"])
        raise UserError(f"No prompt templates are called {name!r}, nor is there such a file; known are {known}.")
    lines = [line for _, line in _lines(Path(name), "templates")]
    return checked_templates(lines, name)


def checked_templates(lines: Sequence[str], where: str = "the templates") -> list[str]:
    """The templates themselves; UserError where one has no place for the class name."""
    for line in lines:
        if "{}" not in line:
            raise UserError(f"The template {line!r} in {where} has no {{}}; write {{}} where the class name goes.")
    if not lines:
        raise UserError(f"There is no template in {where}; give at least one, such as 'a photo of a {{}}.'.")
    return list(lines)


def read_classes(path: Path) -> list[ClassName]:
    """The user's classes, one a line: `name`, or `label = name` if the data have another word for the class."""
    classes = []
    for number, line in _lines(path, "classes"):
        label, _, name = (part.strip() for part in line.partition("="))
        if not label or ("=" in line and not name):
            raise UserError(f"Line {number} of {path} is {line!r}; a line is a class name, or `label = name`.")
        classes.append(ClassName(label, name or label))
    check_distinct([entry.label for entry in classes], f"label in {path}")
    check_distinct([entry.name for entry in classes], f"class name in {path}")
    return classes


def check_distinct(names: Sequence[str], what: str = "class name") -> None:
    """UserError for a name that comes twice, since neither class could win over the other, or when there is none."""
    if not names:
        raise UserError(f"There is no {what}; give at least one.")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name in first:
            raise UserError(
                f"The {what} {name!r} comes twice (entries {first[name]} and {number}); make the names distinct."
            )
        first[name] = number


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"Cannot read the {what} file {path}: {error.strerror or error}.") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
