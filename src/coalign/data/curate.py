"""What a caption must be, and the rules by which DeCLIP's authors cleaned their data and chose their queries (DeCLIP,
App. C)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalign.data.lexicon import base_forms, is_english, likely_parts_of_speech, synonyms, words_of
from coalign.data.writing import write_json_lines, write_rows
from coalign.errors import BadSample, UserError
from coalign.types import Source

if TYPE_CHECKING:
    import numpy as np

MAX_CAPTION_LENGTH = 10_000  # characters; a context of 77 tokens holds a few hundred
PARTS_OF_SPEECH = {"n": "nouns", "v": "verbs", "a": "adjectives", "r": "adverbs", "f": "function words"}
_CHINESE = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


# ---------------------------------------------------------------- single captions


def clean_caption(raw: bytes | str) -> str:
    """The caption with single spaces. Raises BadSample: "caption is not UTF-8", "caption holds NUL", "empty caption",
    "caption too long"."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        text.encode("utf-8")  # a str may hold halves of characters, from undecodable bytes or JSON escapes
    except UnicodeError:
        raise BadSample("caption is not UTF-8", repr(raw[:80])) from None
    if "\0" in text:
        raise BadSample("caption holds NUL", repr(text[:80]))
    text = " ".join(text.removeprefix("\ufeff").split())
    if not any(character.isprintable() and character != " " for character in text):
        raise BadSample("empty caption", repr(text[:80]) if text else "")
    if len(text) > MAX_CAPTION_LENGTH:
        raise BadSample("caption too long", f"{len(text):,} characters, at most {MAX_CAPTION_LENGTH:,}: {text[:80]}…")
    return text


def english_ratio(caption: str) -> float:
    """The share of the caption's words (runs of letters, of any script) that are English; 0 for a caption without
    words."""
    words = words_of(caption)
    return sum(map(is_english, words)) / max(1, len(words))


def single_part_of_speech(caption: str) -> str | None:
    """The part of speech ("nouns", "verbs", "adjectives", "adverbs", "function words") if every word of the caption
    is that, else None.

    The paper says no more than "a caption only including one part of speech" [inferred from here on]. There is no
    tagger: a word counts as all it is likely to be, so a caption is only named where that is certain ("red" alone,
    "dog cat tree", not "dog running"). Words that nobody knows are nouns, since most are names. Numbers do not count.
    """
    parts = {part for word in words_of(caption) for part in likely_parts_of_speech(word) or "n"}
    return PARTS_OF_SPEECH[parts.pop()] if len(parts) == 1 else None


def has_chinese(caption: str) -> bool:
    """Whether the caption holds a Chinese character (Japanese is partly written in them, too)."""
    return _CHINESE.search(caption) is not None


# ---------------------------------------------------------------- a whole source


@dataclass(frozen=True)
class CurationRules:
    """Damaged images and missing captions always go; these are the rules that differ. The defaults are DeCLIP's for
    its YFCC15M."""

    min_english_ratio: float = 0.8  # 0: any language
    several_parts_of_speech: bool = True
    min_side: int = 0  # pixels of an image's shorter side
    no_chinese: bool = False


DECLIP_YFCC = CurationRules()
# For images crawled with the query list. The paper drops "smaller images"; 64 pixels are our guess.
DECLIP_WEB = CurationRules(min_english_ratio=0.0, several_parts_of_speech=False, min_side=64, no_chinese=True)


@dataclass(frozen=True)
class Dropped:
    index: int
    key: str
    rule: str
    detail: str
    sample: bool  # the whole sample went: its image is unusable, or this was its last caption


@dataclass
class CurationReport:
    rules: CurationRules
    total: int = 0  # samples looked at
    kept: dict[int, tuple[str, ...]] = field(default_factory=dict)  # index -> the captions that stay
    dropped: list[Dropped] = field(default_factory=list)

    def counts(self) -> dict[str, tuple[int, int]]:
        """rule -> (samples dropped, single captions dropped from samples that had others), the most frequent first."""
        samples = Counter(drop.rule for drop in self.dropped if drop.sample)
        captions = Counter(drop.rule for drop in self.dropped if not drop.sample)
        return {rule: (samples[rule], captions[rule]) for rule, _ in (samples + captions).most_common()}


def decoded_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) of an image that decodes to its end; raises BadSample for one that does not."""
    from coalign.data.images import open_image

    opened = open_image(image)
    opened.decode(min_scale=1 / 8)  # damage shows at any scale
    return opened.size


def curate(
    source: Source,
    rules: CurationRules = DECLIP_YFCC,
    decode: Callable[[bytes | np.ndarray], tuple[int, int]] = decoded_size,
) -> CurationReport:
    """Looks at every sample by the rules. Captions are dropped singly, a sample when none is left.

    An image is only decoded where a caption has passed, so a sample that is bad in both ways is listed for its
    captions.
    """
    report = CurationReport(rules, len(source))
    for index in range(len(source)):
        key = f"{source.name}, sample {index}"
        try:
            record = source.record(index)
            key = record.key
            kept, faults = _sift(record.captions, rules)
            if kept:
                _check_size(*decode(source.image(index)), rules)
        except BadSample as bad:
            report.dropped.append(Dropped(index, key, bad.reason, bad.detail, True))
            continue
        for number, (rule, detail) in enumerate(faults, start=1):
            report.dropped.append(Dropped(index, key, rule, detail, sample=not kept and number == len(faults)))
        if kept:
            report.kept[index] = kept
    return report


def _sift(captions: Iterable[str], rules: CurationRules) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """The captions that pass, and (rule, detail) of the others. Raises BadSample where there are none to look at."""
    kept, faults = [], []
    for raw in captions:
        try:
            caption = clean_caption(raw)
            _check_caption(caption, rules)
            kept.append(caption)
        except BadSample as bad:
            faults.append((bad.reason, bad.detail))
    if not kept and not faults:
        raise BadSample("no caption")
    return tuple(kept), faults


def _check_caption(caption: str, rules: CurationRules) -> None:
    if rules.no_chinese and has_chinese(caption):
        raise BadSample("Chinese caption", caption)
    if rules.min_english_ratio and (ratio := english_ratio(caption)) < rules.min_english_ratio:
        raise BadSample("too few English words", f"{ratio:.2f} of {caption}")
    if rules.several_parts_of_speech and (part := single_part_of_speech(caption)):
        raise BadSample("single part of speech", f"{part}: {caption}")


def _check_size(width: int, height: int, rules: CurationRules) -> None:
    if min(width, height) < rules.min_side:
        raise BadSample("small image", f"{width}×{height} pixels")


def write_curated(source: Source, report: CurationReport, out: str | Path) -> Path:
    """Writes what is left as a folder (see `writing.write_rows`) and the rest as its `dropped.jsonl`. Gives the path of metadata.jsonl.
    Raises UserError where `out` holds something already, and BadSample for an image that cannot be read."""
    kept = ((index, replace(source.record(index), captions=captions)) for index, captions in report.kept.items())
    path = write_rows(source, kept, out)
    write_json_lines(path.with_name("dropped.jsonl"), map(_plain, report.dropped))
    return path


def _plain(drop: Dropped) -> dict[str, Any]:
    return {"key": drop.key, "rule": drop.rule, "detail": drop.detail, "sample": drop.sample}


# ---------------------------------------------------------------- the query list


def tag_counts(source: Source) -> tuple[Counter[str], Counter[str]]:
    """How many samples carry each tag (lower case, single spaces), and how many records could not be read, by
    reason."""
    tags: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            tags.update({_normal_tag(tag) for tag in source.record(index).tags} - {""})
        except BadSample as bad:
            unread[bad.reason] += 1
    return tags, unread


def caption_nouns(caption: str) -> tuple[str, ...]:
    """The caption's words that are nouns in at least nine of ten uses, in the singular: tags for data that have none
    (MCT's variant)."""
    nouns = [word for word in words_of(caption) if likely_parts_of_speech(word) == {"n"}]
    return tuple(
        dict.fromkeys(next(base for base, part in reversed(base_forms(word)) if part == "n") for word in nouns)
    )


def build_queries(tags: Mapping[str, int] | Iterable[str]) -> list[str]:
    """DeCLIP's query list: the tags (counted, or one by one), the most frequent first, then those of their synonyms
    that are no tags."""
    counted: Counter[str] = Counter()
    for tag, count in tags.items() if isinstance(tags, Mapping) else ((tag, 1) for tag in tags):
        counted[_normal_tag(tag)] += count
    ordered = sorted(counted.keys() - {""}, key=lambda tag: (-counted[tag], tag))
    return list(dict.fromkeys([*ordered, *(synonym for tag in ordered for synonym in synonyms(tag))]))


def write_queries(queries: Iterable[str], path: str | Path) -> None:
    """One query a line, UTF-8. Raises UserError where the file cannot be written."""
    try:
        Path(path).write_text("".join(f"{query}\n" for query in queries), encoding="utf-8")
    except OSError as error:
        raise UserError(f"The queries cannot be written to {path}: {error.strerror or error}.") from None


def _normal_tag(tag: str) -> str:
    """Flickr writes "polar+bear", others "polar_bear"."""
    return " ".join(re.sub(r"[+_\s]+", " ", tag.lower()).split())
