"""DeCLIP's rules for cleaning data, and its list of search queries (DeCLIP, App. C)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalign.data.prepare.writing import write_json_lines, write_rows
from coalign.data.sources.base import Source
from coalign.data.text.captions import clean_caption, require_captions
from coalign.data.text.lexicon import base_forms, is_english, likely_parts_of_speech, synonyms, words_of
from coalign.errors import BadSample, UserError
from coalign.progress import track

if TYPE_CHECKING:
    import numpy as np

PARTS_OF_SPEECH = {"n": "nouns", "v": "verbs", "a": "adjectives", "r": "adverbs", "f": "function words"}


_CHINESE = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def english_ratio(caption: str) -> float:
    """Returns the fraction of the words of a caption (runs of letters in any script) that are English, or 0 if there are no words."""
    words = words_of(caption)
    return sum(map(is_english, words)) / max(1, len(words))


def single_part_of_speech(caption: str) -> str | None:
    """Returns "nouns", "verbs", "adjectives", "adverbs" or "function words" if all words of a caption have this part of speech, else None.

    The paper only says "a caption only including one part of speech"; the rest is inferred. Without a tagger, a word counts as all its
    likely parts of speech, so only certain captions are classified ("red", "dog cat tree", but not "dog running"). Unknown words count as
    nouns, since most are names. Numbers are ignored.
    """
    parts = {part for word in words_of(caption) for part in likely_parts_of_speech(word) or "n"}
    return PARTS_OF_SPEECH[parts.pop()] if len(parts) == 1 else None


def has_chinese(caption: str) -> bool:
    """Whether a caption contains a Chinese character. Japanese text does, too."""
    return _CHINESE.search(caption) is not None


@dataclass(frozen=True)
class CurationRules:
    """Rules in addition to dropping damaged images and missing captions. The defaults are DeCLIP's rules for YFCC15M."""

    min_english_ratio: float = 0.8  # minimum fraction of English words; 0: any language
    several_parts_of_speech: bool = True  # drop captions with a single part of speech
    min_side: int = 0  # minimum length of the shorter side, in pixels
    no_chinese: bool = False  # drop captions with Chinese characters


DECLIP_YFCC = CurationRules()


@dataclass(frozen=True)
class Dropped:
    index: int
    key: str
    rule: str
    detail: str
    sample: bool  # the whole sample is dropped: its image is unusable, or this is its last caption


@dataclass
class CurationReport:
    rules: CurationRules
    total: int = 0  # samples examined
    kept: dict[int, tuple[str, ...]] = field(default_factory=dict)  # index -> captions that are kept
    dropped: list[Dropped] = field(default_factory=list)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Returns rule -> (number of dropped samples, number of other dropped captions), the most frequent rule first."""
        samples = Counter(drop.rule for drop in self.dropped if drop.sample)
        captions = Counter(drop.rule for drop in self.dropped if not drop.sample)
        return {rule: (samples[rule], captions[rule]) for rule, _ in (samples + captions).most_common()}


def decoded_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Returns (width, height) of an image after decoding it completely. Raises BadSample if it is damaged."""
    from coalign.data.images.decode import open_image

    opened = open_image(image)
    opened.decode(min_scale=1 / 8)  # detects damage at any scale
    return opened.size


def curate(
    source: Source,
    rules: CurationRules = DECLIP_YFCC,
    decode: Callable[[bytes | np.ndarray], tuple[int, int]] = decoded_size,
) -> CurationReport:
    """Applies the rules to every sample. Captions are dropped individually, and a sample is dropped if none is left.

    An image is decoded only if a caption passes, so a sample with bad captions and a bad image is reported for its captions.
    """
    report = CurationReport(rules, len(source))
    for index in track(range(len(source)), "Applying the rules"):
        key = f"{source.name}, sample {index}"
        try:
            record = source.record(index)
            key = record.key
            kept, rejected = _filter_captions(require_captions(record), rules)
            if kept:
                _check_size(*decode(source.image(index)), rules)
        except BadSample as bad:
            report.dropped.append(Dropped(index, key, bad.reason, bad.detail, True))
            continue
        for number, (rule, detail) in enumerate(rejected, start=1):
            report.dropped.append(Dropped(index, key, rule, detail, sample=not kept and number == len(rejected)))
        if kept:
            report.kept[index] = kept
    return report


def _filter_captions(captions: Iterable[str], rules: CurationRules) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Returns the captions that pass, and (rule, detail) of the others."""
    kept, rejected = [], []
    for raw in captions:
        try:
            caption = clean_caption(raw)
            _check_caption(caption, rules)
            kept.append(caption)
        except BadSample as bad:
            rejected.append((bad.reason, bad.detail))
    return tuple(kept), rejected


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
    """Writes the kept samples as a folder (see `writing.write_rows`), with the dropped ones in dropped.jsonl.

    Returns the path of metadata.jsonl. Raises UserError if `out` is not empty, and BadSample if an image cannot be read.
    """
    kept = ((index, replace(source.record(index), captions=captions)) for index, captions in report.kept.items())
    path = write_rows(source, kept, out)
    write_json_lines(path.with_name("dropped.jsonl"), map(_to_json, report.dropped))
    return path


def _to_json(drop: Dropped) -> dict[str, Any]:
    return {"key": drop.key, "rule": drop.rule, "detail": drop.detail, "sample": drop.sample}


def tag_counts(source: Source) -> tuple[Counter[str], Counter[str]]:
    """Returns the number of samples per tag (lower case, single spaces), and the number of samples skipped as bad, per reason."""
    tags: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for index in track(range(len(source)), "Reading tags"):
        try:
            record = source.record(index)
            require_captions(record)
            tags.update({_normalize_tag(tag) for tag in record.tags} - {""})
        except BadSample as bad:
            skipped[bad.reason] += 1
    return tags, skipped


def caption_nouns(caption: str) -> tuple[str, ...]:
    """Returns the words of a caption that are almost always nouns, in the singular, as tags for datasets without tags (as in MCT)."""
    nouns = [word for word in words_of(caption) if likely_parts_of_speech(word) == {"n"}]
    return tuple(
        dict.fromkeys(next(base for base, part in reversed(base_forms(word)) if part == "n") for word in nouns)
    )


def build_queries(tags: Mapping[str, int] | Iterable[str]) -> list[str]:
    """Returns DeCLIP's query list: the tags, given with or without counts, the most frequent first, then their synonyms."""
    counts: Counter[str] = Counter()
    for tag, count in tags.items() if isinstance(tags, Mapping) else ((tag, 1) for tag in tags):
        counts[_normalize_tag(tag)] += count
    ordered = sorted(counts.keys() - {""}, key=lambda tag: (-counts[tag], tag))
    return list(dict.fromkeys([*ordered, *(synonym for tag in ordered for synonym in synonyms(tag))]))


def write_queries(queries: Iterable[str], path: str | Path) -> None:
    """Writes one query per line, in UTF-8. Raises UserError if the file cannot be written."""
    try:
        Path(path).write_text("".join(f"{query}\n" for query in queries), encoding="utf-8")
    except OSError as error:
        raise UserError(f"The queries cannot be written to {path}: {error.strerror or error}.") from None


def _normalize_tag(tag: str) -> str:
    """Normalizes case and separators: Flickr writes "polar+bear", others "polar_bear"."""
    return " ".join(re.sub(r"[+_\s]+", " ", tag.lower()).split())
