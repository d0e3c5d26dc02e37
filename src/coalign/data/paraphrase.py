"""Paraphrases by back-translation (MCT §3.3): a caption goes into another language and comes back in other words.

A translator is a function from sentences to as many sentences. Two are here: Apertium, a program of rules that runs anywhere, and Hugging
Face's Marian models. What comes back spoiled is kept out by its words and its length, and counted.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coalign.data.curate import clean_caption
from coalign.data.lexicon import base_forms, parts_of_speech, synonyms, words_of
from coalign.data.writing import write_rows
from coalign.errors import BadSample, NoCaption, UserError
from coalign.types import Record, Source

Translator = Callable[[Sequence[str]], list[str]]

LEAST_SHARED = 0.5  # of a caption's content words, itself, inflected or by a synonym, that its paraphrase must have
LENGTHS = (0.5, 2.0)  # least and greatest ratio of a paraphrase's words to its caption's
_BATCH = 512  # captions a call


# ---------------------------------------------------------------- translators


def apertium(pair: str) -> Translator:
    """The installed Apertium pair of this name, such as "eng-spa". UserError where it is not there."""
    try:
        known = subprocess.run(["apertium", "-l"], capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        raise UserError(
            "There is no program apertium; on Debian or Ubuntu install the packages apertium and apertium-eng-spa."
        ) from None
    if pair not in known:
        raise UserError(f"Apertium has no pair {pair} here; it has {', '.join(known) or 'none'}.")

    def translate(sentences: Sequence[str]) -> list[str]:
        lines = _run_apertium(pair, sentences)
        if len(lines) == len(sentences):
            return lines
        # a mark that Apertium takes for its own joined two lines
        alone = [_run_apertium(pair, [sentence]) for sentence in sentences]
        return [" ".join(found) for found in alone]

    return translate


def _run_apertium(pair: str, sentences: Sequence[str]) -> list[str]:
    text = "".join(f"{sentence}\n" for sentence in sentences)
    done = subprocess.run(["apertium", "-u", pair], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"apertium {pair} failed: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}.")
    return done.stdout.splitlines()


def marian(model: str, device: str = "cpu") -> Translator:
    """A Marian model of the hub, such as "Helsinki-NLP/opus-mt-en-de", or its folder (extra "hf"). UserError where it cannot be had."""
    try:
        import torch
        from transformers import AutoTokenizer, MarianMTModel
    except ImportError:
        raise UserError(f'The translator {model} needs the extra "hf": pip install "coalign[hf]".') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = MarianMTModel.from_pretrained(model).eval().to(device)
    except Exception as error:  # the hub's client has many: no network, no such file, not a Marian model
        raise UserError(f"The translator {model} could not be loaded: {str(error).splitlines()[0]}") from error

    def translate(sentences: Sequence[str]) -> list[str]:
        inputs = tokenizer(list(sentences), return_tensors="pt", padding=True, truncation=True).to(device)
        with torch.inference_mode():
            tokens = network.generate(**inputs, num_beams=4)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return translate


def back_translate(captions: Sequence[str], there: Translator, back: Translator) -> list[str]:
    """A paraphrase of each caption, good or bad."""
    found: list[str] = []
    for start in range(0, len(captions), _BATCH):
        found += back(there(captions[start : start + _BATCH]))
    return found


# ---------------------------------------------------------------- which are good


def fault(caption: str, paraphrase: str) -> str | None:
    """Why a paraphrase is not used, in a few words that can be counted; None for one that is."""
    try:
        paraphrase = clean_caption(paraphrase)
    except BadSample:
        return "nothing came back"
    words, other = words_of(caption), words_of(paraphrase)
    if words == other:
        return "the same words"
    least, most = LENGTHS
    if not least * len(words) <= len(other) <= most * len(words):
        return "too short or too long"
    content = [word for word in words if parts_of_speech(word) != {"f"}]
    there = {form for word in other for form in (word, *_bases(word))}
    kept = sum(bool({word, *_bases(word), *synonyms(word)} & there) for word in content)
    return "other words than the caption's" if kept < LEAST_SHARED * len(content) else None


def _bases(word: str) -> list[str]:
    return [base for base, _ in base_forms(word)]


# ---------------------------------------------------------------- a data set of them


@dataclass
class Paraphrases:
    """What came of a data set's captions."""

    of_caption: dict[str, list[str]]  # distinct caption -> different paraphrases, at most one a pivot
    left_out: Counter[str] = field(default_factory=Counter)  # fault -> paraphrases


def paraphrase(captions: Iterable[str], pivots: Sequence[tuple[Translator, Translator]]) -> Paraphrases:
    """Paraphrases of the distinct captions by way of each pivot: there, and back."""
    distinct = list(dict.fromkeys(captions))
    found = Paraphrases({caption: [] for caption in distinct})
    for there, back in pivots:
        for caption, other in zip(distinct, back_translate(distinct, there, back), strict=True):
            reason = fault(caption, other)
            cleaned = clean_caption(other) if reason is None else ""
            if reason is None and cleaned in found.of_caption[caption]:
                reason = "as by another pivot"
            if reason is None:
                found.of_caption[caption].append(cleaned)
            else:
                found.left_out[reason] += 1
    return found


def write_paraphrased(source: Source, found: Paraphrases, out: str | Path) -> tuple[Path, Counter[str]]:
    """Writes the data with their paraphrases as a folder (see `writing.write_rows`), samples without a caption included. Gives the path of
    metadata.jsonl, and how many samples were left out because their record cannot be read, by reason."""
    unread: Counter[str] = Counter()

    def samples() -> Iterable[tuple[int, Record]]:
        for index in range(len(source)):
            try:
                record = source.record(index)
            except NoCaption as bad:
                record = bad.record
            except BadSample as bad:
                unread[bad.reason] += 1
                continue
            stored = {
                caption: found.of_caption[caption] for caption in record.captions if found.of_caption.get(caption)
            }
            yield index, replace(record, facts={**record.facts, "paraphrases": stored}) if stored else record

    return write_rows(source, samples(), out), unread
