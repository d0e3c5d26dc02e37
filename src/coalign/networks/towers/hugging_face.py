"""Text encoders from Hugging Face Transformers, such as BERT, as text towers (extra "hf")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.towers.spec import TextFeatures, Tower, TowerSpec, new_projection


class HuggingFaceTextTower(Tower):
    """A bidirectional encoder pooled at its first token or over the mean of the caption's tokens, with the interface of `TextTower`.

    Dropout is off, because both passes over a micro-batch must give the same result.
    """

    def __init__(
        self, encoder: nn.Module, width: int, embed_dim: int, context_length: int, pooling: Literal["start", "mean"]
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.width, self.embed_dim, self.context_length = width, embed_dim, context_length
        self.projection = new_projection(width, embed_dim)

    def forward(self, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
        """ids int64 [batch, token], lengths int64 [batch] -> TextFeatures, as in `TextTower`."""
        if ids.shape[1] > self.context_length:
            raise ValueError(
                f"Texts have {ids.shape[1]} tokens, but the text tower has {self.context_length} positions."
            )
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [batch, token]
        states = self.encoder(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        tokens = states * valid[..., None]  # [batch, token, width]
        pooled = tokens[:, 0] if self.pooling == "start" else tokens.sum(1) / lengths[:, None].to(tokens.dtype)
        return TextFeatures(pooled, tokens if with_tokens else None)

    dense_forward = forward  # it does not pack

    def describe_pass(self, ids: Tensor, *_: Any) -> tuple[str, int]:
        return "text", len(ids)


def build_hugging_face_tower(
    name: str, spec: TowerSpec, embed_dim: int, pooling: Literal["start", "mean"]
) -> HuggingFaceTextTower:
    """Builds the tower of the encoder `name`, from the hub or a folder, with its pretrained weights if `spec.pretrained` is "hf".

    Its vocabulary is extended by our start and end token, and by the mask token if `spec.vocab_size` has one more; these are initialized
    from the encoder's own. Raises UserError if the encoder cannot be loaded or is not supported.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError:
        raise UserError(f'The text tower {name} needs the extra "hf"; run: pip install "coalign[hf]"') from None
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(f"The text tower {name} could not be loaded: {str(error).splitlines()[0]}") from error
    _check(name, config, spec)
    for key in vars(config):
        if "dropout" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    width, vocab_size = config.hidden_size, config.vocab_size
    if spec.pretrained == "hf":
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            encoder = AutoModel.from_pretrained(name, config=config).float()
        except Exception as error:
            raise UserError(f"The weights of {name} could not be loaded: {str(error).splitlines()[0]}") from error
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id]
        special = special[: spec.vocab_size - vocab_size]
        if None in special:
            raise UserError(f"The tokenizer of {name} lacks a CLS, SEP or MASK token; use an encoder like BERT.")
        _append_rows(encoder, special)
    else:
        config.vocab_size = spec.vocab_size
        encoder = AutoModel.from_config(config)
    encoder.pooler = None
    if _is_causal(encoder):
        raise UserError(f"The text tower {name} uses causal attention, but must be bidirectional; use one like BERT.")
    return HuggingFaceTextTower(encoder, width, embed_dim, spec.context_length, pooling)


@torch.no_grad()
def _is_causal(encoder: Any) -> bool:
    """Whether the features of the first token do not depend on the second token."""
    first, second = encoder.eval()(input_ids=torch.tensor([[2, 3], [2, 4]])).last_hidden_state[:, 0]
    encoder.train()
    return torch.equal(first, second)


@torch.no_grad()
def _append_rows(encoder: Any, token_ids: Sequence[int]) -> None:
    """Appends copies of the word embeddings of `token_ids`."""
    old = encoder.get_input_embeddings()
    new = nn.Embedding(old.num_embeddings + len(token_ids), old.embedding_dim, old.padding_idx)
    new.weight.copy_(torch.cat([old.weight, old.weight[token_ids]]))
    encoder.set_input_embeddings(new)


def _check(name: str, config: Any, spec: TowerSpec) -> None:
    """Raises UserError if the encoder's type, vocabulary or number of positions does not fit."""
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise UserError(
            f"The text tower {name} has type {config.model_type}, which is not supported; use an encoder like BERT."
        )
    if not 2 <= spec.vocab_size - config.vocab_size <= 3:
        raise UserError(
            f"The text tower {name} has a vocabulary of {config.vocab_size:,} tokens, which the tokenizer does not match; "
            f"use --tokenizer hf:{name}."
        )
    # RoBERTa's positions start after the index of its padding token
    positions = config.max_position_embeddings - (2 if "roberta" in config.model_type else 0)
    if spec.context_length > positions:
        raise UserError(f"The text tower {name} has {positions} positions; use --context-length {positions} or less.")
