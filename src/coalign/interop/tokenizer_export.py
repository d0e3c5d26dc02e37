"""Tokenizers of runs as other libraries read them: with their cleaning as a normalizer, and with start and end tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from coalign.data.text.cleaning import clip_normalizer, lowercase
from coalign.data.text.tokenizer import END, START, Tokenizer
from coalign.errors import UserError


def exported_tokenizer(tokenizer: Tokenizer, repaired: bool = False) -> Backend:
    """Returns a tokenizer of the `tokenizers` library whose `encode(text).ids` are those of `tokenizer`, with start and end tokens.

    Nothing has to be done to a text before; it does not truncate or pad. A tokenizer that was trained on captions, or that comes from a
    Hugging Face encoder, has equal ids for any text. CLIP's repairs texts in Python (`tokenizer.repairs`): ids are equal except for
    wrongly decoded texts and rare HTML entities, so that an export must count and say what differs. If texts are `repaired` before, as
    open_clip does, it only lowercases them, and ids are equal.
    """
    backend = Backend.from_str(tokenizer.to_str())
    if tokenizer.hugging_face:
        return backend
    if tokenizer.repairs:
        backend.normalizer = lowercase() if repaired else clip_normalizer()
    ids = [(START, tokenizer.start_id), (END, tokenizer.end_id)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return backend


def to_transformers_tokenizer(tokenizer: Tokenizer, context_length: int, repaired: bool = False) -> Any:
    """Returns the exported tokenizer as one of transformers, which truncates to `context_length` tokens and pads with the end token.

    Text towers ignore everything after the first end token. Special tokens in a text are encoded as ordinary text, as in training. Raises
    UserError if transformers is not installed.
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise UserError('Exporting this tokenizer needs the extra "hf": pip install "coalign[hf]".') from None
    return PreTrainedTokenizerFast(
        tokenizer_object=exported_tokenizer(tokenizer, repaired),
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=context_length,
        split_special_tokens=True,
    )
