"""OneR: Jang et al. 2023, "Unifying Vision-Language Representation Space with Single-tower Transformer"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.losses.contrastive import info_nce
from coalign.losses.masked import masked_image_loss, masked_language_loss
from coalign.losses.tiled import contrast_labels
from coalign.method import Method
from coalign.methods.oner.config import OneRConfig
from coalign.networks.ema import ema_copy, momentum_for, update_ema
from coalign.networks.heads import MaskedLanguageHead, ModalityBlindMLP
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.unified import States, Tokens, UnifiedTower, build_unified_tower, join, pool
from coalign.types import NOT_MASKED, Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan

# Table 2: the two sides of each contrast. mixed = (F(I) + F(T))/2, joint = F(I,T), crossed = (F(I|T) + F(T|I))/2.
CONTRASTS = {
    "itc": ("image", "text"),
    "xmc": ("mixed", "mixed"),
    "cic": ("crossed", "mixed"),
    "cmc": ("joint", "mixed"),
}

Rows = dict[str, Tensor]  # kind of input -> its features or projections, [batch, width]


class OneREmbeds(NamedTuple):
    """Both sides of the loss, normalized, [batch, dim] each. They are equal without predictor and teacher."""

    query: Tensor  # output of the predictor, or of the projector if there is no predictor
    key: Tensor  # output of the momentum projector, or of the online projector if there is no teacher


class OneR(Method):
    """L = L_ITC + L_CMC + L_MLM + L_MIM, with one tower F for images, texts and image-text sequences (Fig. 5)."""

    length_dependent = ("the share of masked patches", "the momentum of the teacher")

    def __init__(self, config: OneRConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.view_plan = ViewPlan(
            images={"image": config.image_view},
            texts={"caption": TextPolicy(mask_p=config.mask_p if config.mlm else 0.0)},
            patch_ranks=config.mim,
            imageless=config.mlm,
        )
        self.kinds = list(dict.fromkeys(side for loss in config.losses for side in CONTRASTS[loss]))  # of head inputs

        spec = replace(towers, vocab_size=towers.vocab_size + int(config.mlm))  # the last id is the mask token
        self.tower = build_unified_tower(spec, masks_patches=config.mim)
        width, hidden, dim = self.tower.width, config.head_hidden, config.head_dim
        groups = {"all": self.kinds} if config.heads == "one" else {kind: [kind] for kind in self.kinds}
        widths, norm = [width, hidden, hidden, dim], config.head_norm
        self.projectors = nn.ModuleDict({name: ModalityBlindMLP(widths, kinds, norm) for name, kinds in groups.items()})
        self.predictor = ModalityBlindMLP([dim, hidden, dim], self.kinds, norm) if config.heads == "one" else None
        self.momentum_tower = ema_copy(self.tower) if config.teacher == "ema" else None
        self.momentum_projectors = ema_copy(self.projectors) if config.teacher == "ema" else None

        self.mlm_head = MaskedLanguageHead(width, towers.vocab_size) if config.mlm else None
        self.mim_head = nn.Linear(width, 3 * self.tower.patch_size**2) if config.mim else None
        self.diagnostics: dict[str, Tensor] = {}  # of the last step, for logging only; not in the state_dict
        if config.similarity == "trained":
            self.similarity = _trained_similarity

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        """Encodes each of the three inputs once, masked, for both the contrastive and the masked losses. A text without an image (Table 4)
        contributes only to its own masked loss."""
        view, caption = batch.images["image"], batch.texts["caption"]
        paired = batch.has_caption if batch.has_image is None else batch.has_image  # [batch]
        ranks = view.patch_ranks
        masked_patches = None if ranks is None else ranks.flatten(1) < self._mim_ratio(step)  # [batch, patch]
        image = self.tower.embed_image(view.pixels, masked_patches)
        text = self.tower.embed_text(caption.ids, caption.lengths)
        features, states = self._features(self.tower, image, text, self.config.joint)

        if self.mlm_head is not None:
            assert caption.labels is not None
            labels = caption.labels[:, 1:-1]  # without start and end token, as in `states.words`
            for kind in ("text", "joint"):
                total, count = masked_language_loss(states[kind].words, labels, self.mlm_head)  # [batch] each
                valid = paired if kind == "joint" else torch.ones_like(paired)
                features[f"mlm_{kind}_total"], features[f"mlm_{kind}_count"] = total * valid, count * valid
        if self.mim_head is not None:
            assert masked_patches is not None
            pixels = self.tower.patch_pixels(view.pixels)
            for kind in ("image", "joint"):
                total, count = masked_image_loss(states[kind].patches, masked_patches, pixels, self.mim_head)
                features[f"mim_{kind}_total"], features[f"mim_{kind}_count"] = total * paired, count * paired
        return {**features, **batch.ids(), "paired": paired}

    def encode_targets(self, batch: Batch, step: StepInfo) -> Features:
        """Encodes the unmasked inputs with the EMA copy; only the online network is trained on masked inputs (App. C)."""
        tower = self.momentum_tower
        if tower is None:
            return {}
        caption = batch.texts["caption"]
        ids, labels = caption.ids, caption.labels
        ids = ids if labels is None else torch.where(labels == NOT_MASKED, ids, labels)
        image, text = tower.embed_image(batch.images["image"].pixels), tower.embed_text(ids, caption.lengths)
        return self._features(tower, image, text, "joint" in self.kinds)[0]

    def _features(
        self, tower: UnifiedTower, image: Tokens, text: Tokens, joint: bool
    ) -> tuple[Features, dict[str, States]]:
        """Returns the pooled final hidden states for the contrastive losses, [batch, width] each, and all final hidden states of the image,
        the text and, with `joint`, the image-text sequence."""
        states = {"image": tower(image), "text": tower(text)} | ({"joint": tower(join(image, text))} if joint else {})
        pooled = {kind: pool(state, self.config.pooling) for kind, state in states.items()}
        if "joint" not in self.kinds:
            pooled.pop("joint", None)
        if "crossed" in self.kinds:  # Eq. 3
            given = tower.given(image, text), tower.given(text, image)  # F(I|T), F(T|I)
            image_given_text, text_given_image = (pool(state, self.config.pooling) for state in given)
            pooled["crossed"] = (image_given_text + text_given_image) / 2
        return {f"{kind}_features": value for kind, value in pooled.items()}, states

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        config, paired = self.config, features["paired"]
        pairs = paired.nonzero().squeeze(1)  # rows with both image and text; others have no keys
        all_paired = gather(paired)
        positives = (all_paired.cumsum(0) - 1)[gather.global_indices(paired)[pairs]]  # indices among all pairs
        projected = self._project(self.projectors, self._rows(features, pairs), gather.sum)
        predicted = projected if self.predictor is None else self.predictor(projected, gather.sum)
        queries = {kind: F.normalize(x, dim=-1) for kind, x in predicted.items()}
        if self.momentum_projectors is not None:
            with torch.no_grad():
                projected = self._project(self.momentum_projectors, self._rows(targets, pairs), gather.sum)
        keys = {}
        for kind, x in projected.items():
            key = F.normalize(x, dim=-1)
            keys[kind] = gather(key.new_zeros(len(paired), key.shape[1]).index_copy(0, pairs, key))[all_paired]
        labels = contrast_labels(features, gather, config.multi_positive)
        labels = labels and (labels[0][pairs], labels[1][all_paired])

        terms = []
        for loss in config.losses:  # ctr(A, B) = (NCE(A, B) + NCE(B, A))/2, Eqs. 1-4
            a, b = CONTRASTS[loss]
            forward = info_nce(queries[a], keys[b], positives, 1 / config.temperature, labels)
            reverse = forward if a == b else info_nce(queries[b], keys[a], positives, 1 / config.temperature, labels)
            terms.append(LossTerm(loss, (forward + reverse) / 2, len(pairs)))
        for name, inputs, weight in (
            ("mlm", ("text", "joint"), config.mlm_weight),
            ("mim", ("image", "joint"), config.mim_weight),
        ):
            for kind in inputs if getattr(config, name) else ():
                total, num_masked = (features[f"{name}_{kind}_{part}"].sum() for part in ("total", "count"))
                terms.append(LossTerm(f"{name}_{kind}", total, num_masked, weight / len(inputs)))
        self._update_diagnostics(features, pairs, step)
        return terms

    def _rows(self, features: Features, pairs: Tensor) -> Rows:
        """Returns the features of every contrasted kind for the rows `pairs`, [pair, width]. Features are mixed before the projection."""
        rows = {kind: features[f"{kind}_features"][pairs] for kind in self.kinds if kind != "mixed"}
        if "mixed" in self.kinds:
            rows["mixed"] = (features["image_features"][pairs] + features["text_features"][pairs]) / 2
        return rows

    def _project(self, projectors: nn.ModuleDict, rows: Rows, sum_over_ranks: Callable[[Tensor], Tensor]) -> Rows:
        if self.config.heads == "one":
            return projectors["all"](rows, sum_over_ranks)
        return {kind: projectors[kind]({kind: x}, sum_over_ranks)[kind] for kind, x in rows.items()}

    def _mim_ratio(self, step: StepInfo) -> float:
        first, last = self.config.mim_ratio
        return first + (last - first) * step.fraction

    def _momentum(self, step: StepInfo) -> float:
        momentum = self.config.teacher_momentum
        return momentum_for(step.total_steps) if momentum is None else momentum

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        if self.momentum_tower is not None and self.momentum_projectors is not None:
            update_ema(self.momentum_tower, self.tower, self._momentum(step))
            update_ema(self.momentum_projectors, self.projectors, self._momentum(step))

    @torch.no_grad()
    def _update_diagnostics(self, features: Features, pairs: Tensor, step: StepInfo) -> None:
        image, text = (F.normalize(features[f"{kind}_features"][pairs].float(), dim=-1) for kind in ("image", "text"))
        self.diagnostics = {"modality_gap": (image.mean(0) - text.mean(0)).norm()}
        if self.config.teacher == "ema":
            self.diagnostics["teacher_momentum"] = torch.tensor(self._momentum(step))
        if self.config.mim:
            self.diagnostics["mim_ratio"] = torch.tensor(self._mim_ratio(step))

    def scalars(self) -> dict[str, Tensor]:
        """Returns 1/τ, the EMA momentum, the fraction of masked patches, and the modality gap: the distance between the centroids of the
        normalized image and text features of this rank's batch."""
        return {"logit_scale": torch.tensor(1 / self.config.temperature), **self.diagnostics}

    # ------------------------------------------------------------ inference

    def _embed(self, kind: str, tokens: Callable[[UnifiedTower], Tokens]) -> Tensor | OneREmbeds:
        def project(tower: UnifiedTower, projectors: nn.ModuleDict) -> Rows:
            return self._project(projectors, {kind: pool(tower(tokens(tower)), self.config.pooling)}, _no_sum)

        online = project(self.tower, self.projectors)
        if self.config.similarity == "projector":
            return F.normalize(online[kind], dim=-1)
        query = online if self.predictor is None else self.predictor(online, _no_sum)
        key = project(self.momentum_tower or self.tower, self.momentum_projectors or self.projectors)
        return OneREmbeds(*(F.normalize(x[kind], dim=-1) for x in (query, key)))

    def encode_image(self, pixels: Tensor) -> Tensor | OneREmbeds:
        return self._embed("image", lambda tower: tower.embed_image(pixels))

    def image_features(self, pixels: Tensor) -> Tensor:
        return pool(self.tower(self.tower.embed_image(pixels)), self.config.pooling)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor | OneREmbeds:
        return self._embed("text", lambda tower: tower.embed_text(ids, lengths))

    @property
    def has_joint(self) -> bool:
        """Whether the head can project image-text sequences, which needs a head that treats all inputs alike."""
        return self.config.heads == "one" and (self.config.head_norm != "batch_apart" or "joint" in self.kinds)

    def encode_joint(self, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor | OneREmbeds:
        """Encodes image and text as one sequence -> embeds. Raises UserError if the head cannot project it."""
        if not self.has_joint:
            raise UserError("This model cannot embed image and text jointly: its head treats the two separately.")
        return self._embed("joint", lambda tower: join(tower.embed_image(pixels), tower.embed_text(ids, lengths)))

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Returns the hidden states of the patches, [batch, row, column, width], comparable with the mean of a text's `token_features`."""
        return self.tower(self.tower.embed_image(pixels)).patches.unflatten(1, self.tower.patch_grid)

    def token_features(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the hidden states of the tokens, [batch, token, width]; zero at padding and at start and end tokens."""
        return F.pad(self.tower(self.tower.embed_text(ids, lengths)).words, (0, 0, 1, 1))

    def localize(self, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the cosine of every patch with the mean token of the image's text, [batch, row, column] ("Zero-shot Localization")."""
        text = self.token_features(ids, lengths).sum(1)  # the sum has the same cosines as the mean
        return F.cosine_similarity(self.patch_features(pixels), text[:, None, None], dim=-1)

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        tower = self.tower
        mask_patch = [] if tower.mask_patch is None else [tower.mask_patch]
        heads = self.mim_head, self.mlm_head, self.predictor
        mim_head, mlm_head, predictor = ([] if head is None else list(head.parameters()) for head in heads)
        return {
            "tower": [tower.cls, *tower.transformer.parameters(), *tower.norm.parameters()],
            "image": [*tower.stem.parameters(), *mask_patch, *mim_head],
            "text": [*tower.word_embedding.parameters(), *tower.word_norm.parameters(), *mlm_head],
            "heads": [*self.projectors.parameters(), *predictor],
        }


def _trained_similarity(images: OneREmbeds, texts: OneREmbeds) -> Tensor:
    """Returns the mean of what both directions of the loss compare. Symmetric, so it compares any two inputs."""
    return (images.query @ texts.key.T + images.key @ texts.query.T) / 2


def _no_sum(tensor: Tensor) -> Tensor:
    """`sum_over_ranks` for a single process."""
    return tensor


# Implementation details and their sources ([p] stated in the paper, [c] read in released code, [i] inferred). The authors' code is not
# available to us; each [c] names the code it refers to:
# - One Transformer like MAE's encoder: pre-norm blocks, Xavier initialization, one [CLS] without a position, no segment tokens [p; details
#   c, MAE]. Start and end tokens are omitted, as the paper omits [SEP] [p]: they would mark a sequence as text. The tokenizer is byte-pair,
#   not BERT's [i]. Word embeddings are normalized before the positions are added; BERT normalizes the sum [i].
# - ConvStem (3 × 3 convolutions of stride 2 with doubling channels, then 1 × 1) [p], with GroupNorm instead of BatchNorm, so that the
#   encoding of a sample does not depend on the batch [i].
# - At another image size, the sinusoids are evaluated at fractional positions of the original grid; the paper interpolates the table [p;
#   form i]. No weight depends on the image size, so the weights of a run load at any size.
# - F(X) is the mean of the final hidden states of all tokens including [CLS] [i: App. A mentions average pooling]. [CLS] alone and a
#   joint mean with equal weight per modality are options (Fig. 4 notes a bias by sequence length).
# - F(X|Y): queries from X, keys and values from Y's own states at the same layer [i]. CIC therefore encodes both contexts a second time.
# - The projector has 3 layers, the predictor 2 (online only) [p], with MoCo-v3's widths 4096 and 256, no biases, and a last normalization
#   without learned scale [c, MoCo-v3]. τ is fixed at 0.2, without the factor 2τ on the loss [i]. Features are mixed before the projector
#   [p: "final transformer hidden state"].
# - Separate BatchNorm statistics for images and texts would act as a hidden head per modality. Ours cover all inputs of a step [i];
#   separate statistics and LayerNorm are options. With separate statistics, weights are shared and each input is evaluated by its own.
# - "Two heads": one projector per modality [p], no predictor [i], with which nothing aligns their spaces, and no joint embeddings.
# - EMA of tower and projector with fixed momentum 0.996 [p], or lower in runs of under 28,000 steps, to average over the same fraction of
#   the run [i]. The EMA copy gets the same crop without masks [p]. Its heads use the batch statistics of its own features [c, MoCo-v3].
#   Without a teacher (App. E), the right-hand side is the online projector's output for the masked inputs, with gradient [i].
# - MLM as in BERT, 15 % [p], with one linear layer [i]. MIM masks each patch with a probability that rises from 0.1 to 0.5 over the run
#   [p], linearly [i]. The patch's embedding is replaced by a mask token [i] and its pixels by gray, as the stem's receptive field reaches
#   into neighboring patches [i]. One linear layer predicts the pixels, normalized per patch, under mean squared error [c, MAE].
# - Each masked loss has weight 1 and is the mean over the two inputs with such tokens [i]. The image-text sequence is masked in all rows
#   of the tables, even if it is not contrasted [p: "for all three input types", "included in all ablation models"].
# - Training on additional captions (Table 4): rows without an image, in the same batches as the pairs, contribute only to MLM [i].
# - No strong augmentation [p]: SLIP's base view, a crop of 50-100 % without a flip [i].
# - Retrieval and zero-shot compare what the loss compares, in both directions, or the online projections ("projector"); localization
#   compares hidden states [i]. With ITC alone, projections of images and texts stay apart although the loss falls: the predictor learns to
#   map one to the other. With XMC and CMC it must also map mixed features to themselves, which prevents this (tested).
