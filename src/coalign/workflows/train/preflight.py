"""Checks before training that stop a run whose results would mean nothing, such as one on file names as captions.

A check is a function of `Preflight` that returns one sentence, or None if all is well; `CHECKS` lists them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from coalign.config import TrainConfig
from coalign.data.images.decode import open_image
from coalign.data.sources.base import FOLDER, Classes, Source
from coalign.data.text.captions import printable
from coalign.data.text.context import cut_texts
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import BadSample, UserError
from coalign.runs.run import text_context
from coalign.training.distributed import World
from coalign.types import Record
from coalign.workflows.train.batches import TrainingData
from coalign.workflows.train.file_names import meaningless, plain
from coalign.workflows.train.safe_views import with_safe_views
from coalign.workflows.train.setup import ConfigFn, open_data, run_tokenizer

SAMPLE = 1000  # samples to read, whatever the size of the data
ONE_CAPTION = 0.9  # fraction of the captions that are the same
FIRST = 10  # images to open if nothing is held out
CUT = 0.1  # fraction of the captions that are longer than the context: a model would not see what they say
FILE_NAMES = 0.5  # fraction of the captions that look like file names; more than this


@dataclass
class Preflight:
    """The data of a run before training. A sample of its training records stands for all of them; it is the same every time."""

    source: Source
    train: Sequence[int] | np.ndarray  # indices
    num_val: int | None  # None: nothing is to be held out

    @cached_property
    def records(self) -> list[Record]:
        """The readable records of the sample."""
        positions = np.arange(min(len(self.train), SAMPLE))
        if len(self.train) > SAMPLE:
            positions = np.unique(np.random.default_rng(0).integers(len(self.train), size=SAMPLE))
        records = []
        for position in positions.tolist():
            try:
                records.append(self.source.record(int(self.train[position])))
            except BadSample:
                continue  # counted during training
        return records

    @cached_property
    def captions(self) -> list[str]:
        return [caption for record in self.records for caption in record.captions]

    def unusable_captions(self) -> str | None:
        """Returns a sentence on captions that cannot be used, beside others of their image; None if there are none."""
        found = [(reason, record.key) for record in self.records for reason in record.unusable]
        if not found:
            return None
        reason, key = found[0]
        return (
            f"{len(found):,} captions of {len(self.records):,} sampled pairs are not used, beside others of their image ({reason}), such "
            f"as of {key}; coalign data check counts all."
        )

    def has_readable_image(self) -> bool:
        """Whether one of the first training images can be opened."""
        for index in self.train[:FIRST]:
            with suppress(BadSample):
                open_image(self.source.image(int(index)))
                return True
        return False

    @property
    def named_classes(self) -> Classes | None:
        """The classes whose names the captions are made of."""
        classes = self.source.classes
        return None if classes is None or classes.in_captions else classes

    def examples(self, captions: Sequence[str]) -> str:
        """Returns two of the captions, each with its image; if they are equal, of two images."""
        chosen = set(captions)
        pairs = [(caption, record.key) for record in self.records for caption in record.captions if caption in chosen]
        distinct = list({caption: (caption, key) for caption, key in reversed(pairs)}.values())[::-1]
        return " and ".join(f"{_shown(text)} of {key}" for text, key in (distinct if len(distinct) > 1 else pairs)[:2])


Check = Callable[[Preflight], str | None]


def problems(preflight: Preflight) -> list[str]:
    """Returns what the checks find, one sentence each."""
    return [found for check in CHECKS if (found := check(preflight)) is not None]


def check_before_training(pairs: TrainingData, config: TrainConfig, resumed: bool = False) -> Preflight:
    """Returns the preflight of a run.

    Raises UserError with its first problem, unless the configuration skips the checks, or the run passed them before.
    """
    holds_out = config.val_fraction > 0 or config.val_data is not None
    preflight = Preflight(pairs.source, pairs.train, len(pairs.val) if holds_out else None)
    if not (config.skip_data_checks or resumed) and (found := problems(preflight)):
        raise _stop(found[0])
    return preflight


def check_context(preflight: Preflight, config: TrainConfig, tokenizer: Tokenizer, resumed: bool = False) -> str | None:
    """Returns a sentence on the captions that are longer than the context; None if there are none. Raises UserError if they are many."""
    assert config.context_length is not None
    cut = cut_texts(preflight.captions, tokenizer.num_tokens, config.context_length)
    line = cut.line("sampled captions", option=True)
    if line and cut.fraction > CUT and not (config.skip_data_checks or resumed):
        raise _stop(line)
    return line


def open_and_check(
    data: str, config_for: ConfigFn, console: Console, world: World, out: Path, resumed: bool = False
) -> tuple[TrainingData, TrainConfig, Tokenizer]:
    """Opens the data and the tokenizer of a run in the folder `out`, checks the data, and prints what it leaves out.

    Raises UserError if the data cannot be used or does not pass a check. If the run is resumed, it passed them before.
    """
    pairs, config = open_data(data, config_for, world)
    preflight = check_before_training(pairs, config, resumed)
    config, changed_views = with_safe_views(config, preflight.captions)
    tokenizer, config = run_tokenizer(config, pairs, out if resumed else None)
    config = replace(config, context_length=text_context(config, out if resumed else config.init_from))
    cut_captions = check_context(preflight, config, tokenizer, resumed)
    if world.is_first:
        for line in [*pairs.account(), *filter(None, [preflight.unusable_captions(), cut_captions, changed_views])]:
            console.print(line, markup=False)
    return pairs, config, tokenizer


def check_trials(data: str, config_for: ConfigFn, console: Console) -> tuple[TrainingData, TrainConfig]:
    """Does before the trials of an experiment what a run on the CPU does before training; see `open_and_check`."""
    return open_and_check(data, config_for, console, World(0, 1, torch.device("cpu")), Path(os.devnull))[:2]


def _stop(problem: str) -> UserError:
    return UserError(f"{problem.removesuffix('.')}; --skip-data-checks trains anyway.")


# ---------------------------------------------------------------- checks


def no_captions(preflight: Preflight) -> str | None:
    """Finds images without captions, such as those with plain numbers as file names."""
    records = preflight.records
    missing = [record for record in records if not record.captions]
    if not missing or len(missing) <= ONE_CAPTION * len(records):
        return None
    shown = _examples([record.key for record in missing])
    return f"{_share(len(missing), len(records), 'images')} have no caption, such as {shown}; {_remedy(preflight)}."


def file_names(preflight: Preflight) -> str | None:
    """Finds captions, or class names, that are file names, numbers, codes or placeholders."""
    classes = preflight.named_classes
    if classes is not None and len(classes.names) == 1:
        return None  # see one_caption
    labels, what = (preflight.captions, "captions") if classes is None else (list(classes.names), "classes")
    odd = meaningless(labels)
    if len(odd) <= FILE_NAMES * len(labels):
        return None
    shown = preflight.examples(odd) if classes is None else _examples(odd)
    found = (
        f"{_share(len(odd), len(labels), what)} look like file names, numbers, codes or placeholders, such as {shown}"
    )
    return f"{found}; {_remedy(preflight)}."


def one_caption(preflight: Preflight) -> str | None:
    """Finds captions that are nearly all the same but for case, punctuation and white space, or images of a single class."""
    classes, captions = preflight.named_classes, preflight.captions
    if classes is not None:
        if len(classes.names) > 1:
            return None
        return (
            f"All images have the same class, {_shown(classes.names[0])}; add images of other classes, or choose a column with other "
            "classes by --captions-from."
        )
    written = {caption: plain(caption) for caption in captions}
    top, count = Counter(map(written.__getitem__, captions)).most_common(1)[0] if len(captions) > 1 else ("", 0)
    same = [caption for caption in captions if written[caption] == top]
    if not count or count < ONE_CAPTION * len(captions) or meaningless(same):
        return None
    found = f"{_share(count, len(captions), 'captions')} are the same, such as {preflight.examples(same)}"
    return f"{found}; {_remedy(preflight)}."


def nothing_held_out(preflight: Preflight) -> str | None:
    """Finds data of which nothing is held out, although something should be.

    Of a single pair, and of images that cannot be opened, nothing is held out either; the training loader names that cause.
    """
    if preflight.num_val is None or preflight.num_val or len(preflight.train) < 2 or not preflight.has_readable_image():
        return None
    return (
        "No pair is held out to evaluate the model, as the pairs are few or share their images or captions; set a larger --val-fraction, "
        "hold out values of a column with --val-by, give other pairs with --val-data, or evaluate nothing with --val-fraction 0."
    )


CHECKS: tuple[Check, ...] = (no_captions, file_names, one_caption, nothing_held_out)


# ---------------------------------------------------------------- words


def _share(count: int, total: int, what: str) -> str:
    return f"All {total:,} sampled {what}" if count == total else f"{count:,} of {total:,} sampled {what}"


def _shown(text: str) -> str:
    return repr(printable(text if len(text) <= 60 else f"{text[:60]}…"))


def _examples(texts: Sequence[str]) -> str:
    return " and ".join(map(_shown, list(dict.fromkeys(texts))[:2]))


def _remedy(preflight: Preflight) -> str:
    """What to do about captions that are of no use."""
    if preflight.named_classes is not None:
        return "rename the classes, or choose a column with their names by --captions-from"
    folders, classes = (
        list(dict.fromkeys(str(value) for record in preflight.records if (value := record.facts.get(name))))
        for name in (FOLDER, "cls")
    )
    columns = "choose a column of captions with --caption-column or of class names with --captions-from"
    if len(classes) > 1:
        ways = f"make captions of the .cls files, such as {_examples(classes)}, with --captions-from cls"
    elif len(folders) > 1:
        ways = f"make captions of the images' folders, such as {_examples(folders)}, with --captions-from folder, {columns}"
    else:
        ways = f"{columns}, make captions of class folders with --captions-from folder"
    return f"{ways}, or add .txt files with captions beside the images"
