from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.types import DualEncoder

WEIGHT = torch.randn(3 * 4 * 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)


def encode_image(pixels: Tensor) -> Tensor:
    return (pixels.flatten(1).float() @ WEIGHT).to(torch.bfloat16)


class Texts:
    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.encoded.extend(texts)
        return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts], dtype=torch.float64)


def batches(n: int, size: int):
    pixels = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for start in range(0, n, size):
        yield list(range(100 + start, 100 + min(n, start + size))), pixels[start : start + size], [f"bad {start}"]


def test_image_embeds_are_normalized_float32_and_independent_of_batches():
    model = DualEncoder(encode_image, Texts(), 4)
    result = embed_images(model, batches(7, 3))
    assert result.embeds.dtype == torch.float32
    assert not result.embeds.requires_grad
    torch.testing.assert_close(result.embeds.norm(dim=1), torch.ones(7))
    assert result.indices == list(range(100, 107))
    assert result.bad == ["bad 0", "bad 3", "bad 6"]
    torch.testing.assert_close(result.embeds, embed_images(model, batches(7, 7)).embeds, atol=1e-2, rtol=0)


def test_batches_of_bad_images_are_skipped_but_listed():
    def with_empty_batch():
        yield [], torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ["gone"]
        yield from batches(2, 2)

    result = embed_images(DualEncoder(encode_image, Texts(), 4), with_empty_batch())
    assert result.indices == [100, 101]
    assert result.bad == ["gone", "bad 0"]


def test_no_readable_image_raises_with_the_number_of_bad_ones():
    empty = [([], torch.zeros(0, 3, 4, 4, dtype=torch.uint8), ["x", "y"])]
    with pytest.raises(UserError, match=r"no readable image \(2 bad\)"):
        embed_images(DualEncoder(encode_image, Texts(), 4), empty)


def test_texts_keep_their_order_and_are_encoded_once():
    encoder = Texts()
    texts = ["a long caption", "b", "banana", "b", "a long caption"]
    embeds = embed_texts(DualEncoder(encode_image, encoder, 4), texts, batch_size=2)
    expected = torch.nn.functional.normalize(Texts()(texts).float(), dim=-1)
    torch.testing.assert_close(embeds, expected)
    assert sorted(encoder.encoded) == sorted(set(texts))


def test_no_texts_raise():
    with pytest.raises(UserError, match="no captions"):
        embed_texts(DualEncoder(encode_image, Texts(), 4), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_embeddings_raise_with_the_model_name(value):
    def broken(texts: Sequence[str]) -> Tensor:
        out = torch.ones(len(texts), 3)
        out[0, 1] = value
        return out

    with pytest.raises(UserError, match="mine: text embeddings are not finite for 1 of 2"):
        embed_texts(DualEncoder(encode_image, broken, 4, name="mine"), ["a", "b"])


def test_encoder_that_drops_rows_raises():
    with pytest.raises(ValueError, match="for 2 inputs"):
        embed_texts(DualEncoder(encode_image, lambda texts: torch.ones(1, 3), 4), ["a", "b"])
