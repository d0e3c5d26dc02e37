"""Text views: one of a sample's captions as it is, changed by easy data augmentation (EDA) or paraphrased, with
tokens masked if wanted.

Everything is a function of the arguments and of the generator's state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coalign.data.lexicon import synonyms
from coalign.data.tokenizer import Tokenizer
from coalign.types import NOT_MASKED, TextPolicy

DELETION_P = 0.1
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")  # punctuation around a word


@dataclass(frozen=True)
class TokenisedView:
    ids: list[int]  # start … end
    labels: list[int] | None = None  # the original id where a token was chosen for masked language modelling, else -100


def text_view(
    caption: str,
    policy: TextPolicy,
    generator: np.random.Generator,
    tokenizer: Tokenizer,
    context_length: int,
    paraphrases: Sequence[str] = (),
) -> TokenisedView:
    """One view of a caption. A paraphrase is drawn from those that are stored; where there is none, the caption
    stands in for it."""
    if policy.kind == "eda":
        caption = eda(caption, generator)
    elif policy.kind == "paraphrase" and paraphrases:
        caption = choose_caption(paraphrases, generator)
    ids = tokenizer.encode(caption, context_length)
    if not policy.mask_p:
        return TokenisedView(ids)
    return TokenisedView(*mask_tokens(ids, policy.mask_p, generator, tokenizer))


def choose_caption(captions: Sequence[str], generator: np.random.Generator) -> str:
    """One of the captions (at least one), each as likely as another."""
    return captions[int(generator.integers(len(captions)))]


def eda(caption: str, generator: np.random.Generator) -> str:
    """One of synonym replacement, random swap and random deletion, each as likely as another (DeCLIP, App. B; Wei and
    Zou 2019).

    Where the drawn operation has nothing to work on (no synonyms, a single word) the caption comes back with its
    spaces normalised; a caption with words never becomes empty.
    """
    operation = (replace_synonym, swap_words, delete_words)[generator.integers(3)]
    return " ".join(operation(caption.split(), generator))


def replace_synonym(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """One word that has synonyms, wherever it stands in the caption, becomes one of them; the punctuation around it
    stays."""
    cores = [_EDGES.sub("", word) for word in words]
    replaceable = [core for core in dict.fromkeys(cores) if synonyms(core)]
    if not replaceable:
        return list(words)
    chosen = replaceable[generator.integers(len(replaceable))]
    found = synonyms(chosen)
    synonym = found[generator.integers(len(found))]
    return [word.replace(core, synonym, 1) if core == chosen else word for word, core in zip(words, cores)]


def swap_words(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Two words at different places change places."""
    swapped = list(words)
    if len(words) > 1:
        i, j = generator.choice(len(words), size=2, replace=False)
        swapped[i], swapped[j] = swapped[j], swapped[i]
    return swapped


def delete_words(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Every word goes with probability 0.1; if all would go, one at random stays."""
    if len(words) < 2:
        return list(words)
    kept = [word for word, draw in zip(words, generator.random(len(words))) if draw >= DELETION_P]
    return kept or [words[int(generator.integers(len(words)))]]


def mask_tokens(
    ids: Sequence[int], mask_p: float, generator: np.random.Generator, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """BERT's masking: each ordinary token is chosen with probability `mask_p`; a chosen one becomes the mask token
    (80 %), a random ordinary token (10 %) or stays (10 %). Gives the masked ids and the labels: the original id where
    chosen, -100 elsewhere.

    Each token is chosen for itself, as in the released code of DeCLIP, so a short caption may have no masked token.
    """
    original = np.asarray(ids, dtype=np.int64)
    chosen = (generator.random(len(original)) < mask_p) & (original < tokenizer.start_id)
    fate = generator.random(len(original))
    random_ids = generator.integers(tokenizer.start_id, size=len(original))
    masked = np.where(chosen & (fate < 0.8), tokenizer.mask_id, original)
    masked = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked)
    return masked.tolist(), np.where(chosen, original, NOT_MASKED).tolist()
