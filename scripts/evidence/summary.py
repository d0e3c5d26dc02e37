"""The summary page: which method to train, the planned claims, pretrained encoders, and the list of pages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import headline

from coalign.experiments.tables.registry import TABLES
from evidence.plan import Verdict
from evidence.plan_page import counts
from evidence.table_page import SHIFT, TEST_IMAGES, summary_line
from evidence.text import Values, bullet, minus, page, paragraph, percents, shared_settings, signed, span_text, table
from evidence.titles import ABLATIONS, ARMS, COMPARISONS, HEADLINE, INDEX, TABLE_TITLES, TITLES, link

# columns of the first table: the table, and what its test split is
COLUMNS = {
    HEADLINE: "unseen emoji",
    "emoji-vendor": "another vendor's drawings",
    "style-shift": "unseen styles of clip art",
}
INTRODUCTION = """
Each experiment has a page with its settings, all intervals and the command that trains it again. This page sums them up: which method to
train, and which claims hold. The models are small (`tiny`, a million parameters) and learn from thousands of drawings, not from the papers'
millions of photographs, and nothing here is a claim about photographs. Every method has its own learning rate, weight decay, crops and
length, [chosen on held-out pairs with the same number of trials](../benchmark.md#settings-chosen-by-a-search); test pairs are evaluated
once.
"""
ADVICE = """
- **A few thousand pairs, and encoders exist that know such images and words**, as they do for photographs, drawings and everyday English:
  [lock them and train new heads]({docs}pretrained.md). On emoji that no pair names, this finds the right one among the first ten for
  {locked:.0f} %, with an eighth of the pairs for {eighth:.0f} %; CLIP from scratch on all pairs for {clip:.0f} %.
- **No such encoders, or they are too large**: train from scratch. CLIP is the cheapest; here, UniCLIP ({uniclip:.0f} %) and MCD
  ({mcd:.0f} %) are not ahead of it. More pairs help more than another method.
- **You need the image encoder itself**, to classify other images from examples: here, MCD's and UniCLIP's are better. By k-NN on clip
  art, accuracy is {knn[mcd]:.0f} % with MCD's, {knn[uniclip]:.0f} with UniCLIP's and {knn[clip]:.0f} with CLIP's
  ([transfer]({pages}transfer.md), exploratory).
- **You have your own pairs**: [`coalign benchmark`]({docs}benchmark.md) compares the methods on them, within an hour for a few thousand.
- **You have more than pairs**: MCT uses images without captions and tags, OneR encodes an image and a text as one input, FILIP shows which
  words match which part of an image ([methods]({docs}methods/index.md)).
"""
# words of the advice -> arms whose R@10 on unseen emoji they stand for
IN_ADVICE = {"clip": "clip", "uniclip": "uniclip", "mcd": "mcd", "locked": "locked", "eighth": "locked, 12.5 %"}
READING = """
- **Metrics** are means over seeds, in % unless stated otherwise. **±** is half the width of the 95 % t-interval over seeds: how much the
  mean would vary with other seeds. With a single seed, it is half the width of the bootstrap interval over held-out items.
- **Differences** have two 95 % intervals: over held-out items (paired bootstrap), and over seeds (Welch's t).
- **Claims** are decided by a bootstrap over seeds *and* items. The [planned ones](plan.md) were chosen before training, and are corrected
  for their number. The claims of other tables, of a paper or of a control, are exploratory: they are not corrected.
- **The paper's column** is measured on another task and other data; only its order is compared.
- **Time** is wall-clock time relative to the first row, on a shared machine.
- **Core-minutes** are processor time of the final training, without the search and without the features of locked encoders.
- **The modality gap** is the distance between the centroids of image and text embeddings, 0 to 2.
- **Open Clip Art in two styles** (`style-shift.jsonl`): a tenth is held out; *test* is {test}.
- **Scenes** are [synthetic](../data.md#scenes). 2,000 are held out. *Combinations* are 2,000 scenes with held-out combinations of shapes
  and colors (the compositional split). *Shifted* are 2,000 scenes under distribution shift: {shift}.
"""
OTHER_PAGES = {
    "plan": "the claims that were chosen before training, with their verdicts.",
    "headline": "how good a model a number of pairs can give, and how many fewer pairs a method needs.",
    "transfer": "zero-shot, linear probe and k-NN of the image encoders on data that they were not trained on.",
    "misalignment": "do models trained on scenes detect views and captions that do not match?",
    "oner-mct": "why are they behind CLIP here?",
    "small-models": "the default models below 100,000 pairs, compared with others of their size.",
    "speed": "time and memory, compared with open_clip, CLIP_benchmark and SLIP's image pipeline.",
}


def summary_page(
    tables: Mapping[str, Values], transfer: Values, verdicts: Sequence[Verdict], others: Collection[str]
) -> str:
    """`others`: the names of the pages that are not of tables."""
    reading = READING.format(test=TEST_IMAGES, shift=SHIFT)
    return page(
        f"# {INDEX}",
        paragraph(INTRODUCTION),
        "## Which method?",
        which_method(tables, transfer),
        *claims(verdicts),
        *pretrained(tables),
        *experiments(tables, others),
        "## How to read the tables",
        "\n".join(bullet(item) for item in reading.strip().removeprefix("- ").split("\n- ")),
    )


def which_method(tables: Mapping[str, Values], transfer: Values, folder: str = "") -> str:
    """Returns the recommendation, the figure and the table, for a page from which `folder` leads to the evidence.

    transfer: what `scripts/transfer.py` measured with the encoders of the first table.
    """
    found = {each["name"]: headline.both_directions(each["metrics"], "r10")[0] for each in tables[HEADLINE]["groups"]}
    shown = {word: 100 * found[arm] for word, arm in IN_ADVICE.items()}
    knn = {arm: 100 * each["accuracies"]["knn:openclipart"]["mean"] for arm, each in transfer["arms"].items()}
    advice = ADVICE.format(docs="docs/" if folder else "../", pages=folder, knn=knn, **shown)
    return "\n\n".join(
        [
            "\n".join(bullet(item) for item in advice.strip().removeprefix("- ").split("\n- ")),
            f"![Recall on unseen emoji against pairs and core-minutes]({folder}headline.png)",
            methods(tables),
            paragraph(
                "R@10 in %, mean of both directions, on test drawings that chose nothing; mean over seeds ± 95 % CI. Core-minutes: one "
                "training on unseen emoji, without the features of locked encoders, which are computed once for all trainings. "
                f"[{TITLES['headline']}]({folder}headline.md) has R@1, fewer pairs and the cost of the search."
            ),
        ]
    )


def methods(tables: Mapping[str, Values]) -> str:
    """Returns the table of methods on all pairs: R@10 on the test split of each table, seeds, and core-minutes of one training."""
    shown = {name: _on_all_pairs(tables[name]) for name in COLUMNS if name in tables}
    pairs = [f"{shared_settings(tables[name])['num_train']:,} pairs" for name in shown]
    header = ["", *(f"{COLUMNS[name]} ({number})" for name, number in zip(shown, pairs)), "Seeds", "Core-minutes"]
    rows = [["Chance", *(_chance(next(iter(by_arm.values()))) for by_arm in shown.values()), "", ""]]
    for arm, label in ARMS.items():
        if found := {name: by_arm[arm] for name, by_arm in shown.items() if arm in by_arm}:
            cells = [
                percents(*headline.both_directions(found[name]["metrics"], "r10")) if name in found else ""
                for name in shown
            ]
            seeds = sorted({len(each["seeds"]) for each in found.values()})
            minutes = f"{found[HEADLINE]['cpu_seconds'] / 60:.1f}" if HEADLINE in found else ""
            rows.append([label, *cells, " or ".join(map(str, seeds)), minutes])
    return table(header, rows)


def _on_all_pairs(values: Values) -> dict[str, Values]:
    return {each["name"]: each for each in values["groups"] if values["arms"][each["name"]]["train_fraction"] == 1}


def _chance(group: Values) -> str:
    sides = [group["metrics"][f"{headline.TASK}.{side}.r10"]["chance"] for side in ("image_to_text", "text_to_image")]
    return f"{100 * sum(sides) / 2:.1f}"


def claims(verdicts: Sequence[Verdict]) -> list[str]:
    """Returns the planned claims that are decided or undecided, and the number of those that are open."""
    lines = [
        f"{each.claim.statement} **{each.verdict}**: {signed(each.difference)} ({span_text(each.interval)})"
        for each in verdicts
        if each.difference is not None
    ]
    return [
        "## Planned claims",
        paragraph(
            f"{link('plan')} were chosen before training, with the difference that each is planned for. {counts(verdicts)} "
            "*Holds* and *does not hold* (the reverse is significant) are corrected for all of them. Differences are in percentage points "
            "of R@10, mean of both directions, with 95 % CI over seeds and items."
        ),
        "\n".join(bullet(minus(line)) for line in lines),
    ]


def pretrained(tables: Mapping[str, Values]) -> list[str]:
    """Returns what heads on locked pretrained encoders reach, compared with CLIP from scratch."""
    names = [name for name in tables if name.startswith("pretrained-")]
    rows = []
    for name in names:
        task = "retrieval_test" if TABLES[name].test_splits else "retrieval"
        by_arm = {each["name"]: each["metrics"] for each in tables[name]["groups"]}
        cells = [
            percents(*headline.both_directions(by_arm[arm], "r10", task)) for arm in ("clip", "locked", "locked, GLU")
        ]
        rows.append([link(name), f"{shared_settings(tables[name])['num_train']:,}", *cells])
    return [
        "## Pretrained encoders",
        paragraph(
            "R@10 in %, mean of both directions, with default settings, on the test split or else the held-out pairs: CLIP from scratch, "
            "and heads on locked encoders (EfficientNet-Lite0, trained on ImageNet, and all-MiniLM-L6-v2); 3 seeds."
        ),
        table(["", "Pairs", "CLIP from scratch", "Locked, linear heads", "Locked, GLU heads"], rows),
    ]


def experiments(tables: Mapping[str, Values], others: Collection[str]) -> list[str]:
    """Returns links to all pages, with one sentence each."""
    missing = [name for name in TABLE_TITLES if name not in tables]
    blocks = ["## Experiments"]
    for heading, names in (("Comparisons of methods", COMPARISONS), ("Ablations", ABLATIONS)):
        if lines := [bullet(summary_line(tables[name])) for name in names if name in tables]:
            blocks += [f"### {heading}", "\n".join(lines)]
    if missing:
        blocks.append(
            paragraph(f"Defined, but not trained by this protocol yet: {', '.join(f'`{name}`' for name in missing)}.")
        )
    lines = [bullet(f"{link(name)}: {what}") for name, what in OTHER_PAGES.items() if name in others]
    return [*blocks, "### Other measurements", "\n".join(lines)]
