"""The forward of open_clip's Transformers, exact but without waste: sequences packed without padding, a last block for one token each.

In packed form all tokens of all sequences lie one after another, [tokens, width], so that linear layers and norms never see padding. Only
attention pads, sequences of similar length together. Where a single token of each sequence is read (CLIP's class and end tokens), the
last block computes keys and values of all tokens, and everything else of that one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor
from torch.nn import functional as F


class LengthGroup(NamedTuple):
    """Consecutive sequences that attention pads to the longest among them."""

    size: int  # sequences
    longest: int
    num_tokens: int


@dataclass
class Packing:
    """How sequences of these lengths are packed: shortest first."""

    groups: list[LengthGroup]
    slots: list[
        Tensor | None
    ]  # of each group: where its tokens lie in [size · longest], int64; None: it has no padding

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, heads: int, causal: bool) -> Tensor:
        """Softmax attention within each sequence. keys, values [tokens, width]; queries [tokens, width] as well, or one for each
        sequence, [sequences, width], which sees all of it. Returns [queries, width]."""
        every_token = len(queries) == len(keys)
        token, sequence, mixed = 0, 0, []
        for group, slots in zip(self.groups, self.slots):
            tokens = slice(token, token + group.num_tokens)
            rows = tokens if every_token else slice(sequence, sequence + group.size)
            k, v = (_split_heads(_pad(x[tokens], group, slots), heads) for x in (keys, values))
            q = _pad(queries[rows], group, slots) if every_token else queries[rows].unsqueeze(1)
            causally = causal and every_token  # then no token sees the padding, which is behind it
            mask = None if slots is None or causally else _valid(group, slots)
            x = _attention(_split_heads(q, heads), k, v, mask, causally)
            x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # [size · (longest or 1), width]
            mixed.append(x.index_select(0, slots) if every_token and slots is not None else x)
            token, sequence = tokens.stop, sequence + group.size
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of sequences with these lengths, which must not decrease."""
    groups = group_by_length(lengths)
    slots: list[Tensor | None] = []
    first = 0
    for group in groups:
        own = torch.tensor(lengths[first : first + group.size], device=device)
        valid = torch.arange(group.longest, device=device) < own[:, None]  # [size, longest]
        padded = group.num_tokens < group.size * group.longest
        slots.append(valid.flatten().nonzero().squeeze(1) if padded else None)
        first += group.size
    return Packing(groups, slots)


def group_by_length(lengths: Sequence[int], smallest: int = 16) -> list[LengthGroup]:
    """Groups of at least `smallest` sequences (but the last), in which the longest is at most about twice as long as the shortest."""
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
    """Whether `run_blocks` knows the blocks: CLIP's, not open_clip's variants with norms or scales within the attention."""
    return all(type(block) is ResidualAttentionBlock for block in transformer.resblocks)


def run_blocks(
    transformer: Transformer, x: Tensor, packing: Packing, causal: bool = False, read: Tensor | None = None
) -> Tensor:
    """Runs packed tokens [tokens, width] through the blocks; the weights, and the outputs, are open_clip's.

    With `read` (int64 [sequences], one token of each sequence; the last one if `causal`), only these are returned: [sequences, width].
    """
    last = len(transformer.resblocks) - 1
    for number, block in enumerate(transformer.resblocks):
        x = _block(block, x, packing, causal, read if number == last else None)
    return x


def _block(block: ResidualAttentionBlock, x: Tensor, packing: Packing, causal: bool, read: Tensor | None) -> Tensor:
    attention = block.attn
    weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, x.shape[-1]
    normed = block.ln_1(x)
    if read is None:
        queries, keys, values = F.linear(normed, weight, bias).split(width, dim=-1)
    else:
        queries = F.linear(normed.index_select(0, read), weight[:width], bias[:width])
        keys, values = F.linear(normed, weight[width:], bias[width:]).split(width, dim=-1)
        x = x.index_select(0, read)
    x = x + block.ls_1(attention.out_proj(packing.attend(queries, keys, values, attention.num_heads, causal)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[size, heads, token, dim] each. In float32 on a CPU: its kernels' backward in bfloat16 takes 1.2 to 12 times as long."""
    dtype = queries.dtype
    if queries.device.type == "cpu" and dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            queries, keys, values = queries.float(), keys.float(), values.float()
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal).to(dtype)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)


def _pad(x: Tensor, group: LengthGroup, slots: Tensor | None) -> Tensor:
    """[num_tokens, width] -> [size, longest, width]."""
    if slots is not None:
        x = x.new_zeros(group.size * group.longest, x.shape[1]).index_copy(0, slots, x)
    return x.unflatten(0, (group.size, group.longest))


def _valid(group: LengthGroup, slots: Tensor) -> Tensor:
    """bool [size, 1, 1, longest], false at padding."""
    valid = torch.zeros(group.size * group.longest, dtype=torch.bool, device=slots.device)
    return valid.index_fill_(0, slots, True).view(group.size, 1, 1, group.longest)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[size, token, width] -> [size, heads, token, dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
