from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from coalign import embeds
from coalign.embeds import concatenate, fields, map_fields, num_samples, similarities, take
from coalign.types import dot_product


class Tokens(NamedTuple):
    vectors: Tensor  # [sample, token, dim]
    valid: Tensor  # [sample, token]


def tokens(*lengths, dim=3):
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Tokens(torch.randn(len(lengths), longest, dim) * valid[..., None], valid)


def max_similarity(images, texts):
    """Mean over the image's valid tokens of the best text token, by loops."""
    out = torch.zeros(len(images.valid), len(texts.valid))
    for i, (image, image_valid) in enumerate(zip(*images)):
        for j, (text, text_valid) in enumerate(zip(*texts)):
            out[i, j] = (image[image_valid] @ text[text_valid].T).amax(1).mean()
    return out


def test_a_tensor_and_a_named_tuple_have_the_same_operations():
    one, several = torch.arange(6.0).view(3, 2), tokens(2, 1, 4)
    assert num_samples(one) == num_samples(several) == 3
    assert list(fields(one)) == ["embeds"]
    assert list(fields(several)) == ["vectors", "valid"]
    assert take(one, [2, 0]).tolist() == [[4, 5], [0, 1]]
    assert take(several, slice(1, 2)).valid.tolist() == [[True, False, False, False]]
    assert take(several, torch.tensor([False, True, True])).valid.shape == (2, 4)
    assert isinstance(map_fields(several, lambda tensor: tensor), Tokens)
    assert map_fields(one, lambda tensor: tensor + 1)[0].tolist() == [1, 2]


def test_joined_batches_are_padded_to_the_longest():
    short, long = tokens(1, 2), tokens(4)
    joined = concatenate([short, long])
    assert joined.vectors.shape == (3, 4, 3)
    assert joined.valid.sum(1).tolist() == [1, 2, 4]
    assert torch.equal(joined.vectors[:2, :2], short.vectors)
    assert not joined.vectors[:2, 2:].any()
    assert torch.equal(concatenate([torch.ones(1, 2), torch.zeros(2, 2)]), torch.tensor([[1.0, 1], [0, 0], [0, 0]]))


@pytest.mark.parametrize("chunk", [1, 7, 40, 10**6])
def test_blocks_of_any_size_give_the_same_similarities(monkeypatch, chunk):
    torch.manual_seed(0)
    images, texts = tokens(3, 2, 5, 4), tokens(1, 6, 2)
    monkeypatch.setattr(embeds, "_CHUNK", chunk)
    sizes = []

    def counted(images, texts):
        sizes.append(images.valid.numel() * texts.valid.numel())
        return max_similarity(images, texts)

    assert torch.allclose(similarities(counted, images, texts), max_similarity(images, texts))
    assert max(sizes) <= max(chunk, 5 * 6)
    assert torch.equal(similarities(dot_product, torch.eye(3), torch.eye(3)[:2]), torch.eye(3)[:, :2])
