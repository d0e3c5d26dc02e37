"""The page of results/benchmarks.json, written by `python benchmarks/all.py --out results/benchmarks.json`.

Two benchmarks are not run by all.py, so their values are not in the file. They are in `MEASURED_APART`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evidence.text import Values, commands, page, paragraph, results_link, table
from evidence.titles import METHODS, TITLES

OPEN_CLIP = "open_clip's trainer"
MARK = "†"
# what, compared with, ratio, script: one run on a Xeon without AMX (startup.py), one on the machine of the other rows (zero_shot.py)
MEASURED_APART = (
    (
        "Zero-shot evaluation of a ViT-B/32, 2,000 images, 100 classes, 80 templates, equal accuracy", "CLIP_benchmark", "2.83",
        "zero_shot.py",
    ),
    ("From the command to the start of training", OPEN_CLIP, "0.95 (0.82–0.95)", "startup.py"),
    ("From the command to the end of the first step", OPEN_CLIP, "1.33 (1.27–1.34)", "startup.py"),
)  # fmt: skip
# a row is what, compared with, and a script with patterns of the file's lines
FASTER = (
    (
        "Training CLIP with `tiny` on emoji, 48 pixels, batch 128, second epoch on, with data loading, bf16, one core", OPEN_CLIP,
        "small_models.py", ["open_clip's time over ours"],
    ),
    ("CLIP ViT-B/32 training step, batch 32, captions of 13 tokens on average, fp32", OPEN_CLIP, "step_clip.py", ["fp32.*time over ours"]),
    ("The same in bf16", OPEN_CLIP, "step_clip.py", ["bf16.*time over ours"]),
    ("Its peak memory, fp32; bf16", OPEN_CLIP, "step_clip.py", ["fp32.*memory", "bf16.*memory"]),
    (
        "UniCLIP's loss and its gradient, 2,048 pairs × 4 × 256, fp32, two threads", "the same with the full similarity matrix",
        "tiled_losses.py", ["time.*dense|dense.*time"],
    ),
    ("Its memory", "the full similarity matrix", "tiled_losses.py", ["memory"]),
    (
        "Decoding and three augmented 224-pixel views of a JPEG, one core", "SLIP's torchvision pipeline",
        "views_3.py", ["SLIP's over ours"],
    ),
    ("The same with `--image-cache`, from the second epoch on", "ours without", "views_3.py", ["ours over ours, cached$"]),
    (
        "The same with `--device-views` too, in the loader process", "ours with the cache alone",
        "views_3.py", ["ours, cached over ours, cached, without"],
    ),
    ("Search for the penalty of a linear probe", "the sweep over all 97 values", "linear_probe.py", ["time"]),
)  # fmt: skip
OVERHEAD = (
    ("Time outside the towers in the training of `tiny`, as above", "the whole step", "small_models.py", ["outside the towers"]),
    ("Time of a step over CLIP's: UniCLIP; MCD", "the ratio of their tower passes", "small_models.py", ["^UniCLIP", "^MCD"]),
    ("UniCLIP's loss and its gradient, as above", "the four matrix products of that size alone", "tiled_losses.py", ["products"]),
    (
        "Time of a step in micro-batches (`--micro-batch`), lowest for {lowest}, highest for {highest}", "the same step without",
        "gradient_caching.py", [r"^\w+ in .*time over"],
    ),
    (
        "Memory growth of such a step from batch 256 to 4,096, all methods but OneR", "growth of features and heads",
        "gradient_caching.py", [r"^(?!oner)\w+ in .*memory"],
    ),
    ("The same for OneR", "growth of features and heads", "gradient_caching.py", ["^oner in .*memory"]),
    ("Time per pair at batch 1,024, CLIP; UniCLIP", "at batch 64", "cost_curves.py", ["^clip, .*1,024", "^uniclip, .*1,024"]),
    (
        "Nearest neighbors in DeCLIP's queue of 65,536 texts, for one text view; for two", "the whole training step, ViT-B/32",
        "queue_lookup.py", ["paper", "released_code"],
    ),
)  # fmt: skip


def speed_page(values: Values) -> str:
    lines = values["lines"]
    faster = [row(lines, *each) for each in FASTER]
    apart = [[f"{what} {MARK}", against, ratio, ""] for what, against, ratio, _ in MEASURED_APART]
    scripts = " and ".join(f"`{name}`" for name in dict.fromkeys(script for *_, script in MEASURED_APART))
    header = ["What", "Compared with", "Ratio", "Target"]
    return page(
        f"# {TITLES['speed']}",
        paragraph(
            f"Time and memory of coalign, compared with {OPEN_CLIP}, CLIP_benchmark, SLIP's image pipeline, and simpler versions of its "
            "own parts. Each row is measured by one script in `benchmarks/`, in which both sides alternate. To measure them on your "
            "machine:"
        ),
        commands("make bench"),
        paragraph(
            "Ratios are medians of neighboring measurements, with the range in parentheses. Measured on "
            f"{('one', 'two')[values['cores'] - 1]} cores of an {values['processor']} with AVX512-BF16 (Zen 4) and PyTorch "
            f"{values['torch'].partition('+')[0]}, with other jobs running."
        ),
        "## Speed and memory",
        "More than 1 favors coalign.",
        table(header, [*faster, *apart]),
        paragraph(
            f"{MARK} Not in the file of all values: {scripts} need packages beyond coalign's development tools and are run separately. "
            "The start-up rows were measured on a Xeon without AMX."
        ),
        "## Overhead",
        "Lower is better.",
        table(header, [row(lines, *each) for each in OVERHEAD]),
        "## All values",
        paragraph(f"{results_link('benchmarks')} has all lines, with targets, and the machine."),
    )


def row(lines: Sequence[Values], what: str, against: str, script: str, patterns: Sequence[str]) -> list[str]:
    """Returns a row: per pattern the median with its range, or over several methods the range of medians, and the target."""
    cells, targets = [], []
    for pattern in patterns:
        found = [line for line in lines if line["script"] == script and re.search(pattern, line["what"])]
        assert found, f"results/benchmarks.json has no line of {script} that matches {pattern}"
        medians = {line["what"].split()[0]: line["median"] for line in found}
        if len(found) > 1:
            lowest, highest = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
            what = what.format(lowest=METHODS.get(lowest), highest=METHODS.get(highest))
            cells.append(f"{number(medians[lowest])} to {number(medians[highest])}")
        else:
            line = found[0]
            spread = (
                f" ({number(line['least'])}–{number(line['most'])})"
                if line["measured"] > 1 and len(patterns) == 1
                else ""
            )
            cells.append(f"{number(line['median'])}{spread}")
        met = all(line["holds"] for line in found)
        targets += [f"{line['target']}{'' if met else ': missed'}" for line in found if line["target"]]
    return [what, against, "; ".join(cells), "; ".join(dict.fromkeys(targets))]


def number(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.05 else f"{ratio:.3f}"
