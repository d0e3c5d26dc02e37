"""The summary page: which method, differences from CLIP, data efficiency, claims, and the list of pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coalign.experiments.tables.registry import STEP_COST, TABLES
from coalign.experiments.tables.reproduce import R10
from evidence.table_page import SHIFT, TEST_IMAGES, summary_line
from evidence.text import (
    Values,
    bold_if_decided,
    bullet,
    chance_text,
    factor_text,
    group,
    metric_title,
    model_note,
    page,
    paragraph,
    shared_settings,
    signed,
    split_note,
    table,
    value_text,
)
from evidence.titles import ABLATIONS, COMPARISONS, INDEX, METHODS, link

HELD_OUT, TEST, SHIFTED = f"retrieval.{R10}", f"retrieval_test.{R10}", f"retrieval_shifted.{R10}"
STRONG_VIEWS, LONGER = "clip, DeCLIP's views", "CLIP, twice the epochs"  # controls
# columns of the first table: what, table, metric
COLUMNS = (
    ("[Open Clip Art](two-towers-openclipart.md)", "two-towers-openclipart", HELD_OUT),
    ("[Two of its styles](style-shift-openclipart.md)", "style-shift-openclipart", HELD_OUT),
    ("The same runs on drawings by other artists", "style-shift-openclipart", TEST),
    ("[Hard scenes](fractions-scenes.md)", "fractions-scenes", HELD_OUT),
)
INTRODUCTION = """
Each experiment has a page with its settings, all intervals and the command that trains it again. This page sums them up: which method to
train, how each compares with CLIP, and which claims of the papers hold. [How to read the tables](#how-to-read-the-tables) explains ±,
intervals and claims. All models here are small and all runs are short: two million
parameters, minutes on two cores. They show the start of learning, not the papers' scale.
"""
ADVICE = """
**With a few thousand pairs, start from [pretrained encoders](pretrained-openclipart.md): locked, with new heads, they are far ahead of
training from scratch.** The rest of this page compares methods from scratch. **There, train CLIP first: it is the cheapest. Try UniCLIP or
MCD if you have few pairs and will use the model on images that look different from them. Then let
[`coalign benchmark`](../benchmark.md) decide on your own pairs.** FILIP is not in these tables yet.
"""
READING = """
- **Metrics** are means over seeds, in % unless stated otherwise. **±** is half the width of the 95 % t-interval over seeds: how much the
  mean would vary with other seeds. With a single seed, it is half the width of the bootstrap interval over held-out items.
- **Differences** have two 95 % intervals: over held-out items (paired bootstrap), and over seeds (Welch's t).
- A **claim** comes from a paper or from the purpose of a control. It *holds* if both intervals are above zero, and *does not hold* if both
  are below: the reverse is observed. All other claims are *undecided*. No correction for multiple comparisons is applied.
- **The paper's column** is measured on another task and other data; only its order is compared.
- **Time** is wall-clock time relative to the first row, on a shared machine. Rows at "CLIP's time" train for CLIP's time, computed from
  the cost per step relative to CLIP on an idle core: {costs}.
- **OneR** is evaluated by its projector in these tables. Its default is now the similarity that its loss trains (`similarity`).
- **Equal captions** of several images are several results in these tables. They are now one, since every model gives them equal
  similarities. This changes R@5, R@10 and chance of image → text: a CLIP run on Open Clip Art has R@10 44.3 instead of 44.0 % held out
  (chance 1.6 instead of 1.7 %), and 79.4 instead of 74.9 % on the test split of the two styles (chance 4.3 instead of 9.6 %).
- **The modality gap** is the distance between the centroids of image and text embeddings, 0 to 2.
- **Open Clip Art in two styles** (`style-shift.jsonl`): a tenth is held out; *test* is {test}.
- **Scenes**: the captions are *hard*: [each states one to three facts](../data.md#scenes). 2,000 are held out. *Combinations* are 2,000
  scenes with held-out combinations of shapes and colors (the compositional split). *Shifted* are 2,000 scenes under distribution shift:
  {shift}.
"""


@dataclass(frozen=True)
class Setting:
    """One table and split in which CLIP is compared with other methods."""

    table: str
    num_train: int
    split: str
    metrics: Mapping[str, Values]  # by recipe


def summary_page(tables: Mapping[str, Values]) -> str:
    costs = "; ".join(
        f"on {data} " + ", ".join(f"{name} {cost} ×" for name, cost in by_method.items())
        for data, by_method in STEP_COST.items()
    ).replace("on openclipart", "on Open Clip Art")
    reading = READING.format(costs=costs, test=TEST_IMAGES, shift=SHIFT)
    return page(
        f"# {INDEX}",
        paragraph(INTRODUCTION),
        *which_method(tables),
        *differences_from_clip(tables),
        *data_efficiency(tables),
        *claims(tables),
        *experiments(tables),
        "## How to read the tables",
        "\n".join(bullet(item) for item in reading.strip().removeprefix("- ").split("\n- ")),
    )


def which_method(tables: Mapping[str, Values]) -> list[str]:
    """Returns the advice, each method's R@10 and what follows from the tables."""
    header = [""]
    for what, name, metric in COLUMNS:
        settings = shared_settings(tables[name])
        epochs = "" if metric == TEST else f", {settings['num_train']:,} pairs, {settings['epochs']:g} epochs"
        header.append(what + epochs)
    first = [tables[name]["groups"][0]["metrics"][metric] for _, name, metric in COLUMNS]
    rows = [["Chance", *(chance_text(metric) for metric in first), ""]]
    costs = {"clip": 1.0, **STEP_COST["openclipart"]}
    for recipe, label in METHODS.items():
        cells = []
        for _, name, metric in COLUMNS:
            found = [each["metrics"][metric] for each in tables[name]["groups"] if each["name"] == recipe]
            cells.append(bold_if_decided(value_text(found[0]), found[0]) if found else "")
        rows.append([label, *cells, f"{costs[recipe]:g}" if recipe in costs else ""])
    seeds = sorted({len(each["seeds"]) for _, name, _ in COLUMNS for each in tables[name]["groups"]})
    return [
        "## Which method?",
        paragraph(ADVICE),
        paragraph(
            f"Image → text R@10 in %, at equal samples seen; mean over {' or '.join(map(str, seeds))} seeds, ± 95 % CI. **Bold**: better "
            "or worse than CLIP both over held-out items and over seeds."
        ),
        table([*header, "Cost per step, 48 pixels"], rows),
        paragraph(split_note(tables["two-towers-openclipart"])),
        paragraph(model_note(tables["two-towers-openclipart"])),
        "\n".join(bullet(text) for text in findings(tables)),
    ]


def findings(tables: Mapping[str, Values]) -> list[str]:
    """Returns what follows from the tables, with values."""

    def value(name: str, arm: str, metric: str) -> float:
        return 100 * group(tables[name], arm)["metrics"][metric]["value"]

    def text(name: str, arm: str, metric: str) -> str:
        return value_text(group(tables[name], arm)["metrics"][metric])

    def gain(name: str, arm: str, over: str, metric: str) -> str:
        return signed((value(name, arm, metric) - value(name, over, metric)) / 100)

    openclipart, styles, views, fractions = (
        "two-towers-openclipart",
        "style-shift-openclipart",
        "views-scenes",
        "fractions-scenes",
    )
    equal_time = [value(openclipart, f"{name}, CLIP's time", HELD_OUT) for name in STEP_COST["openclipart"]]
    quarter = {name: value(fractions, f"{name}, 25 %", HELD_OUT) for name in ("clip", "declip")}
    shifted = {name: value(fractions, f"{name}, 25 %", SHIFTED) for name in ("clip", "declip")}
    return [
        "**The papers' order** (CLIP < SLIP < DeCLIP < UniCLIP < MCD) is approached only in the third column: few pairs, many epochs, and "
        f"a distribution shift. There, CLIP reaches {text(styles, STRONG_VIEWS, TEST)} with DeCLIP's strong views, "
        f"and {text('declip-openclipart', LONGER, TEST)} with these views and twice the epochs "
        f"({len(group(tables['declip-openclipart'], LONGER)['seeds'])} seeds), so strong views and longer training explain "
        "much of the gain.",
        f"**At equal CPU time**, the four methods reach {min(equal_time):.0f} to {max(equal_time):.0f} in the first column; CLIP has "
        f"{value(openclipart, 'clip', HELD_OUT):.0f}.",
        f"**On hard scenes**, all runs of {link(fractions)} and {link(views)} start from an image encoder pretrained on the tags of other "
        "scenes. Contrasting images with images hurts there: UniCLIP reaches "
        f"{text(views, '1 weak view', HELD_OUT)} with one weak view and {text(views, 'UniCLIP', HELD_OUT)} with three views (both at the "
        "temperature of `views-scenes`). On all pairs, CLIP is also ahead of every method on held-out combinations and under distribution "
        "shift. On a quarter of the pairs, for the same number of steps, CLIP falls from "
        f"{value(fractions, 'clip', HELD_OUT):.1f} to {quarter['clip']:.1f}, but DeCLIP only from "
        f"{value(fractions, 'declip', HELD_OUT):.1f} to {quarter['declip']:.1f}; under distribution shift they are level "
        f"({shifted['clip']:.1f} and {shifted['declip']:.1f}).",
        "**Which part of a method helps** is mostly undecided with 3 seeds; [Claims](#claims) has the exceptions, such as "
        "UniCLIP's strong views "
        f"({text('uniclip-views-openclipart', 'UniCLIP', TEST)} on drawings by other artists, against "
        f"{text('uniclip-views-openclipart', '3 weak views', TEST)} with three weak views), and on hard scenes MCD's whole loss over "
        "MP-NCE alone "
        f"({gain(views, 'MCD', 'MP-NCE', HELD_OUT)}), most of which its ramp explains "
        f"({gain(views, 'MP-NCE, ramp only', 'MP-NCE', HELD_OUT)} without the distillation).",
    ]


def compared_tables(tables: Mapping[str, Values]) -> list[Setting]:
    """Returns the tables and splits in which at least two methods are compared with CLIP."""
    found = []
    for name, values in tables.items():
        arms = TABLES[name].arms
        methods = {
            each["name"]: each["metrics"] for each in values["groups"] if each["name"] == arms[each["name"]].recipe
        }
        for task, split in TABLES[name].retrieval_tasks.items():
            metric = f"{task}.{R10}"
            if len(methods) > 2 and metric in methods.get("clip", {}):
                num_train = shared_settings(values)["num_train"]
                found.append(
                    Setting(name, num_train, split, {recipe: metrics[metric] for recipe, metrics in methods.items()})
                )
    return found


def other_methods(settings: Sequence[Setting]) -> list[str]:
    found = {name for each in settings for name in each.metrics}
    return [name for name in METHODS if name in found and name != "clip"]


def differences_from_clip(tables: Mapping[str, Values]) -> list[str]:
    settings = compared_tables(tables)
    others = other_methods(settings)
    rows = []
    for each in settings:
        cells = [
            bold_if_decided(signed(each.metrics[name]["difference"]), each.metrics[name])
            if name in each.metrics
            else ""
            for name in others
        ]
        rows.append(
            [f"{link(each.table)}, {each.split}", f"{each.num_train:,}", value_text(each.metrics["clip"]), *cells]
        )
    return [
        "## Difference from CLIP",
        paragraph(
            "Image → text R@10 at equal samples seen: CLIP's value in %, and the other methods' differences from it in percentage points. "
            "**Bold**: the intervals over items and over seeds both exclude zero. The plot shows the intervals over seeds."
        ),
        "![Each method's difference from CLIP](beside-clip.png)",
        table(["", "Pairs", "clip", *others], rows),
    ]


def data_efficiency(tables: Mapping[str, Values]) -> list[str]:
    factors: list[tuple[str, Mapping[str, Any]]] = [
        (f"{link(name)}, {TABLES[name].retrieval_tasks[task]}", by_method)
        for name, values in tables.items()
        for task, by_method in values["efficiency"].items()
    ]
    methods = list(dict.fromkeys(method for _, by_method in factors for method in by_method))
    return [
        "## Fewer pairs",
        paragraph(
            "How many times fewer pairs than CLIP each method needs to reach CLIP's score on all pairs (R@10, mean of both directions, "
            "95 % CI over seeds). ≥ and ≤: beyond the fractions tried. On drawings by other artists, CLIP's score on all pairs is close to "
            "chance, so a factor there says little more than that the method beats chance."
        ),
        table(["", *methods], [[label, *(factor_text(found.get(m)) for m in methods)] for label, found in factors]),
    ]


def claims(tables: Mapping[str, Values]) -> list[str]:
    """Returns the number of claims by verdict, and those that are decided."""
    verdicts = Counter(claim["verdict"] for values in tables.values() for claim in values["claims"])
    blocks = [
        "## Claims",
        paragraph(
            f"Of {verdicts.total()} claims, counting each metric separately, {verdicts['holds']} hold, {verdicts['does not hold']} do not "
            f"hold (the reverse is observed), and {verdicts['undecided']} are undecided. The decided claims, with differences in "
            "percentage points:"
        ),
    ]
    for verdict, heading in (("holds", "Claims that hold"), ("does not hold", "Claims that do not hold")):
        lines = []
        for name, values in tables.items():
            decided = [claim for claim in values["claims"] if claim["verdict"] == verdict]
            texts = [f"{c['claim']}: {metric_title(values, c['metric'])} {signed(c['difference'])}" for c in decided]
            lines += [bullet(link(name)), *(bullet(text, "    ") for text in texts)] if decided else []
        blocks += [f"### {heading}", "\n".join(lines)]
    return blocks


def experiments(tables: Mapping[str, Values]) -> list[str]:
    """Returns links to all pages, with one sentence each."""
    missing = [name for name in TABLES if name not in tables]
    others = [
        f"{link('plan')}: the claims that the next experiments test, chosen before training.",
        f"{link('clip-openclipart')}: one CLIP model, trained for 30 epochs with the default settings, 3 seeds.",
        f"{link('detection')}: does a pretrained image encoder help a detector?",
        f"{link('misalignment')}: do models trained on scenes detect views and captions that do not match?",
        f"{link('oner-mct')}: why are they behind CLIP here?",
        f"{link('small-models')}: the default models below 100,000 pairs, compared with others of their size.",
        f"{link('speed')}: time and memory, compared with open_clip, CLIP_benchmark and SLIP's image pipeline.",
    ]
    return [
        "## Experiments",
        "### Comparisons of methods",
        "\n".join(bullet(summary_line(tables[name])) for name in COMPARISONS),
        "### Ablations",
        "\n".join(bullet(summary_line(tables[name])) for name in ABLATIONS),
        paragraph(f"Defined, but not trained yet: {', '.join(f'`{name}`' for name in missing)}.") if missing else "",
        "### Other measurements",
        "\n".join(bullet(text) for text in others),
    ]
