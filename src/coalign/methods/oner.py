"""OneR: Jang et al. 2023, "Unifying Vision-Language Representation Space with Single-tower Transformer"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.losses.contrastive import info_nce
from coalign.losses.masked import masked_image_loss, masked_language_loss
from coalign.method import Method
from coalign.networks.ema import ema_copy, momentum_for, move_ema
from coalign.networks.heads import MaskedLanguageHead, ModalityBlindMLP
from coalign.networks.towers import TowerSpec
from coalign.networks.unified import States, Tokens, UnifiedTower, build_unified_tower, join, pool
from coalign.recipes.oner import OneRConfig
from coalign.types import NOT_MASKED, Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

# Table 2: the two sides of each contrast. mixed = (F(I) + F(T))/2, joint = F(I,T), crossed = (F(I|T) + F(T|I))/2.
CONTRASTS = {
    "itc": ("image", "text"),
    "xmc": ("mixed", "mixed"),
    "cic": ("crossed", "mixed"),
    "cmc": ("joint", "mixed"),
}


class OneR(Method):
    """L = L_ITC + L_CMC + L_MLM + L_MIM, with one tower F for an image, a text and both as one sequence (Fig. 5)."""

    def __init__(self, config: OneRConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        mask_p = config.mask_p if config.mlm else 0.0
        self.view_plan = ViewPlan(
            images={"image": config.image_view},
            texts={"caption": TextPolicy(mask_p=mask_p)},
            patch_ranks=config.mim,
            imageless=config.mlm,
        )
        sides = (side for loss in config.losses for side in CONTRASTS[loss])
        self.kinds = list(dict.fromkeys(sides))  # what passes the head, each once

        vocab_size = towers.vocab_size
        words = replace(towers, vocab_size=vocab_size + int(config.mlm))  # the last is the mask
        self.tower = build_unified_tower(words, masks_patches=config.mim)
        width, hidden, dim = self.tower.width, config.head_hidden, config.head_dim
        groups = {"all": self.kinds} if config.heads == "one" else {kind: [kind] for kind in self.kinds}
        self.projectors = nn.ModuleDict(
            {
                name: ModalityBlindMLP([width, hidden, hidden, dim], kinds, config.head_norm)
                for name, kinds in groups.items()
            }
        )
        self.predictor = None
        if config.heads == "one":
            self.predictor = ModalityBlindMLP([dim, hidden, dim], self.kinds, config.head_norm)
        has_teacher = config.teacher == "ema"
        self.momentum_tower = ema_copy(self.tower) if has_teacher else None
        self.momentum_projectors = ema_copy(self.projectors) if has_teacher else None

        self.mlm_head = MaskedLanguageHead(width, vocab_size) if config.mlm else None
        self.mim_head = nn.Linear(width, 3 * self.tower.patch_size**2) if config.mim else None
        self.followed: dict[str, Tensor] = {}  # of the last step, to look at; no part of the state

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """Contrastive and masked losses share one pass of each of the three inputs, all of them masked. A text without an image (Table 4)
        takes part in its own masked loss alone."""
        view, caption = batch.images["image"], batch.texts["caption"]
        paired = batch.has_caption if batch.has_image is None else batch.has_image  # [batch]
        masked_patches = None
        if self.config.mim:
            assert view.patch_ranks is not None
            masked_patches = view.patch_ranks.flatten(1) < self._mim_ratio(step)  # [batch, patch]
        image = self.tower.embed_image(view.pixels, masked_patches)
        text = self.tower.embed_text(caption.ids, caption.lengths)
        features, states = self._features(self.tower, image, text, self.config.joint)

        if self.mlm_head is not None:
            assert caption.labels is not None
            labels = caption.labels[:, 1:-1]  # those of the words
            for kind in ("text", "joint"):
                total, count = masked_language_loss(states[kind].words, labels, self.mlm_head)  # [batch] each
                counts = paired if kind == "joint" else torch.ones_like(paired)
                features[f"mlm_{kind}_total"], features[f"mlm_{kind}_count"] = total * counts, count * counts
        if self.mim_head is not None:
            assert masked_patches is not None
            pixels = self.tower.patch_pixels(view.pixels)
            for kind in ("image", "joint"):
                total, count = masked_image_loss(states[kind].patches, masked_patches, pixels, self.mim_head)
                features[f"mim_{kind}_total"], features[f"mim_{kind}_count"] = total * paired, count * paired
        features["caption_ids"], features["paired"] = batch.caption_ids, paired
        return features

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """The EMA copy's features, of the clean inputs: only the online network learns masked modelling (App. C)."""
        tower = self.momentum_tower
        if tower is None:
            return {}
        caption = batch.texts["caption"]
        ids = caption.ids
        if caption.labels is not None:
            ids = torch.where(caption.labels == NOT_MASKED, ids, caption.labels)
        image, text = tower.embed_image(batch.images["image"].pixels), tower.embed_text(ids, caption.lengths)
        return self._features(tower, image, text, "joint" in self.kinds)[0]

    def _features(
        self, tower: UnifiedTower, image: Tokens, text: Tokens, joint: bool
    ) -> tuple[Features, dict[str, States]]:
        """The pooled final hidden states that the contrasts need, [batch, width] each, and the states of image, text and, with `joint`,
        both as one sequence."""
        states = {"image": tower(image), "text": tower(text)} | ({"joint": tower(join(image, text))} if joint else {})
        pooled = {kind: pool(state, self.config.pooling) for kind, state in states.items()}
        if "joint" not in self.kinds:
            pooled.pop("joint", None)
        if "crossed" in self.kinds:  # Eq. 3
            crossed = tower.given(image, text), tower.given(text, image)
            one, other = (pool(state, self.config.pooling) for state in crossed)
            pooled["crossed"] = (one + other) / 2
        return {f"{kind}_features": value for kind, value in pooled.items()}, states

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        config, paired, ids = self.config, features["paired"], features["caption_ids"]
        pairs = paired.nonzero().squeeze(1)  # rows of pairs; others have no keys
        all_paired = gather(paired)
        count, positives = len(pairs), (all_paired.cumsum(0) - 1)[gather.own_rows(ids)[pairs]]  # places among all pairs
        projected = self._project(self.projectors, self._rows(features, pairs), gather)
        predicted = projected if self.predictor is None else self.predictor(projected, gather)
        queries = {kind: F.normalize(x, dim=-1) for kind, x in predicted.items()}
        if self.momentum_projectors is not None:
            with torch.no_grad():
                projected = self._project(self.momentum_projectors, self._rows(targets, pairs), gather)
        keys = {}
        for kind, x in projected.items():
            key = F.normalize(x, dim=-1)
            keys[kind] = gather(key.new_zeros(len(paired), key.shape[1]).index_copy(0, pairs, key))[all_paired]
        labels = (ids[pairs], gather(ids)[all_paired]) if config.multi_positive else None

        terms = []
        for loss in config.losses:  # ctr(A, B) = (NCE(A, B) + NCE(B, A))/2, Eqs. 1-4
            a, b = CONTRASTS[loss]
            forth = info_nce(queries[a], keys[b], positives, 1 / config.temperature, labels)
            back = forth if a == b else info_nce(queries[b], keys[a], positives, 1 / config.temperature, labels)
            terms.append(LossTerm(loss, (forth + back) / 2, count))
        for name, inputs, weight in (
            ("mlm", ("text", "joint"), config.mlm_weight),
            ("mim", ("image", "joint"), config.mim_weight),
        ):
            for kind in inputs if getattr(config, name) else ():
                total, masked = (features[f"{name}_{kind}_{part}"].sum() for part in ("total", "count"))
                terms.append(LossTerm(f"{name}_{kind}", total, masked, weight / len(inputs)))
        self._follow(features, pairs, step)
        return terms

    def _rows(self, features: Features, pairs: Tensor) -> dict[str, Tensor]:
        """Of every kind that is contrasted the features of the rows `pairs`, [pair, width]. Mixing comes before the projection."""
        rows = {kind: features[f"{kind}_features"][pairs] for kind in self.kinds if kind != "mixed"}
        if "mixed" in self.kinds:
            image, text = (features[f"{kind}_features"][pairs] for kind in ("image", "text"))
            rows["mixed"] = (image + text) / 2
        return rows

    def _project(
        self, projectors: nn.ModuleDict, rows: dict[str, Tensor], gather: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        if self.config.heads == "one":
            return projectors["all"](rows, gather)
        return {kind: projectors[kind]({kind: x}, gather)[kind] for kind, x in rows.items()}

    def _mim_ratio(self, step: StepInfo) -> float:
        first, last = self.config.mim_ratio
        return first + (last - first) * step.fraction

    def _momentum(self, step: StepInfo) -> float:
        given = self.config.teacher_momentum
        return momentum_for(step.total_steps) if given is None else given

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        if self.momentum_tower is not None and self.momentum_projectors is not None:
            move_ema(self.momentum_tower, self.tower, self._momentum(step))
            move_ema(self.momentum_projectors, self.projectors, self._momentum(step))

    @torch.no_grad()
    def _follow(self, features: Features, pairs: Tensor, step: StepInfo) -> None:
        image, text = (F.normalize(features[f"{kind}_features"][pairs].float(), dim=-1) for kind in ("image", "text"))
        self.followed = {"modality_gap": (image.mean(0) - text.mean(0)).norm()}
        if self.config.teacher == "ema":
            self.followed["teacher_momentum"] = torch.tensor(self._momentum(step))
        if self.config.mim:
            self.followed["mim_ratio"] = torch.tensor(self._mim_ratio(step))

    def scalars(self) -> dict[str, Tensor]:
        """The fixed 1/τ, the momentum, the share of masked patches, and the distance of the centroids of images' and texts' normalised
        features in this process's share of the batch: the modality gap."""
        return {"logit_scale": torch.tensor(1 / self.config.temperature), **self.followed}

    # ------------------------------------------------------------ what the online network gives

    def _embed(self, kind: str, tokens: Tokens) -> Tensor:
        rows = {kind: pool(self.tower(tokens), self.config.pooling)}
        return F.normalize(self._project(self.projectors, rows, _alone)[kind], dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._embed("image", self.tower.embed_image(pixels))

    def image_features(self, pixels: Tensor) -> Tensor:
        return pool(self.tower(self.tower.embed_image(pixels)), self.config.pooling)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._embed("text", self.tower.embed_text(ids, lengths))

    @property
    def has_joint(self) -> bool:
        """Whether the head can take an image and a text together: not one that tells images from texts."""
        return self.config.heads == "one" and (self.config.head_norm != "batch_apart" or "joint" in self.kinds)

    def encode_joint(self, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Image and text as one sequence -> normalised embeds [batch, dim]."""
        if not self.has_joint:
            raise UserError("This model's head tells images from texts, so it has no embedding of both together.")
        return self._embed("joint", join(self.tower.embed_image(pixels), self.tower.embed_text(ids, lengths)))

    def patch_features(self, pixels: Tensor) -> Tensor:
        """The hidden states of an image's patches, [batch, row, column, width], to compare with the mean of a text's `token_features`."""
        return self.tower(self.tower.embed_image(pixels)).patches.unflatten(1, self.tower.patch_grid)

    def token_features(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The hidden states of a text's tokens, [batch, token, width]; zero at start and end token, which are left out, and padding."""
        return F.pad(self.tower(self.tower.embed_text(ids, lengths)).words, (0, 0, 1, 1))

    def localize(self, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Cosines of every patch with the mean token of its image's text, [batch, row, column] ("Zero-shot Localization")."""
        text = self.token_features(ids, lengths).sum(1)  # the cosine does not see the mean's divisor
        return F.cosine_similarity(self.patch_features(pixels), text[:, None, None], dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        tower = self.tower
        mask_patch = [] if tower.mask_patch is None else [tower.mask_patch]
        mim_head, mlm_head, predictor = (
            [] if head is None else list(head.parameters()) for head in (self.mim_head, self.mlm_head, self.predictor)
        )
        return {
            "tower": [tower.cls, *tower.transformer.parameters(), *tower.norm.parameters()],
            "image": [*tower.stem.parameters(), *mask_patch, *mim_head],
            "text": [*tower.word_embedding.parameters(), *tower.word_norm.parameters(), *mlm_head],
            "heads": [*self.projectors.parameters(), *predictor],
        }


def _alone(tensor: Tensor) -> Tensor:
    """The gather of a single process."""
    return tensor


# Implementation details, each with its source ([p] stated in the paper, [c] read in released code, [i] inferred). We have no code of the
# paper's authors; [c] names whose it is:
# - One Transformer as MAE's encoder: pre-norm blocks, Xavier initialisation, one [CLS] without a position, no segment tokens [p; details
#   c, MAE]. Start and end token are left out as [SEP] is in the paper [p]: they would tell a text from an image. The words are a byte-pair
#   tokenizer's, not BERT's [i]; they are normalised before their positions are added, where BERT normalises the sum [i].
# - ConvStem (3 × 3 convolutions of stride 2 with doubling channels, then 1 × 1) [p], with GroupNorm in place of BatchNorm: a sample's
#   encoding must not depend on the batch [i].
# - At another image size, patches lie at fractions of the own grid: the sinusoids' own interpolation, where the paper interpolates the
#   table [p; form i]. No weight depends on the size, so a run's weights load at any.
# - F(X) is the mean of the final hidden states of all tokens, [CLS] among them [i: App. A speaks of average pooling]; [CLS] alone, and a
#   joint mean that gives both modalities equal weight, are switches (Fig. 4 notes a bias of sequence length).
# - F(X|Y): queries of X, at every layer keys and values of Y's own states there [i]. CIC costs the passes of both contexts a second time.
# - Projector of 3 layers and predictor of 2 (online only) [p], of MoCo-v3's sizes 4096 and 256, without biases, and with a last
#   normalisation that learns no scale [c, MoCo-v3]; τ 0.2, fixed, and no factor 2τ before the loss [i]. Mixtures are of features, before
#   the projector [p: "final transformer hidden state"].
# - BatchNorm over images alone and texts alone would be a hidden head for each modality: ours is over all inputs of a step at once [i];
#   apart, or LayerNorm, are switches. With statistics apart, weights are shared, and each input is evaluated by its own statistics.
# - "Two heads" has a projector for each modality [p] and no predictor [i]: behind one, nothing draws the projectors' spaces together. It
#   has no embedding of an image and a text together.
# - EMA of tower and projector, momentum 0.996 fixed [p]; in runs of under 28,000 steps less, so that it averages the same part of a run
#   [i]. The EMA copy sees the same crop without masks [p]. Its heads normalise by the statistics of its own features of the batch [c,
#   MoCo-v3]. Without a teacher (App. E) the right-hand side is the online projector's output, of masked inputs, with its gradient [i].
# - MLM as in BERT, 15 % [p], by one linear layer [i]. MIM masks each patch with a probability that rises from 0.1 to 0.5 over the run [p],
#   linearly [i]: its embedding becomes a mask token [i], and its pixels grey, which the stem of the next patch would see [i]. One linear
#   layer predicts its pixels, normalised by patch, by mean squared error [c, MAE].
# - Masked losses have weight 1 each, the mean over the two inputs that have such tokens [i]; the joint sequence is masked in all rows of
#   the tables, also where it is not contrasted [p: "for all three input types", "included in all ablation models"].
# - Extra training on texts alone (Table 4): rows without an image in the ordinary data, in the same batches as the pairs; of such a text
#   the masked words alone count, since it has nothing to be contrasted with [i].
# - No strong augmentation [p]: SLIP's base view, a crop of 50-100 % without flip [i].
# - Retrieval and zero-shot use the online projector, localisation hidden states [i]. ITC alone leaves both modalities apart there, though
#   its loss falls: the predictor learns to turn either one's projection into the other's. A mixture's own has to stay as it is, so that
#   XMC and CMC prevent this (a test).
