"""Base of the methods with an image tower and a text tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from coalign.method import Method
from coalign.networks.towers.hugging_face import HuggingFaceTextTower
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.text import TextTower


class TwoTowers(Method):
    """A method that embeds images and texts by the normalized projections of two towers, which its `__init__` builds."""

    image: ImageTower
    text: TextTower | HuggingFaceTextTower

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image.projection(self.image(pixels).pooled), dim=-1)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.text.projection(self.text(ids, lengths).pooled), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.image(pixels).pooled

    def projections(self) -> dict[str, nn.Module]:
        return {"image": self.image.projection, "text": self.text.projection}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        """Returns the towers' parameters; a method with more of them adds its own."""
        return {"image": list(self.image.parameters()), "text": list(self.text.parameters())}
