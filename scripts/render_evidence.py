"""Writes docs/evidence.md and its figures from the tables of experiments in results/.

Each table is what `coalign reproduce` left as table.json, under the table's name. Nothing in docs/evidence.md is written by hand.

Run: python scripts/render_evidence.py
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coalign.recipes.tables import STEP_COST, TABLES
from coalign.report import compare_figures
from coalign.report.compare_page import Comparison, Figure, Group, title
from coalign.run.reproduce import rank_correlation

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Evidence

Made by `python scripts/render_evidence.py` from the files in [results](../results), each of which holds all figures, intervals and settings
of one table. A table is trained again by `coalign reproduce NAME --data DATA --out FOLDER`. All of it is small and short: two million
weights, minutes on two cores.
"""

READING = """## How to read the tables

- **Figures** are means over seeds, in per cent where nothing else is said. **±** is half of the 95 % t-interval over seeds, how far other
  seeds would move it; with one seed it is of the bootstrap over held-out items.
- **Differences** have two 95 % intervals: over held-out items (paired bootstrap), and over seeds (Welch's t).
- A **claim**, of a paper or of what a control is for, *holds* where both intervals lie above zero, and *does not hold* where both lie
  below: the reverse is seen. All others are *undecided* by these runs. Nothing is corrected for the number of comparisons.
- **The paper's column** is another task on other data; its order is what is compared.
- **Time** is on the clock, over the first row's, on a machine that did other things too. "CLIP's time" is as many pairs as CLIP's time is
  enough for, by what a step costs on an idle core: {costs}.
- **The modality gap** is the distance between the centroids of images and captions, 0 to 2.
- **Open Clip Art in two styles** (`style-shift.jsonl`): a tenth is held out, and *test* are 301 pictures of the same concepts by others.
- **Scenes**: 2,000 are held out; *combinations* are 2,000 with shapes in colours in which training never shows them, *shifted* 2,000
  darker, more blurred ones before other patterns with more clutter.
"""


MISALIGNMENT = """## What runs on scenes know of the harm that augmentation does

The runs of `views-scenes`, by `python scripts/misalignment.py RUN …`; ± over seeds. *Broken facts*: Spearman's correlation, over
{scenes} scenes and {views} strong views of each, of how much further from its caption a view lies than the whole picture with the share
of the caption's facts that the view broke, as counted from its parameters; 0 is no knowledge. *Swapped captions*: area under the ROC curve
of finding by their distance the tenth of 2,000 pairs whose captions were exchanged; 0.5 is chance. *Left or right*: how often, asked
which is true of the picture as it was drawn, a run is right about the picture as it is, about the same flipped and said to be so, and
flipped without a word (chance 50 %). A head that has understood its parameters would have the first two equal, and the third as far below
50 as they are above. All figures: [{file}](../results/{file}).
"""


def main() -> None:
    costs = "; ".join(
        f"on {data} " + ", ".join(f"{name} {cost} ×" for name, cost in of_method.items())
        for data, of_method in STEP_COST.items()
    )
    paths = [path for name in TABLES if (path := ROOT / f"results/{name}.json").exists()]
    tables = [json.loads(path.read_text()) for path in paths]
    parts = [INTRODUCTION, *in_short(tables), READING.replace("{costs}", costs)]
    for path, values in zip(paths, tables, strict=True):
        parts += section(path, values)
    detection = ROOT / "results/detection-scenes.json"
    if detection.exists():
        parts += detectors(detection, json.loads(detection.read_text()))
    misaligned = ROOT / "results/misalignment-scenes.json"
    if misaligned.exists():
        parts += misalignment(misaligned, json.loads(misaligned.read_text()))
    (ROOT / "docs/evidence.md").write_text("\n".join(parts))


def in_short(tables: list[dict[str, Any]]) -> list[str]:
    """Each method beside CLIP wherever both were trained, the data-efficiency factors, and the claims that were decided."""
    link = {values["table"]: f"[{values['table']}](#{anchor(values['title'])})" for values in tables}
    factors = {
        (values["table"], task): found for values in tables for task, found in values.get("efficiency", {}).items()
    }
    methods = list(dict.fromkeys(method for found in factors.values() for method in found))
    rows = [
        [f"{link[name]}, {tested_on(task)}", *(factor(found[method]) if method in found else "" for method in methods)]
        for (name, task), found in factors.items()
    ]
    lines = [
        "## In short",
        "",
        *beside_clip(tables, link),
        "",
        "How many times fewer pairs than CLIP for CLIP's score on all (95 % interval over seeds):",
        "",
    ]
    lines += markdown(["", *methods], rows)
    verdicts = Counter(claim["verdict"] for values in tables for claim in values.get("claims", []))
    lines += [
        "",
        f"Of {verdicts.total()} claims, each figure by itself, {verdicts['holds']} hold, {verdicts['does not hold']} do not (the reverse "
        f"is seen), and {verdicts['undecided']} are undecided by these runs. Decided are, in points of per cent:",
        "",
    ]
    rows = []
    for values in tables:
        decided = [claim for claim in values.get("claims", []) if claim["verdict"] != "undecided"]
        cells = [
            "; ".join(words(claim) for claim in decided if claim["verdict"] == verdict)
            for verdict in ("holds", "does not hold")
        ]
        rows += [[link[values["table"]], *cells]] if decided else []
    return [*lines, *markdown(["table", "holds", "does not hold"], rows), ""]


def beside_clip(tables: list[dict[str, Any]], link: dict[str, str]) -> list[str]:
    """Each method beside CLIP wherever a table has both, as a table and as a figure."""
    asked, cells = [], []  # (table, pairs, split), and method -> figure
    for values in tables:
        arms = TABLES[values["table"]].arms
        methods = {g["name"]: g["figures"] for g in values["groups"] if g["name"] == arms[g["name"]].recipe}
        for figure in methods.get("clip", {}) if len(methods) > 2 else ():
            if figure.startswith("retrieval") and figure.endswith("image_to_text.r10"):
                trained = {**values["settings"], **values["groups"][0]["settings"]}["num_train"]
                asked.append((values["table"], f"{trained:,} pairs", tested_on(figure.split(".")[0])))
                cells.append({name: figures[figure] for name, figures in methods.items()})
    others = [name for name in dict.fromkeys(name for row in cells for name in row) if name != "clip"]
    triples = {name: [over_seeds(row.get(name)) for row in cells] for name in others}
    labels = [f"{table}\n{pairs}; {split}" for table, pairs, split in asked]
    compare_figures.points(labels, triples, difference_to="CLIP").savefig(ROOT / "docs/beside-clip.png", dpi=110)
    lines = [
        "Image → text R@10 after as many pairs: CLIP's, and what each method has more or less, in points of per cent; **bold** where both "
        "intervals, over items and over seeds, say so. The figure has the intervals over seeds.",
        "",
    ]
    rows = [
        [
            f"{link[table]}, {pairs}; {split}",
            value(row["clip"]),
            *(lead(row[name]) if name in row else "" for name in others),
        ]
        for (table, pairs, split), row in zip(asked, cells, strict=True)
    ]
    return [*lines, *markdown(["", "clip", *others], rows), "", "![Each method beside CLIP](beside-clip.png)"]


def over_seeds(figure: dict[str, Any] | None) -> tuple[float, float, float]:
    """The difference to CLIP with its interval; nothing where there is none."""
    found = figure and figure["difference_over_seeds"]
    return (figure["difference"], *found) if figure and found else (math.nan,) * 3


def lead(figure: dict[str, Any]) -> str:
    spans = [figure[f"difference_over_{what}"] for what in ("items", "seeds")]
    decided = all(spans) and (all(low > 0 for low, _ in spans) or all(high < 0 for _, high in spans))
    return f"**{signed(figure['difference'])}**" if decided else signed(figure["difference"])


def words(claim: dict[str, Any]) -> str:
    return f"{claim['claim']} ({title(claim['figure'])}: {signed(claim['difference'])})"


def anchor(heading: str) -> str:
    """Where a heading is on the page."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def tested_on(task: str) -> str:
    return "held out" if task == "retrieval" else task.removeprefix("retrieval_")


def factor(found: dict[str, Any]) -> str:
    """A data-efficiency factor (over seeds). ≥ and ≤: the curves meet beyond the fractions tried; without an interval, for every seed."""
    edge = ("≥ " if found["factor"] > 1 else "≤ ") if found["bound"] else ""
    low, high = found["over_seeds"] or (1.0, 1.0)
    return f"{edge}{found['factor']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def detectors(path: Path, values: dict[str, Any]) -> list[str]:
    """What `scripts/detection_transfer.py` found."""
    figures = {"box_ap": "AP", "box_ap50": "AP50", "box_ap75": "AP75"}
    number = values["data"].split(",")[0].removeprefix("scenes:")
    control = values["control"]
    lines = [
        "## Detectors on scenes, from pre-trained and from random towers",
        "",
        f"{values['task']}, trained for {values['epochs']} epochs on {number} scenes and asked about {values['tested']} others; in per "
        "cent, with 95 % intervals over images. The runs are of `two-towers-scenes`. The control's tower learnt in another detector, on "
        f"{control['scenes']} other scenes: what a tower has learnt does help a detector here, when it is enough. Made by `python "
        f"scripts/detection_transfer.py RUN …`; all figures: [{path.name}](../results/{path.name}).",
        "",
    ]

    def cells(intervals: dict[str, Any]) -> list[str]:
        found = [intervals[name] for name in figures]
        return [f"{100 * x['value']:.1f} ({100 * x['low']:.1f}–{100 * x['high']:.1f})" for x in found]

    rows = [[row["run"], row["tower"], *cells(row["intervals"])] for row in values["rows"]]
    found = [values["differences"][name] for name in figures]
    differences = [f"{signed(x['mean'])} ({span(x['over_seeds'])})" for x in found]
    rows.append(["pre-trained minus random, over runs", "", *differences])
    rows.append([control["run"], "control", *cells(control["intervals"])])
    lines += markdown(["run", "tower", *figures.values()], rows)
    return [*lines, ""]


def misalignment(path: Path, values: dict[str, Any]) -> list[str]:
    """What `scripts/misalignment.py` found."""
    rows = values["rows"]

    def cell(found: dict[str, Any], scale: int = 1) -> str:
        numbers = [found["mean"], *([found["over_seeds"][1] - found["mean"]] if found["over_seeds"] else [])]
        return " ± ".join(f"{scale * number:.{2 if scale == 1 else 1}f}" for number in numbers).replace("-", "−")

    words = MISALIGNMENT.format(scenes=values["scenes"], views=values["views"], file=path.name)
    cases = ("as it is", "flipped, and said so", "flipped, without a word")
    table = [
        [
            name,
            cell(row["broken facts"]),
            cell(row["swapped captions"]),
            *(cell(row[case], 100) if case in row else "" for case in cases),
        ]
        for name, row in rows.items()
    ]
    header = ["", "broken facts", "swapped captions", *(f"left or right, {case}" for case in cases)]
    return [words, *markdown(header, table), ""]


def section(path: Path, values: dict[str, Any]) -> list[str]:
    groups, name = values["groups"], values["table"]
    figures = [figure for figure in groups[0]["figures"] if groups[0]["figures"][figure]["kind"] == "rate"]
    shown = columns(figures)
    lines = [f"## {values['title']}", ""]
    held_out = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in values["held_out"].items())
    seeds = len(groups[0]["seeds"])
    others = [f"{group['name']}: {len(group['seeds'])}" for group in groups if len(group["seeds"]) != seeds]
    fewer = f" ({'; '.join(others)})" if others else ""
    settings = {**values["settings"], **groups[0]["settings"]}
    lines += [
        f"`{name}`: model `{settings['model']}`, {settings['image_size']} pixels, batches of {settings['batch_size']}, "
        f"{settings['num_train']:,} training pairs; {seeds} {'seed' if seeds == 1 else 'seeds'}{fewer}; held out: {held_out}. "
        f"All figures: [{path.name}](../results/{path.name}).",
        "",
    ]
    sweep = TABLES[name]
    remarks = [sweep.remark] if sweep.remark else []
    if sweep.tag_scenes:
        remarks.insert(
            0,
            f"Every arm starts from the same image tower, which has learnt the tags of {sweep.tag_scenes:,} other scenes.",
        )
    lines += [" ".join(remarks), ""] if remarks else []
    tabled = [*shown, *(["retrieval.modality_gap"] if "retrieval.modality_gap" in groups[0]["figures"] else [])]
    papers = {label: arm.paper for label, arm in TABLES[name].arms.items()}
    has_paper = any(papers.get(group["name"]) is not None for group in groups)
    header = ["", *(["the paper"] if has_paper else []), "pairs seen", "time", *map(title, tabled)]
    chances = [percent(groups[0]["figures"][figure]["chance"]) for figure in tabled]
    rows = [["chance", *([""] if has_paper else []), "", "", *chances]]
    for group in groups:
        cost = f"{group['seconds'] / groups[0]['seconds']:.2f} ×"
        paper = papers.get(group["name"])
        rows.append(
            [
                group["name"],
                *([f"{paper:g}" if paper is not None else ""] if has_paper else []),
                f"{round(group['samples_seen']):,}",
                cost,
                *(value(group["figures"][f]) for f in tabled),
            ]
        )
    lines += markdown(header, rows)
    lines += [""]
    if not values.get("efficiency"):  # arms on fractions are curves, further down
        drawn = [figure for figure in shown if not figure.endswith(".r1")]
        triples = {g["name"]: [interval(g["figures"][f]) for f in drawn] for g in groups}
        chance = [groups[0]["figures"][f]["chance"] for f in drawn]
        compare_figures.points([title(f) for f in drawn], triples, chance).savefig(ROOT / f"docs/{name}.png", dpi=110)
        lines += [f"![{values['title']}, with intervals]({name}.png)", ""]
    lines += [
        f"Differences to {groups[0]['name']}, in points of per cent, with their intervals over items; over seeds:",
        "",
    ]
    rows = [[group["name"], *(difference(group["figures"][f]) for f in shown)] for group in groups[1:]]
    lines += markdown(["", *map(title, shown)], rows)
    if kinds := [figure for figure in figures if figure.startswith("foils.") and figure.endswith(".accuracy")]:
        lines += ["", "True or false captions, by what the false one is wrong about (chance 50):", ""]
        rows = [[group["name"], *(value(group["figures"][f]) for f in kinds)] for group in groups]
        lines += markdown(["", *(title(f).removeprefix("Foils: ") for f in kinds)], rows)
    for task, of_task in values.get("efficiency", {}).items():
        level = groups[0]["figures"][f"{task}.image_to_text.r10"]["chance"]
        lines += data_efficiency(name, task, of_task, values["by_fraction"][task], level)
    if values.get("claims"):
        rows = [
            [
                claim["claim"],
                title(claim["figure"]),
                signed(claim["difference"]),
                span(claim["over_items"]),
                span(claim["over_seeds"]),
                f"**{claim['verdict']}**",
            ]
            for claim in values["claims"]
        ]
        lines += ["", *correlations(name, groups, {claim["figure"]: None for claim in values["claims"]}), ""]
        lines += markdown(["claim", "figure", "difference", "over items", "over seeds", ""], rows)
    return [*lines, ""]


def data_efficiency(
    name: str, task: str, found: dict[str, Any], by_fraction: dict[str, Any], chance: float
) -> list[str]:
    """How many fewer pairs each method needs, with the curves."""
    scores = {
        method: {float(fraction): of_seed for fraction, of_seed in curve.items()}
        for method, curve in by_fraction.items()
    }
    what = "of the pairs held out" if task == "retrieval" else f"of {tested_on(task)}"
    compare_figures.by_fraction(scores, title=f"R@10 {what}, both directions").savefig(
        ROOT / f"docs/{name}-{task}.png", dpi=110
    )
    clip = list(scores["clip"][1.0].values())
    rows = [[method, factor(one)] for method, one in found.items()]
    return [
        "",
        f"Data-efficiency factor, by R@10 {what} (the mean of both directions): how many times fewer pairs than CLIP for CLIP's score on "
        "all of them, straight between the logarithms of the fractions; below 1, CLIP needs fewer for the method's score. ≥ and ≤: the "
        "curves meet beyond the fractions tried. CLIP's score on all pairs is "
        f"{100 * sum(clip) / len(clip):.1f}, chance {percent(chance)}.",
        "",
        *markdown(["", "factor (over seeds)"], rows),
        "",
        f"![R@10 {what} by the share of the pairs]({name}-{task}.png)",
    ]


def correlations(name: str, groups: list[dict[str, Any]], figures: Iterable[str]) -> list[str]:
    """Of our means with the paper's column, and what the claims are."""
    sweep = TABLES[name]
    comparison = Comparison(
        [Group(**{**g, "figures": {f: Figure(**x) for f, x in g["figures"].items()}}) for g in groups], {}, {}
    )
    found = {figure: rank_correlation(sweep, comparison, figure) for figure in figures}
    said = [f"{title(figure)} {value:.2f}".replace("-", "−") for figure, value in found.items() if value is not None]
    lines = [f"The paper's column: {sweep.paper}."] if sweep.paper else []
    if said:
        lines[-1] += f" Rank correlation with it (Spearman's, over the rows that have both): {'; '.join(said)}."
    return [*lines, "", "Claims, the papers' and what controls are there for:"]


def columns(figures: list[str]) -> list[str]:
    """What fits a page: R@1 and R@10 of both directions, zero-shot and probe, and the foils' mean."""
    return [figure for figure in figures if figure.endswith((".r1", ".r10", ".acc1", ".mean_per_kind"))]


def interval(figure: dict[str, Any]) -> tuple[float, float, float]:
    return (figure["value"], *(figure["over_seeds"] or figure["over_items"] or [figure["value"]] * 2))


def value(figure: dict[str, Any]) -> str:
    middle, _, high = interval(figure)
    if figure["kind"] == "distance":
        return f"{middle:.2f} ± {high - middle:.2f}"
    return f"{100 * middle:.1f} ± {100 * (high - middle):.1f}"


def difference(figure: dict[str, Any]) -> str:
    known = [
        span(figure[f"difference_over_{what}"]) for what in ("items", "seeds") if figure[f"difference_over_{what}"]
    ]
    return f"{signed(figure['difference'])} ({'; '.join(known)})"


def signed(number: float) -> str:
    return f"{100 * number:+.1f}".replace("-", "−")


def span(edges: list[float] | None) -> str:
    return "–" if edges is None else f"{signed(edges[0])} to {signed(edges[1])}"


def percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.2g}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
