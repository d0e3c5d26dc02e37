"""A method that gathers a token axis."""

import torch
from torch.nn import functional as F

from coalign.methods.clip.method import CLIP
from coalign.types import LossTerm


class TokenWise(CLIP):
    """CLIP, but the similarity of an image and a caption is the maximum over the caption's tokens, as in FILIP (Yao et al. 2021)."""

    def encode(self, batch, step):
        caption = batch.texts["caption"]
        tokens = self.text(caption.ids, caption.lengths, with_tokens=True).tokens  # [batch, token, width]
        return {
            "image_embeds": self.encode_image(batch.images["image"].pixels),  # [batch, dim]
            "token_embeds": F.normalize(self.text.projection(tokens), dim=-1),  # [batch, token, dim]
            "valid": torch.arange(tokens.shape[1]) < caption.lengths[:, None],  # [batch, token]
        }

    def objective(self, features, targets, gather, step):
        images, tokens, valid = (features[name] for name in ("image_embeds", "token_embeds", "valid"))
        positives = gather.global_indices(images)
        image_to_text = self.token_similarity(images, gather(tokens), gather(valid))  # [batch, global_batch]
        text_to_image = self.token_similarity(gather(images), tokens, valid).T
        losses = [F.cross_entropy(logits, positives, reduction="sum") for logits in (image_to_text, text_to_image)]
        return [LossTerm("token_wise", sum(losses) / 2, len(images))]

    def token_similarity(self, images, tokens, valid):
        """[image, dim], [text, token, dim] and a mask [text, token] -> scaled similarities [image, text]."""
        cosines = torch.einsum("id,jtd->ijt", images, tokens).masked_fill(~valid, -torch.inf)
        return cosines.amax(2) * self.logit_scale()
