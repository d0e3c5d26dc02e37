"""Fine-tuning for classification, from the zero-shot classifier, and the weights between both (Wortsman et al. 2022, WiSE-FT)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.evaluation.accuracy import AccuracyResult, accuracy
from coalign.evaluation.embed import Batches
from coalign.optim import OptimiserConfig, RoleConfig, build_optimisers

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the fine-tuned weights; 0 is the model as it was, 1 the fine-tuned one


@dataclass(frozen=True)
class FineTuneConfig:
    epochs: int = 10
    lr: float = 1e-4  # of what is last, such as the classifier; an encoder's layers have less, the deeper they lie
    layer_decay: float = 0.75  # from a layer to the one before it (as in BEiT)
    weight_decay: float = 0.05
    batch_size: int = 64
    label_smoothing: float = 0.1
    max_grad_norm: float = 1.0


def recipe(num_images: int, epochs: int) -> FineTuneConfig:
    """The settings for so many images. From 100,000 on, as of ImageNet, batch, decay and loss are those of Wortsman et al. 2022."""
    if num_images < 100_000:
        return FineTuneConfig(epochs=epochs)
    return FineTuneConfig(epochs=epochs, batch_size=512, weight_decay=0.1, label_smoothing=0.0)


@dataclass
class FineTuneResult:
    by_alpha: dict[float, AccuracyResult]

    def to_json(self) -> dict[str, Any]:
        chance = 1 / next(iter(self.by_alpha.values())).num_classes
        intervals = {name_of(alpha): result.top1.to_json() for alpha, result in self.by_alpha.items()}
        per_class = {name_of(alpha): result.mean_per_class.to_json() for alpha, result in self.by_alpha.items()}
        return {
            "task": "fine_tuning",
            "acc1": self.by_alpha[1.0].top1.value,
            "mean_per_class_recall": self.by_alpha[1.0].mean_per_class.value,
            "intervals": intervals,
            "mean_per_class_intervals": per_class,
            "chance": chance,
        }


def name_of(alpha: float) -> str:
    return {0.0: "zero-shot", 1.0: "fine-tuned"}.get(alpha, f"{alpha:g} of the way")


class Classifier(nn.Module):
    """uint8 pixels [batch, 3, size, size] -> logits [batch, class]: cosines with the classes' vectors, times a fixed scale. What images do
    not pass, such as a text tower in the same module, is not trained."""

    def __init__(self, encoder: nn.Module, weights: Tensor, scale: float, size: int) -> None:
        super().__init__()
        self.encoder, self.head, self.scale = encoder.eval(), nn.Parameter(weights.clone()), scale
        train_what_passes(encoder, torch.zeros(2, 3, size, size, dtype=torch.uint8, device=weights.device))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.encoder(pixels), dim=-1), self.head)


def train_what_passes(encoder: nn.Module, inputs: Any) -> None:
    """Lets those parameters be trained that the inputs pass, and no others."""
    floating = [parameter for parameter in encoder.parameters() if parameter.is_floating_point()]
    for parameter in floating:
        parameter.requires_grad_(True)
    encoder(inputs).square().sum().backward()
    for parameter in floating:
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


_LAYER = re.compile(
    r"((?:.*\.)?\d+)\.(?:[^.]+\.)+[^.]+$"
)  # the last number that names a module with modules of its own


def layers_of(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """The trained parameters by depth: a layer is what is numbered in the parameters' names, such as blocks.3 or layer2.0; what comes
    before the first is a layer of its own, and what has no number belongs to the layer before it. open_clip's towers hold their projection
    as a bare parameter, which is named first and comes last."""
    layers: dict[str, list[nn.Parameter]] = {"": []}
    current = ""
    trained = [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trained, key=lambda item: item[0].split(".")[-1] in ("text_projection", "proj")):
        numbered = _LAYER.match(name)
        current = numbered.group(1) if numbered else current
        layers.setdefault(current, []).append(parameter)
    return [layer for layer in layers.values() if layer]


def fine_tune(
    classifier: Classifier,
    batches: Callable[[int], Batches],
    num_images: int,
    labels: Mapping[int, int],
    config: FineTuneConfig,
    device: torch.device | str = "cpu",
) -> None:
    """Trains the classifier on `batches(epoch)` of `num_images` images, of the classes `labels` by index. It stays in evaluation mode:
    statistics of BatchNorm are those of the pre-training."""
    layers = layers_of(classifier.encoder)
    if not layers:
        raise UserError("There is nothing to fine-tune: the image encoder has no trained weights.")
    classifier.eval()

    def losses(epoch: int) -> Iterator[Tensor]:
        for indices, pixels, _ in batches(epoch):
            if len(indices):
                truth = torch.tensor([labels[index] for index in indices], device=device)
                yield F.cross_entropy(classifier(pixels.to(device)), truth, label_smoothing=config.label_smoothing)

    descend(losses, [*layers, [classifier.head]], -(-num_images // config.batch_size), config)


def descend(
    losses: Callable[[int], Iterable[Tensor]],
    layers: Sequence[Sequence[nn.Parameter]],
    steps: int,
    config: FineTuneConfig,
) -> None:
    """AdamW on the losses of each epoch, of so many steps; of the layers the last has the configuration's learning rate, one before it
    less. UserError where there is no loss at all."""
    groups = {f"layer {depth}": list(layer) for depth, layer in enumerate(layers)}
    multipliers = {name: config.layer_decay ** (len(groups) - 1 - depth) for depth, name in enumerate(groups)}
    settings = OptimiserConfig(
        lr=config.lr,
        start_lr=0.0,
        final_lr=0.0,
        warmup_fraction=0.1,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.999),
        roles={name: RoleConfig(lr_multiplier=value) for name, value in multipliers.items()},
    )
    optimisers = build_optimisers(groups, settings, None)
    trained = [parameter for layer in layers for parameter in layer]
    step = 0
    for epoch in range(config.epochs):
        for loss in losses(epoch):
            optimisers.set_lr(step, config.epochs * steps)
            optimisers.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimisers.step()
            step += 1
    if not step:
        raise UserError("There is nothing to fine-tune on: no training image could be read.")


@torch.no_grad()
def between(
    classifier: Classifier,
    start: Mapping[str, Tensor],
    test: Iterable[tuple[Sequence[int], Tensor, Sequence[Any]]],
    labels: Mapping[int, int],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> FineTuneResult:
    """Accuracies on the test images of the weights between `start` and the classifier's. Leaves the classifier as it was."""
    kept = list(test)
    truth = np.array([labels[index] for indices, _, _ in kept for index in indices])
    if not len(truth):
        raise UserError("There is nothing to evaluate: the test part has no readable image with a class.")
    results = {}
    for alpha in weights_between(classifier, start):
        predicted = torch.cat([classifier(pixels.to(device)).argmax(1).cpu() for _, pixels, _ in kept if len(pixels)])
        results[alpha] = accuracy("fine_tuning", predicted.numpy(), truth, num_classes)
    return FineTuneResult(results)


def weights_between(module: nn.Module, start: Mapping[str, Tensor]) -> Iterator[float]:
    """Each share of ALPHAS, while the module has the weights there between `start` and its own, which it has again at the end."""
    end = {name: value.clone() for name, value in module.state_dict().items()}
    for alpha in ALPHAS:
        module.load_state_dict(
            {
                name: torch.lerp(start[name], value, alpha) if value.is_floating_point() else value
                for name, value in end.items()
            }
        )
        yield alpha
    module.load_state_dict(end)
