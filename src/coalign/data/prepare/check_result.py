"""The result of a data check, and the warnings that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from coalign.formatting import percent

CONTEXT_LENGTH = 77  # CLIP's context length in tokens
MIN_SAMPLES = 5_000  # for training from scratch


@dataclass(frozen=True)
class Example:
    """A sample for the gallery: its `index` in the source, and a `note` on why it was selected."""

    index: int
    key: str
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Distribution:
    """Summary statistics and a histogram, with `counts[i]` values between `edges[i]` and `edges[i + 1]`."""

    smallest: float
    median: float
    mean: float
    largest: float
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Broken:
    """Samples that cannot be used for the same reason."""

    reason: str
    count: int
    examples: list[str]  # keys, with details


@dataclass(frozen=True)
class Duplicates:
    """Groups of two or more samples with equal captions or images."""

    groups: int
    samples: int  # in all groups
    # (caption or key, samples, some of their indices), the largest group first
    largest: list[tuple[str, int, list[int]]]


@dataclass(frozen=True)
class Leak:
    """Samples of a held-out split whose image is in train too, or looks like one there."""

    count: int
    samples: int  # of the split
    examples: list[tuple[int, int]]  # (index, index of the image in train)


@dataclass
class DataCheck:
    """The result of `check`. `dataclasses.asdict` returns JSON values.

    What is there is the samples plus what opening left out. A table counts images: rows with the same image are one sample with the
    captions of all; a row without an image, or one that cannot be read, counts by itself. If all samples are checked, the sum of
    `usable`, of the counts in `broken` and of those in `left_out` is what is there.
    """

    name: str
    samples: int
    checked: int  # all samples, or a random subset
    usable: int
    broken: list[Broken] = field(default_factory=list)
    unusable_captions: list[Broken] = field(default_factory=list)  # beside others of their image
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> images or rows that opening the source left out
    left_out_where: list[tuple[str, str]] = field(default_factory=list)  # the first (where, reason)
    unread: list[str] = field(default_factory=list)  # what lies beside the data and looks like data
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    width: Distribution | None = None
    height: Distribution | None = None
    shortest_side: Distribution | None = None
    aspect_ratio: Distribution | None = None  # width / height
    blank: int = 0  # images of a single color
    captions: int = 0
    captions_per_sample: dict[str, int] = field(default_factory=dict)  # "2" -> samples with two captions
    words: Distribution | None = None
    tokens: Distribution | None = None  # including start and end tokens; None without a tokenizer
    cut: int = 0  # captions longer than the context length
    english: Distribution | None = None  # fraction of English words per caption
    hardly_english: int = 0  # captions with less than half English words
    single_part_of_speech: dict[str, int] = field(default_factory=dict)  # "nouns" -> captions that contain only nouns
    same_caption: Duplicates | None = None
    same_image: Duplicates | None = None  # identical bytes
    look_alikes: Duplicates | None = None  # different bytes, near-duplicates by their perceptual hashes
    leaks: dict[str, Leak] = field(default_factory=dict)  # by split, of those that the data comes with
    tagged: int = 0  # samples with tags
    num_tags: int = 0  # distinct tags
    tags: list[tuple[str, int]] = field(default_factory=list)  # the most frequent tags and their counts
    gallery: dict[str, list[Example]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # the most severe first


def warnings(result: DataCheck) -> list[str]:
    """Returns warnings to read before training on the dataset, the most severe first."""
    if not result.usable:
        return [f"None of the {result.checked:,} samples can be used."]
    broken = result.checked - result.usable
    same_caption, same_image, look_alikes = (
        group.samples if group else 0 for group in (result.same_caption, result.same_image, result.look_alikes)
    )
    stops = broken > 0.01 * max(result.checked, 1000)  # as BadSampleLog
    consequence = "training stops at 1 %" if stops else "training replaces them"
    single_part = sum(result.single_part_of_speech.values())
    rates = [  # (count, total, items, threshold of the rate, message)
        (broken, result.checked, "samples", 0.0, f"cannot be used; {consequence}."),
        (
            same_caption, result.usable, "samples", 0.05,
            "share a caption with another sample; they are false negatives of each other without --multi-positive.",
        ),
        (same_image, result.usable, "samples", 0.01, "have the same image as another sample."),
        (look_alikes, result.usable, "samples", 0.1, "have an image that looks like another."),
        (result.blank, result.usable, "images", 0.001, "are blank: a single color."),
        (result.cut, result.captions, "captions", 0.01, f"are longer than {CONTEXT_LENGTH} tokens and are truncated."),
        (result.hardly_english, result.captions, "captions", 0.2, "have fewer than half of their words in English."),
        (single_part, result.captions, "captions", 0.2, "have a single part of speech; most of them are names."),
    ]  # fmt: skip
    rates += [
        (leak.count, leak.samples, f"{split} samples", 0.0, "have an image that is in train too, or looks like one.")
        for split, leak in sorted(result.leaks.items())
    ]
    by_severity = [
        (count / total / max(threshold, 0.01), f"{count:,} of {total:,} {items} ({percent(count / total)}) {message}")
        for count, total, items, threshold, message in rates
        if count > threshold * total
    ]
    if lost := sum(result.left_out.values()):
        by_severity.append((2.0, f"{lost:,} images or rows were left out when the dataset was opened."))
    if result.unread:
        by_severity.append((2.0, f"Not read, although it looks like data: {', '.join(result.unread[:10])}."))
    if result.words is not None and result.words.median < 3:
        by_severity.append((2.0, f"Half of the captions have at most {result.words.median:.0f} words."))
    if result.shortest_side is not None and result.shortest_side.median < 96:
        side = f"{result.shortest_side.median:.0f}"
        by_severity.append((1.5, f"Half of the images have a shorter side of at most {side} pixels."))
    if result.samples < MIN_SAMPLES:
        by_severity.append(
            (3.0, f"The dataset has only {result.samples:,} samples; training from scratch will overfit.")
        )
    return [message for _, message in sorted(by_severity, key=lambda pair: -pair[0])]
