"""Detectors on a ResNet image tower: torchvision's Faster R-CNN and Mask R-CNN with a feature pyramid, or Faster R-CNN as C4."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from coalign.errors import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")
ANCHOR_IMAGE_SIDE = 800  # shorter image side for which the anchors of 32 to 512 pixels were designed


def resnet_trunk(encoder: nn.Module) -> nn.Module:
    """Returns the module of an image encoder that has a ResNet's stages. Raises UserError if there is none, as in a ViT."""
    for module in encoder.modules():
        if all(hasattr(module, name) for name in STAGES):
            return module
    raise UserError("Detection needs a ResNet image tower, but this model has a different one.")


class Stages(nn.Module):
    """Pixels [batch, 3, height, width] -> the outputs of the first stages by name. BatchNorm keeps the statistics of pre-training."""

    def __init__(self, trunk: nn.Module, num_stages: int) -> None:
        super().__init__()
        children = [name for name, _ in trunk.named_children()]
        self.stem = nn.Sequential(*(getattr(trunk, name) for name in children[: children.index(STAGES[0])]))
        self.stages = nn.ModuleDict({name: getattr(trunk, name) for name in STAGES[:num_stages]})
        with torch.no_grad():
            self.channels: list[int] = [x.shape[1] for x in self.train()(torch.zeros(1, 3, 64, 64)).values()]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x, outputs = self.stem(x), OrderedDict()
        for name, stage in self.stages.items():
            x = stage(x)
            outputs[name] = x
        return outputs

    def train(self, mode: bool = True) -> Stages:
        return super().train(False)


class _Pyramid(nn.Module):
    """All four stages with a feature pyramid."""

    out_channels = 256

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.body = Stages(trunk, 4)
        self.fpn = FeaturePyramidNetwork(self.body.channels, self.out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(self.body(x))


class _ThirdStage(nn.Module):
    """C4 backbone: the output of the third stage, of stride 16."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.body = Stages(trunk, 3)
        self.out_channels = self.body.channels[-1]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", self.body(x)["layer3"])])


class _FourthStage(nn.Module):
    """C4 box head: the fourth stage on the features of each region, averaged: [region, channel, 14, 14] -> [region, width]."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.stage = trunk.get_submodule(STAGES[3])

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x).mean((2, 3))

    def train(self, mode: bool = True) -> _FourthStage:
        return super().train(False)


def build_detector(
    encoder: nn.Module,
    kind: Literal["fpn", "c4"],
    with_masks: bool,
    num_classes: int,
    side: int,
    regions: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> nn.Module:
    """Builds a detector for `num_classes` classes (labels 1 … num_classes) on the trunk of `encoder`.

    Images are resized to a shorter side of `side`; anchors scale with it. Per image and step, the heads are trained on `regions` regions
    and the proposals on half of that number. Raises UserError if the trunk is not a ResNet, or for masks without the pyramid, which the
    papers use for them.
    """
    trunk: Any = resnet_trunk(encoder)
    sizes = tuple(max(4, round(size * side / ANCHOR_IMAGE_SIDE)) for size in (32, 64, 128, 256, 512))
    ratios = (0.5, 1.0, 2.0)
    options: dict[str, Any] = {
        "min_size": side,
        "max_size": round(side * 1333 / ANCHOR_IMAGE_SIDE),
        "image_mean": list(mean),
        "image_std": list(std),
        "box_batch_size_per_image": regions,
        "rpn_batch_size_per_image": regions // 2,
    }
    if kind == "fpn":
        backbone: nn.Module = _Pyramid(trunk)
        options["rpn_anchor_generator"] = AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * len(sizes))
        options["box_roi_pool"] = MultiScaleRoIAlign(list(STAGES), 7, 2)
        if not with_masks:
            return FasterRCNN(backbone, num_classes + 1, **options)
        width = _Pyramid.out_channels
        return MaskRCNN(
            backbone,
            num_classes=None,
            box_predictor=FastRCNNPredictor(1024, num_classes + 1),
            mask_roi_pool=MultiScaleRoIAlign(list(STAGES), 14, 2),
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
            **options,
        )
    if with_masks:
        raise UserError("Masks need the feature pyramid; use c4 for boxes only.")
    backbone, box_head = _ThirdStage(trunk), _FourthStage(trunk).train()
    with torch.no_grad():
        width = box_head(torch.zeros(1, backbone.out_channels, 14, 14)).shape[1]
    return FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=AnchorGenerator((sizes,), (ratios,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(width, num_classes + 1),
        **options,
    )
