"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coalign.losses.contrastive import clip_loss
from coalign.losses.tiled import contrast_labels
from coalign.methods.clip.config import CLIPConfig
from coalign.networks.logit_scale import LogitScale
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan


class CLIP(TwoTowers):
    """L = ½ · [InfoNCE(image → text) + InfoNCE(text → image)] over the pairs of a batch (Fig. 3)."""

    def __init__(self, config: CLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.view_plan = ViewPlan(images={"image": config.image_view}, texts={"caption": TextPolicy()})
        self.image = build_image_tower(towers)
        self.text = build_text_tower(towers, attention="causal", pooling="end")
        self.logit_scale = LogitScale(config.temperature)

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        caption = batch.texts["caption"]
        return {
            "image_embeds": self.encode_image(batch.images["image"].pixels),  # [batch, dim]
            "text_embeds": self.encode_text(caption.ids, caption.lengths),  # [batch, dim]
            **batch.ids(),  # [batch] each
        }

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        image_embeds, text_embeds = features["image_embeds"], features["text_embeds"]
        positives = gather.global_indices(image_embeds)
        labels = contrast_labels(features, gather, self.config.multi_positive)
        all_images, all_texts = gather(image_embeds), gather(text_embeds)  # [global_batch, dim]
        loss = clip_loss(image_embeds, text_embeds, all_images, all_texts, positives, self.logit_scale(), labels)
        return [LossTerm("clip", loss, count=len(image_embeds))]

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.logit_scale.clamp_(self.config.max_logit_scale)

    def scalars(self) -> dict[str, Tensor]:
        return {"logit_scale": self.logit_scale().detach()}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        return {**super().parameter_groups(), "scale": list(self.logit_scale.parameters())}


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred):
# - The log-scale starts at ln(1/0.07) and is clamped to [0, ln 100] [p]. The clamp is applied to the parameter after the step [c, SLIP],
#   so it does not change the gradient at the bound.
# - The image view is a random resized crop of 50-100 % of the area, without a flip [c, SLIP's baseline]; the paper uses "a random square
#   crop" [p].
# - Text: lower-cased BPE, causal Transformer, feature of the end token [p]. Captions are packed without padding, which does not change
#   the outputs.
# - `multi_positive` (ours, off by default) removes pairs with the same caption from each other's denominators, the groups of
#   `--group-column` those of the same group.
# - Logits are computed in float32 under bf16 and fp16 autocast [i].
