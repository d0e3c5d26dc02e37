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
from coalign.losses.tiled import contrast_labels
from coalign.methods.uniclip.config import UniCLIPConfig
from coalign.networks.augmentation_encoder import AugmentationEncoder, build_head
from coalign.networks.domain_similarity import DomainSimilarity
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import AugmentationParams, Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

LOSSES = {"supcon": sup_con, "mil-nce": mil_nce}  # the other choices are MP-NCE with different weights


class UniCLIP(TwoTowers):
    """L = MP-NCE (Eq. 12) over V image views and U text views of each pair, which are all positives of each other and of themselves."""

    encodes_both = True
    positive_weights: Tensor  # [view, view]

    def __init__(self, config: UniCLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        policies = {"weak": config.weak_view, "strong": config.strong_view}
        self.view_plan = ViewPlan(
            images={f"{kind}_{number}": policies[kind] for number, kind in enumerate(config.views, 1)},
            texts={"caption": TextPolicy()} | {f"eda_{n}": TextPolicy("eda") for n in range(1, config.text_views)},
        )
        # f_I, f_A and g_I, f_T and g_T (§2.1). g_I includes the image tower's projection; g_T is the text tower's.
        self.image = build_image_tower(towers)
        self.augmentation = AugmentationEncoder() if config.augmentation_embedding else None
        augmentation_dim = 0 if self.augmentation is None else self.augmentation.dim
        self.head = build_head(
            config.image_head, self.image.width, self.image.embed_dim, self.image.projection, augmentation_dim
        )
        self.image.projection = nn.Identity()
        if config.image_head.startswith("mlp"):
            self.image.starts.pop("projection", None)  # not used
        self.text = build_text_tower(towers, attention="bidirectional", pooling="start")

        # τ_D and b_D (Eq. 16). If a positive and all its negatives share one b, it cancels (Eq. 15) and is not trained.
        num_images, num_texts = len(config.views), config.text_views
        self.domain_similarity = DomainSimilarity(
            domain_combinations(num_images, num_texts),
            config.temperature,
            shared=not config.domain_similarity,
            offsets=config.domain_similarity and config.unified_supervision,
        )

        # Separated supervision: one loss for each combination of the anchor's domain and the other view's domain.
        all_views, images, texts = slice(None), slice(0, num_images), slice(num_images, None)
        separated = [(anchors, others) for anchors in (images, texts) for others in (images, texts)]
        self.blocks = [(all_views, all_views)] if config.unified_supervision else separated
        weights = torch.ones(2 * [num_images + num_texts], dtype=torch.float64)
        if config.loss == "mp-nce":
            weights = balancing_weights(num_images, num_texts)
        elif config.loss != "mp-nce-unweighted":
            weights.fill_diagonal_(0)  # no trivial pairs
        self.positive_weights = weights  # no buffer: Apple GPUs have no float64
        # The losses are means: MP-NCE over anchors and their positives, the others over anchors that have positives.
        positive = weights > 0
        counted = [positive[block].any(1) if config.loss in LOSSES else positive[block] for block in self.blocks]
        self.terms_per_pair = int(sum(c.sum() for c in counted))

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        embeds = both(lambda: self._encode_images(batch), lambda: self._encode_texts(batch))
        return {"embeds": torch.stack(list(embeds.values()), dim=1), **batch.ids()}  # [batch, view, dim], [batch] each

    def _encode_images(self, batch: Batch) -> Features:
        views = [batch.images[name] for name in self.view_plan.images]
        features = self.image(torch.cat([view.pixels for view in views])).pooled  # f_I(A(x)): [view · batch, width]
        shift = int(self.config.foreign_parameters)  # 1: the parameters of another sample of the batch
        images = self.project_image(features, torch.cat([view.params.roll(shift, 0) for view in views]))
        return dict(zip(self.view_plan.images, images.chunk(len(views))))

    def _encode_texts(self, batch: Batch) -> Features:
        captions = {name: batch.texts[name] for name in self.view_plan.texts}
        return {name: self.encode_text(caption.ids, caption.lengths) for name, caption in captions.items()}

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        embeds = features["embeds"]
        labels = contrast_labels(features, gather, self.config.multi_positive)
        if labels is None:
            indices = gather.global_indices(embeds)
            labels = indices, gather(indices)
        logit_scales, offsets = self.domain_similarity()
        scores = compare_views(embeds, gather(embeds), logit_scales, offsets, labels)
        total = scores.own.new_zeros(())
        for anchors, others in self.blocks:
            block, weights = scores.among(anchors, others), self.positive_weights[anchors, others]
            if self.config.loss in LOSSES:  # Eq. 6, Eq. 4
                total = total + LOSSES[self.config.loss](block, (weights > 0).to(total.device))
            else:  # Eq. 12, Eq. 11, Eq. 9
                total = total + mp_nce(block, weights)
        return [LossTerm(self.config.loss.replace("-", "_"), total, count=len(embeds) * self.terms_per_pair)]

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.domain_similarity.clamp_(self.config.max_logit_scale)

    def scalars(self) -> dict[str, Tensor]:
        return self.domain_similarity.scalars()

    def project_image(self, features: Tensor, params: Tensor) -> Tensor:
        """Returns z = g_I(f_I(A(x)), f_A(A)), normalized: features [batch, width], params [batch, 11] -> [batch, dim]."""
        augmentation = None if self.augmentation is None else self.augmentation(params.to(features.dtype))
        return F.normalize(self.head(features, augmentation), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeds the evaluation view as an unaugmented image."""
        identity = torch.tensor([AugmentationParams().vector()], device=pixels.device)
        return self.project_image(self.image(pixels).pooled, identity.expand(pixels.shape[0], -1))

    def projections(self) -> dict[str, nn.Module]:
        own = {} if self.config.image_head.startswith("mlp") else {"image": self.head.get_submodule("projection")}
        return {**own, "text": self.text.projection}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        augmentation = [] if self.augmentation is None else list(self.augmentation.parameters())
        return {
            "image": [*self.image.parameters(), *self.head.parameters(), *augmentation],
            "text": list(self.text.parameters()),
            "scale": list(self.domain_similarity.parameters()),
        }


# Implementation details and their sources ([p] stated in the paper, [i] inferred; there is no released code):
# - The positive group of a pair is one weak and two strong image views and one caption [p]. The weak view is SLIP's base view, a crop of
#   50-100 %; the strong views are SLIP's SSL views, SimCLR's augmentations [i]. Additional text views are EDA views [i], which the paper
#   found "not very helpful".
# - The augmentation vector has 11 entries: crop box, four color changes, blur sigma, flipped, grayed [p]. f_A is 11 -> 256 -> 256 with one
#   GELU [i]. Only the head is conditioned on it, not the encoder [p].
# - In evaluation, the head gets the parameters of an unaugmented image with box (0, 0, 1, 1). The evaluation view is a center crop, but
#   the encoder gets only the cropped pixels, so the box within the full image is unknown [i].
# - g_I: three residual blocks [p] x + W2 GELU(W1 LayerNorm[x; f_A]) as wide as the features, with W2 initialized to zero, then the tower's
#   linear projection [i]. MLP heads use GELU and the same width, and take f_A in the first layer [i]. Linear probes use f_I alone [p].
# - g_T is linear, on the last hidden state of the start token [p], so text attention must be bidirectional [p implies].
# - Each domain combination has its own τ and b [p], initially 0.07 and 0. 1/τ is learned in log-space and clamped to [1, 100] after the
#   step [i]. Both have the role "scale". Adam moves a scalar by at most about the sum of the learning rates, so short runs may need
#   `--roles.scale.lr-multiplier 10`; for CLIP on small data it did not help [i].
# - With shared τ and b or with separated supervision, b has no gradient (Eq. 15) [p]; it is then fixed at zero and not a parameter. In
#   general, adding c·τ_D to every b_D changes nothing. (The paper says any constant, which holds for equal τ.)
# - MP-NCE is the mean over all anchors (images and texts) and their positives including the trivial pair, weighted by 1/V², 1/(2UV),
#   1/U² (Eq. 12) [p]. That is 3/(V+U)² times the mean of the three combinations, which matters next to other terms and for clipping.
# - SupCon and MIL-NCE omit the trivial pair (Eq. 1) [p]; in Table 6, both keep the domain-dependent similarity [i].
# - Separated supervision: a positive competes only with negatives of the same combination, seen from the anchor's domain, "as in SLIP
#   and DeCLIP" [p words, i form]. The trivial pairs and w are unchanged.
# - `multi_positive` (ours, off by default): pairs with the same caption are neither positives nor negatives of each other.
# - Loss weights and logits are in float32 under bf16 and fp16 autocast [i].
# - The main paper omits the optimizer (it is in the appendix, which we do not have); ours is MCD's for the same towers and data [i].
