"""The head of masked language modelling."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class MaskedLanguageHead(nn.Module):
    """Token features after the tower's final norm -> a logit for every token of the vocabulary, by one linear layer, as in the released
    code of DeCLIP. The mask token is no answer: `vocab_size` is the tokenizer's."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, vocab_size)
        nn.init.normal_(self.decoder.weight, std=0.02)  # BERT's: the loss starts near ln(vocab_size)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Float[Tensor, "masked width"]) -> Float[Tensor, "masked vocabulary"]:
        return self.decoder(tokens)
