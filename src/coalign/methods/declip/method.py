"""DeCLIP: Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training Paradigm"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.alignment import simsiam_loss
from coalign.losses.contrastive import clip_loss, info_nce
from coalign.losses.masked import masked_language_loss
from coalign.losses.tiled import contrast_labels
from coalign.methods.declip.config import DeCLIPConfig
from coalign.networks.heads import MLP, MaskedLanguageHead, spread
from coalign.networks.logit_scale import LogitScale
from coalign.networks.queue import FeatureQueue, nearest_neighbors
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.two_towers import TwoTowers
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

FIRST, SECOND = 0, 1  # views of the image, I and Ĩ, and of the text, T and T̃


class DeCLIP(TwoTowers):
    """L = (1−α−β−γ)·L_CLIP + α·(L_ISS + L_TSS) + β·L_MVS + γ·L_NNS (Eq. 2, Algorithm 1).

    L_ISS is SimSiam, L_TSS is masked language modeling, L_MVS is InfoNCE over the other three pairs of views, and L_NNS is InfoNCE of the
    images with the nearest neighbor of the text in a queue.
    """

    encodes_both = True

    length_dependent = ("when the nearest-neighbor term starts",)

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
            self.token_terms = {"text": "text_ss"}
            self.mlm_head = MaskedLanguageHead(self.text.width, towers.vocab_size)
        if config.neighbors:
            empty = torch.tensor(-1)
            self.queue = FeatureQueue(config.queue_size, embeds=torch.zeros(dim), indices=empty, caption_ids=empty)
        self.logit_scale = LogitScale(config.temperature)
        self.diagnostics: dict[str, Tensor] = {}  # of the last step, for logging only; not in the state_dict

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        features = both(lambda: self._encode_images(batch), lambda: self._encode_texts(batch))
        return {**features, **batch.ids(), "indices": batch.queue_ids}  # [batch] each

    def _encode_images(self, batch: Batch) -> Features:
        images = [self.image.projection(self.image(batch.images[name].pixels).pooled) for name in self.view_plan.images]
        return {"image_projected": torch.stack(images, 1)}  # [batch, view, dim], not normalized, as SimSiam needs it

    def _encode_texts(self, batch: Batch) -> Features:
        texts, masked = [], {}
        for name in self.view_plan.texts:
            view = batch.texts[name]
            encoded = self.text(view.ids, view.lengths, with_tokens=view.labels is not None)
            if view.labels is not None:  # L_TSS: cross-entropy over the masked tokens, summed per sample
                total, count = masked_language_loss(encoded.tokens, view.labels, self.mlm_head)
                masked = {"mlm_total": total, "mlm_count": count}  # [batch]
            if name != "masked_text":
                texts.append(F.normalize(self.text.projection(encoded.pooled), dim=-1))
        return {"text_embeds": torch.stack(texts, 1), **masked}  # [batch, view, dim]

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
            total, num_masked = features["mlm_total"].sum(), features["mlm_count"].sum()
            terms.append(LossTerm("text_ss", total, num_masked, config.ss_weight))
        if config.neighbors:
            total, num_terms = self._neighbors(embeds, gather, step)
            terms.append(LossTerm("nns", total, num_terms, config.neighbor_weight))
        return terms

    def _pairs(self, embeds: Features, gather: Gather) -> tuple[Tensor, Tensor | None]:
        """Returns L_CLIP, InfoNCE (Eq. 1 in both directions) of (I, T), and L_MVS, its sum over (I, T̃), (Ĩ, T) and (Ĩ, T̃)."""
        images, texts = embeds["image_embeds"], embeds["text_embeds"]  # [batch, view, dim]
        all_images, all_texts = gather(images), gather(texts)  # [global_batch, view, dim]
        positives, scale = gather.global_indices(images), self.logit_scale()
        labels = contrast_labels(embeds, gather, self.config.multi_positive)

        def pair(image: int, text: int) -> Tensor:
            local = images[:, image], texts[:, text]
            return clip_loss(*local, all_images[:, image], all_texts[:, text], positives, scale, labels)

        if not self.config.multi_view:
            return pair(FIRST, FIRST), None
        return pair(FIRST, FIRST), pair(FIRST, SECOND) + pair(SECOND, FIRST) + pair(SECOND, SECOND)

    def _simsiam(self, features: Features, gather: Gather) -> Tensor:
        """Returns L_ISS = −½[cos(p, sg z̃) + cos(p̃, sg z)]. Each view passes projector and predictor as a separate batch."""
        z1, z2 = (self.projector(features["image_projected"][:, view], gather.sum) for view in (FIRST, SECOND))
        p1, p2 = self.predictor(z1, gather.sum), self.predictor(z2, gather.sum)
        self.diagnostics["simsiam_std"] = spread(z1.detach())  # falls to 0 if the embeddings collapse
        return simsiam_loss(p1, z1, p2, z2)

    def _neighbors(self, embeds: Features, gather: Gather, step: StepInfo) -> tuple[Tensor, Tensor]:
        """Returns the sum and the number of terms of L_NNS: InfoNCE of (I, T′) and (Ĩ, T′), with T′ the nearest neighbor of T in the queue.

        A sample without a neighbor has no term and is not a negative.
        """
        config, images, texts = self.config, embeds["image_embeds"], embeds["text_embeds"]
        total, count = images.new_zeros(()), images.new_zeros((), dtype=torch.long)
        if step.fraction < config.neighbor_start:
            return total, count
        positives, scale = gather.global_indices(images), self.logit_scale()
        excluded = {name: embeds[name] for name in ("indices", "caption_ids")} if config.neighbor_not_own else {}
        shuffle = None
        if config.neighbor_random:
            generator = torch.Generator().manual_seed(step.step)
            shuffle = torch.randperm(self.queue.size, generator=generator).to(images.device)
        for text in (FIRST, SECOND) if config.neighbor_pairs == "released_code" else (FIRST,):
            neighbors = nearest_neighbors(self.queue, texts[:, text].detach(), excluded, shuffle)
            valid, all_valid = neighbors.slots >= 0, gather(neighbors.slots) >= 0  # [batch], [global_batch]
            rows, keys = valid.nonzero().squeeze(1), gather(neighbors.embeds)[all_valid]
            columns = positives[rows]
            key_columns = all_valid.cumsum(0)[columns] - 1  # each row's column among the valid neighbors
            labels, key_labels = self._neighbor_labels(embeds, neighbors.slots, positives)
            for image in (SECOND,) if config.neighbor_pairs == "algorithm_1" else (FIRST, SECOND):
                loss = info_nce(
                    images[rows, image], keys, key_columns, scale, (labels[rows], gather(key_labels)[all_valid])
                )
                if config.neighbor_both_ways:
                    all_images = gather(images[:, image])  # [global_batch, dim]
                    reverse = info_nce(
                        neighbors.embeds[rows], all_images, columns, scale, (key_labels[rows], gather(labels))
                    )
                    loss = (loss + reverse) / 2
                total, count = total + loss, count + len(rows)
            if text == FIRST:
                self.diagnostics["neighbor_similarity"] = neighbors.similarity.sum() / max(1, len(rows))
        return total, count

    def _neighbor_labels(self, embeds: Features, slots: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        """Returns labels of the images and of the neighbors in `slots`, int64 [batch, label].

        An image and a neighbor with an equal label at some position are not negatives of each other.
        """

        def of_neighbors(column: str) -> Tensor:
            return torch.where(slots >= 0, self.queue[column][slots], -1)

        shared = [embeds["caption_ids"], of_neighbors("caption_ids")] if self.config.multi_positive else []
        if "group_ids" not in embeds:
            labels = torch.stack(shared or [positives], dim=1)
            return labels, labels
        own, found = embeds["group_ids"], of_neighbors("indices")
        shared += [own, found]
        return torch.stack([*shared, own], dim=1), torch.stack([*shared, found], dim=1)

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.logit_scale.clamp_(self.config.max_logit_scale)
        if self.config.neighbors:
            texts = gather(features["text_embeds"])  # [global_batch, view, dim]
            indices, caption_ids = gather(features["indices"]), gather(features["caption_ids"])
            for text in (SECOND, FIRST) if self.config.neighbor_pairs == "released_code" else (FIRST,):
                self.queue.push(embeds=texts[:, text], indices=indices, caption_ids=caption_ids)

    def scalars(self) -> dict[str, Tensor]:
        fill = {"queue_fill": self.queue.fill} if self.config.neighbors else {}
        return {"logit_scale": self.logit_scale().detach(), **fill, **self.diagnostics}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        image_modules = [self.image, self.projector, self.predictor] if self.config.image_ss else [self.image]
        text_modules = [self.text, self.mlm_head] if self.config.text_ss else [self.text]
        return {
            "image": [parameter for module in image_modules for parameter in module.parameters()],
            "text": [parameter for module in text_modules for parameter in module.parameters()],
            "scale": list(self.logit_scale.parameters()),
        }


def _view_plan(config: DeCLIPConfig) -> ViewPlan:
    """Returns the views that the enabled terms need."""
    kind: Literal["original", "eda"] = "eda" if config.text_views == "two_eda" else "original"
    mask_p = config.mask_p if config.text_ss else 0.0
    images, texts = {"image_1": config.image_view}, {"text_1": TextPolicy(kind, mask_p)}
    if config.multi_view or config.image_ss or config.neighbors:
        images["image_2"] = config.image_view
    if config.multi_view or (config.neighbors and config.neighbor_pairs == "released_code"):
        texts["text_2"] = TextPolicy("eda")
    if config.text_ss and not config.contrast_masked_text:
        texts.update(text_1=TextPolicy(kind), masked_text=TextPolicy(kind, mask_p))
    return ViewPlan(images, texts)


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred):
# - α = β = γ = 0.2 [p]. `loss_weighting` "paper" (default) is Eq. 2, with L_MVS the sum of three pairs as in Algorithm 1 [p]. The code
#   uses one mean over the four pairs with weight 0.4, and weight 0.2 each for SimSiam, MLM and L_NNS [c, its ViT-B/32 and R50
#   configurations; the configuration for ViT-B/32 on 88M pairs has 0.6].
# - The weight of a disabled term (Table 4) is added to L_CLIP; with the code's weighting, the mean has 1 minus the other weights [i].
# - SimSiam takes the projected image features without normalization [c]. The projector has 3 layers of width 1024, the predictor
#   512 → 1024 [p]. BatchNorm follows each projector layer (ReLU after the first two) and the predictor's hidden layer [c].
# - Their BatchNorm statistics cover one view and the global batch; the code's cover the samples of one GPU [i].
# - MLM: 15 % of the tokens, special tokens excluded, 80/10/10 [p]. A linear head on the token features after the final norm [c], with
#   BERT's initialization [i]. With `contrast_masked_text`, the masked caption's feature is contrasted, used as the query for neighbors and
#   queued [p: Algorithm 1, c]. The second view is not masked [c]. The loss is the mean over the masked tokens of the global batch; the
#   code averages over GPUs.
# - With causal attention, which the code keeps, MLM predicts from the left context only [c].
# - Text views: the original and one EDA view [c], or "two text views" of EDA [p]. EDA is synonym replacement, random swap or random
#   deletion, chosen uniformly [p]. A caption too short for the operation is left unchanged [i]; the code fails on a single word.
# - Image views: crop of 20-100 %, jitter .4/.4/.4/.1 with p .8, grayscale with p .2, blur of sigma .1-2, flip [p]; blur with p .5 [c].
# - L_NNS is a mean over its pairs [c], from image to neighbor [p: Eq. 1, c]. The neighbor receives no gradient [c]. `neighbor_pairs`
#   selects §3.3 (default), Algorithm 1 or the code.
# - The queue holds 64K features [p] of T [p: Algorithm 1] or of T̃ and T [c]. Features of all ranks enter once, in global order. It is in
#   the state_dict, empty slots are never neighbors, and the oldest entries are replaced first. The code has one queue per GPU outside the
#   state_dict, initially filled with noise, and drops rows when it wraps around.
# - Entries of the same sample or caption are not neighbors, and L_NNS starts after 10 % of the run [i]. Both matter only if the queue is
#   large relative to the data or the run is short.
# - τ starts at 0.07 and is learned [p]. The log-scale is clamped to [0, ln 100] after the step; the code clamps the scale to [20, 100]
#   in the forward pass [c].
# - The code's text projection has a bias and its SGD uses Nesterov momentum [c]. The paper mentions neither, and we use neither.
# - The context length is 77 as in the code; the paper prints 76.
# - The text tower of RegNetY-64GF has BERT-base's shape and attention, pooled at the start token [c], but CLIP's vocabulary, pre-norm
#   blocks and random initialization [i]. The paper gives no optimizer for it.
# - `multi_positive` (ours, off by default) removes pairs with the same caption from each other's denominators; in L_NNS, also pairs whose
#   neighbors have the same caption. The groups of `--group-column` do the same; in L_NNS, they also remove neighbors of an image's group.
# - In the R50 rows, the scale's learning rate is a tenth of the others' and momentum is 0.9 [c]. AdamW's betas are (.9, .98) [c].
