"""Text encoders of the Hugging Face library, such as BERT, as text towers (extra "hf")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.towers import TextFeatures, TowerSpec, new_projection


class HuggingFaceTextTower(nn.Module):
    """An encoder that attends both ways, read at its first token, or at the mean of the caption's tokens: a `TextTower` to every method.

    Its dropout is off: the second pass of a micro-batch must be the first one again.
    """

    def __init__(
        self, encoder: nn.Module, width: int, embed_dim: int, context_length: int, pooling: Literal["start", "mean"]
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.width, self.embed_dim, self.context_length = width, embed_dim, context_length
        self.projection = new_projection(width, embed_dim)

    def forward(self, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
        """ids int64 [batch, token], lengths int64 [batch] -> as `TextTower` gives them."""
        if ids.shape[1] > self.context_length:
            raise ValueError(f"{ids.shape[1]} tokens, but the text tower has {self.context_length} positions")
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [batch, token]
        states = self.encoder(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        tokens = states * valid[..., None]  # [batch, token, width]
        pooled = tokens[:, 0] if self.pooling == "start" else tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        return TextFeatures(pooled, tokens if with_tokens else None)


def build_hugging_face_tower(
    name: str, spec: TowerSpec, embed_dim: int, pooling: Literal["start", "mean"]
) -> HuggingFaceTextTower:
    """The tower of the encoder `name`, of the hub or a folder, with its own weights where `spec.pretrained` is "hf". Its vocabulary is its
    own and then our start and end token, and with one more the mask token, which begin as what they stand for. UserError for what cannot
    be had or does not fit."""
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError:
        raise UserError(f'The text tower {name} needs the extra "hf": pip install "coalign[hf]".') from None
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client has many: no network, no such file, offline mode
        raise UserError(f"The text tower {name} could not be loaded: {str(error).splitlines()[0]}") from error
    _check(name, config, spec)
    for key in vars(config):
        if "dropout" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    width, known = config.hidden_size, config.vocab_size
    if spec.pretrained == "hf":
        try:
            own, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, config=config).float()
        except Exception as error:
            raise UserError(f"The weights of {name} could not be loaded: {str(error).splitlines()[0]}") from error
        special = [own.cls_token_id, own.sep_token_id, own.mask_token_id][: spec.vocab_size - known]
        if None in special:
            raise UserError(
                f"The text tower {name} has no token to begin or to end with, or none for masked words; use one like BERT."
            )
        _append_rows(encoder, special)
    else:
        config.vocab_size = spec.vocab_size
        encoder = AutoModel.from_config(config)
    encoder.pooler = None
    if _is_causal(encoder):
        raise UserError(
            f"The text tower {name} reads from left to right, so that its first token sees no other; use one like BERT."
        )
    return HuggingFaceTextTower(encoder, width, embed_dim, spec.context_length, pooling)


@torch.no_grad()
def _is_causal(encoder: Any) -> bool:
    """Whether the first token stays the same when the second is another."""
    one, other = encoder.eval()(input_ids=torch.tensor([[2, 3], [2, 4]])).last_hidden_state[:, 0]
    encoder.train()
    return torch.equal(one, other)


@torch.no_grad()
def _append_rows(encoder: Any, copied: Sequence[int]) -> None:
    """Rows of the word embedding for further tokens, which begin as those of others."""
    old = encoder.get_input_embeddings()
    new = nn.Embedding(old.num_embeddings + len(copied), old.embedding_dim, old.padding_idx)
    new.weight.copy_(torch.cat([old.weight, old.weight[copied]]))
    encoder.set_input_embeddings(new)


def _check(name: str, config: Any, spec: TowerSpec) -> None:
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise UserError(f"The text tower {name} is no encoder like BERT ({config.model_type}); use one that is.")
    if not 2 <= spec.vocab_size - config.vocab_size <= 3:
        raise UserError(
            f"The text tower {name} has {config.vocab_size:,} tokens of its own, which the tokenizer has not; use --tokenizer hf:{name}."
        )
    # RoBERTa's positions begin behind its padding token's
    positions = config.max_position_embeddings - (2 if "roberta" in config.model_type else 0)
    if spec.context_length > positions:
        raise UserError(f"The text tower {name} has {positions} positions; use --context-length {positions} or less.")
