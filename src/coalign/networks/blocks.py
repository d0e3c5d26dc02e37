"""Blocks of trunks and encoders: Transformer layers and residual blocks, for checkpointing, partial tuning and layer decay."""

from __future__ import annotations

from torch import nn

from coalign.networks.open_clip_parts import Transformer


def find_blocks(module: nn.Module, of_transformers: bool = True) -> list[nn.Module]:
    """Returns the blocks of a trunk or encoder, from its input to its output: the elements of its innermost lists of modules that have
    submodules themselves. of_transformers: also those of open_clip's Transformers."""
    if isinstance(module, Transformer):
        return list(module.resblocks) if of_transformers else []
    is_list = isinstance(module, (nn.Sequential, nn.ModuleList))
    if not is_list or not all(next(child.children(), None) is not None for child in module.children()):
        return [block for child in module.children() for block in find_blocks(child, of_transformers)]
    blocks = []
    for child in module.children():
        inner = find_blocks(child, of_transformers)
        blocks += inner if inner or isinstance(child, nn.ModuleList) else [child]
    return blocks
