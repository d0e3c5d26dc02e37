"""MCD: Kim et al. 2023, "Misalign, Contrast then Distill: Rethinking Misalignments in Language-Image Pretraining"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.log_ratio import (
    log_distances,
    negative_log_ratio,
    noisy_log_ratio,
    noisy_log_ratio_of_texts,
    positive_log_ratio,
)
from coalign.losses.masked import masked_language_loss
from coalign.losses.multi_positive import balancing_weights, compare_views, domain_combinations, mp_nce
from coalign.losses.tiled import Labels, contrast_labels
from coalign.methods.mcd.config import MCDConfig
from coalign.networks.domain_similarity import DomainSimilarity
from coalign.networks.ema import cosine_momentum, ema_copy, momentum_for, update_ema
from coalign.networks.heads import MaskedLanguageHead
from coalign.networks.towers.image import ImageTower, build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, ImageView, LossTerm, StepInfo, TextPolicy, ViewPlan

AUGMENTED, ORIGINAL, TEXT = 0, 1, 2  # the views of a pair: ṽ, v, t; in this order, v and t form a slice


class MCD(TwoTowers):
    """L = (1−λ)·L_con(v, ṽ, t) + λ·[L_con(v, t) + L_distill] + β·L_MLM (Eq. 13); λ rises from 0 to 1 over the run."""

    encodes_both = True
    length_dependent = ("λ, the weight of the distillation", "the momentum of the teacher")

    def __init__(self, config: MCDConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        # Misalign (§4.1): the image is augmented without regard to its caption.
        captions = {"caption": TextPolicy()}
        self.masked_view = "caption" if config.contrast_masked_text else "masked_caption"
        if config.mlm:
            captions[self.masked_view] = TextPolicy(mask_p=config.mask_p)
        self.view_plan = ViewPlan(
            images={"augmented": config.augmented_view, "image": config.image_view}, texts=captions
        )

        self.image = build_image_tower(towers)
        vocab_size = towers.vocab_size + 1 if config.mlm else towers.vocab_size  # the last id is the mask token
        self.text = build_text_tower(replace(towers, vocab_size=vocab_size), attention="causal", pooling="end")
        self.teacher = ema_copy(self.image) if config.distills else None
        self.mlm_head = MaskedLanguageHead(self.text.width, towers.vocab_size) if config.mlm else None
        self.token_terms = {"text": "mlm"} if config.mlm else {}

        # UniCLIP's τ_D and b_D for each combination D of image and text; with a single τ, b would cancel
        self.domain_similarity = DomainSimilarity(
            domain_combinations(num_images=2, num_texts=1),
            config.temperature,
            shared=not config.domain_similarity,
            offsets=config.domain_similarity,
        )
        self.diagnostics: dict[str, Tensor] = {}  # of the last step, for logging only; not in the state_dict

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        features = both(lambda: self._encode_images(batch), lambda: self._encode_texts(batch))
        embeds = [features.pop(name) for name in ("augmented", "original", "text")]
        return {
            "embeds": torch.stack(embeds, dim=1),  # [batch, view, dim]
            **features,
            **batch.ids(),  # [batch] each
        }

    def _encode_images(self, batch: Batch) -> Features:
        augmented, original = self._embed(self.image, [batch.images["augmented"], batch.images["image"]])
        return {"augmented": augmented, "original": original}

    def _encode_texts(self, batch: Batch) -> Features:
        caption = batch.texts["caption"]
        text = self.text(caption.ids, caption.lengths, with_tokens=self.config.mlm and self.config.contrast_masked_text)
        features = {"text": F.normalize(self.text.projection(text.pooled), dim=-1)}
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
        """Embeds v, and ṽ if a term needs it, with the teacher; captions have no teacher. The teacher's BatchNorm layers, if the trunk has
        any, use batch statistics over the same groups of samples as the student's."""
        if self.teacher is None:
            return {}
        views = [batch.images["image"]]
        if self.config.distill_positive or self.config.distill_negative:
            views.insert(0, batch.images["augmented"])
        return {"teacher_embeds": torch.stack(self._embed(self.teacher, views), dim=1)}  # [batch, 1 or 2 views, dim]

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        embeds, gathered = features["embeds"], gather(features["embeds"])
        positives = gather.global_indices(embeds)
        labels = contrast_labels(features, gather, self.config.multi_positive) or (positives, gather(positives))
        progress = (1 - math.cos(math.pi * step.fraction)) / 2  # λ
        self.diagnostics = {"lambda": torch.tensor(progress)} if self.config.progressive else {}

        terms = self._contrast(embeds, gathered, labels, progress)
        if self.teacher is not None:
            terms += self._distill(embeds, targets["teacher_embeds"], gathered, positives, gather, progress)
            self.diagnostics["teacher_momentum"] = torch.tensor(self._momentum(step))
        if self.config.mlm:  # Eq. 11
            total, count = features["mlm_total"].sum(), features["mlm_count"].sum()
            terms.append(LossTerm("mlm", total, count, self.config.mlm_weight))
        return terms

    def _contrast(self, embeds: Tensor, gathered: Tensor, labels: Labels, progress: float) -> list[LossTerm]:
        """Contrast (§4.2): returns L_con(v, ṽ, t), MP-NCE over all views of a pair (Eq. 5), and L_con(v, t), without ṽ."""
        logit_scales, offsets = self.domain_similarity()
        scores = compare_views(embeds, gathered, logit_scales, offsets, labels)
        count = 3 * len(embeds)  # the weights of a pair sum to 3: UniCLIP's mean (its Eq. 12) times (V + U)²/3
        total = mp_nce(scores, balancing_weights(num_images=2, num_texts=1))
        if not self.config.progressive:
            return [LossTerm("contrastive", total, count)]
        original = scores.among(slice(ORIGINAL, None), slice(ORIGINAL, None))
        original_total = mp_nce(original, balancing_weights(num_images=1, num_texts=1))
        return [
            LossTerm("contrastive", total, count, weight=1 - progress),
            LossTerm("contrastive_original", original_total, count, weight=progress),
        ]

    def _distill(
        self, embeds: Tensor, teacher: Tensor, gathered: Tensor, positives: Tensor, gather: Gather, progress: float
    ) -> list[LossTerm]:
        """Distill (§4.3): returns the terms of L_distill, Eqs. 7, 8 and 9 (summed in Eq. 10), from residuals r = log D_S − log D_T."""
        config = self.config
        v, augmented, t, texts = embeds[:, ORIGINAL], embeds[:, AUGMENTED], embeds[:, TEXT], gathered[:, TEXT]
        teacher_v, teacher_augmented = teacher[:, -1], teacher[:, 0]
        residuals = _residuals(v, teacher_v, t)  # r(v_i, t_i), [batch]
        self.diagnostics["log_distance_to_teacher"] = residuals.detach().mean()
        weight = progress if config.progressive else 1.0
        num_pairs, num_negatives = len(v), len(v) * (len(texts) - 1)  # i; i and j ≠ i
        terms = []
        if config.distill_positive:  # Eq. 7
            augmented_residuals = _residuals(augmented, teacher_augmented, t)
            total = positive_log_ratio(residuals, augmented_residuals, config.norm)
            terms.append(LossTerm("positive", total, num_pairs, weight))
        if config.distill_noisy and config.noisy_pairs == "pairs":  # Eq. 9
            total = noisy_log_ratio(residuals, gather(residuals), config.norm)
            terms.append(LossTerm("noisy", total, num_negatives, weight))
        if config.distill_negative:  # Eq. 8
            total = negative_log_ratio(v, augmented, teacher_v, teacher_augmented, texts, positives, config.norm)
            terms.append(LossTerm("negative", total, num_negatives, weight))
        if config.distill_noisy and config.noisy_pairs == "texts":  # Eq. 9, alternative reading
            total = noisy_log_ratio_of_texts(v, teacher_v, texts, positives, config.norm)
            terms.append(LossTerm("noisy", total, num_negatives, weight))
        return terms

    def _momentum(self, step: StepInfo) -> float:
        start = self.config.teacher_momentum
        return cosine_momentum(momentum_for(step.total_steps) if start is None else start, step)

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.domain_similarity.clamp_(self.config.max_logit_scale)
        if self.teacher is not None:  # Eq. 12
            update_ema(self.teacher, self.image, self._momentum(step))

    def scalars(self) -> dict[str, Tensor]:
        """Returns 1/τ and b (per domain combination if there are several; `logit_scale` is then image-text), λ, the teacher's momentum, and
        the mean of log D_S(v_i, t_i) − log D_T(v_i, t_i)."""
        return {**self.domain_similarity.scalars(), **self.diagnostics}

    def _embed(self, tower: ImageTower, views: Sequence[ImageView]) -> tuple[Tensor, ...]:
        """Returns the normalized embeds of each view, [batch, dim], from a single forward pass."""
        features = tower(torch.cat([view.pixels for view in views])).pooled
        return F.normalize(tower.projection(features), dim=-1).chunk(len(views))

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        mlm_head = [] if self.mlm_head is None else list(self.mlm_head.parameters())
        return {
            "image": list(self.image.parameters()),
            "text": [*self.text.parameters(), *mlm_head],
            "scale": list(self.domain_similarity.parameters()),
        }


def _residuals(student: Tensor, teacher: Tensor, texts: Tensor) -> Tensor:
    """Returns r = log D_S − log D_T. Both distances use the student's text embeds; the teacher's carries no gradient."""
    return log_distances(student, texts) - log_distances(teacher, texts.detach())


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred). The text of the paper we
# worked from lost its equations, and there is no released code:
# - v is SLIP's base view, a crop of 50-100 %. ṽ uses SimCLR's augmentations with SLIP's parameters, "following SimCLR" [p; numbers c,
#   SLIP].
# - L_con is UniCLIP's MP-NCE with the trivial pair, the balancing weights (1/V², 1/(2UV), 1/U²), and τ and b per domain combination, but
#   without an augmentation encoder: Table 5 describes UniCLIP as row (a) with augmentation encoding [p; τ and b i]. A single τ is an
#   option.
# - MP-NCE is multiplied by (V + U)²/3 before other terms are added, since its weights sum to 3 and its mean is over (V + U)² entries [i].
# - λ = (1 − cos πs/S)/2 at step s of S [p words, i form]. At λ = 0 the contrastive loss is Eq. 5; at λ = 1, ṽ is neither a positive nor a
#   negative. MLM keeps its weight β = 0.2 [i]. Without `progressive`, L_con(v, ṽ, t) and L_distill both have full weight: a control. A
#   second control is the ramp without distillation (`TABLE_5` in tables.py), since the paper's table never separates the two.
# - D is the Euclidean distance between normalized embeddings [p], with eps 1e-4/dim inside the root and 1e-6 inside the logarithm [c, Kim
#   et al. 2019], so that equal embeddings have a finite log-distance and gradient. The norm in Eq. 6 is the square [i]; absolute is an
#   option.
# - Eq. 9 compares original pairs i and j [i]; comparing an image's own caption with other captions is an option. Pairs i ≠ j with the same
#   caption stay in Eqs. 8 and 9, because the teacher's distances are valid for them too [i].
# - The teacher covers the image tower and its projection [p]. D_T uses the student's text features, detached [i]. The momentum starts at
#   0.996 [i] and rises to 1 on a cosine [p]. Runs of under 28,000 steps start lower, so that the teacher averages over the same fraction of
#   the run [i].
# - The teacher normalizes by batch statistics, like the student, so that both agree at the first step, when their weights are equal. Its
#   running statistics are averaged like its weights and used in evaluation mode only [i].
# - Causal text attention, pooled at the end token, as in SLIP, on whose code the paper builds [p, c].
# - MLM masks 15 % of the tokens; 80 % of these become the mask token, 10 % a random token [p]. The head is one linear layer on the tower's
#   token features [c, DeCLIP]. The masked caption is also contrasted, as in DeCLIP, which saves a text pass [i]. Section 4.4 trains MLM,
#   while section 5.2 says that MCD does not: an option.
# - `multi_positive` (ours, off by default) and groups (`--group-column`) remove pairs from each other's denominators in L_con. L_distill
#   compares the distances of student and teacher for all pairs: it has no negatives.
# - The student is evaluated (§4.5) [p].
