"""Hooks of the documentation site (mkdocs.yml): the home page is README.md, some tables are generated from the code, and formulas become
MathML.

A page has a generated part where it contains one of these comments:

    <!-- options: MODULE.CLASS -->    the fields of a dataclass as command-line options, with defaults and help
    <!-- recipes: METHOD -->          the recipes of a method
    <!-- details: METHOD -->          the implementation details at the end of its method.py
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from coalign.config import NOMINAL_PAIRS, OptimizerConfig, TrainConfig
from coalign.methods import recipes

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the home page, which is README.md, and the result files that pages link to."""
    for name, page in {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "results").glob("*.json")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces the comments of generated parts. Links to results/ lead into the site."""
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./results/", r"](\1results/", markdown)
    return re.sub(
        r"^<!-- (options|recipes|details): (\S+) -->$", lambda m: GENERATED[m[1]](m[2]), markdown, flags=re.MULTILINE
    )


def on_page_content(content: str, **_: Any) -> str:
    """Converts formulas to MathML, which browsers show without scripts."""

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def block(match: re.Match[str]) -> str:
        return f'<div class="math-display">{convert(html.unescape(match[1]), display="block")}</div>'

    content = content.replace(" ± ", "\u00a0±\u00a0")  # the two numbers stay on one line
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, content, flags=re.DOTALL)


def options(name: str) -> str:
    """Returns a table of a dataclass' fields as command-line options, with their defaults and help."""
    module, _, class_name = name.rpartition(".")
    cls = getattr(import_module(module), class_name)
    help_texts, recipe = field_help(cls), resolved(cls)
    rows = [
        f"| `--{name}` | {_default(field, recipe)} | {help_texts[field.name]} |"
        for field in dataclasses.fields(cls)
        if (name := _option(field))
    ]
    return "\n".join(["| Option | Default | |", "| --- | --- | --- |", *rows])


def _option(field: dataclasses.Field[Any]) -> str:
    """Returns the name of a field's option, or "" if the field is not one option."""
    annotation = str(field.type)
    if annotation.startswith("Suppress"):
        return ""
    renamed = re.search(r"""arg\(name=["'](.*?)["']\)""", annotation)
    name = renamed[1] if renamed else field.name.replace("_", "-")
    if annotation.startswith("Mapping"):
        return f"{name}.NAME.…"
    if dataclasses.is_dataclass(field.default):
        return f"{name}.…"  # has options of its own
    return f"{name}` / `--no-{name}" if isinstance(field.default, bool) else name


def resolved(cls: type) -> Any:
    """The settings of `coalign train` without options, as in its help; None for the settings of other classes."""
    config = recipes()["clip"](NOMINAL_PAIRS)
    return {TrainConfig: config, OptimizerConfig: config.optimizer}.get(cls)


def _default(field: dataclasses.Field[Any], recipe: Any) -> str:
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if recipe is not None:
        value = getattr(recipe, field.name)
    if isinstance(value, tuple):
        value = " ".join(f"{item:.3g}" if isinstance(item, float) else str(item) for item in value)
    return "" if value in (None, "", {}) or dataclasses.is_dataclass(value) else f"`{value}`"


def field_help(cls: type) -> dict[str, str]:
    """Returns the help of each field, which is its docstring, its trailing comment, or the comment above it."""
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    lines = source.splitlines()
    body = ast.parse(source).body[0].body
    texts = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            texts[node.target.id] = " ".join(str(following.value.value).split())
            continue
        trailing = re.search(r"#\s*(.*)", lines[node.end_lineno - 1][node.end_col_offset :])
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("# "))
        texts[node.target.id] = trailing[1] if trailing else " ".join(above)
    return texts


def recipe_table(method: str) -> str:
    """Returns a table of a method's recipes."""
    recipes = import_module(f"coalign.methods.{method}.config").RECIPES
    rows = [
        f"| `{name}` | {' '.join(inspect.cleandoc(make.__doc__ or '').split())} |" for name, make in recipes.items()
    ]
    return "\n".join(["| `--recipe` | |", "| --- | --- |", *rows])


def details(method: str) -> str:
    """Returns the implementation details that stand as comments at the end of a method's file."""
    comments = (ROOT / f"src/coalign/methods/{method}/method.py").read_text().rpartition("\n\n\n# ")[2]
    lines = [line.removeprefix("#").removeprefix(" ") for line in comments.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("- "))
    # outside code, a bracket is not the start of a link: "[0, ln 100] [p]" is no reference
    return re.sub(r"(`[^`]*`)|\[", lambda m: m[1] or "&#91;", "\n".join([*lines[:start], "", *lines[start:]]))


GENERATED = {"options": options, "recipes": recipe_table, "details": details}
