"""All that we use of open_clip beyond what `import open_clip` exports, so that a new version can break only this file.

open_clip 3.x and 4.x have these names, and the same names of weights. They differ in the attention of a ResidualAttentionBlock: torch's
MultiheadAttention in 3.x, a class of open_clip's in 4.x. Use only what both have: in_proj_weight [3 · width, width] of queries, keys and
values, in_proj_bias, out_proj and num_heads.
"""

from __future__ import annotations

from coalign.errors import UserError

try:
    # one tower; CustomTextCLIP would also build the other, and so draw random numbers for it
    from open_clip.model import _build_text_tower as build_text_transformer
    from open_clip.model import _build_vision_tower as build_visual

    # in 3.x, AttentionPool2d passes its weights to a function, so they cannot be sharded
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer, Transformer, VisionTransformer

    # the parts of a ViT's forward pass before and after the blocks, which run packed: (vit, x) -> tokens, (vit, tokens) -> (pooled, tokens)
    embed_patches = VisionTransformer._embeds
    pool_tokens = VisionTransformer._pool
except (ImportError, AttributeError) as error:
    raise UserError(f"The installed open_clip is not supported ({error}); install open_clip_torch 3 or 4.") from error

__all__ = [
    "AttentionPool2d",
    "ModifiedResNet",
    "ResidualAttentionBlock",
    "TextTransformer",
    "TimmModel",
    "Transformer",
    "VisionTransformer",
    "build_text_transformer",
    "build_visual",
    "embed_patches",
    "pool_tokens",
]
