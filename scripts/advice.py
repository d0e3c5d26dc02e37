"""Tries the advice of `coalign benchmark` on data that it was not built on: icons and their names, and scenes.

    pip install diagrams fontawesomefree lucide pytablericons qtawesome resvg-py --no-deps
    python scripts/advice.py data data/advice
    python scripts/advice.py run data/advice runs/advice --minutes 60
    python scripts/advice.py summary runs/advice --out results/advice.json

`data` writes a folder of pairs per package: diagrams (symbols of cloud services), Font Awesome, Lucide, Tabler and Material Design icons.
`run` benchmarks each of them, and scenes with standard captions, with the default methods; interrupted, it resumes. `summary` collects, for
each, what was recommended, and its regret: by how much the best method's test score is above the recommended one's, both means over seeds.
As the best is chosen by the same scores, noise alone makes the regret larger than zero.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from coalign.experiments.benchmark.result import HEADLINES
from coalign.files import write_json
from coalign.methods.table import parts
from coalign.version import __version__

SIDE = 72  # pixels of the written images
SCENES = "scenes:4096:standard"

Drawings = Iterator[tuple[str, list[str], Image.Image]]  # name, captions, picture


def package(name: str) -> Path:
    """Returns the folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {name} is not installed; see the top of this script.")
    return Path(spec.submodule_search_locations[0])


def diagrams() -> Drawings:
    folder = package("diagrams").parent / "resources"
    for path in sorted(folder.glob("*/*/*.png")):
        provider, category, name = path.relative_to(folder).with_suffix("").parts
        yield (
            f"{provider}-{category}-{name}",
            [words(f"{provider} {name}"), words(f"{provider} {category} {name}")],
            Image.open(path),
        )


def fontawesome() -> Drawings:
    folder = package("fontawesomefree") / "static/fontawesomefree"
    for name, icon in json.loads((folder / "metadata/icons.json").read_text()).items():
        terms = [str(term) for term in icon["search"]["terms"]]
        captions = [icon["label"].lower(), *([", ".join(terms[:6])] if terms else [])]
        for style, svg in icon["svg"].items():
            yield f"{name}-{style}", captions, drawn(svg["raw"])


def lucide() -> Drawings:
    with zipfile.ZipFile(package("lucide") / "lucide.zip") as archive:
        for entry in sorted(archive.namelist()):
            name = Path(entry).stem
            yield name, [words(name)], drawn(archive.read(entry).decode())


def tabler() -> Drawings:
    for path in sorted((package("pytablericons") / "icons").glob("*/*.svg")):
        filled = ["filled"] if path.parent.name == "filled" else []
        yield f"{path.stem}-{path.parent.name}", [words(" ".join([path.stem, *filled]))], drawn(path.read_text())


def material() -> Drawings:
    folder = package("qtawesome") / "fonts"
    (file,), (table,) = folder.glob("materialdesignicons6*.ttf"), folder.glob("materialdesignicons6*.json")
    font = ImageFont.truetype(str(file), 2 * SIDE)
    for name, code in json.loads(table.read_text()).items():
        picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
        ImageDraw.Draw(picture).text((SIDE, SIDE), chr(int(code, 16)), "black", font, anchor="mm")
        yield name, [words(name)], picture


SETS: dict[str, Callable[[], Drawings]] = {
    "diagrams": diagrams, "fontawesome": fontawesome, "lucide": lucide, "material": material, "tabler": tabler,
}  # fmt: skip


def words(name: str) -> str:
    return " ".join(name.replace("-", " ").replace("_", " ").split())


def drawn(svg: str) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data)))


def write_data(out: Path) -> None:
    for name, drawings in SETS.items():
        (out / name / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for key, captions, picture in drawings():
            flat = Image.new("RGBA", picture.size, "white")
            flat.alpha_composite(picture.convert("RGBA"))
            flat.thumbnail((SIDE, SIDE))
            flat.convert("RGB").save(out / name / f"images/{key}.png")
            rows.append({"image": f"images/{key}.png", "captions": captions})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name / "metadata.jsonl").write_text(text, encoding="utf-8")
        print(f"{out / name}: {len(rows):,} drawings")


def benchmark(data: Path, runs: Path, minutes: float) -> None:
    for name, source in {**{name: str(data / name) for name in SETS}, "scenes": SCENES}.items():
        if not (runs / name / "benchmark.json").exists():
            command = ["benchmark", "--data", source, "--out", str(runs / name), "--minutes", str(minutes)]
            subprocess.run([sys.executable, "-m", "coalign", *command], check=True)


def summary(runs: Path) -> dict[str, Any]:
    """Returns, for each set, the scores on the test pairs, the recommended method and its regret."""
    sets = {}
    for name in (*SETS, "scenes"):
        result = json.loads((runs / name / "benchmark.json").read_text())
        if not result["recommended"]:
            sys.exit(f"{runs / name} recommends no method: {result['advice']}")
        metric = next(name for name, title in HEADLINES.items() if title == result["headline"])
        scores = {
            group["name"]: fmean(group["metrics"][part]["value"] for part in parts(metric))
            for group in result["groups"]
        }
        recommended = result["recommended"]
        sets[name] = {
            "pairs": result["settings"]["num_train"],
            "metric": metric,
            "scores": scores,
            "recommended": recommended,
            "regret": max(scores.values()) - scores[recommended],
            "leads": result["leads"],
            "advice": result["advice"],
        }
    mean = fmean(each["regret"] for each in sets.values())
    return {"version": __version__, "sets": sets, "mean_regret": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("data")
    action.add_argument("data", type=Path)
    action = actions.add_parser("run")
    action.add_argument("data", type=Path)
    action.add_argument("runs", type=Path)
    action.add_argument("--minutes", type=float, default=60)
    action = actions.add_parser("summary")
    action.add_argument("runs", type=Path)
    action.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.action == "data":
        write_data(options.data)
    elif options.action == "run":
        benchmark(options.data, options.runs, options.minutes)
    else:
        found = summary(options.runs)
        write_json(options.out, found, indent=1)
        for name, each in found["sets"].items():
            print(f"{name}: {each['recommended']}, regret {100 * each['regret']:.1f}")
        print(f"Mean regret: {100 * found['mean_regret']:.1f} points")


if __name__ == "__main__":
    main()
