"""Text towers: open_clip's Transformer with a packed forward pass, or a Hugging Face encoder."""

from __future__ import annotations

from typing import Any, Literal

import open_clip
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.open_clip_parts import TextTransformer, build_text_transformer
from coalign.networks.towers.hugging_face import HuggingFaceTextTower, build_hugging_face_tower
from coalign.networks.towers.pretrained import is_trunk_weights, linear_from_matrix, load_pretrained
from coalign.networks.towers.spec import ONE_TOWER_WEIGHTS, TextFeatures, Tower, TowerSpec, model_config, new_projection
from coalign.networks.transformer import is_plain, pack, run_blocks, run_padded_blocks


class TextTower(Tower):
    """open_clip's text Transformer with a packed forward pass for captions of any length up to the context length.

    `pooling` is "end" (CLIP), "start" (UniCLIP; needs bidirectional attention) or "mean" over the caption's tokens. Captions are packed
    without padding, which saves most of the compute, since most captions use a sixth of the positions.
    """

    def __init__(
        self,
        transformer: TextTransformer,
        embed_dim: int,
        attention: Literal["causal", "bidirectional"],
        pooling: Literal["end", "start", "mean"],
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if pooling == "start" and attention == "causal":
            raise ValueError('pooling is "start", but attention is "causal", so the start token ignores the caption.')
        self.transformer, self.attention, self.pooling = transformer, attention, pooling
        self.width, self.embed_dim, self.context_length = transformer.width, embed_dim, transformer.context_length
        self.projection = projection or new_projection(self.width, embed_dim)

    def forward(
        self, ids: Int[Tensor, "batch token"], lengths: Int[Tensor, " batch"], with_tokens: bool = False
    ) -> TextFeatures:
        """ids int64 [batch, token], lengths int64 [batch] -> TextFeatures. Raises ValueError for texts longer than the context."""
        if ids.shape[1] > self.context_length:
            raise ValueError(
                f"Texts have {ids.shape[1]} tokens, but the text tower has {self.context_length} positions."
            )
        tower, device = self.transformer, ids.device
        by_length = lengths.argsort(stable=True)
        ids, sorted_lengths = ids[by_length], lengths[by_length]
        packing = pack(sorted_lengths.tolist(), device)
        valid = torch.arange(ids.shape[1], device=device) < sorted_lengths[:, None]  # [batch, token]
        row, position = valid.nonzero(as_tuple=True)  # [tokens]
        x = tower.token_embedding(ids[row, position]) + F.embedding(position, tower.positional_embedding)
        causal, ends = self.attention == "causal", sorted_lengths.cumsum(0) - 1
        read = ends - sorted_lengths + 1 if self.pooling == "start" else ends
        inverse = by_length.argsort()  # index of each caption among the sorted captions
        if self.pooling != "mean" and not with_tokens:
            x = tower.ln_final(run_blocks(tower.transformer, x, packing, causal, read))  # [batch, width]
            return TextFeatures(x.index_select(0, inverse), None)
        x = tower.ln_final(run_blocks(tower.transformer, x, packing, causal))  # [tokens, width]
        tokens = x.new_zeros(ids.numel(), self.width).index_copy(0, by_length[row] * ids.shape[1] + position, x)
        tokens = tokens.view(*ids.shape, self.width)
        if self.pooling == "mean":
            pooled = tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        else:
            pooled = x.index_select(0, read[inverse])
        return TextFeatures(pooled, tokens if with_tokens else None)

    def dense_forward(self, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
        tower, position = self.transformer, torch.arange(ids.shape[1], device=ids.device)
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        valid = position < lengths[:, None]  # [batch, token]
        mask = (position <= position[:, None])[None, None] if self.attention == "causal" else valid[:, None, None]
        tokens = tower.ln_final(run_padded_blocks(tower.transformer, x, mask)) * valid[..., None]
        if self.pooling == "mean":
            pooled = tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        elif self.pooling == "start":
            pooled = tokens[:, 0]
        else:
            pooled = (tokens * (position == lengths[:, None] - 1)[..., None]).sum(1)
        return TextFeatures(pooled, tokens if with_tokens else None)

    def describe_pass(self, ids: Tensor, *_: Any) -> tuple[str, int]:
        return "text", len(ids)


def build_text_tower(
    spec: TowerSpec,
    attention: Literal["causal", "bidirectional"] = "causal",
    pooling: Literal["end", "start", "mean"] = "end",
) -> TextTower | HuggingFaceTextTower:
    """Builds the text tower of `spec`. Vocabulary and context length are the spec's, not the configuration's.

    A Hugging Face encoder is always bidirectional and pooled at its start, unless `pooling` is "mean". Raises UserError if model and
    weights do not fit.
    """
    config = model_config(spec.name)
    text, embed_dim = dict(config["text_cfg"]), config["embed_dim"]
    if "hf_model_name" in text:
        if spec.pretrained not in ONE_TOWER_WEIGHTS and not is_trunk_weights(spec):
            raise UserError(f"The text tower of {spec.name} can only load its own weights; use --pretrained hf.")
        return build_hugging_face_tower(
            text["hf_model_name"], spec, embed_dim, "mean" if pooling == "mean" else "start"
        )
    if spec.pretrained == "hf":
        raise UserError(f"The model {spec.name} has no Hugging Face text tower; do not use --pretrained hf with it.")
    if spec.pretrained not in ONE_TOWER_WEIGHTS and not is_trunk_weights(spec):
        tower = load_pretrained(spec).text
        _fit_text(tower, spec)
    else:
        text.update(
            vocab_size=spec.vocab_size, context_length=spec.context_length, no_causal_mask=attention != "causal"
        )
        text.update(embed_cls=False, proj_type="linear", proj_bias=False)
        tower = build_text_transformer(embed_dim, open_clip.CLIPTextCfg(**text), config.get("quick_gelu", False))
    if not is_plain(tower.transformer):
        raise UserError(
            f"The text tower of {spec.name} has norms or scales inside its attention, which are not supported; "
            "use a model with CLIP's text tower."
        )
    tower.attn_mask = None
    projection = linear_from_matrix(tower.text_projection)
    tower.text_projection = None
    return TextTower(tower, embed_dim, attention, pooling, projection)


def _fit_text(tower: Any, spec: TowerSpec) -> None:
    """Truncates a pretrained text tower to the spec's context length and adds an embedding for [MASK] if the spec's vocabulary has it."""
    vocab_size = tower.token_embedding.num_embeddings
    if not vocab_size <= spec.vocab_size <= vocab_size + 1:
        raise UserError(
            f"The weights {spec.pretrained} have a vocabulary of {vocab_size:,} tokens, but the tokenizer has {spec.vocab_size:,}; "
            "use --tokenizer clip."
        )
    if spec.context_length > tower.context_length:
        raise UserError(
            f"The weights {spec.pretrained} have {tower.context_length} positions; use --context-length {tower.context_length} or less."
        )
    tower.positional_embedding = nn.Parameter(tower.positional_embedding.data[: spec.context_length].clone())
    tower.num_pos = tower.context_length = spec.context_length
    if spec.vocab_size > vocab_size:
        embedding = nn.Embedding(spec.vocab_size, tower.width)
        nn.init.normal_(embedding.weight, std=0.02)
        embedding.weight.data[:vocab_size] = tower.token_embedding.weight.data
        tower.token_embedding = embedding
