"""Efficient forward pass of open_clip's Transformers: packed sequences, and a last block that computes only the pooled token.

Packed sequences are concatenated, [tokens, width], so that linear layers and norms do not process padding. Only attention pads, in groups
of similar length. If a single token of each sequence is pooled (CLIP's class and end tokens), the last block computes keys and values of
all tokens and everything else for that token only. The outputs are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.networks.checkpointing import recomputed
from coalign.networks.open_clip_parts import ResidualAttentionBlock, Transformer


class LengthGroup(NamedTuple):
    """Consecutive sequences that attention pads to a common length."""

    size: int  # number of sequences
    longest: int  # length of the longest sequence
    num_tokens: int  # total, without padding


@dataclass
class Packing:
    """Layout of packed sequences, shortest first."""

    groups: list[LengthGroup]
    # per group: indices of its tokens in the padded [size · longest], int64; None if it has no padding
    slots: list[Tensor | None]

    def attend(self, projected: Tensor, queries: Tensor | None, heads: int, causal: bool) -> Tensor:
        """Softmax attention within each sequence.

        `projected`, [tokens, 3 · width], has the queries, keys and values of all tokens. With `queries`, [sequences, width], one per
        sequence, which attends to the whole sequence, it has keys and values only, [tokens, 2 · width]. Returns [queries, width].
        """
        parts = _split(projected, [group.num_tokens for group in self.groups])
        rows = [None] * len(parts) if queries is None else _split(queries, [group.size for group in self.groups])
        outputs = []
        for group, slots, part, own in zip(self.groups, self.slots, parts, rows):
            padded = _pad(part, group, slots)  # at once, as each padding is a pass over memory
            projections = padded.chunk(3, dim=-1) if own is None else (own.unsqueeze(1), *padded.chunk(2, dim=-1))
            q, k, v = (_split_heads(each, heads) for each in projections)
            is_causal = causal and own is None  # the causal mask then also hides the padding
            mask = None if slots is None or is_causal else _valid(group, slots)
            x = _attention(q, k, v, mask, is_causal)
            x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # [size · (longest or 1), width]
            outputs.append(x.index_select(0, slots) if own is None and slots is not None else x)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    """Returns the packing of sequences with these lengths, which must be in ascending order."""
    groups = group_by_length(lengths)
    slots: list[Tensor | None] = []
    first = 0
    for group in groups:
        group_lengths = torch.tensor(lengths[first : first + group.size], device=device)
        valid = torch.arange(group.longest, device=device) < group_lengths[:, None]  # [size, longest]
        has_padding = group.num_tokens < group.size * group.longest
        slots.append(valid.flatten().nonzero().squeeze(1) if has_padding else None)
        first += group.size
    return Packing(groups, slots)


def group_by_length(lengths: Sequence[int], smallest: int = 16) -> list[LengthGroup]:
    """Groups sequences so that the longest of a group is at most about twice as long as the shortest. All groups but the last have at least
    `smallest` sequences."""
    groups: list[LengthGroup] = []
    shortest = 0
    for length in lengths:
        last = groups[-1] if groups else None
        if last and (last.size < smallest or length <= 2 * shortest):
            groups[-1] = LengthGroup(last.size + 1, length, last.num_tokens + length)
        else:
            groups.append(LengthGroup(1, length, length))
            shortest = length
    return groups


def is_plain(transformer: Transformer) -> bool:
    """Whether `run_blocks` supports the blocks: CLIP's, but not open_clip's variants with norms or scales inside the attention."""
    return all(type(block) is ResidualAttentionBlock for block in transformer.resblocks)


def run_blocks(
    transformer: Transformer,
    x: Tensor,
    packing: Packing,
    causal: bool = False,
    read: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Runs packed tokens [tokens, width] through the blocks, with the same weights and outputs as open_clip's.

    `read` (int64 [sequences]) selects one token per sequence, which must be its last one if `causal`: returns [sequences, width]. Otherwise
    returns [tokens, width]. `dropout` is the probability that an input of a block is dropped, in blocks that are in training mode.
    """
    attend, last = partial(packing.attend, causal=causal), len(transformer.resblocks) - 1
    for index, block in enumerate(transformer.resblocks):
        x = _run(transformer, block, x, attend, read if index == last else None, dropout)
    return x


def run_padded_blocks(transformer: Transformer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Runs padded sequences [batch, token, width] through the blocks, for graphs, which cannot pack. `mask`, bool, broadcasts to
    [batch, heads, query, key] and is true where a query attends."""

    def attend(projected: Tensor, _: None, heads: int) -> Tensor:
        q, k, v = (_split_heads(each, heads) for each in projected.chunk(3, dim=-1))
        return _attention(q, k, v, mask, causal=False).transpose(1, 2).flatten(2)

    for block in transformer.resblocks:
        x = _run(transformer, block, x, attend)
    return x


def _run(transformer: Transformer, *args: Any) -> Tensor:
    """Returns `_block(*args)`, with gradient checkpointing if it is on."""
    return recomputed(_block, *args) if transformer.grad_checkpointing else _block(*args)


def _block(
    block: ResidualAttentionBlock,
    x: Tensor,
    attend: Callable[..., Tensor],
    read: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` has the arguments of `Packing.attend`: projections, queries and the number of heads."""
    if dropout and block.training:
        x = F.dropout(x, dropout)
    attention = block.attn
    weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, x.shape[-1]
    normed = block.ln_1(x)
    if read is None:
        projected, queries = F.linear(normed, weight, bias), None
    else:
        projected = F.linear(normed, weight[width:], bias[width:])
        queries = F.linear(normed.index_select(0, read), weight[:width], bias[:width])
        x = x.index_select(0, read)
    x = x + block.ls_1(attention.out_proj(attend(projected, queries, attention.num_heads)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention over [size, heads, token, dim].

    Uses float32 on CPUs, where the bfloat16 backward takes 1.2 to 12 times as long, and on Apple GPUs, where causal attention in half
    precision may attend to later tokens (pytorch#195910).
    """
    dtype = queries.dtype
    if queries.device.type in ("cpu", "mps") and dtype == torch.bfloat16:
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys, values = queries.float(), keys.float(), values.float()
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal).to(dtype)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Returns consecutive parts of the rows."""
    return x.split(sizes) if len(sizes) > 1 else [x]  # split copies the gradient, even of a single part


def _pad(x: Tensor, group: LengthGroup, slots: Tensor | None) -> Tensor:
    """[num_tokens, width] -> [size, longest, width]."""
    if slots is not None:
        x = x.new_zeros(group.size * group.longest, x.shape[1]).index_copy_(0, slots, x)
    return x.unflatten(0, (group.size, group.longest))


def _valid(group: LengthGroup, slots: Tensor) -> Tensor:
    """Attention mask, bool [size, 1, 1, longest], false at padding."""
    valid = torch.zeros(group.size * group.longest, dtype=torch.bool, device=slots.device)
    return valid.index_fill_(0, slots, True).view(group.size, 1, 1, group.longest)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[size, token, width] -> [size, heads, token, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
