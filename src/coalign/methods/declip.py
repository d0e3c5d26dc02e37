"""DeCLIP: Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.alignment import simsiam_loss
from coalign.losses.contrastive import clip_loss, info_nce
from coalign.losses.masked import masked_language_loss
from coalign.method import Method
from coalign.networks.heads import MLP, MaskedLanguageHead, spread
from coalign.networks.queue import FeatureQueue, nearest_neighbours
from coalign.networks.towers import TowerSpec, build_image_tower, build_text_tower
from coalign.recipes.declip import DeCLIPConfig
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

FIRST, SECOND = 0, 1  # the views of the image, I and Ĩ, and of the text, T and T̃


class DeCLIP(Method):
    """L = (1−α−β−γ)·L_CLIP + α·(L_ISS + L_TSS) + β·L_MVS + γ·L_NNS (Eq. 2, Algorithm 1).

    L_ISS is SimSiam, L_TSS masked language modelling, L_MVS InfoNCE of the three other pairs of views, and L_NNS InfoNCE of the images
    with the text's nearest neighbour in a queue.
    """

    def __init__(self, config: DeCLIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.view_plan = _view_plan(config)
        self.image = build_image_tower(towers)
        mask_token = 1 if config.text_ss else 0
        bidirectional = config.text_attention == "bidirectional"
        self.text = build_text_tower(
            replace(towers, vocab_size=towers.vocab_size + mask_token),
            attention=config.text_attention,
            pooling="start" if bidirectional else "end",
        )
        dim, width = self.image.embed_dim, config.projector_width
        if config.image_ss:
            self.projector = MLP([dim, width, width, width], last_norm=True)
            self.predictor = MLP([width, config.predictor_width, width])
        if config.text_ss:
            self.mlm_head = MaskedLanguageHead(self.text.width, towers.vocab_size)
        if config.neighbours:
            none = torch.tensor(-1)
            self.queue = FeatureQueue(config.queue_size, embeds=torch.zeros(dim), indices=none, caption_ids=none)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature)]))
        self.followed: dict[str, Tensor] = {}  # of the last step, to look at; no part of the state

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        images = [self.image.projection(self.image(batch.images[name].pixels)) for name in self.view_plan.images]
        texts, masked = [], {}
        for name in self.view_plan.texts:
            view = batch.texts[name]
            encoded = self.text(view.ids, view.lengths, with_tokens=view.labels is not None)
            if view.labels is not None:  # L_TSS: cross-entropy of the masked tokens, summed for each sample
                total, count = masked_language_loss(encoded.tokens, view.labels, self.mlm_head)
                masked = {"mlm_total": total, "mlm_count": count}  # [batch]
            if name != "masked_text":
                texts.append(F.normalize(self.text.projection(encoded.pooled), dim=-1))
        return {
            "image_projected": torch.stack(images, 1),  # [batch, view, dim], not normalised: SimSiam takes it as it is
            "text_embeds": torch.stack(texts, 1),  # [batch, view, dim]
            "caption_ids": batch.caption_ids,  # [batch]
            "indices": batch.indices,  # [batch]
            **masked,
        }

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        config, count = self.config, len(features["text_embeds"])
        embeds = {**features, "image_embeds": F.normalize(features["image_projected"], dim=-1)}
        clip, multi_view = self._pairs(embeds, gather)
        clip_weight = multi_view_weight = config.clip_weight
        if config.loss_weighting == "paper":
            multi_view_weight = config.multi_view_weight
        elif config.multi_view:  # one mean over all four pairs
            clip_weight = multi_view_weight = config.clip_weight / 4
        terms = [LossTerm("clip", clip, count, clip_weight)]
        if multi_view is not None:
            terms.append(LossTerm("mvs", multi_view, count, multi_view_weight))
        if config.image_ss:
            terms.append(LossTerm("image_ss", self._simsiam(features, gather), count, config.ss_weight))
        if config.text_ss:
            total, masked = features["mlm_total"].sum(), features["mlm_count"].sum()
            terms.append(LossTerm("text_ss", total, masked, config.ss_weight))
        if config.neighbours:
            total, found = self._neighbours(embeds, gather, step)
            terms.append(LossTerm("nns", total, found, config.neighbour_weight))
        return terms

    def _pairs(self, embeds: Features, gather: Gather) -> tuple[Tensor, Tensor | None]:
        """L_CLIP: InfoNCE (Eq. 1 in both directions) of (I, T). L_MVS: the sum of (I, T̃), (Ĩ, T) and (Ĩ, T̃)."""
        images, texts = embeds["image_embeds"], embeds["text_embeds"]  # [batch, view, dim]
        all_images, all_texts = gather(images), gather(texts)  # [global_batch, view, dim]
        positives, scale = gather.own_rows(images), self.log_logit_scale.exp()
        labels = (embeds["caption_ids"], gather(embeds["caption_ids"])) if self.config.multi_positive else None

        def pair(image: int, text: int) -> Tensor:
            one, other = images[:, image], texts[:, text]
            return clip_loss(one, other, all_images[:, image], all_texts[:, text], positives, scale, labels)

        if not self.config.multi_view:
            return pair(FIRST, FIRST), None
        return pair(FIRST, FIRST), pair(FIRST, SECOND) + pair(SECOND, FIRST) + pair(SECOND, SECOND)

    def _simsiam(self, features: Features, gather: Gather) -> Tensor:
        """L_ISS = −½[cos(p, sg z̃) + cos(p̃, sg z)], each view through projector and predictor by itself."""
        z1, z2 = (self.projector(features["image_projected"][:, view], gather) for view in (FIRST, SECOND))
        p1, p2 = self.predictor(z1, gather), self.predictor(z2, gather)
        self.followed["simsiam_std"] = spread(z1.detach())  # falls to 0 when the embeddings collapse
        return simsiam_loss(p1, z1, p2, z2)

    def _neighbours(self, embeds: Features, gather: Gather, step: StepInfo) -> tuple[Tensor, Tensor]:
        """L_NNS: InfoNCE of (I, T′) and (Ĩ, T′), where T′ is the nearest neighbour of T in the queue: the sum, and the count of terms.

        A row without any neighbour neither has a term nor is a negative.
        """
        config, images, texts = self.config, embeds["image_embeds"], embeds["text_embeds"]
        total, count = images.new_zeros(()), images.new_zeros((), dtype=torch.long)
        if step.fraction < config.neighbour_start:
            return total, count
        positives, scale = gather.own_rows(images), self.log_logit_scale.exp()
        own = {name: embeds[name] for name in ("indices", "caption_ids")} if config.neighbour_not_own else {}
        shuffle = None
        if config.neighbour_random:
            generator = torch.Generator().manual_seed(step.step)
            shuffle = torch.randperm(self.queue.size, generator=generator).to(images.device)
        for text in (FIRST, SECOND) if config.neighbour_pairs == "released_code" else (FIRST,):
            neighbours = nearest_neighbours(self.queue, texts[:, text].detach(), own, shuffle)
            found, all_found = neighbours.slots >= 0, gather(neighbours.slots) >= 0  # [batch], [global_batch]
            rows, keys = found.nonzero().squeeze(1), gather(neighbours.embeds)[all_found]
            columns = positives[rows]
            key_columns = all_found.cumsum(0)[columns] - 1  # where a row's neighbour is among those that were found
            ids = positives[:, None]
            if config.multi_positive:
                neighbours_captions = torch.where(found, self.queue["caption_ids"][neighbours.slots], -1)
                ids = torch.stack([embeds["caption_ids"], neighbours_captions], dim=1)
            row_ids, all_ids = ids[rows], gather(ids)
            for image in (SECOND,) if config.neighbour_pairs == "algorithm_1" else (FIRST, SECOND):
                loss = info_nce(images[rows, image], keys, key_columns, scale, (row_ids, all_ids[all_found]))
                if config.neighbour_both_ways:
                    all_images = gather(images[:, image])  # [global_batch, dim]
                    back = info_nce(neighbours.embeds[rows], all_images, columns, scale, (row_ids, all_ids))
                    loss = (loss + back) / 2
                total, count = total + loss, count + len(rows)
            if text == FIRST:
                self.followed["neighbour_similarity"] = neighbours.similarity.sum() / max(1, len(rows))
        return total, count

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.log_logit_scale.clamp_(0, math.log(self.config.max_logit_scale))
        if self.config.neighbours:
            texts = gather(features["text_embeds"])  # [global_batch, view, dim]
            indices, caption_ids = gather(features["indices"]), gather(features["caption_ids"])
            for text in (SECOND, FIRST) if self.config.neighbour_pairs == "released_code" else (FIRST,):
                self.queue.push(embeds=texts[:, text], indices=indices, caption_ids=caption_ids)

    def scalars(self) -> dict[str, Tensor]:
        fill = {"queue_fill": self.queue.fill} if self.config.neighbours else {}
        return {"logit_scale": self.log_logit_scale.detach().exp(), **fill, **self.followed}

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image.projection(self.image(pixels)), dim=-1)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return F.normalize(self.text.projection(self.text(ids, lengths).pooled), dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        of_image = [self.image, self.projector, self.predictor] if self.config.image_ss else [self.image]
        of_text = [self.text, self.mlm_head] if self.config.text_ss else [self.text]
        return {
            "image": [parameter for module in of_image for parameter in module.parameters()],
            "text": [parameter for module in of_text for parameter in module.parameters()],
            "scale": [self.log_logit_scale],
        }


def _view_plan(config: DeCLIPConfig) -> ViewPlan:
    """As many views as the terms that are on need."""
    kind: Literal["original", "eda"] = "eda" if config.text_views == "two_eda" else "original"
    mask_p = config.mask_p if config.text_ss else 0.0
    images, texts = {"image_1": config.image_view}, {"text_1": TextPolicy(kind, mask_p)}
    if config.multi_view or config.image_ss or config.neighbours:
        images["image_2"] = config.image_view
    if config.multi_view or (config.neighbours and config.neighbour_pairs == "released_code"):
        texts["text_2"] = TextPolicy("eda")
    if config.text_ss and not config.contrast_masked_text:
        texts.update(text_1=TextPolicy(kind), masked_text=TextPolicy(kind, mask_p))
    return ViewPlan(images, texts)


# Implementation details, each with its source ([p] stated in the paper, [c] read in released code, [i] inferred):
# - α = β = γ = 0.2 [p]. `loss_weighting` "paper" (default) is Eq. 2, with L_MVS the sum of three pairs as in Algorithm 1 [p]; the code
#   takes one mean over the four pairs with weight 0.4 and gives SimSiam, MLM and L_NNS 0.2 each [c, its ViT-B/32 and R50
#   configurations; the one of ViT-B/32 on 88M pairs has 0.6].
# - A term that is off (Table 4) gives its weight back to L_CLIP; in the code's weighting, 1 minus the others' weights [i].
# - SimSiam takes the projected image features, not normalised [c]. Projector of 3 layers of width 1024, predictor 512 → 1024 [p],
#   BatchNorm after each layer of the projector (ReLU after the first two) and in the predictor's hidden layer [c].
# - Their BatchNorm is over the global batch and each view apart; the code's is over one GPU's rows [i].
# - MLM: 15 % of the ordinary tokens, 80/10/10 [p]; a linear head on the token features after the final norm [c], with BERT's
#   initialisation [i]. The masked caption's feature is the one that is contrasted, searched with and queued [p: Algorithm 1, c], as
#   `contrast_masked_text` says; the second view is not masked [c]. The mean is over the masked tokens of the global batch; the code
#   averages over GPUs.
# - Under causal attention, which the code keeps, MLM predicts from the left alone [c].
# - Text views: the original and EDA [c], or "two text views" of EDA [p]. One of synonym replacement, swap and deletion, each as likely
#   [p]. A caption too short for its operation stays as it is [i]; the code fails on a single word.
# - Image views: crop of 20-100 %, jitter .4/.4/.4/.1 (p .8), greyscale .2, blur of sigma .1-2, flip [p]; blur with p .5 [c].
# - L_NNS is a mean over its pairs [c], from image to neighbour [p: Eq. 1, c], the neighbour without gradient [c]. `neighbour_pairs`
#   chooses between §3.3 (default), Algorithm 1 and the code.
# - The queue holds 64K rows [p], of T [p: Algorithm 1] or of T̃ and T [c], those of all ranks once, in global order; the code has a
#   queue for each GPU, outside the state_dict, filled with noise at first, and its wrap-around drops rows. Ours is in the state_dict,
#   empty slots are never found, and rows are replaced oldest first.
# - The neighbour is no row of the same sample or caption, and L_NNS begins after a tenth of the run [i]: both matter only where the
#   queue is not small against the data, or the run short.
# - τ starts at 0.07 and is learned [p]; the log-scale is clamped to [0, ln 100] after the step. The code clamps the scale to at most
#   100 in the forward pass, and to at least 20 [c].
# - The code's projection of text has a bias [c] and its SGD Nesterov momentum [c]; ours do not, the paper says neither.
# - The context is 77 tokens as in the code; the paper prints 76.
# - RegNetY-64GF's text tower has BERT-base's shape and attention, read at the start token [c], but CLIP's vocabulary and norms before
#   the sublayers, and starts from random weights [i]. The paper gives no optimiser for it.
# - `multi_positive` (ours, off by default): pairs that carry the same caption leave each other's denominators; in L_NNS also pairs
#   whose neighbours carry the same caption.
# - In the R50 rows the scale's learning rate is a tenth of the others' and momentum is 0.9 [c]; AdamW's betas are (.9, .98) [c].
