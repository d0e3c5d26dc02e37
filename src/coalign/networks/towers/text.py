"""Text towers: open_clip's Transformer with a packed forward pass, or a Hugging Face encoder."""

from __future__ import annotations

from typing import Any, Literal

import open_clip
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.open_clip_parts import TextTransformer, build_text_transformer
from coalign.networks.towers.composition import compose
from coalign.networks.towers.hugging_face import HuggingFaceTextTower, build_hugging_face_tower
from coalign.networks.towers.pretrained import linear_from_matrix, load_pretrained, take_own_settings
from coalign.networks.towers.spec import TextFeatures, Tower, TowerSpec, new_projection
from coalign.networks.towers.text_sources import check_text_cfg, load_open_clip_text
from coalign.networks.transformer import is_plain, pack, run_blocks, run_padded_blocks


class TextTower(Tower):
    """open_clip's text Transformer with a packed forward pass for captions of any length up to the context length.

    `pooling` is "end" (CLIP), "start" (UniCLIP; needs bidirectional attention) or "mean" over the caption's tokens. Captions are packed
    without padding, which saves most of the compute, since most captions use a sixth of the positions.
    """

    context_length: int

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
        self.projection = new_projection(self.width, embed_dim) if projection is None else projection

    def forward(
        self,
        ids: Int[Tensor, "batch token"] | Float[Tensor, "batch width"],
        lengths: Int[Tensor, " batch"],
        with_tokens: bool = False,
        dropout: float = 0.0,
    ) -> TextFeatures:
        """ids int64 [batch, token], lengths int64 [batch] -> TextFeatures. Raises ValueError for texts longer than the context.

        `dropout` is the probability that an input of a block is dropped in training. Pooled features, float [batch, width], which a locked
        tower has computed before, are returned as they are.
        """
        if ids.is_floating_point():
            return TextFeatures(ids, None)
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
            x = run_blocks(tower.transformer, x, packing, causal, read, dropout)
            x = tower.ln_final(x)  # [batch, width]
            return TextFeatures(x.index_select(0, inverse), None)
        x = tower.ln_final(run_blocks(tower.transformer, x, packing, causal, dropout=dropout))  # [tokens, width]
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
    """Builds the text tower of `spec`. Its vocabulary is the spec's, and its context length, if the spec has one.

    A Hugging Face encoder is always bidirectional; if it has no pooling of its own, it is pooled at its start, unless `pooling` is "mean".
    Raises UserError if model and weights do not fit.
    """
    model = compose(spec)
    config, embed_dim = model.config, model.config["embed_dim"]
    text, own = take_own_settings(config["text_cfg"])
    tower: TextTower | HuggingFaceTextTower
    if "hf_config" in text:
        tower = build_hugging_face_tower(text, spec, embed_dim, "mean" if pooling == "mean" else "cls")
    else:
        if "hf_model_name" in text or spec.pretrained:
            check_text_cfg(spec.name, text)
        quick_gelu = own.get("quick_gelu", config.get("quick_gelu", False))
        tower = _new_text_tower(spec, text, embed_dim, quick_gelu, attention, pooling)
    tower.starts = dict(model.starts["text"])
    if model.text is not None:
        model.text.load(tower)
    elif spec.pretrained:
        weights = load_pretrained(spec).text.state_dict()
        load_open_clip_text(tower, {f"text.{name}": value for name, value in weights.items()}, spec.pretrained)
    return tower


def _new_text_tower(
    spec: TowerSpec,
    text: dict[str, Any],
    embed_dim: int,
    quick_gelu: bool,
    attention: Literal["causal", "bidirectional"],
    pooling: Literal["end", "start", "mean"],
) -> TextTower:
    """Returns open_clip's text tower with random weights."""
    text.update(vocab_size=spec.vocab_size, no_causal_mask=attention != "causal")
    text.update(context_length=spec.context_length or text.get("context_length", 77))
    text.update(embed_cls=False, proj_type="linear", proj_bias=False)
    tower = build_text_transformer(embed_dim, open_clip.CLIPTextCfg(**text), quick_gelu)
    if not is_plain(tower.transformer):
        raise UserError(
            f"The text tower of {spec.text_tower or spec.name} has norms or scales inside its attention, which are not supported; "
            "use a model with CLIP's text tower."
        )
    tower.attn_mask = None
    projection: nn.Module = linear_from_matrix(tower.text_projection)
    if spec.head != "linear":
        projection = new_projection(tower.width, embed_dim, spec.head)
    tower.text_projection = None
    return TextTower(tower, embed_dim, attention, pooling, projection)
