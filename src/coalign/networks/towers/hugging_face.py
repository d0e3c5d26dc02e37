"""Text encoders of Hugging Face Transformers, such as BERT, as text towers (extra "hf")."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from coalign.errors import UserError, first_line
from coalign.networks.positions import num_kept, stretch_positions
from coalign.networks.towers.spec import TextFeatures, Tower, TowerSpec, new_projection


class HuggingFaceTextTower(Tower):
    """A bidirectional encoder pooled at its first token or over the mean of the caption's tokens, with the interface of `TextTower`.

    Dropout is off, because both passes over a micro-batch must give the same result.
    """

    context_length: int

    def __init__(
        self,
        encoder: Any,
        width: int,
        embed_dim: int,
        context_length: int,
        pooling: Literal["cls", "mean"],
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.width, self.embed_dim, self.context_length = width, embed_dim, context_length
        self.pad_id = encoder.config.pad_token_id or 0
        self.projection = new_projection(width, embed_dim) if projection is None else projection

    def forward(self, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
        """ids int64 [batch, token] or pooled features, lengths int64 [batch] -> TextFeatures, as in `TextTower`."""
        if ids.is_floating_point():
            return TextFeatures(ids, None)
        if ids.shape[1] > self.context_length:
            raise ValueError(
                f"Texts have {ids.shape[1]} tokens, but the text tower has {self.context_length} positions."
            )
        return self.dense_forward(ids, lengths, with_tokens)

    def dense_forward(self, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [batch, token]
        ids = ids.masked_fill(~valid, self.pad_id)  # RoBERTa counts positions by it
        states = self.encoder(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        tokens = states * valid[..., None]  # [batch, token, width]
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        return TextFeatures(pooled, tokens if with_tokens else None)

    def describe_pass(self, ids: Tensor, *_: Any) -> tuple[str, int]:
        return "text", len(ids)


def build_hugging_face_tower(
    text_cfg: dict[str, Any], spec: TowerSpec, embed_dim: int, pooling: Literal["cls", "mean"]
) -> HuggingFaceTextTower:
    """Builds the tower of `text_cfg["hf_config"]`, the encoder's own configuration, with random weights.

    text_cfg: its "hf_pooling" comes from a sentence encoder; None: `pooling`. Raises UserError if the encoder is not supported, or has
    fewer tokens than the tokenizer.
    """
    config = hugging_face_config(text_cfg["hf_config"])
    kind = config.model_type
    if spec.vocab_size > config.vocab_size + 1:  # a method adds one for a mask token, which is among the encoder's own
        raise UserError(
            f"The tokenizer has {spec.vocab_size:,} tokens, but the text encoder has {config.vocab_size:,}; omit --tokenizer."
        )
    for key in vars(config):
        if "dropout" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    encoder = new_encoder(config)
    own = num_positions(encoder)
    context = spec.context_length or text_cfg.get("context_length") or default_context(own)
    if context > own:
        if position_table(encoder) is None:
            raise UserError(
                f"The text encoder has {own} positions, which cannot be stretched, as type {kind} has no table of them; use "
                f"--context-length {own} or less."
            )
        config.max_position_embeddings += context - own
        encoder = new_encoder(config)
    if _is_causal(encoder):
        raise UserError(
            f"The text encoder, of type {kind}, uses causal attention, but must be bidirectional; use one like BERT."
        )
    width, pooling = config.hidden_size, text_cfg.get("hf_pooling") or pooling
    projection = new_projection(width, embed_dim, spec.head)
    return HuggingFaceTextTower(encoder, width, embed_dim, context, pooling, projection)


def hugging_face_config(values: dict[str, Any]) -> Any:
    """Returns the configuration of an encoder from the content of its config.json. Raises UserError if it is not supported."""
    kind = values.get("model_type")
    others = {
        key: value for key, value in values.items() if key not in ("model_type", "auto_map", "dtype", "torch_dtype")
    }
    try:
        config = import_transformers().AutoConfig.for_model(kind, **others)
    except Exception as error:  # unknown types and invalid values raise many types
        reason = first_line(error).partition(". ")[0]  # then it lists hundreds of types
        raise UserError(f"The installed transformers cannot build a text encoder of type {kind}: {reason}") from error
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise UserError(f"A text encoder of type {kind} is not supported; use an encoder like BERT.")
    return config


def new_encoder(config: Any) -> Any:
    """Returns an encoder with random weights, in float32 and without a pooling layer."""
    try:
        encoder = import_transformers().AutoModel.from_config(config).float()
    except Exception as error:
        raise UserError(
            f"transformers cannot build a text encoder of type {config.model_type}: {first_line(error)}"
        ) from error
    return without_pooler(encoder)


def default_context(own: int) -> int:
    """Returns the default context length of an encoder with `own` positions: CLIP's, or its own if that is smaller."""
    return min(77, own)


def copy_encoder(source: Any, tower: HuggingFaceTextTower) -> str:
    """Copies the weights of an encoder of the same configuration into the tower's, with its positions stretched if they are fewer. Returns
    what was stretched, for `Tower.starts`."""
    weights = without_pooler(source).state_dict()
    own, context, table = num_positions(source), num_positions(tower.encoder), position_table(source)
    if table is not None and context > own:
        name, offset = table
        weights[name] = torch.cat([weights[name][:offset], stretch_positions(weights[name][offset:], context)])
    tower.encoder.load_state_dict(weights)
    return stretched_note(own, context) if context > own else ""


def stretched_note(own: int, length: int) -> str:
    """Says how positions were stretched, for `Tower.starts`."""
    return f" ({own} positions stretched to {length}, the first {num_kept(own)} unchanged)"


def num_positions(encoder: Any) -> int:
    """Returns the longest sequence that the encoder takes."""
    table = position_table(encoder)
    return encoder.config.max_position_embeddings - (table[1] if table else 0)


def position_table(encoder: nn.Module) -> tuple[str, int] | None:
    """Returns the name of the learned position table and its number of rows before the first position: RoBERTa's and MPNet's positions
    start after the index of the padding token. None: the encoder has no such table."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return f"{name}.weight", 0 if module.padding_idx is None else module.padding_idx + 1
    return None


def import_transformers() -> Any:
    """Returns transformers. Raises UserError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError('A Hugging Face text encoder needs the extra "hf": pip install "coalign[hf]".') from None
    return transformers


def without_pooler(encoder: Any) -> Any:
    if hasattr(encoder, "pooler"):
        encoder.pooler = None
    return encoder


@torch.no_grad()
def _is_causal(encoder: Any) -> bool:
    """Whether the features of the first token do not depend on the second token."""
    first, second = encoder.eval()(input_ids=torch.tensor([[2, 3], [2, 4]])).last_hidden_state[:, 0]
    encoder.train()
    return torch.equal(first, second)
