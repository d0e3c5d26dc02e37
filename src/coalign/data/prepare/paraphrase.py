"""Paraphrases by back-translation (MCT §3.3): captions are translated to another language and back.

Translators are Apertium, a rule-based program, and Marian models from Hugging Face. Paraphrases that differ too much from the caption, in
their words or their length, are rejected.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coalign.data.prepare.writing import write_rows
from coalign.data.sources.base import Source
from coalign.data.text.captions import clean_caption
from coalign.data.text.lexicon import base_forms, parts_of_speech, synonyms, words_of
from coalign.errors import BadSample, UserError
from coalign.progress import track
from coalign.types import Record

Translator = Callable[[Sequence[str]], list[str]]  # returns one translation per sentence

# of the caption's content words, which the paraphrase must contain, possibly inflected or as a synonym
MIN_SHARED = 0.5
LENGTH_RATIO = (0.5, 2.0)  # min and max number of words of a paraphrase relative to the caption
_BATCH_SIZE = 512  # captions per call of a translator


# ---------------------------------------------------------------- translators


def apertium(pair: str) -> Translator:
    """Returns the translator of an installed Apertium language pair, such as "eng-spa". Raises UserError if it is not installed."""
    try:
        installed = subprocess.run(["apertium", "-l"], capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        raise UserError(
            "Apertium is not installed; on Debian or Ubuntu, install the packages apertium and apertium-eng-spa."
        ) from None
    if pair not in installed:
        raise UserError(
            f"The Apertium language pair {pair} is not installed; available: {', '.join(installed) or 'none'}."
        )

    def translate(sentences: Sequence[str]) -> list[str]:
        lines = _run_apertium(pair, sentences)
        if len(lines) == len(sentences):
            return lines
        # Apertium can join lines with characters of its own markup. Translate the sentences one by one.
        return [" ".join(_run_apertium(pair, [sentence])) for sentence in sentences]

    return translate


def _run_apertium(pair: str, sentences: Sequence[str]) -> list[str]:
    text = "".join(f"{sentence}\n" for sentence in sentences)
    process = subprocess.run(["apertium", "-u", pair], input=text, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = " ".join(process.stderr.split()) or f"exit code {process.returncode}"
        raise UserError(f"`apertium -u {pair}` failed: {reason}.")
    return process.stdout.splitlines()


def marian(model: str, device: str = "cpu") -> Translator:
    """Returns the translator of a Marian model, by its name on the hub, such as "Helsinki-NLP/opus-mt-en-de", or by its folder.

    Raises UserError if the model cannot be loaded or the "hf" extra is not installed.
    """
    try:
        import torch
        from transformers import AutoTokenizer, MarianMTModel
    except ImportError:
        raise UserError(f'The translator {model} requires the "hf" extra: pip install "coalign[hf]".') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = MarianMTModel.from_pretrained(model).eval().to(device)
    except Exception as error:  # many kinds: no network, no such file, not a Marian model
        raise UserError(f"The translator {model} could not be loaded: {str(error).splitlines()[0]}") from error

    def translate(sentences: Sequence[str]) -> list[str]:
        inputs = tokenizer(list(sentences), return_tensors="pt", padding=True, truncation=True).to(device)
        with torch.inference_mode():
            tokens = network.generate(**inputs, num_beams=4)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return translate


def back_translate(captions: Sequence[str], to_pivot: Translator, from_pivot: Translator) -> list[str]:
    """Returns one paraphrase per caption, without filtering."""
    paraphrases: list[str] = []
    for start in track(range(0, len(captions), _BATCH_SIZE), "Translating", unit="batches"):
        paraphrases += from_pivot(to_pivot(captions[start : start + _BATCH_SIZE]))
    return paraphrases


# ---------------------------------------------------------------- filtering


def rejection_reason(caption: str, paraphrase: str) -> str | None:
    """Returns why a paraphrase is rejected, as a short phrase to count by, or None if it is accepted."""
    try:
        paraphrase = clean_caption(paraphrase)
    except BadSample:
        return "empty"
    words, paraphrase_words = words_of(caption), words_of(paraphrase)
    if words == paraphrase_words:
        return "same words"
    min_ratio, max_ratio = LENGTH_RATIO
    if not min_ratio * len(words) <= len(paraphrase_words) <= max_ratio * len(words):
        return "too short or too long"
    content_words = [word for word in words if parts_of_speech(word) != {"f"}]
    forms = {form for word in paraphrase_words for form in (word, *_bases(word))}
    num_shared = sum(bool({word, *_bases(word), *synonyms(word)} & forms) for word in content_words)
    return "too different" if num_shared < MIN_SHARED * len(content_words) else None


def _bases(word: str) -> list[str]:
    return [base for base, _ in base_forms(word)]


# ---------------------------------------------------------------- datasets


@dataclass
class Paraphrases:
    """Paraphrases of the captions of a dataset."""

    by_caption: dict[str, list[str]]  # distinct caption -> distinct paraphrases, at most one per pivot language
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> number of paraphrases


def paraphrase(captions: Iterable[str], pivots: Sequence[tuple[Translator, Translator]]) -> Paraphrases:
    """Paraphrases the distinct captions through each pivot language, given by its translators (to_pivot, from_pivot)."""
    distinct = list(dict.fromkeys(captions))
    result = Paraphrases({caption: [] for caption in distinct})
    for to_pivot, from_pivot in pivots:
        for caption, candidate in zip(distinct, back_translate(distinct, to_pivot, from_pivot), strict=True):
            reason = rejection_reason(caption, candidate)
            cleaned = clean_caption(candidate) if reason is None else ""
            if reason is None and cleaned in result.by_caption[caption]:
                reason = "same as through another pivot"
            if reason is None:
                result.by_caption[caption].append(cleaned)
            else:
                result.rejected[reason] += 1
    return result


def write_paraphrased(source: Source, paraphrases: Paraphrases, out: str | Path) -> tuple[Path, Counter[str]]:
    """Writes the samples with their paraphrases to a folder (see `writing.write_rows`), including samples without a caption.

    Returns the path of metadata.jsonl, and the number of samples skipped because their record is unreadable, by reason.
    """
    skipped: Counter[str] = Counter()

    def samples() -> Iterable[tuple[int, Record]]:
        for index in range(len(source)):
            try:
                record = source.record(index)
            except BadSample as bad:
                skipped[bad.reason] += 1
                continue
            by_caption = {
                caption: candidates
                for caption in record.captions
                if (candidates := paraphrases.by_caption.get(caption))
            }
            facts = {**record.facts, "paraphrases": by_caption} if by_caption else record.facts
            yield index, replace(record, facts=facts)

    return write_rows(source, samples(), out), skipped
