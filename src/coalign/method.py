"""Interface between a method and the trainer. Each paper is one final subclass of `Method` or `TwoTowers`, in a folder of `methods/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coalign.types import Batch, Features, Gather, LossTerm, Similarity, StepInfo, ViewPlan, dot_product


class Method(nn.Module, ABC):
    """A training method: the encoders, the views they are trained on, and the loss.

    A training step calls `encode`, `encode_targets`, `objective` and, after the optimizer's update, `after_step`. All state is in the
    `state_dict`: queues are buffers, teachers are submodules, scales are parameters of shape [1]. The gradient depends on the global batch
    only, not on how it is split into slices and ranks.
    """

    view_plan: ViewPlan
    # Terms of the loss that need more of a tower than its pooled features, such as patches or masked words: name of the tower, "image"
    # or "text", -> name of the term. They cannot be computed from cached features.
    token_terms: Mapping[str, str] = {}
    # Whether `encode` runs the towers `image` and `text` by `networks.towers.side_by_side.both`.
    encodes_both: bool = False

    @abstractmethod
    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """Runs the trained encoders, without coupling samples.

        On every rank and in every slice, token axes have the length of the global batch's longest caption, so features may have a token
        axis [batch, token, …] and be gathered.

        May be called on slices of the batch, and twice per slice (gradient caching). Both calls must return the same values: no
        collectives, no randomness other than torch's global generator, no batch statistics other than the fixed BatchNorm groups of image
        encoders.
        """

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """Runs teachers and momentum encoders, without gradient. Called once per step and slice."""
        return {}

    @abstractmethod
    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        """Computes the loss terms, with everything that couples samples: this rank's rows against the gathered columns.

        Called once per step, with the features of all slices of this rank.
        """

    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        """Updates state after the optimizer: clamped scales, momentum encoders, queues. Not called if the step was skipped."""

    def scalars(self) -> dict[str, Tensor]:
        """Returns values to log during training, such as the logit scale."""
        return {}

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Any:
        """uint8 pixels [batch, 3, size, size] of the evaluation view -> embeds: normalized [batch, dim], or what `similarity` takes."""

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [batch, 3, size, size] of the evaluation view -> image encoder output before the projection [batch, width]."""

    @abstractmethod
    def encode_text(self, ids: Tensor, lengths: Tensor) -> Any:
        """Token ids [batch, token] and lengths [batch] -> embeds, as `encode_image`."""

    # The only comparison of embeds in evaluation, search and reports: (embeds of images, embeds of texts) -> [image, text]. A method that
    # does not compare one vector per sample by its cosine overrides it, and may return any NamedTuple of tensors as embeds, with the
    # sample first. It is called on chunks of the samples. If embeds of images and texts have the same form, it compares any two of them,
    # else it raises UserError for two images.
    similarity: Similarity = staticmethod(dot_product)

    # What depends on the length of the run, apart from the learning rate: phrases for the message of a run that is extended.
    length_dependent: tuple[str, ...] = ()

    # Optional capabilities; None: the method does not have it.
    # pixels and, for each image, token ids and lengths, as one input -> embeds, as `encode_image`
    encode_joint: Callable[[Tensor, Tensor, Tensor], Any] | None = None
    # the same inputs -> how well each image region matches the text, [batch, row, column]; None: Grad-CAM of the tower `image` is used
    localize: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def has_joint(self) -> bool:
        """Whether `encode_joint` can be called, which may depend on the configuration."""
        return self.encode_joint is not None

    def projections(self) -> dict[str, nn.Module]:
        """Returns the modules that map the features of the towers `image` and `text` into the shared space, by role, if they may be
        pretrained: not heads that always start from random values."""
        return {}

    @abstractmethod
    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        """Returns the trained parameters by role ("image", "text", "scale", …), each in exactly one role. See `OptimizerConfig.roles`."""
