"""The page of `coalign data check`: the contents of a dataset, and warnings before you train on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from coalign.formatting import percent
from coalign.report.figures import INK, LINE, PALETTE, SOFT, WIDTH
from coalign.report.left_out import LeftOutTable, left_out_sections
from coalign.report.page import GalleryCell, Page

Images = Mapping[int, np.ndarray]  # index of a sample -> uint8 [height, width, 3]

_GALLERIES = (  # key, title, what it is
    (
        "random",
        "Random samples",
        "Could you match these captions and images without knowing the pairs?",
    ),
    ("shared captions", "Shared captions", "Up to four samples of each of the most frequent captions."),
    ("identical images", "Identical images", "The same file under several names."),
    (
        "look-alikes",
        "Similar images",
        "Different files with nearly the same perceptual hash: near-duplicates, variants, or chance.",
    ),
    ("leaks", "Held-out images like one of train", "Each held-out image, and the most similar one of train."),
    ("hardly English", "Mostly non-English captions", "Fewer than half of the words are in the English word list."),
    ("longest captions", "Longest captions", ""),
    ("shortest captions", "Shortest captions", ""),
    ("smallest images", "Smallest images", ""),
    ("blank images", "Blank images", "A single color; often a white drawing on a transparent background."),
)


def check_page(check: Mapping[str, Any], images: Images) -> Page:
    """The page of a data check, from its plain values (`dataclasses.asdict` of a DataCheck) and its gallery's images."""
    whole = check["checked"] == check["samples"]
    scope = f"all {check['samples']:,} samples"
    if not whole:
        scope = f"{check['checked']:,} random samples of {check['samples']:,}"
    page = Page("Data check", f"{check['name']} · {scope}")
    page.verdict(_verdict(check["warnings"]))
    page.numbers(_tiles(check))
    if len(check["warnings"]) > 1:
        page.section("Warnings")
        page.table(["", "warning"], [[number, text] for number, text in enumerate(check["warnings"], 1)])
    if not whole:
        page.text("Only a sample was checked: duplicates between it and the rest are not counted.")
    if check["usable"]:
        page.section("Random samples", _GALLERIES[0][2])
        page.gallery(_cells(check["gallery"]["random"], images))
        _images(page, check)
        _captions(page, check)
        _tags(page, check)
    _broken(page, check)
    _galleries(page, check, images)
    return page


def _verdict(warnings: Sequence[str]) -> str:
    if not warnings:
        return "No problems found: you can train on this data."
    rest = len(warnings) - 1
    more = "" if rest == 0 else f" {'One more warning' if rest == 1 else f'{rest} more warnings'} below."
    return warnings[0] + more


def _tiles(check: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    broken = check["checked"] - check["usable"]
    captions, usable = check["captions"], check["usable"]
    shared = (check["same_caption"] or {}).get("samples", 0)
    twice = (check["same_image"] or {}).get("samples", 0)
    words = f"median {check['words']['median']:.0f} words" if check["words"] else ""
    foreign = check["hardly_english"]
    return [
        ("Usable samples", f"{usable:,}", f"{broken:,} bad ({_share(broken, check['checked'])})"),
        ("Captions", f"{captions:,}", words),
        ("Share a caption", f"{shared:,}", f"{_share(shared, usable)} of the samples"),
        ("Duplicate images", f"{twice:,}", f"{_share(twice, usable)} of the samples"),
        ("Mostly non-English", f"{foreign:,}", f"{_share(foreign, captions)} of the captions"),
    ]


# ---------------------------------------------------------------- sections


def _images(page: Page, check: Mapping[str, Any]) -> None:
    page.section("Images")
    spreads = [
        ("width", "pixels"),
        ("height", "pixels"),
        ("shortest side", "pixels"),
        ("aspect ratio", "width / height"),
    ]
    found = [(name, unit, check[name.replace(" ", "_")]) for name, unit in spreads]
    page.figure(_histograms([found[2], found[3]], base=2), "Sizes as stored, on logarithmic axes.")
    page.table(["", "smallest", "median", "mean", "largest"], [_landmarks(name, spread) for name, _, spread in found])
    total = check["usable"]
    for what in ("formats", "modes"):
        table = [(name, count, _share(count, total)) for name, count in check[what].items()]
        page.table([what.removesuffix("s"), "images", "share"], table)
    alike = check["look_alikes"] or {"groups": 0, "samples": 0}
    same = check["same_image"] or {"groups": 0, "samples": 0}
    rows: list[list[object]] = [
        ["the same file", same["groups"], same["samples"], _share(same["samples"], total)],
        ["look-alikes", alike["groups"], alike["samples"], _share(alike["samples"], total)],
        ["blank (a single color)", None, check["blank"], _share(check["blank"], total)],
    ]
    rows += [
        [
            f"{split} samples with an image like one of train",
            None,
            leak["count"],
            _share(leak["count"], leak["samples"]),
        ]
        for split, leak in check["leaks"].items()
    ]
    page.table(["duplicates", "groups", "samples", "share"], rows)


def _captions(page: Page, check: Mapping[str, Any]) -> None:
    page.section("Captions")
    panels = [("words per caption", "words", check["words"])]
    if check["tokens"]:
        panels.append(("tokens per caption", "tokens, start and end included", check["tokens"]))
    panels.append(("English words", "fraction of a caption's words", check["english"]))
    page.figure(_histograms(panels), "The last bar includes all longer captions.")
    page.table(["", "smallest", "median", "mean", "largest"], [_landmarks(name, spread) for name, _, spread in panels])
    total = check["captions"]
    rows = [["longer than the context length", check["cut"], _share(check["cut"], total)]] if check["tokens"] else []
    rows.append(["mostly non-English", check["hardly_english"], _share(check["hardly_english"], total)])
    parts = check["single_part_of_speech"].items()
    rows += [[f"only {name}", count, _share(count, total)] for name, count in parts]
    page.table(["captions", "count", "share"], rows)
    per_sample = check["captions_per_sample"].items()
    page.table(
        ["captions per sample", "samples", "share"],
        [[n, count, _share(count, check["usable"])] for n, count in per_sample],
    )
    same = check["same_caption"] or {"largest": []}
    page.table(["shared caption", "samples"], [[text, count] for text, count, _ in same["largest"][:20]])


def _tags(page: Page, check: Mapping[str, Any]) -> None:
    if not check["num_tags"]:
        return
    page.section("Tags", f"{check['num_tags']:,} distinct tags on {check['tagged']:,} samples; the most frequent:")
    page.figure(_bars(check["tags"][:30]))


def _broken(page: Page, check: Mapping[str, Any]) -> None:
    if check["broken"]:
        page.section("Bad samples", "Training replaces bad samples by others, and stops when there are too many.")
        rows = [(row["reason"], row["count"], ", ".join(row["examples"][:3])) for row in check["broken"]]
        page.table(["reason", "samples", "for example"], rows)
    if check["unusable_captions"]:
        page.section("Captions that are not used", "Other captions of the same image are.")
        rows = [(row["reason"], row["count"], ", ".join(row["examples"][:3])) for row in check["unusable_captions"]]
        page.table(["reason", "captions", "for example of"], rows)
    left_out_sections(page, LeftOutTable(check["left_out"], check["left_out_where"], check["unread"]))


def _galleries(page: Page, check: Mapping[str, Any], images: Images) -> None:
    for key, title, text in _GALLERIES[1:]:
        if examples := check["gallery"].get(key):
            page.section(title, text)
            page.gallery(_cells(examples, images))


def _cells(examples: Sequence[Mapping[str, Any]], images: Images) -> list[GalleryCell]:
    return [GalleryCell(images.get(row["index"]), row["caption"], note=row["note"]) for row in examples]


def _landmarks(name: str, spread: Mapping[str, Any]) -> list[object]:
    return [name, *(float(spread[key]) for key in ("smallest", "median", "mean", "largest"))]


def _share(count: int, of: int) -> str:
    return percent(count / max(1, of))


# ---------------------------------------------------------------- figures


def _histograms(panels: Sequence[tuple[str, str, Mapping[str, Any]]], base: int | None = None) -> Figure:
    """Precomputed histograms side by side, without the empty bins at both ends."""
    figure = _canvas(2.7)
    for position, (title, label, spread) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), position)
        counts, edges = np.array(spread["counts"]), np.array(spread["edges"])
        filled = np.flatnonzero(counts)
        counts, edges = counts[filled[0] : filled[-1] + 1], edges[filled[0] : filled[-1] + 2]
        axes.stairs(counts, edges, fill=True, color=PALETTE[0], alpha=0.85, edgecolor="white", linewidth=0.5)
        if base is not None:
            axes.set_xscale("log", base=base)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.axvline(spread["median"], color=PALETTE[1], linewidth=1.6, label=f"median {spread['median']:.3g}")
        axes.legend(
            frameon=False, fontsize=8.5, labelcolor=SOFT, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0
        )
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel(label, fontsize=9, color=SOFT)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(labelsize=8.5, colors=SOFT, length=0, which="both")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def _bars(counts: Sequence[tuple[str, int]]) -> Figure:
    figure = _canvas(0.21 * len(counts) + 0.4)
    axes = figure.add_subplot()
    places = np.arange(len(counts))[::-1]
    axes.barh(places, [count for _, count in counts], height=0.7, color=PALETTE[0], alpha=0.85)
    for place, (_, count) in zip(places, counts):
        axes.text(count, place, f" {count:,}", va="center", fontsize=8, color=SOFT)
    names = [name if len(name) <= 40 else name[:39] + "…" for name, _ in counts]
    axes.set_yticks(places, names, fontsize=8.5, color=INK, parse_math=False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(y=0.01)
    return figure


def _canvas(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
