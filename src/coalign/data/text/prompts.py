"""Prompt templates and class names for zero-shot classification.

The templates of the papers' eleven datasets are those published with CLIP (Radford et al. 2021; data/prompts.md of openai/CLIP), and
ImageNet's eighty come from open_clip, so results are comparable. In a template, `{}` stands for the class name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    prompts: tuple[str, ...] = ()  # of its own, instead of the templates


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


def class_prompts(
    names: Sequence[str],
    templates: Sequence[str],
    own: Mapping[str, Sequence[str]] | None = None,
    allow_duplicates: bool = False,
) -> list[list[str]]:
    """Returns the prompts of each class: those in `own` by its name, else the templates with its name.

    Raises UserError for a template without {}, and for a repeated name, unless `allow_duplicates`: ImageNet has two pairs of classes with
    the same name.
    """
    own = own or {}
    if not allow_duplicates:
        check_distinct(names)
    check_templates(templates)
    return [[each.replace("{}", name) for each in own.get(name) or templates] for name in names]


def read_classes(path: Path, given_templates: Sequence[str] = ()) -> list[ClassName]:
    """Reads the classes of a file, and the prompts of those that have prompts of their own.

    A text file has one class per line: `name`, or `label = name` if the data uses another label. A JSON file is an object of a prompt or a
    list of prompts for each class, or a list of names. An empty list stands for the templates, and {} in a prompt for the class's name.

    given_templates: the templates that the user chose, for classes without prompts of their own. Raises UserError if there are no such
    classes, if the file is unreadable, or has malformed entries or duplicates.
    """
    classes = _json_classes(path) if path.suffix.lower() == ".json" else _text_classes(path)
    check_distinct([entry.label for entry in classes], f"label in {path}")
    check_distinct([entry.name for entry in classes], f"class name in {path}")
    if own := [" | ".join(entry.prompts) for entry in classes if entry.prompts]:
        check_distinct(own, f"list of prompts in {path}")
    if given_templates and all(entry.prompts for entry in classes):
        raise UserError(f"--prompts has no effect: all classes in {path} have prompts of their own; omit it.")
    return classes


def _text_classes(path: Path) -> list[ClassName]:
    classes = []
    for number, line in _lines(path, "classes"):
        label, _, name = (part.strip() for part in line.partition("="))
        if not label or ("=" in line and not name):
            raise UserError(f"Line {number} of {path} is {line!r}, but must be a class name or `label = name`.")
        classes.append(ClassName(label, name or label))
    return classes


def _json_classes(path: Path) -> list[ClassName]:
    def as_pairs(pairs: list[tuple[str, Any]]) -> _Pairs:  # a dict would lose repeated classes
        return _Pairs(pairs)

    try:
        content = json.loads(_text(path, "classes"), object_pairs_hook=as_pairs)
    except ValueError as error:
        raise UserError(f"The classes file {path} is not valid JSON: {error}.") from error
    if not isinstance(content, list):
        raise UserError(f"The classes file {path} must be an object of prompts for each class, or a list of names.")
    pairs = content if isinstance(content, _Pairs) else [(name, []) for name in content]
    classes = []
    for label, prompts in pairs:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(label, str) or not label.strip():
            raise UserError(f"The classes file {path} has the class {label!r}; each must be a text.")
        if type(prompts) is not list or not all(isinstance(each, str) and each.strip() for each in prompts):
            raise UserError(f"The prompts of {label!r} in {path} must be a text or a list of texts.")
        name = label.strip()
        classes.append(ClassName(name, name, tuple(dict.fromkeys(each.strip() for each in prompts))))
    return classes


class _Pairs(list[Any]):
    """The names and values of a JSON object."""


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
    lines = enumerate(_text(path, what).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"Cannot read the {what} file {path}: {error.strerror or error}.") from error
