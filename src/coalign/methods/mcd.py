"""MCD: Kim et al. 2023, "Misalign, Contrast then Distill: Rethinking Misalignments in Language-Image Pretraining"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.distillation import (
    log_distances,
    negative_log_ratio,
    noisy_log_ratio,
    noisy_log_ratio_of_texts,
    positive_log_ratio,
)
from coalign.losses.masked import masked_language_loss
from coalign.losses.multi_positive import balancing_weights, compare_views, domain_combinations, mp_nce
from coalign.losses.tiled import Labels
from coalign.method import Method
from coalign.networks.domain_similarity import DomainSimilarity
from coalign.networks.ema import cosine_momentum, ema_copy, momentum_for, move_ema
from coalign.networks.heads import MaskedLanguageHead
from coalign.networks.towers import ImageTower, TowerSpec, build_image_tower, build_text_tower
from coalign.recipes.mcd import MCDConfig
from coalign.types import Batch, Features, Gather, ImageView, LossTerm, StepInfo, TextPolicy, ViewPlan

AUGMENTED, ORIGINAL, TEXT = 0, 1, 2  # the members of a pair: ṽ, v, t; what is left without ṽ is a slice


class MCD(Method):
    """L = (1−λ)·L_con(v, ṽ, t) + λ·[L_con(v, t) + L_distill] + β·L_MLM (Eq. 13), where λ rises from 0 to 1 over the run."""

    def __init__(self, config: MCDConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        # Misalign (§4.1): the augmentation knows nothing of the caption.
        captions = {"caption": TextPolicy()}
        self.masked_view = "caption" if config.contrast_masked_text else "masked_caption"
        if config.mlm:
            captions[self.masked_view] = TextPolicy(mask_p=config.mask_p)
        self.view_plan = ViewPlan(
            images={"augmented": config.augmented_view, "image": config.image_view}, texts=captions
        )

        self.image = build_image_tower(towers)
        vocab_size = towers.vocab_size + 1 if config.mlm else towers.vocab_size  # the last id is the mask
        self.text = build_text_tower(replace(towers, vocab_size=vocab_size), attention="causal", pooling="end")
        self.teacher = ema_copy(self.image) if config.distills else None
        self.mlm_head = MaskedLanguageHead(self.text.width, towers.vocab_size) if config.mlm else None

        # UniCLIP's τ_D and b_D, of every combination D of image and text; with one τ, b would cancel
        self.similarity = DomainSimilarity(
            domain_combinations(num_images=2, num_texts=1),
            config.temperature,
            shared=not config.domain_similarity,
            offsets=config.domain_similarity,
        )
        self.followed: dict[str, Tensor] = {}  # of the last step, to look at; no part of the state

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        augmented, original = self._embed(self.image, [batch.images["augmented"], batch.images["image"]])
        caption = batch.texts["caption"]
        text = self.text(caption.ids, caption.lengths, with_tokens=self.config.mlm and self.config.contrast_masked_text)
        text_embeds = F.normalize(self.text.projection(text.pooled), dim=-1)
        features = {
            "embeds": torch.stack([augmented, original, text_embeds], dim=1),  # [batch, view, dim]
            "caption_ids": batch.caption_ids,  # [batch]
        }
        if self.mlm_head is not None:
            masked, tokens = batch.texts[self.masked_view], text.tokens
            if tokens is None:
                tokens = self.text(masked.ids, masked.lengths, with_tokens=True).tokens  # [batch, token, width]
            assert tokens is not None
            assert masked.labels is not None
            losses = masked_language_loss(tokens, masked.labels, self.mlm_head)
            features["mlm_total"], features["mlm_count"] = losses  # [batch] each
        return features

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """The teacher's view of v, and of ṽ if a term needs it; captions have no teacher. Its batch norms, if the trunk has any, work in
        the mode of the student's, on the same groups of samples."""
        if self.teacher is None:
            return {}
        views = [batch.images["image"]]
        if self.config.distill_positive or self.config.distill_negative:
            views.insert(0, batch.images["augmented"])
        return {"teacher_embeds": torch.stack(self._embed(self.teacher, views), dim=1)}  # [batch, 1 or 2 views, dim]

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        embeds, gathered = features["embeds"], gather(features["embeds"])
        positives = gather.own_rows(embeds)
        labels = features["caption_ids"] if self.config.multi_positive else positives
        progress = (1 - math.cos(math.pi * step.fraction)) / 2  # λ
        self.followed = {"lambda": torch.tensor(progress)} if self.config.progressive else {}

        terms = self._contrast(embeds, gathered, (labels, gather(labels)), progress)
        if self.teacher is not None:
            terms += self._distil(embeds, targets["teacher_embeds"], gathered, positives, gather, progress)
            self.followed["teacher_momentum"] = torch.tensor(self._momentum(step))
        if self.config.mlm:  # Eq. 11
            total, count = features["mlm_total"].sum(), features["mlm_count"].sum()
            terms.append(LossTerm("mlm", total, count, self.config.mlm_weight))
        return terms

    def _contrast(self, embeds: Tensor, gathered: Tensor, labels: Labels, progress: float) -> list[LossTerm]:
        """Contrast (§4.2): L_con(v, ṽ, t), MP-NCE on all members (Eq. 5), and L_con(v, t), which ṽ has left."""
        logit_scales, offsets = self.similarity()
        scores = compare_views(embeds, gathered, logit_scales, offsets, labels)
        # Σ w over a pair's members is 3: the mean of Eq. 12 of UniCLIP times (V + U)²/3
        count = 3 * len(embeds)
        total = mp_nce(scores, balancing_weights(num_images=2, num_texts=1))
        if not self.config.progressive:
            return [LossTerm("contrastive", total, count)]
        remaining = scores.among(slice(ORIGINAL, None), slice(ORIGINAL, None))
        without = mp_nce(remaining, balancing_weights(num_images=1, num_texts=1))
        return [
            LossTerm("contrastive", total, count, weight=1 - progress),
            LossTerm("contrastive_original", without, count, weight=progress),
        ]

    def _distil(
        self, embeds: Tensor, teacher: Tensor, gathered: Tensor, positives: Tensor, gather: Gather, progress: float
    ) -> list[LossTerm]:
        """Distill (§4.3): L_distill, the sum of Eqs. 7, 8 and 9 (Eq. 10), from residuals r = log D_S − log D_T."""
        config = self.config
        v, augmented, t, texts = embeds[:, ORIGINAL], embeds[:, AUGMENTED], embeds[:, TEXT], gathered[:, TEXT]
        teacher_v, teacher_augmented = teacher[:, -1], teacher[:, 0]
        own = _residuals(v, teacher_v, t)  # r(v_i, t_i), [batch]
        self.followed["log_distance_to_teacher"] = own.detach().mean()
        weight = progress if config.progressive else 1.0
        pairs, others = len(own), len(own) * (len(texts) - 1)  # of i; of i and j ≠ i
        terms = []
        if config.distill_positive:  # Eq. 7
            augmented_own = _residuals(augmented, teacher_augmented, t)
            terms.append(LossTerm("positive", positive_log_ratio(own, augmented_own, config.norm), pairs, weight))
        if config.distill_noisy and config.noisy_pairs == "pairs":  # Eq. 9
            terms.append(LossTerm("noisy", noisy_log_ratio(own, gather(own), config.norm), others, weight))
        if config.distill_negative:  # Eq. 8
            total = negative_log_ratio(v, augmented, teacher_v, teacher_augmented, texts, positives, config.norm)
            terms.append(LossTerm("negative", total, others, weight))
        if config.distill_noisy and config.noisy_pairs == "texts":  # Eq. 9, read otherwise
            total = noisy_log_ratio_of_texts(v, teacher_v, texts, positives, config.norm)
            terms.append(LossTerm("noisy", total, others, weight))
        return terms

    def _momentum(self, step: StepInfo) -> float:
        start = self.config.teacher_momentum
        return cosine_momentum(momentum_for(step.total_steps) if start is None else start, step)

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.similarity.clamp_(self.config.max_logit_scale)
        if self.teacher is not None:  # Eq. 12
            move_ema(self.teacher, self.image, self._momentum(step))

    def scalars(self) -> dict[str, Tensor]:
        """1/τ and b, by combination if there are several (`logit_scale` alone is image-text), λ, the teacher's momentum, and the mean of
        log D_S(v_i, t_i) − log D_T(v_i, t_i)."""
        return {**self.similarity.scalars(), **self.followed}

    def _embed(self, tower: ImageTower, views: Sequence[ImageView]) -> tuple[Tensor, ...]:
        """Every view's embeds [batch, dim], normalised, in one pass."""
        features = tower(torch.cat([view.pixels for view in views]))
        return F.normalize(tower.projection(features), dim=-1).chunk(len(views))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The student's (§4.5)."""
        return F.normalize(self.image.projection(self.image(pixels)), dim=-1)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.text.projection(self.text(ids, lengths).pooled), dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        mlm_head = [] if self.mlm_head is None else list(self.mlm_head.parameters())
        return {
            "image": list(self.image.parameters()),
            "text": [*self.text.parameters(), *mlm_head],
            "scale": list(self.similarity.parameters()),
        }


def _residuals(student: Tensor, teacher: Tensor, texts: Tensor) -> Tensor:
    """r = log D_S − log D_T; both networks have the student's captions, and the teacher's distances carry no gradient."""
    return log_distances(student, texts) - log_distances(teacher, texts.detach())


# Implementation details, each with its source ([p] stated in the paper, [c] read in released code, [i] inferred). The paper's equations
# are lost in the text that this was written from, and there is no released code:
# - v is SLIP's base view, a crop of 50-100 %; ṽ is SimCLR's augmentations as SLIP draws them, "following SimCLR" [p; numbers c, SLIP].
# - L_con is UniCLIP's MP-NCE with the trivial pair, its balancing weights (1/V², 1/(2UV), 1/U²), τ and b for each combination of image
#   and text, and no augmentation encoder: Table 5 calls UniCLIP row (a) with augmentation encoding [p; τ and b i]. One τ is a switch.
# - MP-NCE is rescaled by (V + U)²/3 before other terms are added: its weights sum to 3, and its mean is over (V + U)² [i].
# - λ = (1 − cos πs/S)/2 at step s of S [p words, i form]: at 0 the contrastive loss is Eq. 5, at 1 ṽ is in no positive and no negative.
#   MLM and its β = 0.2 stay as they are [i]. Without `progressive` both L_con(v, ṽ, t) and L_distill count in full: a control, as is the
#   ramp without distillation (`TABLE_5` in the recipes): the paper's table has each row with its ramp.
# - D is the Euclidean distance of normalised embeddings [p], with an eps of 1e-4/dim within the root and 1e-6 within the logarithm [c, Kim
#   et al. 2019]: embeddings that are equal have a finite distance and gradient. The norm of Eq. 6 is the square [i]; absolute is a switch.
# - Eq. 9 compares original pairs with one another, i with j [i]; an image's own caption with others' is a switch. Pairs i ≠ j that share a
#   caption stay in Eqs. 8 and 9: the teacher's distances are right for them too [i].
# - The teacher is of image tower and projection [p]; D_T takes the student's captions, detached [i]. Its momentum starts at 0.996 [i]
#   and rises to 1 on a cosine [p]; in runs of under 28,000 steps it starts lower, so that the teacher averages the same part of a run [i].
# - The teacher normalises by batch statistics as the student does, so that they agree where their weights do, at the first step; its
#   running statistics are averaged as its weights are and read in evaluation mode only [i].
# - Causal text attention and the end token's feature, as in SLIP, on whose code the paper builds [p, c].
# - MLM: 15 % of tokens, of which 80 % become the mask, 10 % another token [p], by one linear layer on the tower's tokens [c, DeCLIP]. The
#   masked caption is contrasted as well, which saves a text pass, as DeCLIP does [i]. Section 4.4 trains MLM, section 5.2 says that MCD
#   does without: a switch.
# - The student is evaluated [p].
