"""SLIP: Mu et al. 2021, "SLIP: Self-supervision meets Language-Image Pre-training"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.contrastive import clip_loss, nt_xent
from coalign.losses.tiled import contrast_labels
from coalign.methods.slip.config import SLIPConfig
from coalign.networks.heads import MLP, spread
from coalign.networks.logit_scale import LogitScale
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan


class SLIP(TwoTowers):
    """L = L_CLIP(weak view, caption) + c · L_NT-Xent(two strong views), with SimCLR's head on the image features (Algorithm 1)."""

    encodes_both = True

    def __init__(self, config: SLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.view_plan = ViewPlan(
            images={"image": config.image_view, "ssl_1": config.ssl_view, "ssl_2": config.ssl_view},
            texts={"caption": TextPolicy()},
        )
        self.image = build_image_tower(towers)
        self.text = build_text_tower(towers, attention="causal", pooling="end")
        self.ssl_head = MLP([self.image.width, config.ssl_hidden, config.ssl_hidden, config.ssl_dim])
        self.logit_scale = LogitScale(config.temperature)
        self.diagnostics: dict[str, Tensor] = {}  # of the last step, for logging only; not in the state_dict

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        caption = batch.texts["caption"]
        features = both(
            lambda: {
                "image_embeds": self.encode_image(batch.images["image"].pixels),  # [batch, dim]
                # before CLIP's projection: the SSL head is an MLP on the tower's features
                "ssl_1_features": self.image(batch.images["ssl_1"].pixels).pooled,  # [batch, width]
                "ssl_2_features": self.image(batch.images["ssl_2"].pixels).pooled,  # [batch, width]
            },
            lambda: {"text_embeds": self.encode_text(caption.ids, caption.lengths)},  # [batch, dim]
        )
        return features | batch.ids()  # [batch] each

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        count = len(features["image_embeds"])
        return [
            LossTerm("clip", self._clip(features, gather), count),
            LossTerm("ssl", self._ssl(features, gather), count, weight=self.config.ssl_scale),
        ]

    def _clip(self, features: Features, gather: Gather) -> Tensor:
        image_embeds, text_embeds = features["image_embeds"], features["text_embeds"]
        positives = gather.global_indices(image_embeds)
        labels = contrast_labels(features, gather, self.config.multi_positive)
        all_images, all_texts = gather(image_embeds), gather(text_embeds)  # [global_batch, dim]
        return clip_loss(image_embeds, text_embeds, all_images, all_texts, positives, self.logit_scale(), labels)

    def _ssl(self, features: Features, gather: Gather) -> Tensor:
        """Returns NT-Xent of the SSL head's outputs for two strong views."""
        first, second = (
            F.normalize(self.ssl_head(features[name], gather.sum), dim=-1)
            for name in ("ssl_1_features", "ssl_2_features")
        )
        rows, temperature = gather.global_indices(first), self.config.ssl_temperature
        groups = contrast_labels(features, gather, captions=False)
        total = nt_xent(first, second, gather(first), gather(second), rows, temperature, groups)
        return total / 2  # per sample, the mean over both views

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.logit_scale.clamp_(self.config.max_logit_scale)
        self.diagnostics = {"ssl_features_std": spread(features["ssl_1_features"])}

    def scalars(self) -> dict[str, Tensor]:
        return {"logit_scale": self.logit_scale().detach(), **self.diagnostics}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        return {
            **super().parameter_groups(),
            "ssl_head": list(self.ssl_head.parameters()),
            "scale": list(self.logit_scale.parameters()),
        }


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred):
# - CLIP's view is a random resized crop of 50-100 % of the area, without a flip. The strong views are SimCLR's: crop of 8-100 %, flip
#   with p .5, jitter .4/.4/.4/.1 with p .8, grayscale with p .2, blur of sigma .1-2 with p .5 [c].
# - The SSL head is width → 4096 → 4096 → 256, with BatchNorm and ReLU after the first two layers, neither after the last, and biases in
#   all. Its input is the tower's feature before CLIP's projection. Each view is a separate batch for BatchNorm [c].
# - The head's BatchNorm statistics cover the global batch, like the released code's SyncBatchNorm [c].
# - NT-Xent: temperature 0.1, mean over both views of all samples, weight 1 [p, c].
# - Deviation: the released code gathers CLIP's embeddings without gradient, so its gradient depends on the number of GPUs. Ours does not,
#   and equals the released code's on a single GPU.
# - The log-scale is clamped to [0, ln 100] after the step [c].
# - `multi_positive` (ours, off by default) affects only L_CLIP: NT-Xent does not use captions. The groups of `--group-column` affect both.
