"""The pages of single runs and of scripts: CLIP on Open Clip Art, detectors, misalignment."""

from __future__ import annotations

from typing import Any

from coalign.formatting import duration
from evidence.text import (
    Values,
    bullet,
    commands,
    interval,
    minus,
    model_note,
    page,
    paragraph,
    results_link,
    shared_settings,
    signed,
    span_text,
    split_note,
    table,
)
from evidence.titles import TITLES, link

MISALIGNMENT = """
- *Broken facts*: Spearman's correlation, over {scenes} scenes with {views} strong views each, between two ratios: the view's distance to
  its caption over the full image's distance, and the fraction of the caption's facts that the view breaks, computed from its augmentation
  parameters. 0 means no relation.
- *Swapped captions*: area under the ROC curve of detecting, by distance, the 10 % of 2,000 pairs whose captions were swapped. 0.5 is
  chance.
- *Left or right*: accuracy in % of choosing the caption that is true of the original image, given the original image, the flipped image
  with the flip in its augmentation parameters, and the flipped image without it (chance 50 %). A head that uses its parameters correctly
  would have equal values in the first two columns, and a third as far below 50 as these are above.
"""
LEFT_OR_RIGHT = {  # keys of misalignment-scenes.json -> columns
    "as it is": "Left or right: original",
    "flipped, and said so": "flipped, with parameters",
    "flipped, without a word": "flipped, without parameters",
}


def clip_page(values: Values) -> str:
    """Returns the page of results/openclipart_clip.json, written by `coalign compare --json` of three runs."""
    runs, settings = values["groups"][0], shared_settings(values)
    metrics, held_out = runs["metrics"], values["held_out"]
    ranks = (1, 5, 10)
    rows = []
    for side, label in (("image_to_text", "Image to text"), ("text_to_image", "Text to image")):
        cells = []
        for rank in ranks:
            middle, low, high = (100 * number for number in interval(metrics[f"retrieval.{side}.r{rank}"]))
            cells.append(f"{middle:.1f} % ({low:.1f}–{high:.1f})")
        rows.append([label, *cells])
    rows.append(["Chance", *(f"{100 * metrics[f'retrieval.image_to_text.r{rank}']['chance']:.2f} %" for rank in ranks)])
    items = [metrics[f"retrieval.{side}.r1"]["over_items"] for side in ("image_to_text", "text_to_image")]
    widths = [f"{100 * (high - low) / 2:.1f}" for low, high in items]
    folders = [f"runs/openclipart-{seed}" for seed in runs["seeds"]]
    train = "coalign train --recipe clip --data data/openclipart --val-fraction 0.1"
    return page(
        f"# {TITLES['clip-openclipart']}",
        paragraph(
            f"CLIP trained from scratch on {settings['num_train']:,} real, noisy pairs, with the recipe's default settings: model "
            f"`{settings['model']}`, {runs['parameters'] / 1e6:.1f} M parameters, 64 pixels, {settings['epochs']} epochs. A run takes "
            f"about 20 minutes of CPU time ({duration(runs['seconds'])} of wall-clock time on a shared machine)."
        ),
        commands(
            *(f"{train} \\\n  --seed {seed} --out {out}" for seed, out in zip(runs["seeds"], folders, strict=True)),
            f"coalign compare {' '.join(folders)} \\\n  --json openclipart.json",
        ),
        "## Results",
        paragraph(
            f"Retrieval among the {held_out['images']} held-out images and their {held_out['captions']} captions; mean over "
            f"{len(runs['seeds'])} seeds, 95 % CI over seeds."
        ),
        paragraph(split_note(values)),
        paragraph(model_note(values)),
        table(["", *(f"R@{rank}" for rank in ranks)], rows),
        paragraph(
            f"The bootstrap interval over the held-out pairs is ± {' and '.join(widths)} percentage points for R@1 in the two directions."
        ),
        "## All values",
        f"{results_link('openclipart_clip')} has all metrics, intervals, settings and validations.",
    )


def detection_page(values: Values) -> str:
    """Returns the page of `scripts/detection_transfer.py`."""
    metrics = {"box_ap": "AP", "box_ap50": "AP50", "box_ap75": "AP75"}
    num_scenes, control = values["data"].split(":")[1], values["control"]

    def cells(found: dict[str, Any]) -> list[str]:
        shown = [found[name] for name in metrics]
        return [f"{100 * x['value']:.1f} ({100 * x['low']:.1f}–{100 * x['high']:.1f})" for x in shown]

    rows = [[row["run"], row["tower"], *cells(row["metrics"])] for row in values["rows"]]
    shown = [values["differences"][name] for name in metrics]
    rows.append(
        [
            "pretrained minus random, over runs",
            "",
            *(f"{signed(x['mean'])} ({span_text(x['over_seeds'])})" for x in shown),
        ]
    )
    rows.append([control["run"], "control", *cells(control["metrics"])])
    return page(
        f"# {TITLES['detection']}",
        paragraph(
            f"Does a pretrained image encoder help a detector? Faster R-CNN with FPN, trained for {values['epochs']} epochs on "
            f"{num_scenes} scenes and evaluated on {values['tested']} others, starts from the image encoders of "
            f"{link('two-towers-scenes')}, or from "
            "random weights."
        ),
        paragraph(
            "The control's image encoder was pretrained in another detector, on "
            f"{control['scenes']} other scenes: pretraining can help a detector here, if it learns enough. To measure it again on your own "
            "runs: `python scripts/detection_transfer.py RUN …`, about three minutes per detector."
        ),
        "## Results",
        "Average precision in %, with 95 % CI over images.",
        table(["Run", "Image encoder", *metrics.values()], rows),
        "## All values",
        f"{results_link('detection-scenes')} has all values.",
    )


def misalignment_page(values: Values) -> str:
    """Returns the page of `scripts/misalignment.py`."""

    def cell(result: dict[str, Any], scale: int = 1) -> str:
        numbers = [result["mean"], *([result["over_seeds"][1] - result["mean"]] if result["over_seeds"] else [])]
        return minus(" ± ".join(f"{scale * number:.{2 if scale == 1 else 1}f}" for number in numbers))

    rows = []
    for name, row in values["rows"].items():
        accuracies = [cell(row[key], 100) if key in row else "" for key in LEFT_OR_RIGHT]
        rows.append([name, cell(row["broken facts"]), cell(row["swapped captions"]), *accuracies])
    items = MISALIGNMENT.format(scenes=values["scenes"], views=values["views"]).strip().removeprefix("- ").split("\n- ")
    return page(
        f"# {TITLES['misalignment']}",
        paragraph(
            f"Do models trained on hard scenes detect what augmentation breaks? The runs of {link('views-scenes')}, evaluated by "
            "`python scripts/misalignment.py RUN …`."
        ),
        "## Results",
        "Mean ± half the width of the 95 % t-interval over seeds.",
        table(["", "Broken facts", "Swapped captions", *LEFT_OR_RIGHT.values()], rows),
        "\n".join(bullet(item) for item in items),
        "## All values",
        f"{results_link('misalignment-scenes')} has all values.",
    )
