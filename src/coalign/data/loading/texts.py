"""The text views of a chunk of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coalign.data.loading.samples import Ragged, Samples
from coalign.data.text.tokenizer import Tokenizer
from coalign.data.text.views import choose_paraphrases, eda, mask_tokens
from coalign.errors import BadSample
from coalign.randomness import Draws, stable_hash
from coalign.types import NOT_MASKED, TextPolicy


@dataclass
class Texts:
    """Text views of samples."""

    captions: np.ndarray  # int64 [sample], numbers of the captions that are shown
    has_caption: np.ndarray  # bool [sample]
    caption_id: np.ndarray  # int64 [sample]
    ids: np.ndarray  # int32 [sample, view, token], padded with 0
    lengths: np.ndarray  # int32 [sample, view]
    labels: np.ndarray  # int32 [sample, view, token]
    failures: dict[int, BadSample]  # by position among the samples


def text_views(
    samples: Samples,
    rows: np.ndarray,
    draws: Draws,
    policies: Mapping[str, TextPolicy],
    tokenizer: Tokenizer,
    context_length: int,
) -> Texts:
    """Makes the text views of the samples at `rows`. All views of a sample show one caption; a sample without any, the empty caption."""
    captions = samples.choose_captions(rows, draws.uniform("caption", 1)[:, 0])
    shape = (len(rows), len(policies), context_length)
    texts = Texts(
        captions=captions,
        has_caption=samples.num_captions[rows] > 0,
        caption_id=samples.caption_ids[captions],
        ids=np.zeros(shape, np.int32),
        lengths=np.zeros(shape[:2], np.int32),
        labels=np.full(shape, NOT_MASKED, np.int32),
        failures={},
    )
    for row in np.flatnonzero(~texts.has_caption):
        texts.caption_id[row] = stable_hash("no caption", draws.indices[row])
    paraphrases = _paraphrases(samples, rows, captions, draws, policies, texts.failures)
    for view, (name, policy) in enumerate(policies.items()):
        tokens, numbers = samples.tokens, captions
        if policy.kind != "original":
            if policy.kind == "eda":
                changed = [
                    eda(samples.captions[caption], draws.generator(row, f"text/{name}"))
                    for row, caption in enumerate(captions.tolist())
                ]
            else:
                changed = paraphrases.pop(0)
            tokens = Ragged(tokenizer.encode(text, context_length) for text in changed)
            numbers = np.arange(len(rows))
        texts.lengths[:, view] = tokens.lengths[numbers]
        texts.ids[:, view] = tokens.padded(numbers, context_length, 0)
        if policy.mask_p:
            uniform = draws.uniform(f"text/{name}/mask", 3 * context_length).reshape(len(rows), 3, context_length)
            texts.ids[:, view], texts.labels[:, view] = mask_tokens(
                texts.ids[:, view], texts.lengths[:, view], policy.mask_p, uniform.transpose(1, 0, 2), tokenizer
            )
    return texts


def _paraphrases(
    samples: Samples,
    rows: np.ndarray,
    captions: np.ndarray,
    draws: Draws,
    policies: Mapping[str, TextPolicy],
    failures: dict[int, BadSample],
) -> list[list[str]]:
    """The texts of each view of kind "paraphrase", by view and sample. Adds samples with malformed paraphrases to `failures`."""
    count = sum(policy.kind == "paraphrase" for policy in policies.values())
    texts: list[list[str]] = [[] for _ in range(count)]
    for position, (row, number) in enumerate(zip(rows.tolist(), captions.tolist()) if count else ()):
        caption = samples.captions[number]
        chosen = [caption] * count
        if samples.num_captions[row]:
            try:
                generator = draws.generator(position, "paraphrases")
                chosen = choose_paraphrases(caption, samples.paraphrases.get(row), count, generator)
            except BadSample as bad:
                failures[position] = bad.copy()
        for view, text in zip(texts, chosen):
            view.append(text)
    return texts
