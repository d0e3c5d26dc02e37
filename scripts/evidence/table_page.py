"""The page of one table of experiments, from the table.json of `coalign reproduce`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coalign.data.scenes.captions import KINDS
from coalign.experiments.tables.registry import TABLES
from coalign.experiments.tables.reproduce import R10, rank_correlation
from coalign.formatting import percent
from coalign.methods.table import Table
from coalign.report.compare_page import ComparedMetric, Comparison, Group
from evidence.text import (
    Values,
    bullet,
    chance_text,
    commands,
    difference_text,
    factor_text,
    metric_title,
    minus,
    page,
    paragraph,
    results_link,
    shared_settings,
    signed,
    span_text,
    table,
    value_text,
)
from evidence.titles import HEADLINE, METHODS, TITLES, link

# of each split
RETRIEVAL = tuple(f"{side}.r{k}" for side in ("image_to_text", "text_to_image") for k in (1, 10))
# of the held-out samples
GAP = "retrieval.modality_gap"
OTHER_METRICS = ("foils.mean_per_kind", "zeroshot.acc1", "probe.acc1", GAP)
RELATIONS = ("bigger_than", "side", "left_of", "above")  # kinds of foils; the other kinds are attributes and counts
SPLITS = {"held out": "Held-out pairs", "test": "Test split", "combinations": "Combinations", "shifted": "Shifted"}
TEST_IMAGES = "301 images of the same concepts by other artists"
SHIFT = "darker, more blurred, with other background patterns and more clutter"
SPLIT_TEXTS = {
    "test": f"*Test*: {TEST_IMAGES}.",
    "combinations": "*Combinations*: 2,000 scenes with held-out combinations of shapes and colors (the compositional split).",
    "shifted": f"*Shifted*: 2,000 scenes under distribution shift: {SHIFT}.",
}
# the name of the data in results/ -> its test split, if it is not TEST_IMAGES
OTHER_TESTS = {
    "emoji.jsonl": "the same 1,918 emoji as drawn by another vendor, OpenMoji",
    "metadata.jsonl": "the same 1,918 emoji as drawn by another vendor, OpenMoji",
    "concepts.jsonl": "902 drawings of 451 emoji that are in no training pair",
}
# the name of the data in results/ -> what it is, and its --data
DATA = {
    "oca96": ("Open Clip Art", "data/openclipart"),
    "emoji.jsonl": ("emoji of one vendor, Twemoji", "data/emoji/metadata.jsonl"),
    "metadata.jsonl": ("emoji of one vendor, Twemoji", "data/emoji/metadata.jsonl"),
    "concepts.jsonl": ("emoji by Twemoji and OpenMoji", "data/emoji/concepts.jsonl"),
    "style-shift.jsonl": ("two styles of Open Clip Art", "data/openclipart/style-shift.jsonl"),
    "scenes:8192:simple": ("synthetic scenes with simple captions", "scenes:8192:simple"),
}


def table_page(values: Values) -> str:
    """Returns the page of a table: setup, command, values, figure, differences, foils, data efficiency and claims."""
    name = values["table"]
    return page(
        f"# {TITLES[name]}",
        paragraph(f"{first_sentence(values)} {verdicts(values['claims'])}"),
        *setup(values),
        *results(values),
        *differences(values),
        *foils(values),
        *data_efficiency(values),
        *claims(values),
        "## All values",
        paragraph(
            f"{results_link(name)} has all metrics, intervals and settings. [How to read the tables](index.md#how-to-read-the-tables) "
            "explains intervals, differences and claims."
        ),
    )


def first_sentence(values: Values) -> str:
    return f"{TABLES[values['table']].title}."


def verdicts(rows: Sequence[Values]) -> str:
    """Returns how many claims hold, as a sentence."""
    if not rows:
        return ""
    counts = Counter(claim["verdict"] for claim in rows)
    plural = {"holds": "hold", "does not hold": "do not hold", "undecided": "undecided"}
    shown = [f"{counts[each]} {each if counts[each] == 1 else words}" for each, words in plural.items() if counts[each]]
    return f"Claims: {', '.join(shown)}."


def setup(values: Values) -> list[str]:
    """Returns the settings that all arms share, the table's notes, and the commands that train it."""
    sweep, settings, groups = TABLES[values["table"]], shared_settings(values), values["groups"]
    held_out = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in values["held_out"].items())
    what, data = DATA[settings["data"]]
    counts = [len(each["seeds"]) for each in groups]
    exceptions = [f"{each['name']}: {len(each['seeds'])}" for each in groups if len(each["seeds"]) != counts[0]]
    fewer = f" ({', '.join(exceptions)})" if exceptions else ""
    seeds = f"{counts[0]} {'seed' if counts[0] == 1 else 'seeds'} per row{fewer}"
    models = {METHODS[each["method"]]: each["settings"].get("model", settings["model"]) for each in groups}
    others = "".join(f" ({name}: `{model}`)" for name, model in models.items() if model != settings["model"])
    texts = SPLIT_TEXTS | {"test": f"*Test*: {OTHER_TESTS.get(settings['data'], TEST_IMAGES)}."}
    splits = " ".join(texts[split] for split in sweep.test_splits)
    untrained = [name for name in sweep.arms if name not in {each["name"] for each in groups}]
    size = f"{settings['image_size']} pixels" if settings["image_size"] else "its own image size"
    facts = [
        f"Data: {what}. {settings['num_train']:,} training pairs; held out: {held_out}. {splits}",
        f"Model: `{settings['model']}`{others} at {size}.",
        f"Training: {length(sweep, settings)}, batch size {settings['batch_size']}; {seeds}. {sweep.note}",
        *(
            [f"The table also has rows without results here: {', '.join(f'`{name}`' for name in untrained)}."]
            if untrained
            else []
        ),
    ]
    return [
        "## Setup",
        "\n".join(bullet(fact) for fact in facts),
        "To train it again; if interrupted, run it again to resume:",
        commands(*reproduce_commands(values, data)),
    ]


def length(sweep: Table, settings: Values) -> str:
    """Returns where settings and epochs come from."""
    if sweep.search:
        return "settings and length of each arm chosen by a [search](../benchmark.md#settings-chosen-by-a-search)"
    if any(arm.choice for arm in sweep.arms.values()):
        return f"settings and length that the search of {link(HEADLINE)} chose for each method"
    return f"{settings['epochs']:g} epochs"


def reproduce_commands(values: Values, data: str) -> list[str]:
    """Returns the commands that train the table: all arms with the fewest seeds, then those that have more."""
    counts = {each["name"]: len(each["seeds"]) for each in values["groups"]}
    lines = []
    for seeds in sorted(set(counts.values())):
        line = f"coalign reproduce {values['table']} --data {data} \\\n  --out runs/{values['table']} --seeds {seeds} --jobs 2"
        if seeds > min(counts.values()):
            arms = " ".join(f'"{name}"' if " " in name else name for name, count in counts.items() if count >= seeds)
            line += f" \\\n  --arms {arms}"
        lines.append(line)
    return lines


def metric_blocks(values: Values) -> list[tuple[str, list[str]]]:
    """Returns the metrics that the page shows, in tables that fit a narrow screen: by split, and the others."""
    first = values["groups"][0]["metrics"]
    tasks = TABLES[values["table"]].retrieval_tasks
    blocks = [(SPLITS[split], [f"{task}.{metric}" for metric in RETRIEVAL]) for task, split in tasks.items()]
    others = [metric for metric in OTHER_METRICS if metric in first]
    return [*blocks, ("Other metrics", others)]


def column(values: Values, metric: str, heading: str) -> str:
    """Returns a metric's title without its split, which the heading names."""
    title = metric_title(values, metric).removeprefix(f"{heading.split()[0]}: ")
    return title[0].upper() + title[1:]


def results(values: Values) -> list[str]:
    """Returns every arm's metrics, with the paper's value, the samples seen and the time relative to the first arm, and the figure."""
    sweep, groups = TABLES[values["table"]], values["groups"]
    papers = {label: arm.paper for label, arm in sweep.arms.items() if arm.paper is not None}
    has_paper = any(each["name"] in papers for each in groups)
    blocks = ["## Results"]
    for heading, metrics in metric_blocks(values):
        with_paper = has_paper and sweep.headline_metrics[0] in metrics
        with_cost = heading == "Other metrics"
        header = ["", *(["Paper"] if with_paper else []), *(["Samples seen", "Time"] if with_cost else [])]
        header += [column(values, metric, heading) for metric in metrics]
        empty = [""] * (with_paper + 2 * with_cost)
        chances = [chance_text(groups[0]["metrics"][metric]) for metric in metrics]
        rows = [["chance", *empty, *chances]] if any(chances) else []
        for each in groups:
            paper = papers.get(each["name"])
            paper_value = ["" if paper is None else f"{paper:g}"] if with_paper else []
            time = f"{each['seconds'] / groups[0]['seconds']:.2f} ×"
            cost = [f"{round(each['samples_seen']):,}", time] if with_cost else []
            rows.append(
                [each["name"], *paper_value, *cost, *(value_text(each["metrics"][metric]) for metric in metrics)]
            )
        blocks += [f"### {heading if metrics else 'Cost'}", table(header, rows)]
    unit = "In %, except the modality gap." if GAP in groups[0]["metrics"] else "In %."
    paper_text = f"The paper's column is {sweep.paper_metric}; compare only its order." if has_paper else ""
    blocks.insert(1, paragraph(f"{unit} {paper_text}"))
    if not values["efficiency"]:
        blocks += ["### Figure", f"![{TITLES[values['table']]}, with intervals]({values['table']}.png)"]
    return blocks


def differences(values: Values) -> list[str]:
    """Returns the differences of all arms from the first."""
    groups = values["groups"]
    blocks = [
        f"## Differences from `{groups[0]['name']}`",
        "In percentage points, with 95 % CI over items; over seeds.",
    ]
    for heading, metrics in metric_blocks(values):
        shown = [metric for metric in metrics if groups[0]["metrics"][metric]["kind"] == "rate"]
        if shown:
            rows = [
                [each["name"], *(difference_text(each["metrics"][metric]) for metric in shown)] for each in groups[1:]
            ]
            blocks += [f"### {heading}: differences", table(["", *(column(values, m, heading) for m in shown)], rows)]
    return blocks


def foils(values: Values) -> list[str]:
    """Returns the accuracy on each kind of foils, if the table has them."""
    kinds = {
        kind: f"foils.{kind}.accuracy" for kind in KINDS if f"foils.{kind}.accuracy" in values["groups"][0]["metrics"]
    }
    if not kinds:
        return []
    blocks = ["## Foils", "Accuracy in %, by the kind of fact that is false (chance 50)."]
    for relations in (False, True):
        metrics = [metric for kind, metric in kinds.items() if (kind in RELATIONS) == relations]
        rows = [[each["name"], *(value_text(each["metrics"][m]) for m in metrics)] for each in values["groups"]]
        blocks.append(table(["", *(metric_title(values, m).removeprefix("Foils: ") for m in metrics)], rows))
    return blocks


def data_efficiency(values: Values) -> list[str]:
    """Returns the data-efficiency factors on each split, with the curves over fractions of the pairs."""
    if not values["efficiency"]:
        return []
    blocks = [
        "## Data efficiency",
        paragraph(
            "The factor is how many times fewer pairs than CLIP a method needs to reach CLIP's score on all pairs, interpolated linearly "
            "in the logarithm of the fraction. The score is R@10, mean of both directions. Below 1, CLIP needs fewer pairs to reach the "
            "method's score. ≥ and ≤: the curves cross beyond the fractions tried."
        ),
    ]
    for task, by_method in values["efficiency"].items():
        heading = SPLITS[TABLES[values["table"]].retrieval_tasks[task]]
        clip = list(values["by_fraction"][task]["clip"]["1.0"].values())
        chance = values["groups"][0]["metrics"][f"{task}.{R10}"]["chance"]
        blocks += [
            f"### {heading}: factors",
            f"CLIP's score on all pairs is {percent(sum(clip) / len(clip))}, chance {percent(chance)}.",
            table(["", "Factor (95 % CI)"], [[m, factor_text(found)] for m, found in by_method.items()]),
            f"![{heading}: R@10 against the fraction of the pairs]({values['table']}-{task}.png)",
        ]
    return blocks


def claims(values: Values) -> list[str]:
    """Returns the claims with their verdicts, and the rank correlation of our means with the paper's values."""
    if not values["claims"]:
        return []
    over, header = "over items and over seeds", ["Over items", "Over seeds"]
    rows = [_separate_intervals(values, claim) for claim in values["claims"] if "over_items" in claim]
    if not rows:
        over, header = (
            "over seeds and items (hierarchical bootstrap), not corrected for the number of claims",
            ["95 % CI", "*p*"],
        )
        rows = [_one_interval(claim) for claim in values["claims"]]
    return [
        "## Claims",
        paragraph(
            f"Of the paper, and of the controls. Differences in percentage points, with 95 % CI {over}. {correlations(values)}"
        ),
        table(["Claim", "Metric", "Difference", *header, ""], rows),
    ]


def _separate_intervals(values: Values, claim: Values) -> list[str]:
    """The row of a claim that is decided by its intervals over items and over seeds, as in older results."""
    spans = [span_text(claim[f"over_{unit}"]) for unit in ("items", "seeds")]
    title = metric_title(values, claim["metric"])
    return [claim["claim"], title, signed(claim["difference"]), *spans, f"**{claim['verdict']}**"]


def _one_interval(claim: Values) -> list[str]:
    p = "–" if claim["p"] is None else f"{claim['p']:.3f}"
    spans = [span_text(claim["interval"]), p]
    return [claim["claim"], claim["title"], signed(claim["difference"]), *spans, f"**{claim['verdict']}**"]


def correlations(values: Values) -> str:
    """Returns the rank correlation of our means with the paper's values, as a sentence."""
    sweep = TABLES[values["table"]]
    if not sweep.paper_metric:
        return ""
    groups = [
        Group(**{**each, "metrics": {name: ComparedMetric(**metric) for name, metric in each["metrics"].items()}})
        for each in values["groups"]
    ]
    comparison = Comparison(groups, {}, {})
    by_metric = {claim["metric"]: rank_correlation(sweep, comparison, claim["metric"]) for claim in values["claims"]}
    found = [
        f"{metric_title(values, m)} {minus(f'{value:.2f}')}" for m, value in by_metric.items() if value is not None
    ]
    if not found:
        return ""
    return f"Rank correlation with the paper's column (Spearman's, over the rows that have both): {'; '.join(found)}."


def summary_line(values: Values) -> str:
    """Returns the table's entry in the list of pages."""
    return f"{link(values['table'])}: {first_sentence(values)} {verdicts(values['claims'])}"
