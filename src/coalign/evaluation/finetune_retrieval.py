"""Fine-tuning of both encoders for retrieval, by the contrast of a batch's pairs, and the weights between (as `finetune`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coalign.evaluation.embed import Batches, embed_images
from coalign.evaluation.finetune import (
    FineTuneConfig,
    descend,
    layers_of,
    name_of,
    train_what_passes,
    weights_between,
)
from coalign.evaluation.retrieval import RetrievalResult, retrieve
from coalign.types import DualEncoder

Captions = Callable[[int], Sequence[str]]


class Retriever(nn.Module):
    """Both encoders, trained, and the logarithm of the scale of their cosines. `layers` are the parameters by depth, the last trained
    fastest: both encoders' last layers lie side by side, whatever their numbers; what they share is an image's."""

    def __init__(self, image: nn.Module, text: nn.Module, logit_scale: float, size: int) -> None:
        super().__init__()
        self.image, self.text = image.eval(), text.eval()
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        device = next(image.parameters(), self.log_scale).device
        train_what_passes(image, torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device))
        of_image = layers_of(image)
        train_what_passes(text, ["a text", "another"])
        of_text = layers_of(text)
        known = {id(parameter) for layer in of_image for parameter in layer}
        own = [[parameter for parameter in layer if id(parameter) not in known] for layer in of_text]
        sides = zip_longest(of_image[::-1], own[::-1])
        self.layers = [layer for layer in ([*(one or []), *(other or [])] for one, other in sides) if layer][::-1]
        for layer in self.layers:
            for parameter in layer:
                parameter.requires_grad_(True)

    def loss(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """InfoNCE both ways over the pairs of a batch; an equal text is as right as a pair's own."""
        numbers = {text: number for number, text in enumerate(texts)}
        ids = torch.tensor([numbers[text] for text in texts], device=pixels.device)
        right = (ids[:, None] == ids).float()
        right /= right.sum(1, keepdim=True)
        images, captions = F.normalize(self.image(pixels), dim=-1), F.normalize(self.text(texts), dim=-1)
        logits = self.log_scale.exp() * images @ captions.T
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


@dataclass
class RetrievalFineTuneResult:
    by_alpha: dict[float, RetrievalResult]

    def to_json(self) -> dict[str, Any]:
        """The fine-tuned weights' figures as of `retrieval`, and R@1 of both directions at all weights."""
        at = {name_of(alpha): result.to_json() for alpha, result in self.by_alpha.items()}
        intervals = {
            f"{side.replace('_', ' ')} R@1, {name}": figures[side]["r1"]
            for side in ("image_to_text", "text_to_image")
            for name, figures in at.items()
        }
        return {**at["fine-tuned"], "task": "fine_tuned_retrieval", "intervals": intervals}


def fine_tune_retrieval(
    retriever: Retriever, batches: Callable[[int], Batches], num_images: int, captions: Captions, config: FineTuneConfig
) -> None:
    """Trains the retriever on `batches(epoch)` of `num_images` images with captions, each with one of its own, drawn anew in every epoch.
    It stays in evaluation mode: statistics of BatchNorm are those of the pre-training."""

    def losses(epoch: int) -> Iterator[Tensor]:
        draw = np.random.default_rng(epoch)
        for indices, pixels, _ in batches(epoch):
            if len(indices) > 1:  # a pair alone has nothing to be told from
                texts = [str(draw.choice(captions(index))) for index in indices]
                yield retriever.loss(pixels.to(retriever.log_scale.device), texts)

    whole, rest = divmod(num_images, config.batch_size)
    descend(losses, [*retriever.layers, [retriever.log_scale]], whole + (rest > 1), config)


@torch.no_grad()
def retrieval_between(
    retriever: Retriever, start: Mapping[str, Tensor], test: Batches, captions: Captions, size: int
) -> tuple[RetrievalFineTuneResult, list[Any]]:
    """Retrieval on the test images by the weights between `start` and the retriever's, and the images that could not be read."""
    kept, device = list(test), retriever.log_scale.device
    encoder = DualEncoder(
        lambda pixels: retriever.image(pixels.to(device)), retriever.text, size, "the fine-tuned model"
    )
    results: dict[float, RetrievalResult] = {}
    bad: list[Any] = []
    for alpha in weights_between(retriever, start):
        images = embed_images(encoder, kept)
        results[alpha], bad = retrieve(encoder, images, captions).result, images.bad
    return RetrievalFineTuneResult(results), bad
