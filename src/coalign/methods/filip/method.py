"""FILIP: Yao et al. 2021, "FILIP: Fine-grained Interactive Language-Image Pre-Training"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.losses.tiled import (
    Labels,
    at_least_float32,
    contrast_labels,
    labels_2d,
    masked_logit,
    over_row_chunks,
)
from coalign.method import Method
from coalign.methods.filip.config import FILIPConfig
from coalign.networks.logit_scale import LogitScale
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.side_by_side import both
from coalign.networks.towers.spec import TowerSpec, new_projection
from coalign.networks.towers.text import build_text_tower
from coalign.types import Batch, Features, Gather, LossTerm, StepInfo, TextPolicy, ViewPlan


class TokenEmbeds(NamedTuple):
    """The tokens of an image (its patches) or of a text (its words, with start and end token)."""

    vectors: Tensor  # [batch, token, dim], normalized
    valid: Tensor  # bool [batch, token], false at padding, which follows at least one token


def token_similarities(images: TokenEmbeds, texts: TokenEmbeds) -> tuple[Tensor, Tensor]:
    """Returns s^I and s^T of every image and text (Eqs. 3-5), both [image, text] and in at least float32.

    s^I is the mean over the image's tokens of the largest product with a token of the text, and s^T the mean over the text's tokens of the
    largest product with a token of the image. Padding is excluded. The image × patch × text × token products are computed for a few images
    at a time and recomputed for the gradient, so that one chunk is in memory at a time.
    """
    num_texts, num_tokens = texts.valid.shape
    columns, column_weights = _without_padding(texts)

    def similarities(vectors: Tensor, valid: Tensor) -> Tensor:
        """Returns s^I and s^T of some images and all texts, [image, 2, text]."""
        rows, row_weights = _without_padding(TokenEmbeds(vectors, valid))
        with torch.autocast(rows.device.type, enabled=False):  # autocast would use half precision
            products = rows.flatten(0, 1) @ columns.flatten(0, 1).T
            products = products.view(*valid.shape, num_texts, num_tokens)  # [image, patch, text, token]
            image_to_text = torch.einsum("ipj,ip->ij", products.amax(3), row_weights)
            text_to_image = torch.einsum("ijt,jt->ij", products.amax(1), column_weights)
            return torch.stack([image_to_text, text_to_image], 1)

    both = over_row_chunks(similarities, *images, columns=images.valid.shape[1] * texts.valid.numel())
    return both[:, 0], both[:, 1]


def _without_padding(tokens: TokenEmbeds) -> tuple[Tensor, Tensor]:
    """Returns the vectors with padding replaced by the first token, which changes no maximum, and each token's weight in the mean."""
    vectors, valid = at_least_float32(tokens.vectors), tokens.valid
    weights = valid.to(vectors.dtype) / valid.sum(1, keepdim=True)
    return torch.where(valid[..., None], vectors, vectors[:, :1]), weights


def _without_mask(vectors: Tensor) -> TokenEmbeds:
    """Returns embeds of which all tokens are valid, such as those of an image."""
    return TokenEmbeds(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))


def logits_info_nce(logits: Tensor, positives: Tensor, labels: Labels | None = None) -> Tensor:
    """Returns InfoNCE of logits [batch, global_batch], Σ_i −log( e^{l_ip(i)} / Σ_j e^{l_ij} ) (Eqs. 1 and 2).

    `positives` is the column of each row's positive. With `labels` of rows and columns, a row's denominator omits the columns with its
    label, except for its positive.
    """
    if labels is not None:
        rows, columns = labels_2d(labels)
        omitted = (rows[:, None] == columns).any(2).scatter(1, positives[:, None], False)
        logits = logits.masked_fill(omitted, masked_logit(logits.dtype))
    return F.cross_entropy(logits, positives, reduction="sum")


class FILIP(Method):
    """L = ½ · [InfoNCE(image → text, s^I) + InfoNCE(text → image, s^T)], with similarities of patches and tokens (Eqs. 1-5)."""

    encodes_both = True

    def __init__(self, config: FILIPConfig, towers: TowerSpec) -> None:
        super().__init__()
        self.config = config
        self.token_terms = {"image": "filip", "text": "filip"}
        self.view_plan = ViewPlan(images={"image": config.image_view}, texts={"caption": TextPolicy(config.text_view)})
        self.image = build_image_tower(towers)
        projection, width = self.image.projection, self.image.patch_width
        fits = not isinstance(projection, nn.Identity) and self.image.width == width  # of a ViT, it may be pretrained
        self.patch_projection = projection if fits else new_projection(width, self.image.embed_dim, towers.head)
        if not fits:
            self.image.starts.pop("projection", None)
        self.image.projection = nn.Identity()  # the pooled features are not used
        self.text = build_text_tower(towers, attention="causal", pooling="end")
        self.logit_scale = LogitScale(config.temperature)

    def encode(self, batch: Batch, step: StepInfo) -> Features:
        caption = batch.texts["caption"]

        def encode_captions() -> Features:
            texts = self.encode_text(caption.ids, caption.lengths)
            return {"token_embeds": texts.vectors, "token_valid": texts.valid}  # [batch, token, dim] and [batch, token]

        features = both(
            lambda: {"patch_embeds": self.encode_image(batch.images["image"].pixels).vectors},  # [batch, patch, dim]
            encode_captions,
        )
        return features | batch.ids()  # [batch] each

    def objective(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> list[LossTerm]:
        images = _without_mask(features["patch_embeds"])
        all_texts = TokenEmbeds(gather(features["token_embeds"]), gather(features["token_valid"]))
        image_to_text, text_to_image = token_similarities(images, all_texts)  # [batch, global_batch]
        positives = gather.global_indices(image_to_text)
        # own texts against all images: each rank has computed s^T of its images and all texts
        text_to_image = gather(text_to_image)[:, positives].T  # [batch, global_batch]
        labels = contrast_labels(features, gather, self.config.multi_positive)
        scale = at_least_float32(self.logit_scale())
        losses = [logits_info_nce(scale * logits, positives, labels) for logits in (image_to_text, text_to_image)]
        return [LossTerm("filip", (losses[0] + losses[1]) / 2, count=len(positives))]

    @torch.no_grad()
    def after_step(self, features: Features, targets: Features, gather: Gather, step: StepInfo) -> None:
        self.logit_scale.clamp_(self.config.max_logit_scale)

    def scalars(self) -> dict[str, Tensor]:
        return {"logit_scale": self.logit_scale().detach()}

    def _patch_embeds(self, pixels: Tensor) -> Tensor:
        """Returns the normalized embeds of the patches, [batch, row, column, dim]."""
        return F.normalize(self.patch_projection(self.image(pixels, with_patches=True).patches), dim=-1)

    def encode_image(self, pixels: Tensor) -> TokenEmbeds:
        return _without_mask(self._patch_embeds(pixels).flatten(1, 2))

    def encode_text(self, ids: Tensor, lengths: Tensor) -> TokenEmbeds:
        tokens = self.text(ids, lengths, with_tokens=True).tokens
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return TokenEmbeds(F.normalize(self.text.projection(tokens), dim=-1), valid)

    @staticmethod
    def similarity(images: TokenEmbeds, texts: TokenEmbeds) -> Tensor:
        """(s^I + s^T) / 2 of every image and text. Symmetric, so that it also compares two images or two texts."""
        image_to_text, text_to_image = token_similarities(images, texts)
        return (image_to_text + text_to_image) / 2

    def image_features(self, pixels: Tensor) -> Tensor:
        """Returns the mean of the patches before the projection, [batch, patch_width]: the pooled features are not trained."""
        return self.image(pixels, with_patches=True).patches.mean((1, 2))

    def localize(self, pixels: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns each patch's largest product with a word of the image's text, its term of s^I without start and end token,
        [batch, row, column]. It is −1 if the text has no words."""
        patches, texts = self._patch_embeds(pixels), self.encode_text(ids, lengths)
        position = torch.arange(ids.shape[1], device=ids.device)
        words = (position > 0) & (position < lengths[:, None] - 1)  # [batch, token]
        products = torch.einsum("brcd,btd->brct", patches, texts.vectors)
        return products.masked_fill(~words[:, None, None], -1.0).amax(3)

    def projections(self) -> dict[str, nn.Module]:
        return {"image": self.patch_projection, "text": self.text.projection}

    def parameter_groups(self) -> dict[str, Sequence[nn.Parameter]]:
        return {
            "image": [*self.image.parameters(), *self.patch_projection.parameters()],
            "text": list(self.text.parameters()),
            "scale": list(self.logit_scale.parameters()),
        }


# Implementation details and their sources ([p] stated in the paper, [r] read in Cui et al.'s re-implementation (the paper has no released
# code), [i] inferred):
# - Similarities are means over all tokens but padding, each direction has its own in the loss, and τ is learned from 0.07 [p]. The start
#   and end tokens are not padding, so they are included.
# - An image's tokens are its patches, without the class token [r; the paper's linear probe averages the patches, too]. They are taken after
#   the tower's last norm [i] and projected by one linear layer [p] without bias and with CLIP's initialization [i], or by the
#   projection of a pretrained ViT (ours).
# - `image_features`, for probes, is the mean of the patches [p].
# - The embedding dimension is the model's `embed_dim`, such as 512 of ViT-B-32 [i]. The paper's is 256, to save memory.
# - Deviation: the paper gathers only the 25 % of each sample's tokens with the largest similarities within the batch of one GPU, in fp16.
#   The selection depends on how the batch is split over slices and ranks. Ours compares all tokens in float32.
# - s^T of all images and own texts is gathered instead of the images' tokens: every product is computed once, and the gradient is the same.
# - `similarity`, which evaluation uses for both directions, is (s^I + s^T) / 2 (ours): one symmetric number per pair, as search needs. The
#   paper ranks texts by s^I and images by s^T [i].
# - `localize` is each patch's term of s^I without start and end token (ours). The paper shows the index of the token with the maximum [p].
# - Deviation: images are augmented with CLIP's random crop, in the recipe of Cui et al. with theirs (`image_view`); the paper uses
#   AutoAugment. Captions are unchanged; the paper draws the caption or its back-translation via German or Russian. `text_view`
#   "paraphrase" draws from the stored paraphrases, without the caption itself.
# - `filip-yfcc15m` has the schedule of Cui et al., but not their dimension of 256, projections with bias, patches before the last norm,
#   clamp of 1/τ to at least 20, and selection of 16 tokens [r].
# - Deviation: AdamW instead of LAMB, and CLIP's clamp of the log-scale to [0, ln 100] after the step, which the paper does not mention.
# - Text: lower-cased BPE, causal Transformer, at most 77 tokens [p].
# - `multi_positive` (ours, off by default) removes pairs with the same caption from each other's denominators, the groups of
#   `--group-column` those of the same group.
