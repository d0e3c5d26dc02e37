"""Compares the token ids of a run's own captions in another library with the run's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coalign.data.sources.open import open_any
from coalign.errors import UserError
from coalign.progress import progress
from coalign.runs.folder import data_name
from coalign.runs.run import Run, context_length
from coalign.workflows.train.setup import captions_of

MAX_PAIRS = 200_000
_BATCH = 1000
TokenIds = Callable[[list[str]], Sequence[Sequence[int]]]  # texts -> their ids from start to end token, maybe padded


def check_captions(run: Run, library: str, token_ids: TokenIds, max_differing: float = 0.0) -> str:
    """Returns a sentence on the captions of the run's data, of at most MAX_PAIRS pairs that are evenly spaced.

    Raises UserError if more than the fraction `max_differing` of them have other token ids than in the run. If the data cannot be read
    here, says that nothing was compared.
    """
    data = data_name(run.data)
    try:
        source = open_any(run.data, run.config.reading)
        indices = np.linspace(0, len(source) - 1, min(len(source), MAX_PAIRS)).astype(int)
        found = captions_of(source, indices)
        captions = list(dict.fromkeys(text.encode("utf-8", "replace").decode() for text in found))
    except UserError as error:
        print(f"Captions were not compared: {error}")
        return f"The captions of {data} were not compared with {library}, as they could not be read."
    differing: list[str] = []
    with progress(f"Comparing captions with {library}", len(captions), "captions") as task:
        for first in range(0, len(captions), _BATCH):
            texts = captions[first : first + _BATCH]
            differing += differing_texts(run, texts, token_ids)
            task.update(first + len(texts))
    if len(differing) > max_differing * len(captions):
        raise UserError(_refusal(run, library, differing, len(captions)))
    if differing:
        return f"{_differ(library, differing, len(captions))} of {data}: their embeddings differ."
    return f"{library} returns the run's token ids for all of {len(captions):,} captions of {data}."


def differing_texts(run: Run, texts: list[str], token_ids: TokenIds) -> list[str]:
    """Returns those of the texts that have other token ids than in the run."""
    ours = [run.tokenizer.encode(text, context_length(run.method)) for text in texts]
    pairs = zip(texts, ours, token_ids(texts), strict=True)
    return [text for text, one, other in pairs if list(other[: len(one)]) != one]


def _differ(library: str, differing: Sequence[str], count: int) -> str:
    return f"{library} tokenizes {len(differing):,} of {count:,} captions otherwise than the run, such as {differing[0][:60]!r}"


def _refusal(run: Run, library: str, differing: Sequence[str], count: int) -> str:
    found, accept = f"{_differ(library, differing, count)}: ", "accept it with --max-differing"
    if run.tokenizer.repairs:  # so repaired captions are the ones that it was trained on
        return found + (
            "it does not repair wrongly decoded text and rare HTML entities as the run does; use --to open_clip, or repair these captions "
            f"in {run.data} (ftfy.fix_text, html.unescape), which changes nothing for the run, and export again, or {accept}."
        )
    return found + (
        "it repairs wrongly decoded text and HTML entities that the run was trained on as they are; use --to transformers or --to onnx, "
        f"or repair these captions (ftfy.fix_text, html.unescape) and train again, or {accept}."
    )
