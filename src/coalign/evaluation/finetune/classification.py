"""Fine-tuning of the zero-shot classifier, and interpolation of both weights (WiSE-FT, Wortsman et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coalign.config import OptimizerConfig, RoleConfig
from coalign.embeds import fields
from coalign.errors import UserError
from coalign.evaluation.embed import Batches
from coalign.evaluation.probes.accuracy import accuracy
from coalign.evaluation.zero_shot import ClassEmbeds, class_scores
from coalign.metric import Metric
from coalign.optim import build_optimizers
from coalign.progress import track
from coalign.types import Embeds, Similarity, dot_product

ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)  # interpolation coefficients: 0 is the zero-shot model, 1 the fine-tuned one


@dataclass(frozen=True)
class FineTuneConfig:
    epochs: int = 10
    lr: float = 1e-4  # of the last layer, such as the classifier
    layer_decay: float = 0.75  # learning rate of a layer relative to the next one (layer-wise decay, as in BEiT)
    weight_decay: float = 0.05
    batch_size: int = 64
    label_smoothing: float = 0.1
    max_grad_norm: float = 1.0


def recipe(num_images: int, epochs: int) -> FineTuneConfig:
    """Returns settings by dataset size: from 100,000 images, such as ImageNet, the batch, decay and loss of Wortsman et al. 2022."""
    if num_images < 100_000:
        return FineTuneConfig(epochs=epochs)
    return FineTuneConfig(epochs=epochs, batch_size=512, weight_decay=0.1, label_smoothing=0.0)


def of_alpha(metric: Metric, alpha: float) -> Metric:
    """Returns the metric of weights interpolated by `alpha`, named by it; the fine-tuned model's metrics keep their names."""
    if alpha == 1:
        return metric
    name = "zero-shot" if alpha == 0 else f"{alpha:g} of the way"
    return replace(metric, name=f"alpha_{alpha:g}.{metric.name}", title=f"{metric.title}, {name}")


class Classifier(nn.Module):
    """Classifier by similarity to class embeds: uint8 pixels [batch, 3, size, size] -> logits [batch, class], scaled by a fixed factor.

    classes: of `embed_classes`, trained. Parameters that images do not reach, such as a text tower in the same module, stay frozen.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: ClassEmbeds,
        scale: float,
        size: int,
        similarity: Similarity = dot_product,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.scale = encoder.eval(), _Head(classes.embeds), scale
        self.counts, self.similarity = classes.counts, similarity
        device = next(iter(fields(classes.embeds).values())).device
        inputs = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
        unfreeze_used_parameters(encoder, inputs, frozen_parameters(encoder))

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.encoder(pixels)
        if self.similarity is dot_product:
            images = F.normalize(images, dim=-1)
        return self.scale * class_scores(self.similarity, images, ClassEmbeds(self.head(), self.counts))


class _Head(nn.Module):
    """Embeds whose floating-point fields are parameters; other fields, such as masks, are buffers."""

    def __init__(self, embeds: Embeds) -> None:
        super().__init__()
        self.form, self.names = type(embeds), list(fields(embeds))
        for name, value in fields(embeds).items():
            if value.is_floating_point():
                self.register_parameter(f"class_{name}", nn.Parameter(value.clone()))
            else:
                self.register_buffer(f"class_{name}", value.clone())

    def forward(self) -> Any:
        values = [getattr(self, f"class_{name}") for name in self.names]
        return values[0] if issubclass(self.form, Tensor) else self.form(*values)


def frozen_parameters(*modules: nn.Module) -> set[int]:
    """Returns the ids of the parameters that the modules' method does not train, such as those of a momentum encoder."""
    return {id(p) for module in modules for p in module.parameters() if not p.requires_grad}


def unfreeze_used_parameters(encoder: nn.Module, inputs: Any, frozen: set[int]) -> None:
    """Makes the parameters that affect the output for `inputs` trainable, except those in `frozen`, and freezes all others."""
    parameters = [p for p in encoder.parameters() if p.is_floating_point() and id(p) not in frozen]
    for parameter in parameters:
        parameter.requires_grad_(True)
    outputs = fields(encoder(inputs)).values()
    torch.stack([output.square().sum() for output in outputs if output.is_floating_point()]).sum().backward()
    for parameter in parameters:
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


_NUMBERED = re.compile(r"((?:.*\.)?\d+)\.(?:[^.]+\.)+[^.]+$")  # up to the last number of a module with submodules


def layers_by_depth(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """Returns the trainable parameters by layer, from the input to the output.

    A layer is a numbered module, such as blocks.3 or layer2.0. Parameters before the first one form a layer, and unnumbered parameters
    belong to the preceding layer. open_clip's towers register their projection first, as a bare parameter; it is moved to the end.
    """
    layers: dict[str, list[nn.Parameter]] = {"": []}
    current = ""
    trainable = [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trainable, key=lambda item: item[0].split(".")[-1] in ("text_projection", "proj")):
        numbered = _NUMBERED.match(name)
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
    """Trains the classifier on `batches(epoch)` of `num_images` images; `labels`: index -> class.

    The classifier stays in evaluation mode, so BatchNorm keeps its pretrained statistics. Raises UserError if there is nothing to train.
    """
    layers = layers_by_depth(classifier.encoder)
    if not layers:
        raise UserError("There is nothing to fine-tune: the image encoder has no trainable weights.")
    classifier.eval()

    def losses(epoch: int) -> Iterator[Tensor]:
        for indices, pixels, _ in batches(epoch):
            if len(indices):
                targets = torch.tensor([labels[index] for index in indices], device=device)
                yield F.cross_entropy(classifier(pixels.to(device)), targets, label_smoothing=config.label_smoothing)

    minimize(losses, [*layers, list(classifier.head.parameters())], -(-num_images // config.batch_size), config)


def minimize(
    losses: Callable[[int], Iterable[Tensor]],
    layers: Sequence[Sequence[nn.Parameter]],
    steps_per_epoch: int,
    config: FineTuneConfig,
) -> None:
    """Minimizes `losses(epoch)` with AdamW and layer-wise learning rate decay: the last of `layers` has the configured rate.

    Raises UserError if no epoch yields a loss.
    """
    groups = {f"layer {depth}": list(layer) for depth, layer in enumerate(layers)}
    multipliers = {name: config.layer_decay ** (len(groups) - 1 - depth) for depth, name in enumerate(groups)}
    settings = OptimizerConfig(
        lr=config.lr,
        start_lr=0.0,
        final_lr=0.0,
        warmup_fraction=0.1,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.999),
        roles={name: RoleConfig(lr_multiplier=value) for name, value in multipliers.items()},
    )
    optimizers = build_optimizers(groups, settings, None)
    parameters = [parameter for layer in layers for parameter in layer]
    step = 0
    for epoch in track(range(config.epochs), "Fine-tuning", unit="epochs"):
        for loss in losses(epoch):
            optimizers.set_lr(step, config.epochs * steps_per_epoch)
            optimizers.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizers.step()
            step += 1
    if not step:
        raise UserError("There is nothing to fine-tune on: no training image could be read.")


@torch.no_grad()
def evaluate_interpolated(
    classifier: Classifier,
    start: Mapping[str, Tensor],
    test: Iterable[tuple[Sequence[int], Tensor, Sequence[Any]]],
    labels: Mapping[int, int],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> list[Metric]:
    """Returns the test accuracy of weights interpolated between `start` and the classifier's, which are restored at the end.

    Raises UserError if no test image with a class is readable.
    """
    test_batches = list(test)
    targets = np.array([labels[index] for indices, _, _ in test_batches for index in indices])
    if not len(targets):
        raise UserError("There is nothing to evaluate: the test split has no readable image with a class.")
    found: list[Metric] = []
    for alpha in interpolate_weights(classifier, start):
        predictions = [classifier(pixels.to(device)).argmax(1).cpu() for _, pixels, _ in test_batches if len(pixels)]
        metrics = accuracy("Fine-tuning", torch.cat(predictions).numpy(), targets, num_classes)
        found += [of_alpha(metric, alpha) for metric in metrics]
    return found


def interpolate_weights(module: nn.Module, start: Mapping[str, Tensor]) -> Iterator[float]:
    """Loads the weights interpolated between `start` and the module's own for each of ALPHAS, yields it, and restores the module's own."""
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
