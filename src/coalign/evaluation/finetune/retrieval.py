"""Contrastive fine-tuning of both encoders for retrieval, and interpolation with the initial weights (as for classification)."""

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
from coalign.evaluation.finetune.classification import (
    FineTuneConfig,
    frozen_parameters,
    interpolate_weights,
    layers_by_depth,
    minimize,
    of_alpha,
    unfreeze_used_parameters,
)
from coalign.evaluation.retrieval import RetrievalResult, retrieve
from coalign.metric import Metric
from coalign.types import DualEncoder, Similarity, dot_product

Captions = Callable[[int], Sequence[str]]


class Retriever(nn.Module):
    """Both encoders and the log logit scale, all trainable.

    `layers` groups the parameters by depth for layer-wise decay. The encoders are aligned at their last layers, whatever their depths;
    shared parameters count as the image encoder's.
    """

    def __init__(
        self, image: nn.Module, text: nn.Module, logit_scale: float, size: int, similarity: Similarity = dot_product
    ) -> None:
        super().__init__()
        self.image, self.text, self.similarity = image.eval(), text.eval(), similarity
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        device = next(image.parameters(), self.log_scale).device
        frozen = frozen_parameters(image, text)
        unfreeze_used_parameters(image, torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device), frozen)
        image_layers = layers_by_depth(image)
        unfreeze_used_parameters(text, ["a text", "another"], frozen)
        text_layers = layers_by_depth(text)
        image_ids = {id(parameter) for layer in image_layers for parameter in layer}
        text_layers = [[parameter for parameter in layer if id(parameter) not in image_ids] for layer in text_layers]
        from_last = zip_longest(image_layers[::-1], text_layers[::-1], fillvalue=())
        self.layers = [
            layer for layer in ([*image_layer, *text_layer] for image_layer, text_layer in from_last) if layer
        ][::-1]
        for layer in self.layers:
            for parameter in layer:
                parameter.requires_grad_(True)

    def loss(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the symmetric InfoNCE loss of a batch of pairs; equal texts are positives of each other's images."""
        id_of_text = {text: i for i, text in enumerate(texts)}
        ids = torch.tensor([id_of_text[text] for text in texts], device=pixels.device)
        targets = (ids[:, None] == ids).float()
        targets /= targets.sum(1, keepdim=True)
        image_embeds, text_embeds = self.image(pixels), self.text(texts)
        if self.similarity is dot_product:
            image_embeds, text_embeds = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
        logits = self.log_scale.exp() * self.similarity(image_embeds, text_embeds)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@dataclass
class RetrievalFineTuneResult:
    by_alpha: dict[float, RetrievalResult]

    def metrics(self) -> list[Metric]:
        """Returns the fine-tuned model's metrics as in `retrieval`, and R@1 of both directions for every other alpha."""
        others = [
            of_alpha(side.recall[1], alpha)
            for alpha, result in self.by_alpha.items()
            for side in (result.image_to_text, result.text_to_image)
            if alpha != 1
        ]
        return [*self.by_alpha[1.0].metrics(), *others]

    def details(self) -> dict[str, Any]:
        return self.by_alpha[1.0].details()


def fine_tune_retrieval(
    retriever: Retriever, batches: Callable[[int], Batches], num_images: int, captions: Captions, config: FineTuneConfig
) -> None:
    """Trains the retriever on `batches(epoch)` of `num_images` images, each with one of its captions, drawn at random in every epoch.

    The retriever stays in evaluation mode, so BatchNorm keeps its pretrained statistics.
    """

    def losses(epoch: int) -> Iterator[Tensor]:
        rng = np.random.default_rng(epoch)
        for indices, pixels, _ in batches(epoch):
            if len(indices) > 1:  # a single pair has no negatives
                texts = [str(rng.choice(captions(index))) for index in indices]
                yield retriever.loss(pixels.to(retriever.log_scale.device), texts)

    full_batches, remainder = divmod(num_images, config.batch_size)
    minimize(losses, [*retriever.layers, [retriever.log_scale]], full_batches + (remainder > 1), config)


@torch.no_grad()
def evaluate_interpolated_retrieval(
    retriever: Retriever, start: Mapping[str, Tensor], test: Batches, captions: Captions, size: int
) -> tuple[RetrievalFineTuneResult, list[Any]]:
    """Evaluates retrieval on the test images by weights interpolated between `start` and the retriever's.

    Returns the results and the entries of unreadable images.
    """
    test_batches, device = list(test), retriever.log_scale.device
    encoder = DualEncoder(
        lambda pixels: retriever.image(pixels.to(device)),
        retriever.text,
        size,
        "the fine-tuned model",
        similarity=retriever.similarity,
    )
    results: dict[float, RetrievalResult] = {}
    bad: list[Any] = []
    for alpha in interpolate_weights(retriever, start):
        images = embed_images(encoder, test_batches)
        results[alpha], bad = retrieve(encoder, images, captions).result, images.bad
    return RetrievalFineTuneResult(results), bad
