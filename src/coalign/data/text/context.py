"""Texts that are longer than the context of a text encoder, and lose their end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coalign.formatting import percent


@dataclass(frozen=True)
class CutTexts:
    """How many of some texts are cut, and the number of tokens of the longest one."""

    cut: int
    texts: int
    longest: int
    context_length: int

    @property
    def fraction(self) -> float:
        return self.cut / max(self.texts, 1)

    def line(self, what: str = "captions", option: bool = False) -> str | None:
        """Returns a sentence for the terminal; None if no text is cut. With `option`, it names the option that keeps the texts whole."""
        if not self.cut:
            return None
        keep = f"; --context-length {self.longest} keeps them whole" if option else ""
        if self.texts == 1:
            return f"The {what} has {self.longest:,} tokens, but the context of the model has {self.context_length}: its end is cut{keep}."
        return (
            f"{self.cut:,} of {self.texts:,} {what} ({percent(self.fraction)}) are longer than the context of {self.context_length} tokens "
            f"and lose their end; the longest has {self.longest:,}{keep}."
        )


def cut_texts(texts: Iterable[str], num_tokens: Callable[[str], int], context_length: int) -> CutTexts:
    """Counts the texts with more than `context_length` tokens. num_tokens: the tokens of a text, with start and end tokens."""
    lengths = [num_tokens(text) for text in texts]
    return CutTexts(sum(n > context_length for n in lengths), len(lengths), max(lengths, default=0), context_length)
