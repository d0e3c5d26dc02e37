"""Prompt templates and class names for zero-shot classification.

The templates of the papers' eleven datasets are those published with CLIP (Radford et al. 2021; data/prompts.md of openai/CLIP), and
ImageNet's eighty come from open_clip, so results are comparable. In a template, `{}` stands for the class name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coalign.errors import UserError

DEFAULT = ("a photo of a {}.",)


def _articles(*patterns: str) -> tuple[str, ...]:
    """Returns each pattern with `*` replaced by "a" and by "the"."""
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
    label: str  # its label in the data: a folder, a tag, a column's value
    name: str  # its name in the prompts


def templates(*prompts: str) -> list[str]:
    """Returns the templates that `prompts` name, without repetitions; those of "default" if there are none.

    Each is a template (it contains {}), a dataset's templates (a key of TEMPLATES, or "imagenet"), or a text file with one template per
    line. Raises UserError if it is neither, or the file holds no usable templates.
    """
    return list(dict.fromkeys(line for each in prompts or ("default",) for line in _templates(each)))


def _templates(name: str) -> list[str]:
    if "{}" in name:
        return [name]
    if name == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    if name in TEMPLATES:
        return list(TEMPLATES[name])
    if not Path(name).is_file():
        known = ", ".join([*TEMPLATES, "imagenet"])
        raise UserError(
            f"The prompt {name!r} is neither a template, as it has no {{}} for the class name, nor a file, nor one of {known}."
        )
    lines = [line for _, line in _lines(Path(name), "templates")]
    check_templates(lines, name)
    return lines


def check_templates(lines: Sequence[str], source: str = "the templates") -> None:
    """Raises UserError if a template lacks a placeholder for the class name, or there are no templates."""
    for line in lines:
        if "{}" not in line:
            raise UserError(f"The template {line!r} in {source} has no {{}}; write {{}} where the class name goes.")
    if not lines:
        raise UserError(f"There are no templates in {source}; give at least one, such as 'a photo of a {{}}.'.")


def read_classes(path: Path) -> list[ClassName]:
    """Reads a classes file with one class per line: `name`, or `label = name` if the data uses another label.

    Raises UserError if the file is unreadable, or has malformed lines or duplicates.
    """
    classes = []
    for number, line in _lines(path, "classes"):
        label, _, name = (part.strip() for part in line.partition("="))
        if not label or ("=" in line and not name):
            raise UserError(f"Line {number} of {path} is {line!r}, but must be a class name or `label = name`.")
        classes.append(ClassName(label, name or label))
    check_distinct([entry.label for entry in classes], f"label in {path}")
    check_distinct([entry.name for entry in classes], f"class name in {path}")
    return classes


def check_distinct(names: Sequence[str], what: str = "class name") -> None:
    """Raises UserError for a repeated name, as the two classes would always tie, and if there are no names."""
    if not names:
        raise UserError(f"There is no {what}; give at least one.")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name in first:
            raise UserError(
                f"The {what} {name!r} is repeated (entries {first[name]} and {number}); make the names distinct."
            )
        first[name] = number


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Returns the non-blank lines of a file with their numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"Cannot read the {what} file {path}: {error.strerror or error}.") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
