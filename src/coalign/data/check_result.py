"""What `check` finds out about a data set, and what of it should worry a person."""

from __future__ import annotations

from dataclasses import dataclass, field

CONTEXT_LENGTH = 77  # tokens, CLIP's
FEW = 5_000  # samples, from which on training from scratch makes some sense


@dataclass(frozen=True)
class Example:
    """A sample worth looking at: `index` in the source, and why (`note`)."""

    index: int
    key: str
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """A distribution: its landmarks and its histogram (`counts[i]` between `edges[i]` and `edges[i + 1]`)."""

    smallest: float
    median: float
    mean: float
    largest: float
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Broken:
    """Samples that cannot be used for one reason."""

    reason: str
    count: int
    examples: list[str]  # keys, with details


@dataclass(frozen=True)
class Duplicates:
    """Samples that are alike in one way: groups of two and more, the largest first."""

    groups: int
    samples: int  # in any group
    largest: list[tuple[str, int, list[int]]]  # (caption or key, samples, some of their indices)


@dataclass
class DataCheck:
    """The result of `check`, in plain values: `dataclasses.asdict` of it is JSON."""

    name: str
    samples: int
    checked: int  # all, or a random subset where a limit was given
    usable: int
    broken: list[Broken] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (where, reason), from opening; the first ones
    num_problems: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    width: Spread | None = None
    height: Spread | None = None
    shortest_side: Spread | None = None
    aspect_ratio: Spread | None = None  # width / height
    blank: int = 0  # images of a single colour
    captions: int = 0
    captions_per_sample: dict[str, int] = field(default_factory=dict)  # "2" -> samples with two
    words: Spread | None = None
    tokens: Spread | None = None  # start and end token included; None without a tokenizer
    cut: int = 0  # captions longer than the context
    english: Spread | None = None  # share of English words, a caption
    hardly_english: int = 0  # captions with less than half
    single_part_of_speech: dict[str, int] = field(default_factory=dict)  # "nouns" -> captions of nothing but nouns
    same_caption: Duplicates | None = None
    same_image: Duplicates | None = None  # the same bytes
    look_alikes: Duplicates | None = None  # other bytes, the same 8 × 8 difference hash
    tagged: int = 0  # samples with tags
    num_tags: int = 0  # different ones
    tags: list[tuple[str, int]] = field(default_factory=list)  # the most frequent
    gallery: dict[str, list[Example]] = field(default_factory=dict)
    worries: list[str] = field(default_factory=list)  # sentences, the worst first


def worries(found: DataCheck) -> list[str]:
    """What a person should know before training on this, in sentences, the worst first."""
    if not found.usable:
        return [f"None of the {found.checked:,} samples can be used."]
    broken = found.checked - found.usable
    same_caption, same_image, alike = (
        group.samples if group else 0 for group in (found.same_caption, found.same_image, found.look_alikes)
    )
    end = "are broken, and a run stops at 1 %." if broken > 0.01 * found.checked else "are broken and will be replaced."
    negatives = (
        "share a caption with another one; they are false negatives of each other unless --multi-positive is on."
    )
    nouns = sum(found.single_part_of_speech.values())
    shares = [  # (how many, of how many, of what, the share from which it is worth a word, what they do)
        (broken, found.checked, "samples", 0.0, end),
        (same_caption, found.usable, "samples", 0.05, negatives),
        (same_image, found.usable, "samples", 0.01, "have an image that occurs more than once."),
        (alike, found.usable, "samples", 0.1, "look like another one when reduced to 8 × 8 cells."),
        (found.blank, found.usable, "images", 0.001, "are blank: a single colour."),
        (found.cut, found.captions, "captions", 0.01, f"are longer than {CONTEXT_LENGTH} tokens and lose their end."),
        (found.hardly_english, found.captions, "captions", 0.2, "are hardly English by the word list."),
        (nouns, found.captions, "captions", 0.2, "have one part of speech only; most often they are bare names."),
    ]
    said = [
        (count / of / max(least, 0.01), f"{count:,} of {of:,} {what} ({percent(count, of)}) {does}")
        for count, of, what, least, does in shares
        if count > least * of
    ]
    if found.num_problems:
        said.append((2.0, f"{found.num_problems:,} things were left out when the data was opened."))
    if found.words is not None and found.words.median < 3:
        said.append((2.0, f"Half of the captions have no more than {found.words.median:.0f} words."))
    if found.shortest_side is not None and found.shortest_side.median < 96:
        said.append((1.5, f"Half of the images have a side of {found.shortest_side.median:.0f} pixels or less."))
    if found.samples < FEW:
        said.append((3.0, f"There are only {found.samples:,} samples; expect overfitting when training from scratch."))
    return [sentence for _, sentence in sorted(said, key=lambda pair: -pair[0])]


def percent(count: int, of: int) -> str:
    """A share in per cent with two digits or more, so that a few of many are not shown as none."""
    share = 100 * count / max(1, of)
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
