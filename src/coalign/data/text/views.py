"""Augmentation of text views: easy data augmentation (EDA) of a caption, distinct paraphrases, and token masking.

All functions are deterministic given their arguments and the state of the generator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from coalign.data.text.lexicon import synonyms
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import BadSample
from coalign.types import NOT_MASKED

DELETION_P = 0.1
_PUNCTUATION = re.compile(r"^[\W_]+|[\W_]+$")  # around a word


def eda(caption: str, generator: np.random.Generator) -> str:
    """Applies synonym replacement, random swap or random deletion, drawn uniformly (DeCLIP, App. B; Wei and Zou 2019).

    If the operation does not apply (no synonyms, a single word), only whitespace is normalized. A non-empty caption never becomes empty.
    """
    operation = (replace_synonym, swap_words, delete_words)[generator.integers(3)]
    return " ".join(operation(caption.split(), generator))


def replace_synonym(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Replaces all occurrences of one random word by one of its synonyms, keeping the punctuation around it."""
    cores = [_PUNCTUATION.sub("", word) for word in words]
    replaceable = [core for core in dict.fromkeys(cores) if synonyms(core)]
    if not replaceable:
        return list(words)
    target = replaceable[generator.integers(len(replaceable))]
    candidates = synonyms(target)
    synonym = candidates[generator.integers(len(candidates))]
    return [word.replace(core, synonym, 1) if core == target else word for word, core in zip(words, cores)]


def swap_words(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Swaps two random words."""
    swapped = list(words)
    if len(words) > 1:
        i, j = generator.choice(len(words), size=2, replace=False)
        swapped[i], swapped[j] = swapped[j], swapped[i]
    return swapped


def delete_words(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Deletes each word with probability 0.1. If all were deleted, a random one is kept."""
    if len(words) < 2:
        return list(words)
    kept = [word for word, draw in zip(words, generator.random(len(words))) if draw >= DELETION_P]
    return kept or [words[int(generator.integers(len(words)))]]


def choose_paraphrases(caption: str, stored: object, count: int, generator: np.random.Generator) -> list[str]:
    """Draws paraphrases of a caption for `count` views: distinct ones as far as available. If there are too few, the caption is one.

    stored: {caption: [paraphrase, …]}, or None. Raises BadSample for anything else.
    """
    stored = stored or {}
    paraphrases = stored.get(caption, []) if isinstance(stored, dict) else None
    if not isinstance(paraphrases, list) or not all(isinstance(paraphrase, str) for paraphrase in paraphrases):
        raise BadSample("malformed paraphrases", "expected {caption: [paraphrase, …]}")
    choices = list(dict.fromkeys(paraphrases))
    if len(choices) < count and caption not in choices:
        choices.append(caption)
    shuffled = generator.permutation(len(choices)).tolist()
    return [choices[shuffled[i % len(choices)]] for i in range(count)]


@cache
def _ordinary_ids(vocab_size: int, special_ids: tuple[int, ...]) -> np.ndarray:
    return np.setdiff1d(np.arange(vocab_size), special_ids)


def mask_tokens(
    ids: np.ndarray, lengths: np.ndarray, mask_p: float, draws: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Masks tokens as BERT does. Returns the masked ids and the labels: the original ids of selected tokens, else NOT_MASKED.

    ids: int [text, token], padded to the right. lengths: [text]. draws: uniform numbers in [0, 1), float [3, text, token].

    The tokenizer must have a mask token. Each ordinary token is selected with probability `mask_p`, independently as in DeCLIP's released
    code, so a short caption may have no masked token. A selected token becomes the mask token (80 %) or a random ordinary token (10 %), or
    stays unchanged (10 %).
    """
    selection, action, token = draws
    is_text = ~np.isin(ids, tokenizer.special_ids) & (ids != tokenizer.mask_id)
    is_text &= np.arange(ids.shape[1]) < lengths[:, None]
    selected = (selection < mask_p) & is_text
    ordinary = _ordinary_ids(tokenizer.vocab_size, tokenizer.special_ids)
    changed = np.where(action < 0.8, tokenizer.mask_id, ordinary[(token * len(ordinary)).astype(np.int64)])
    masked = np.where(selected & (action < 0.9), changed, ids)
    return masked.astype(ids.dtype), np.where(selected, ids, NOT_MASKED).astype(ids.dtype)
