"""What a locked tower encodes once: the variants of the image views and of the captions of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from coalign.data.images.decode import open_image
from coalign.data.images.views import NUM_PARAMS, AnyImage, in_groups, make_views
from coalign.data.loading.samples import Samples, naming
from coalign.data.sources.base import Source
from coalign.data.text.captions import require_captions
from coalign.data.text.tokenizer import Tokenizer
from coalign.data.text.views import choose_paraphrases, eda
from coalign.errors import BadSample
from coalign.randomness import Draws, generator
from coalign.types import EVALUATION, AugmentationPolicy, Preprocess, Record, TextPolicy


@dataclass(frozen=True)
class ImageVariants:
    """The variants of image views: each is the view that a run without a cache shows in epoch `epoch`.

    With a single variant, all views are the evaluation view.
    """

    source: Source
    indices: np.ndarray  # int64 [row], the sample of each row
    policies: Mapping[str, AugmentationPolicy]
    views: int
    image_size: int
    preprocess: Preprocess
    seed: int

    def drawn(self) -> list[tuple[str, int]]:
        """Returns the view and the epoch of each variant."""
        if self.views == 1:
            return [("evaluation", 0)]
        return [(name, epoch) for name, policy in self.policies.items() for epoch in range(_count(policy, self.views))]

    def of_view(self) -> dict[str, tuple[int, ...]]:
        """Returns the numbers of each view's variants."""
        drawn = self.drawn()
        return {
            name: tuple(
                number
                for number, (view, _) in enumerate(drawn)
                if view in (name, "evaluation" if self.views == 1 else name)
            )
            for name in self.policies
        }

    def load(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns pixels, uint8 [row, variant, 3, size, size], parameters, float32 [row, variant, 11], and which rows are bad, bool."""
        indices, drawn, size = self.indices[rows], self.drawn(), self.image_size
        pixels = np.zeros((len(indices), len(drawn), 3, size, size), np.uint8)
        params = np.zeros((len(indices), len(drawn), NUM_PARAMS), np.float32)
        bad = np.zeros(len(indices), bool)
        policies = {
            f"{epoch}/{view}": self.policies.get(view, EVALUATION) if self.views > 1 else EVALUATION
            for view, epoch in drawn
        }

        def opened() -> Iterator[tuple[int, AnyImage]]:
            for row, index in enumerate(indices.tolist()):
                try:
                    with naming(self.source, index):
                        yield row, open_image(self.source.image(index))
                except BadSample:
                    bad[row] = True

        def uniform(chosen: np.ndarray, name: str, count: int) -> np.ndarray:
            epoch, view = name.split("/", 1)
            return Draws(self.seed, int(epoch), chosen).uniform(view, count)

        for numbers, images in in_groups(opened()):
            views = make_views(images, policies, partial(uniform, indices[numbers]), size, preprocess=self.preprocess)
            pixels[numbers], params[numbers] = views.pixels.swapaxes(0, 1), views.params.swapaxes(0, 1)
            bad[[numbers[each] for each in views.failures]] = True
        return pixels, params, bad


def _count(policy: AugmentationPolicy, views: int) -> int:
    return 1 if policy == EVALUATION else views


@dataclass(frozen=True)
class TextVariants:
    """The variants of captions: the caption itself, once for all views that show it, and `views` changed ones for each other view."""

    samples: Samples
    policies: Mapping[str, TextPolicy]
    views: int
    tokenizer: Tokenizer
    context_length: int
    seed: int

    def drawn(self) -> list[tuple[str, int]]:
        """Returns the view and the epoch of each variant; the view "" for the caption itself."""
        original = any(policy.kind == "original" for policy in self.policies.values())
        changed = [name for name, policy in self.policies.items() if policy.kind != "original"]
        return [*([("", 0)] if original else []), *((name, epoch) for name in changed for epoch in range(self.views))]

    def of_view(self) -> dict[str, tuple[int, ...]]:
        """Returns the numbers of each view's variants."""
        drawn = self.drawn()
        return {
            name: tuple(
                number for number, (view, _) in enumerate(drawn) if view == ("" if policy.kind == "original" else name)
            )
            for name, policy in self.policies.items()
        }

    def load(self, rows: slice) -> list[list[int]]:
        """Returns the tokens of all variants of each caption, one after the other."""
        samples, texts = self.samples, []
        paraphrased = [name for name, policy in self.policies.items() if policy.kind == "paraphrase"]
        for number in range(*rows.indices(len(samples.captions))):
            caption = samples.captions[number]
            row = int(np.searchsorted(samples.first_caption, number, side="right")) - 1
            index = int(samples.indices[row])
            for view, epoch in self.drawn():
                if not view or not caption:
                    texts.append(caption)
                elif view in paraphrased:
                    draw = generator(self.seed, epoch, index, 0, "paraphrases")
                    chosen = choose_paraphrases(caption, samples.paraphrases.get(row), len(paraphrased), draw)
                    texts.append(chosen[paraphrased.index(view)])
                else:
                    texts.append(eda(caption, generator(self.seed, epoch, index, 0, f"text/{view}")))
        return [self.tokenizer.encode(text, self.context_length) for text in texts]


def check_record(policies: Mapping[str, TextPolicy], captionless: bool, record: Record) -> None:
    """Raises BadSample for a record without captions, unless the plan allows it, or with malformed paraphrases, if the plan shows them."""
    if not captionless:
        require_captions(record)
    if any(policy.kind == "paraphrase" for policy in policies.values()):
        for caption in record.captions:
            choose_paraphrases(caption, record.facts.get("paraphrases"), 1, np.random.default_rng(0))
