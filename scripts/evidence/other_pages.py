"""The pages of scripts: misalignment and transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evidence.text import Values, bullet, minus, page, paragraph, percents, results_link, table
from evidence.titles import ARMS, TABLE_TITLES, TITLES, link

MISALIGNMENT = """
- *Broken facts*: Spearman's correlation, over {scenes} scenes with {views} strong views each, between two ratios: the view's distance to
  its caption over the full image's distance, and the fraction of the caption's facts that the view breaks, computed from its augmentation
  parameters. 0 means no relation. *Another view's parameters*: given to a head that takes them; if nothing changes, it does not use them.
- *Swapped captions*: area under the ROC curve of detecting, by distance, the 10 % of 2,000 pairs whose captions were swapped. 0.5 is
  chance.
- *Left or right*: accuracy in % of choosing the caption that is true of the original image, given the original image, the flipped image
  with the flip in its augmentation parameters, and the flipped image without it (chance 50 %). A head that uses its parameters correctly
  would have equal values in the first two columns, and a third as far below 50 as these are above.
"""
SHUFFLED = "broken facts, another view's parameters"
LEFT_OR_RIGHT = {  # keys of misalignment-scenes.json -> columns
    "as it is": "Left or right: original",
    "flipped, and said so": "flipped, with parameters",
    "flipped, without a word": "flipped, without parameters",
}


def misalignment_page(values: Values) -> str:
    """Returns the page of `scripts/misalignment.py`."""

    def cell(result: dict[str, Any], scale: int = 1) -> str:
        numbers = [result["mean"], *([result["over_seeds"][1] - result["mean"]] if result["over_seeds"] else [])]
        return minus(" ± ".join(f"{scale * number:.{2 if scale == 1 else 1}f}" for number in numbers))

    rows = []
    for name, row in values["rows"].items():
        accuracies = [cell(row[key], 100) if key in row else "" for key in LEFT_OR_RIGHT]
        shuffled = cell(row[SHUFFLED]) if SHUFFLED in row else ""
        rows.append([name, cell(row["broken facts"]), shuffled, cell(row["swapped captions"]), *accuracies])
    items = MISALIGNMENT.format(scenes=values["scenes"], views=values["views"]).strip().removeprefix("- ").split("\n- ")
    return page(
        f"# {TITLES['misalignment']}",
        paragraph(
            f"Do models trained on scenes detect what augmentation breaks? The runs of {link('scenes')}, evaluated by "
            "`python scripts/misalignment.py RUN …`."
        ),
        "## Results",
        "Mean ± half the width of the 95 % t-interval over seeds.",
        table(["", "Broken facts", "Another view's parameters", "Swapped captions", *LEFT_OR_RIGHT.values()], rows),
        "\n".join(bullet(item) for item in items),
        "## All values",
        f"{results_link('misalignment-scenes')} has all values.",
    )


TASKS = {"zeroshot": "Zero-shot", "probe": "Linear probe", "knn": "k-NN, 20 neighbors"}
TRANSFER_DATA = {
    "openclipart": "Open Clip Art, in 24 classes by tag",
    "emoji": "emoji by another vendor, in eight categories",
    "digits": "scikit-learn's handwritten digits, enlarged from 8 to 32 pixels",
}


def transfer_page(results: Sequence[Values]) -> str:
    """Returns the page of `scripts/transfer.py`, whose results are one file per table of experiments."""
    blocks, evaluated = [], set()
    for values in results:
        data = dict.fromkeys(name.partition(":")[2] for name in values["tasks"])
        evaluated |= data.keys()
        trained_on = values["table"]
        label = link(trained_on) if trained_on in TABLE_TITLES else f"`{trained_on}`"
        blocks += [f"## Encoders of {TABLE_TITLES.get(trained_on, trained_on)}", f"The runs of {label} on all pairs."]
        for task, heading in TASKS.items():
            chances = [f"{100 * values['tasks'][f'{task}:{name}']['chance']:.1f}" for name in data]
            rows = [["Chance", *chances, ""]]
            for arm, found in values["arms"].items():
                cells = [_over_seeds(found["accuracies"][f"{task}:{name}"]) for name in data]
                rows.append([ARMS.get(arm, arm.capitalize()), *cells, str(len(found["seeds"]))])
            blocks += [f"### {heading}", table(["", *data, "Seeds"], rows)]
    names = ", ".join(results_link(values["name"]) for values in results)
    return page(
        f"# {TITLES['transfer']}",
        paragraph(
            "How good are the encoders on data that they were not trained on? Accuracy in %, mean over classes and over seeds, ± 95 % CI. "
            "Probe and k-NN are of the image encoder's features, before the projection. *Untrained* is CLIP before its training: what the "
            "architecture alone gives. All of this is exploratory."
        ),
        "\n".join(bullet(f"*{name}*: {what}.") for name, what in TRANSFER_DATA.items() if name in evaluated),
        "Half of each is learned from, by probe and k-NN, and half evaluated.",
        *blocks,
        "## All values",
        f"{names}, by `scripts/transfer.py`.",
    )


def _over_seeds(found: Values) -> str:
    return percents(found["mean"], *(found["over_seeds"] or [found["mean"]] * 2))
