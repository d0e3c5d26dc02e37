"""A method with its own similarity: several vectors per sample, of any number for a text."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.methods.clip.method import CLIP
from coalign.types import LossTerm


class TokenEmbeds(NamedTuple):
    tokens: Tensor  # [sample, token, dim], zero if not valid
    valid: Tensor  # bool [sample, token]


def token_similarity(images, texts):
    """The mean over an image's tokens of the best text token, and the reverse, averaged: [image, text]."""
    cosines = torch.einsum("isd,jtd->ijst", images.tokens, texts.tokens)
    to_text = cosines.masked_fill(~texts.valid[:, None], -torch.inf).amax(3)  # [image, text, image token]
    to_image = cosines.masked_fill(~images.valid[:, None, :, None], -torch.inf).amax(2)  # [image, text, text token]
    return (_masked_mean(to_text, images.valid[:, None]) + _masked_mean(to_image, texts.valid[None])) / 2


def _masked_mean(values, valid):
    return values.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)


class TokenWise(CLIP):
    """CLIP, but images and texts are compared token by token, as in FILIP (Yao et al. 2021). It has the weights of CLIP.

    The image tower returns one vector, so its tokens are two parts of it, and those of a text are in both dimensions of a part.
    """

    def encode_image(self, pixels):
        tokens = self.image.projection(self.image(pixels).pooled).unflatten(1, (2, -1))  # [batch, 2, dim / 2]
        return TokenEmbeds(F.normalize(tokens, dim=-1), torch.ones_like(tokens[..., 0], dtype=torch.bool))

    def encode_text(self, ids, lengths):
        tokens = self.text(ids, lengths, with_tokens=True).tokens
        tokens = self.text.projection(tokens)[..., ::2]  # [batch, token, dim / 2]
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return TokenEmbeds(F.normalize(tokens, dim=-1) * valid[..., None], valid)

    similarity = staticmethod(token_similarity)

    def encode(self, batch, step):
        caption = batch.texts["caption"]
        texts = self.encode_text(caption.ids, caption.lengths)
        images = self.encode_image(batch.images["image"].pixels)
        return {"image_tokens": images.tokens, "tokens": texts.tokens, "valid": texts.valid}

    def objective(self, features, targets, gather, step):
        image_tokens = features["image_tokens"]
        images = TokenEmbeds(image_tokens, torch.ones_like(image_tokens[..., 0], dtype=torch.bool))
        texts = TokenEmbeds(features["tokens"], features["valid"])
        all_images, all_texts = (TokenEmbeds(*map(gather, embeds)) for embeds in (images, texts))
        positives = gather.global_indices(image_tokens)
        logits = (self.similarity(images, all_texts), self.similarity(all_images, texts).T)  # [batch, global_batch]
        scale = self.logit_scale()
        losses = [F.cross_entropy(scale * values, positives, reduction="sum") for values in logits]
        return [LossTerm("token_wise", sum(losses) / 2, len(image_tokens))]


def loop_similarity(images, texts):
    """`token_similarity` by loops over valid tokens."""
    scores = torch.zeros(len(images.valid), len(texts.valid))
    for i, (image, image_valid) in enumerate(zip(*images)):
        for j, (text, text_valid) in enumerate(zip(*texts)):
            cosines = image[image_valid] @ text[text_valid].T
            scores[i, j] = (cosines.amax(1).mean() + cosines.amax(0).mean()) / 2
    return scores


class QueryKey(NamedTuple):
    query: Tensor  # [sample, dim]
    key: Tensor  # [sample, dim]


class TwoVectors(CLIP):
    """CLIP, but an image's query is compared with a text's key, which are other vectors than its key and query."""

    def encode_image(self, pixels):
        return QueryKey(*self.image.projection(self.image(pixels).pooled).chunk(2, dim=-1))

    def encode_text(self, ids, lengths):
        return QueryKey(*self.text.projection(self.text(ids, lengths).pooled).chunk(2, dim=-1))

    def similarity(self, images, texts):
        return self.logit_scale.log * images.query @ texts.key.T
