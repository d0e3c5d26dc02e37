"""UniCLIP: Lee et al. 2022, "UniCLIP: Unified Framework for Contrastive Language-Image Pre-training"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.multi_positive import (
    balancing_weights,
    compare_views,
    domain_combinations,
    mil_nce,
    mp_nce,
    sup_con,
)
from coalign.method import Method
from coalign.networks.augmentation_encoder import AugmentationEncoder, build_head
from coalign.networks.domain_similarity import DomainSimilarity
from coalign.networks.towers import TowerSpec, build_image_tower, build_text_tower
from coalign.recipes.uniclip import UniCLIPConfig
from coalign.types import AugmentationParams, Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

LOSSES = {"supcon": sup_con, "mil-nce": mil_nce}  # all others are MP-NCE with other weights


class UniCLIP(Method):
    """V image views and U text views of a pair in one space, every one a positive of every other and of itself."""

    positive_weights: Tensor  # [view, view]

    def __init__(self, config: UniCLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        policies = {"weak": config.weak_view, "strong": config.strong_view}
        self.view_plan = ViewPlan(
            images={f"{kind}_{number}": policies[kind] for number, kind in enumerate(config.views, 1)},
            texts={"caption": TextPolicy()} | {f"eda_{n}": TextPolicy("eda") for n in range(1, config.text_views)},
        )
        # f_I, f_A and g_I, f_T and g_T (§2.1). g_I takes over the image tower's projection; g_T is the text tower's.
        self.image = build_image_tower(towers)
        self.augmentation = AugmentationEncoder() if config.augmentation_embedding else None
        width, embed_dim, aware = self.image.width, self.image.embed_dim, 0
        if self.augmentation is not None:
            aware = self.augmentation.dim
        self.head = build_head(config.head, width, embed_dim, self.image.projection, aware)
        self.image.projection = nn.Identity()
        self.text = build_text_tower(towers, attention="bidirectional", pooling="start")

        # τ_D and b_D (Eq. 16). Where all negatives of a positive share one b, it cancels (Eq. 15), and is not trained.
        num_images, num_texts = len(config.views), config.text_views
        self.similarity = DomainSimilarity(
            domain_combinations(num_images, num_texts),
            config.temperature,
            shared=not config.domain_similarity,
            offsets=config.domain_similarity and config.unified_supervision,
        )

        # Separated supervision is one loss for each combination of the anchor's domain with the others'.
        every, images, texts = slice(None), slice(0, num_images), slice(num_images, None)
        separated = [(anchors, others) for anchors in (images, texts) for others in (images, texts)]
        self.blocks = [(every, every)] if config.unified_supervision else separated
        weights = torch.ones(2 * [num_images + num_texts], dtype=torch.float64)
        if config.loss == "mp-nce":
            weights = balancing_weights(num_images, num_texts)
        elif config.loss != "mp-nce-unweighted":
            weights.fill_diagonal_(0)  # no trivial pair
        self.register_buffer("positive_weights", weights, persistent=False)
        # The losses are means: MP-NCE's over anchors and their positives, the others' over anchors that have positives.
        positive = weights > 0
        counted = [positive[block].any(1) if config.loss in LOSSES else positive[block] for block in self.blocks]
        self.terms_per_pair = int(sum(c.sum() for c in counted))

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        views = [batch.images[name] for name in self.view_plan.images]
        features = self.image(torch.cat([view.pixels for view in views]))  # [view · batch, width]: f_I(A(x)), without A
        shift = int(self.config.foreign_parameters)  # 1: those of another sample of the batch
        images = self.project_image(features, torch.cat([view.params.roll(shift, 0) for view in views]))
        captions = [batch.texts[name] for name in self.view_plan.texts]
        embeds = [*images.chunk(len(views)), *(self.encode_text(c.ids, c.lengths) for c in captions)]
        return {"embeds": torch.stack(embeds, dim=1), "caption_ids": batch.caption_ids}  # [batch, view, dim], [batch]

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        embeds = features["embeds"]
        labels = features["caption_ids"] if self.config.multi_positive else gather.own_rows(embeds)
        logit_scales, offsets = self.similarity()
        scores = compare_views(embeds, gather(embeds), logit_scales, offsets, (labels, gather(labels)))
        total = scores.own.new_zeros(())
        for anchors, others in self.blocks:
            block, weights = scores.among(anchors, others), self.positive_weights[anchors, others]
            if self.config.loss in LOSSES:  # Eq. 6, Eq. 4
                total = total + LOSSES[self.config.loss](block, weights > 0)
            else:  # Eq. 12, Eq. 11, Eq. 9
                total = total + mp_nce(block, weights)
        return [LossTerm(self.config.loss.replace("-", "_"), total, count=len(embeds) * self.terms_per_pair)]

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.similarity.clamp_(self.config.max_logit_scale)

    def scalars(self) -> dict[str, Tensor]:
        return self.similarity.scalars()

    def project_image(self, features: Tensor, params: Tensor) -> Tensor:
        """z = g_I(f_I(A(x)), f_A(A)), normalised: features [batch, width], params [batch, 11] -> [batch, dim]."""
        augmentation = None if self.augmentation is None else self.augmentation(params.to(features.dtype))
        return F.normalize(self.head(features, augmentation), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        unchanged = torch.tensor([AugmentationParams().vector()], device=pixels.device)
        return self.project_image(self.image(pixels), unchanged.expand(pixels.shape[0], -1))

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.text.projection(self.text(ids, lengths).pooled), dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        aware = [] if self.augmentation is None else list(self.augmentation.parameters())
        return {
            "image": [*self.image.parameters(), *self.head.parameters(), *aware],
            "text": list(self.text.parameters()),
            "scale": list(self.similarity.parameters()),
        }


# Implementation details, each with its source ([p] stated in the paper, [i] inferred; there is no released code):
# - One weak and two strong image views and one caption form a pair's positive group [p]. Weak is SLIP's base view, a crop of 50-100 %;
#   strong is SLIP's SSL view, SimCLR's augmentations [i]. More captions are EDA copies [i]; the paper found them "not very helpful".
# - The augmentation is 11 numbers: box, four changes of colour, sigma of the blur, flipped, greyed [p]; f_A is 11 -> 256 -> 256 with
#   one GELU [i]. Only the head sees it; the encoder does not [p].
# - Evaluation gives the head the parameters of an unchanged image, box (0, 0, 1, 1). The evaluation view is a centre crop, but encoders
#   are handed its square pixels alone, so its box within the whole picture cannot be known [i].
# - g_I: three residual blocks [p] x + W2 GELU(W1 LayerNorm[x; f_A]) of the features' width, W2 zero at the start, then the tower's linear
#   projection [i]. MLP heads have GELU and the features' width, and take f_A in their first layer [i]. Linear probes use f_I alone [p].
# - g_T is linear, on the start token's last state [p]; so text attention must be bidirectional [p implies].
# - Each combination of domains has its own τ and b [p], starting at 0.07 and 0; 1/τ is learned in log-space and clamped to [1, 100]
#   after the step [i]. Both are in the role "scale": Adam moves a scalar by at most about the sum of its learning rates, so a short
#   run may want `--roles.scale.lr-multiplier 10`; on small data it did CLIP no good [i].
# - With shared τ and b, or separated supervision, b has no gradient (Eq. 15) [p]; it is then zero and no parameter. In general one
#   direction of b is free: adding c·τ_D to every b_D changes nothing. (The paper says any number, which holds for equal τ.)
# - MP-NCE is the mean over all anchors, images and texts, and over their positives with the trivial pair, weighted by 1/V², 1/(2UV),
#   1/U² (Eq. 12) [p]: 3/(V+U)² of the mean of the three combinations, which matters beside other terms, and to clipping.
# - SupCon and MIL-NCE leave out the trivial pair (Eq. 1) [p]; both keep the domain-dependent similarity in Table 6 [i].
# - "Separated" supervision: a positive competes only with negatives of its own combination seen from the anchor's domain, "as in SLIP
#   and DeCLIP" [p words, i form]; the trivial pairs and w stay.
# - `multi_positive` (ours, off by default): pairs that carry the same caption are neither positives nor negatives of each other.
# - Weights and logits in float32 under bf16 and fp16 autocast [i].
# - The paper does not print its optimiser (its appendix, which we do not have, does): MCD's for the same towers and data [i].
