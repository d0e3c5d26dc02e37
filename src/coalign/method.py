"""The contract between a method and the trainer. A paper is one final subclass of `Method`, in one file of `methods/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, ViewPlan


class Method(nn.Module, ABC):
    """A step is `encode`, then `objective`.

    Whatever the method needs to go on (queues, teachers, scales) is in its `state_dict`: queues are buffers, teachers are modules,
    scales are parameters of shape [1]. Its gradient depends on the global batch alone.
    """

    view_plan: ViewPlan

    @abstractmethod
    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """The trained encoder passes and nothing that couples samples. May be called on slices of the batch, and twice: the same values
        must come again, so no collectives, no unrecorded randomness, no batch statistics but the trunk's fixed groups."""

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """Teachers and momentum encoders. Called once a step, on slices, without gradient."""
        return {}

    @abstractmethod
    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        """Everything that couples samples, once a step, on all of the rank's rows: own rows against gathered columns."""

    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        """What moves after the optimiser: scale clamps, EMA, queues. Not called for a skipped step."""

    def scalars(self) -> dict[str, Tensor]:
        """Numbers worth following during training, such as the logit scale."""
        return {}

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, 3, size, size], the evaluation view -> normalised embeds [batch, dim]."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """The evaluation view -> the image encoder's output before any projection, [batch, width]: what probes look at."""
        return self.image(pixels)  # type: ignore[operator]

    @abstractmethod
    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids [batch, token] and their lengths [batch] -> normalised embeds [batch, dim]."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        """Trained parameters by role ("image", "text", "scale", …); an optimiser setting names a role. Every parameter in one group."""
