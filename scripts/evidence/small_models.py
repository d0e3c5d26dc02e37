"""The page of results/small-models.json, the trials of `python scripts/small_models.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from coalign.evaluation.metrics import over_runs
from evidence.text import Values, commands, page, paragraph, results_link, table
from evidence.titles import METHODS, TITLES

LR = 2e-3  # the default
# the name of the data in results/ -> what it is, and where
DATA = {
    "emoji": ("Emoji", "data/emoji/emoji.jsonl"),
    "openclipart": ("Open Clip Art", "data/openclipart"),
}
SPLITS = {"retrieval": "held-out images", "retrieval_test": "images of the test split"}
METRICS = {
    "image_to_text.r1": "Image → text R@1",
    "image_to_text.r10": "R@10",
    "text_to_image.r1": "Text → image R@1",
    "text_to_image.r10": "R@10",
}
CHOICE = """
Below 20,000 pairs, the default model is `tiny`, the cheapest whose retrieval on held-out pairs is not worse than with the others. On the
other vendor's drawings of the emoji it is behind: there, the previous `tiny` is the best. open_clip builds the image encoders of `tiny` and
`small`, so models trained with them can be exported to it. `small` has a ModifiedResNet and a wider text encoder; it is for 20,000 pairs
and more, and was not compared at that size.
"""
NAMES = METHODS | {"filip": "FILIP"}
RATES = """
Every method has the same budget: its default model, and the defaults but for the epochs. The values are the mean of R@1, R@5 and R@10 in
both directions in %, over seeds; in brackets, the lowest and the highest. No method is clearly better with another rate than the default,
0.002, which is the best on average. More epochs may favor other rates.
"""


def small_models_page(trials: Sequence[Values]) -> str:
    """Returns the page: a table of image encoders per dataset and split, and one of learning rates per dataset."""
    rates = [trial for trial in trials if len(_rates(trials, trial)) > 1]
    towers = [trial for trial in trials if trial not in rates]
    name = "small-models"
    return page(
        f"# {TITLES[name]}",
        "Which image encoder is worth its time on few pairs?",
        paragraph(CHOICE),
        paragraph(
            f"CLIP trains each model at {_values(towers, 'image_size')} pixels with a learning rate of {LR:g} and the other defaults. A "
            "candidate is a model file: `tiny.json` with another `vision_cfg`. Trials that are in the file of results are not repeated."
        ),
        commands(*_commands(towers, [_file(name) for name in _unique(towers, "model")])),
        paragraph(
            "R@1 and R@10 in %: mean over seeds, ± half the width of the 95 % t-interval over seeds if there are several. *Parameters* are "
            "those of the whole model. *Time* is processor time of the whole run on one thread, with data loading and evaluation, relative "
            "to the previous `tiny`, over the seeds that both have."
        ),
        *_sections(towers, "Image encoder", _tower, ("Parameters", "Time"), _costs),
        *_rate_sections(rates),
        "## All values",
        f"{results_link(name)} has all trials, with their towers.",
    )


def _sections(
    trials: Sequence[Values],
    title: str,
    label: Callable[[Values], str],
    columns: Sequence[str],
    cells: Callable[[Sequence[Values], Sequence[Values]], list[str]],
) -> list[str]:
    """Returns a heading per dataset and a table per split, with a row per `label`. `cells` computes `columns` from a row's trials and the
    first row's."""
    blocks = []
    for data in _unique(trials, "data"):
        of_data = [trial for trial in trials if trial["data"] == data]
        blocks.append(f"## {DATA[data][0]}, {_values(of_data, 'epochs')} epochs")
        for task, split in SPLITS.items():
            evaluated = [trial for trial in of_data if task in trial["metrics"]]
            groups = {name: [t for t in evaluated if label(t) == name] for name in dict.fromkeys(map(label, evaluated))}
            first = [trial for trial in of_data if label(trial) == label(of_data[0])]
            rows = [
                [name, *cells(group, first), *(_recall(group, task, metric) for metric in METRICS), f"{len(group)}"]
                for name, group in groups.items()
            ]
            if rows:
                blocks += [f"{evaluated[0]['images'][task]:,} {split}:"]
                blocks += [table([title, *columns, *METRICS.values(), "Seeds"], rows)]
    return blocks


def _tower(trial: Values) -> str:
    """Describes an image encoder by its vision_cfg."""
    tower, name = trial["tower"], f" (`{trial['model']}`)" if trial["model"] == "tiny" else ""
    if "timm_kwargs" in tower:
        shape = "; ".join(f"{key} {', '.join(map(str, value))}" for key, value in tower["timm_kwargs"].items())
        return f"timm's `{tower['timm_model_name']}` with {shape} (the previous `tiny`)"
    if "timm_model_name" in tower:
        return f"timm's `{tower['timm_model_name']}`{name}"
    layers = ", ".join(map(str, tower["layers"]))
    return f"open_clip's ModifiedResNet with layers {layers}; width {tower['width']}{name}"


def _rate_sections(trials: Sequence[Values]) -> list[str]:
    """Returns a heading per dataset, and a table of mean recall with a row per method and a column per learning rate."""
    blocks = []
    for data in _unique(trials, "data"):
        of_data = [trial for trial in trials if trial["data"] == data]
        rates = sorted({trial["lr"] for trial in of_data})
        rows = []
        for name in _unique(of_data, "recipe"):
            own = [trial for trial in of_data if trial["recipe"] == name]
            cells = [_mean_recall([trial for trial in own if trial["lr"] == rate]) for rate in rates]
            rows.append([NAMES[name], *cells, f"{len({trial['seed'] for trial in own})}"])
        blocks += [
            f"## Learning rates: {DATA[data][0]}, {_values(of_data, 'epochs')} epochs",
            paragraph(RATES),
            commands(*_commands(of_data, ["default"])),
            f"{of_data[0]['images']['retrieval']:,} held-out images:",
            table(["Method", *(f"{rate:g}" for rate in rates), "Seeds"], rows),
        ]
    return blocks


def _mean_recall(group: Sequence[Values]) -> str:
    values = [100 * fmean(trial["metrics"]["retrieval"].values()) for trial in group]
    return f"{fmean(values):.1f}" + (f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else "")


def _costs(group: Sequence[Values], first: Sequence[Values]) -> list[str]:
    """Returns parameters, and the time relative to the first row's runs of the same seeds, if both evaluated the same splits."""
    pairs = [
        (trial["seconds"], other["seconds"])
        for trial in group
        for other in first
        if trial["seed"] == other["seed"] and trial["images"] == other["images"]
    ]
    ratio = f"{sum(own for own, _ in pairs) / sum(other for _, other in pairs):.2f}" if pairs else ""
    return [f"{group[0]['parameters'] / 1e6:.1f} M", ratio]


def _recall(group: Sequence[Values], task: str, metric: str) -> str:
    values = [100 * trial["metrics"][task][metric] for trial in group]
    mean, edges = sum(values) / len(values), over_runs(values)
    return f"{mean:.1f}" + (f" ± {edges[1] - mean:.1f}" if edges else "")


def _file(model: str) -> str:
    return model if model == "tiny" else f"{model}.json"


def _commands(trials: Sequence[Values], models: Sequence[str]) -> list[str]:
    """Returns the command of each dataset."""
    lines = []
    for data in _unique(trials, "data"):
        own = [trial for trial in trials if trial["data"] == data]
        test = " --test-splits test" if "retrieval_test" in own[0]["metrics"] else ""
        options = [
            f"python scripts/small_models.py {DATA[data][1]}{test}",
            f"--recipes {' '.join(_unique(own, 'recipe'))} --lrs {_values(own, 'lr', ' ')}",
            f"--epochs {_values(own, 'epochs')} --seeds {_values(own, 'seed', ' ')}",
            f"--models {' '.join(models)}",
            "--out results/small-models.json",
        ]
        lines.append(" \\\n  ".join(options))
    return lines


def _rates(trials: Sequence[Values], trial: Values) -> set[float]:
    """Returns the learning rates tried with a trial's model, recipe, data and epochs."""
    keys = ("model", "recipe", "data", "epochs")
    return {other["lr"] for other in trials if all(other[key] == trial[key] for key in keys)}


def _unique(trials: Sequence[Values], key: str) -> list[str]:
    return list(dict.fromkeys(trial[key] for trial in trials))


def _values(trials: Sequence[Values], key: str, separator: str = " or ") -> str:
    return separator.join(f"{value:g}" for value in sorted({trial[key] for trial in trials}))
