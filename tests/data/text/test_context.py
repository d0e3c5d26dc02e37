from __future__ import annotations

import pytest

from coalign.data.text.context import cut_texts
from coalign.data.text.tokenizer import load_tokenizer, train_bpe

TEXTS = (
    "",
    "a",
    "a red circle on a table",
    "ﬁne &amp; “curly” ".strip(),
    "word " * 200,
    "日本語の長い文" * 30,
    "😀" * 50,
)


@pytest.mark.parametrize("context_length", [3, 20, 77, 300])
@pytest.mark.parametrize("name", ["clip", "trained"])
def test_counts_agree_with_the_truncation(name: str, context_length: int) -> None:
    """A text is cut if and only if a larger context gives other tokens."""
    tokenizer = load_tokenizer("clip") if name == "clip" else train_bpe(TEXTS, 300)
    cut = cut_texts(TEXTS, tokenizer.num_tokens, context_length)
    whole = [tokenizer.encode(text, 10_000) for text in TEXTS]
    assert cut.cut == sum(tokenizer.encode(text, context_length) != ids for text, ids in zip(TEXTS, whole, strict=True))
    assert (cut.texts, cut.longest) == (len(TEXTS), max(map(len, whole)))


def test_sentences() -> None:
    def found(num_cut: int, texts: int):
        return cut_texts(["a" * 9] * (texts - num_cut) + ["a" * 150] * num_cut, len, 77)

    assert found(0, 10).line() is None
    assert cut_texts([], len, 77).line() is None
    assert found(1, 3).line() == (
        "1 of 3 captions (33.3 %) are longer than the context of 77 tokens and lose their end; the longest has 150."
    )
    assert found(1, 1).line("query") == "The query has 150 tokens, but the context of the model has 77: its end is cut."
    assert "--context-length 150" in found(1, 3).line(option=True)
    assert "11 of 100 sampled captions (11.0 %)" in found(11, 100).line("sampled captions")
