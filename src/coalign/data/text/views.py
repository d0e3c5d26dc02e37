"""Text views of a caption: unchanged, augmented by easy data augmentation (EDA), or paraphrased, with optional token masking.

All functions are deterministic given their arguments and the state of the generator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coalign.data.text.lexicon import synonyms
from coalign.data.text.tokenizer import Tokenizer
from coalign.types import NOT_MASKED, TextPolicy

DELETION_P = 0.1
_PUNCTUATION = re.compile(r"^[\W_]+|[\W_]+$")  # around a word


@dataclass(frozen=True)
class TokenizedView:
    ids: list[int]  # from start to end token
    labels: list[int] | None = None  # MLM labels: the original id of a selected token, else NOT_MASKED


def text_view(
    caption: str,
    policy: TextPolicy,
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    context_length: int,
    paraphrases: Sequence[str] = (),
) -> TokenizedView:
    """Returns one view of a caption. A "paraphrase" view is one of the stored paraphrases, or the caption itself if there are none."""
    if policy.kind == "eda":
        caption = eda(caption, generator)
    elif policy.kind == "paraphrase" and paraphrases:
        caption = choose_caption(paraphrases, generator)
    ids = tokenizer.encode(caption, context_length)
    if not policy.mask_p:
        return TokenizedView(ids)
    return TokenizedView(*mask_tokens(ids, policy.mask_p, generator, tokenizer))


def choose_caption(captions: Sequence[str], generator: np.random.Generator) -> str:
    """Returns one of the captions, drawn uniformly. There must be at least one."""
    return captions[int(generator.integers(len(captions)))]


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


def mask_tokens(
    ids: Sequence[int], mask_p: float, generator: np.random.Generator, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Masks tokens as BERT does. Returns the masked ids and the labels: the original ids of selected tokens, else NOT_MASKED.

    Each ordinary token is selected with probability `mask_p`, independently as in DeCLIP's released code, so a short caption may have no
    masked token. A selected token becomes the mask token (80 %) or a random ordinary token (10 %), or stays unchanged (10 %).
    """
    original = np.asarray(ids, dtype=np.int64)
    selected = (generator.random(len(original)) < mask_p) & (original < tokenizer.start_id)
    action = generator.random(len(original))
    random_ids = generator.integers(tokenizer.start_id, size=len(original))
    masked = np.where(selected & (action < 0.8), tokenizer.mask_id, original)
    masked = np.where(selected & (action >= 0.8) & (action < 0.9), random_ids, masked)
    return masked.tolist(), np.where(selected, original, NOT_MASKED).tolist()
