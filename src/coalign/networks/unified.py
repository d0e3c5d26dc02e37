"""One Transformer for images, texts and image-text sequences (OneR): only the embedding layers differ by modality."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import open_clip
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.checkpointing import recomputed
from coalign.networks.open_clip_parts import ResidualAttentionBlock, Transformer
from coalign.networks.positions import sincos_1d, sincos_2d
from coalign.networks.towers.spec import Tower, TowerSpec, model_config
from coalign.networks.transformer import pack, run_blocks

Pooling = Literal["mean", "cls", "balanced"]


class Tokens(NamedTuple):
    """Input of the tower: the patches of an image, the words of a text, or both. An absent modality has zero tokens."""

    patches: Tensor  # [batch, patch, width]
    words: Tensor  # [batch, word, width], padded beyond `lengths`
    lengths: Tensor  # int64 [batch], number of words, without start and end token


class States(NamedTuple):
    """Final hidden states of the tower, F(X)."""

    cls: Tensor  # [batch, width]
    patches: Tensor  # [batch, patch, width]
    words: Tensor  # [batch, word, width], zero beyond `lengths`
    lengths: Tensor  # int64 [batch]


def join(image: Tokens, text: Tokens) -> Tokens:
    """Returns the image's patches and the text's words as one sequence."""
    return Tokens(image.patches, text.words, text.lengths)


def pool(states: States, pooling: Pooling) -> Float[Tensor, "batch width"]:
    """Returns one feature vector per sequence. "mean": the mean of its tokens, including [CLS]. "cls": [CLS]. "balanced": like "mean", but
    for an image-text sequence the average of both modalities' means, each including [CLS], so that both have equal weight."""
    if pooling == "cls":
        return states.cls
    num_patches, lengths = states.patches.shape[1], states.lengths[:, None]
    patches, words = states.patches.sum(1), states.words.sum(1)  # [batch, width]
    if pooling == "balanced" and num_patches and states.words.shape[1]:
        return ((states.cls + patches) / (1 + num_patches) + (states.cls + words) / (1 + lengths)) / 2
    return (states.cls + patches + words) / (1 + num_patches + lengths)


class UnifiedTower(Tower):
    """MAE's Transformer with a convolutional stem for patches and an embedding table for words (OneR, "Implementation Details").

    A sequence is [CLS], patches, words. Positions are fixed sinusoids: two-dimensional for patches, one-dimensional for words, none for
    [CLS]. Patch positions are in units of the grid of `own_size`, so that the weights apply to any image size.
    """

    image_size: int
    context_length: int
    patch_grid: tuple[int, int]
    mean: Tensor
    std: Tensor
    patch_positions: Tensor  # [patch, width]
    word_positions: Tensor  # [position, width]

    def __init__(
        self,
        transformer: Transformer,
        vocab_size: int,
        context_length: int,
        patch_size: int,
        own_size: int,
        image_size: int,
        masks_patches: bool,
    ) -> None:
        super().__init__()
        self.width = transformer.width
        self.context_length, self.patch_size, self.image_size = context_length, patch_size, image_size
        self.patch_grid = (image_size // patch_size, image_size // patch_size)  # rows, columns
        self.stem = conv_stem(patch_size, self.width)
        self.word_embedding = nn.Embedding(vocab_size, self.width)
        # embeddings with BERT's initial scale are small next to the positions
        self.word_norm = nn.LayerNorm(self.width)
        self.cls = nn.Parameter(torch.randn(self.width) * 0.02)
        self.mask_patch = nn.Parameter(torch.randn(self.width) * 0.02) if masks_patches else None
        self.transformer = transformer  # registered in order of depth, which fine-tuning's layer-wise decay relies on
        self.norm = nn.LayerNorm(self.width)
        nn.init.normal_(self.word_embedding.weight, std=0.02)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        tables = {
            "mean": torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1) * 255,
            "std": torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255,
            "patch_positions": grid_positions(self.patch_grid[0], own_size // patch_size, self.width).float(),
            "word_positions": sincos_1d(torch.arange(context_length), self.width).float(),
        }
        for name, table in tables.items():  # not in the state_dict, so that weights load at any image size
            self.register_buffer(name, table, persistent=False)

    def normalize(self, pixels: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Normalizes uint8 pixels [batch, 3, image_size, image_size]. Raises UserError for another size."""
        height, width = pixels.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"The images have {height} × {width} pixels, but this model needs {self.image_size} × {self.image_size}."
            )
        return (pixels.to(self.mean.dtype) - self.mean) / self.std

    def patch_pixels(self, pixels: Tensor) -> Float[Tensor, "batch patch values"]:
        """Returns the normalized pixels of every patch in row-major order: the targets of masked image modeling."""
        x = self.normalize(pixels).unflatten(2, (-1, self.patch_size)).unflatten(4, (-1, self.patch_size))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # from [batch, 3, row, y, column, x]

    def embed_image(self, pixels: Tensor, masked: Bool[Tensor, "batch patch"] | None = None) -> Tokens:
        """Embeds the patches of uint8 images. A patch in `masked` is replaced by the mask embedding, and its pixels by zero, because the
        stem's receptive field reaches into neighboring patches."""
        x = self.normalize(pixels)
        if masked is not None:
            pixel_mask = masked.unflatten(1, self.patch_grid)[:, None]  # [batch, 1, row, column]
            pixel_mask = pixel_mask.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
            x = x.masked_fill(pixel_mask, 0)
        patches = self.stem(x).flatten(2).transpose(1, 2)  # [batch, patch, width]
        if masked is not None:
            assert self.mask_patch is not None
            patches = torch.where(masked[..., None], self.mask_patch.to(patches.dtype), patches)
        patches = patches + self.patch_positions
        batch = pixels.shape[0]  # not len(), which ONNX export would treat as a constant; the same below
        lengths = torch.zeros(batch, dtype=torch.int64, device=pixels.device)
        return Tokens(patches, patches.new_zeros(batch, 0, self.width), lengths)

    def embed_text(self, ids: Int[Tensor, "batch token"], lengths: Int[Tensor, " batch"]) -> Tokens:
        """Embeds the words of texts. Start and end tokens are omitted, as they would mark a sequence as text, so word i is token i + 1.
        Raises UserError for texts longer than the context."""
        if ids.shape[1] > self.context_length:
            raise UserError(
                f"The longest text has {ids.shape[1]} tokens, but this model supports {self.context_length}; shorten it."
            )
        words = self.word_norm(self.word_embedding(ids[:, 1:-1]))
        words = words + self.word_positions[: words.shape[1]]
        return Tokens(words.new_zeros(ids.shape[0], 0, self.width), words, (lengths - 2).clamp(min=0))

    def forward(self, tokens: Tokens) -> States:
        """Returns F(X), with self-attention over the whole sequence. Sequences are packed, so padding does not affect the output."""
        x, lengths = self._sequence(tokens)
        batch, longest = x.shape[:2]
        by_length = lengths.argsort(stable=True)
        sorted_lengths = lengths[by_length]
        valid = torch.arange(longest, device=x.device) < sorted_lengths[:, None]
        row, position = valid.nonzero(as_tuple=True)
        slots = by_length[row] * longest + position  # index of each packed token in [batch · longest]
        packed = x.flatten(0, 1).index_select(0, slots)
        packed = self.norm(run_blocks(self.transformer, packed, pack(sorted_lengths.tolist(), x.device)))
        x = packed.new_zeros(batch * longest, self.width).index_copy(0, slots, packed)
        return _states(x.unflatten(0, (batch, longest)), tokens)

    def dense_forward(self, tokens: Tokens) -> States:
        return self.given(tokens, tokens)

    def describe_pass(self, tokens: Tokens) -> tuple[str, int]:
        parts = {"image": tokens.patches, "text": tokens.words}
        return " and ".join(name for name, part in parts.items() if part.shape[1]), len(tokens.lengths)

    def given(self, tokens: Tokens, context: Tokens) -> States:
        """Returns F(X|Y): at every layer, queries come from X, keys and values from Y, which attends only to itself. F(X|X) is F(X)."""
        x, lengths = self._sequence(tokens)
        y, context_lengths = self._sequence(context)
        valid = torch.arange(y.shape[1], device=y.device) < context_lengths[:, None]  # [batch, key]
        for block in self.transformer.resblocks:
            args = (block, x, y, valid)
            x, y = recomputed(_given_block, *args) if self.transformer.grad_checkpointing else _given_block(*args)
        is_token = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return _states(self.norm(x).masked_fill(~is_token[..., None], 0), tokens)

    def _sequence(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Returns [CLS], patches and words, [batch, token, width], and the number of tokens without padding, [batch]."""
        cls = self.cls.to(tokens.patches.dtype).expand(tokens.patches.shape[0], 1, -1)
        return torch.cat([cls, tokens.patches, tokens.words], dim=1), 1 + tokens.patches.shape[1] + tokens.lengths


def _states(x: Tensor, tokens: Tokens) -> States:
    cls, patches, words = x.split([1, tokens.patches.shape[1], tokens.words.shape[1]], dim=1)
    return States(cls[:, 0], patches, words, tokens.lengths)


def _given_block(block: ResidualAttentionBlock, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (z + attend(block.attn, block.ln_1(z), block.ln_1(y), valid) for z in (x, y))  # both from the same y
    x, y = (z + block.mlp(block.ln_2(z)) for z in (x, y))
    return x, y


def attend(
    attention: Any,  # of a block
    x: Float[Tensor, "batch query width"],
    context: Float[Tensor, "batch key width"],
    valid: Bool[Tensor, "batch key"],
) -> Float[Tensor, "batch query width"]:
    """Returns f(X|Y) = softmax(Q_X K_Yᵀ / √d_k) V_Y of all heads, projected (OneR, Eq. 8)."""
    weight, bias, width = attention.in_proj_weight, attention.in_proj_bias, x.shape[-1]
    queries = F.linear(x, weight[:width], bias[:width])
    keys, values = F.linear(context, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (z.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in (queries, keys, values))
    outputs = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    return attention.out_proj(outputs.transpose(1, 2).flatten(2))


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """Returns a stem from pixels to patch embeddings: 3 × 3 convolutions of stride 2, doubling the channels up to `width`, and a 1 × 1
    convolution (Xiao et al. 2021). Uses GroupNorm instead of BatchNorm, so that a sample's patches do not depend on the batch."""
    num_halvings = patch_size.bit_length() - 1
    channels = [3, *(width >> (num_halvings - 1 - k) for k in range(num_halvings))]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()]
    layers.append(nn.Conv2d(channels[-1], width, 1))
    stem = nn.Sequential(*layers)
    for layer in stem:
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
    return stem


def grid_positions(side: int, own_side: int, width: int) -> Float[Tensor, "patch width"]:
    """Returns the position table of a grid of `side`² patches for a model whose own grid has `own_side`²: the sinusoids, evaluated at the
    patch centers in units of the own grid (which interpolating the table would approximate)."""
    if side == own_side:
        return sincos_2d(side, side, width)
    centers = (torch.arange(side, dtype=torch.float64) + 0.5) * own_side / side - 0.5
    column, row = (sincos_1d(at, width // 2) for at in (centers.repeat(side), centers.repeat_interleave(side)))
    return torch.cat([column, row], dim=1)


def build_unified_tower(spec: TowerSpec, masks_patches: bool) -> UnifiedTower:
    """Builds a single tower with the width, layers, heads, patch size and image size of the model's image tower, which must be a plain ViT.
    Vocabulary and context length are the spec's. Raises UserError if the model does not fit."""
    for option in ("pretrained", "image_tower", "text_tower"):
        if weights := getattr(spec, option):
            raise UserError(
                f"A single tower is trained from scratch and cannot load {weights}; omit --{option.replace('_', '-')}."
            )
    config = model_config(spec.name)
    vision, context = dict(config["vision_cfg"]), spec.context_length or config["text_cfg"].get("context_length", 77)
    known = open_clip.CLIPVisionCfg.__annotations__
    cfg = open_clip.CLIPVisionCfg(**{name: value for name, value in vision.items() if name in known})
    if cfg.timm_model_name or not isinstance(cfg.layers, int):
        raise UserError(
            f"A single tower needs the shape of a plain ViT, but the image tower of {spec.name} is not one; "
            "use oner-tiny, oner-small, ViT-S-32 or ViT-B-16."
        )
    patch, own_size = cfg.patch_size, cfg.image_size
    if not isinstance(own_size, int):
        raise UserError(f"The model {spec.name} takes non-square images, but only square images are supported.")
    size = spec.image_size or own_size
    if patch < 2 or patch & (patch - 1):
        raise UserError(
            f"The patch size of {spec.name} is {patch}, but must be a power of two for the stem of a single tower."
        )
    if size % patch or own_size % patch:
        raise UserError(f"The image size is {size}, but must be a multiple of {spec.name}'s patch size, {patch}.")
    if cfg.width % max(4, patch // 2, cfg.head_width):
        raise UserError(
            f"The width of {spec.name} is {cfg.width}, but must be a multiple of {max(4, patch // 2, cfg.head_width)} "
            "for a single tower."
        )
    transformer = Transformer(cfg.width, cfg.layers, cfg.width // cfg.head_width, cfg.mlp_ratio)
    return UnifiedTower(transformer, spec.vocab_size, context, patch, own_size, size, masks_patches)
