import pytest
import torch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.guidance import GuidedQuery, bootstrapped_guidance, guided_classification
from coalign.types import DualEncoder

NAMES = ["cat", "dog", "cow"]


def one_hot(text):
    return F.one_hot(torch.tensor(next(i for i, name in enumerate(NAMES) if name in text)), 3).float()


MODEL = DualEncoder(
    encode_image=lambda pixels: pixels.float().mean((2, 3)),  # the embedding is the mean color
    encode_text=lambda texts: torch.stack([one_hot(text) for text in texts]),
    image_size=2,
)


def image(*channels):
    return torch.tensor(channels, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)


def encode_joint(pixels, texts):
    """Recognizes a dog if the text says so and the third channel is bright; otherwise uninformative."""
    rows = []
    for image_pixels, text in zip(pixels, texts):
        is_dog = "dog" in text and image_pixels[2, 0, 0] > 100
        rows.append(one_hot(text) if is_dog else torch.ones(3))
    return torch.stack(rows)


def test_bootstrapped_guidance_reranks_the_top_classes():
    pixels = torch.stack([image(200, 190, 150), image(200, 10, 0), image(0, 100, 120)])
    batches = [([0, 1], pixels[:2], []), ([2], pixels[2:], [])]
    labels = {0: 1, 1: 0, 2: 1}
    result = bootstrapped_guidance(MODEL, encode_joint, batches, labels, NAMES, ["a {}"], top_k=2)
    assert result.plain_correct.tolist() == [0, 1, 0]
    assert result.guided_correct.tolist() == [1, 1, 1]
    assert result.difference.value == pytest.approx(2 / 3)
    # a class outside the top k is not considered
    far = torch.stack([image(200, 0, 150)])
    assert (
        bootstrapped_guidance(MODEL, encode_joint, [([0], far, [])], {0: 1}, NAMES, ["a {}"], top_k=2).guided.value == 0
    )
    with pytest.raises(UserError, match="nothing to classify"):
        bootstrapped_guidance(MODEL, encode_joint, batches, {}, NAMES, ["a {}"])


def test_guide_selects_the_object_it_names():
    """An image of a cat and a dog is nearer to the cat alone, and nearer to the dog with "dog" beside it."""
    both = image(200, 150, 0)

    def joint(pixels, texts):
        return pixels.float().mean((2, 3)) / 255 + torch.stack([one_hot(text) for text in texts])

    queries = [GuidedQuery(0, name, ("a cat", "a dog"), target) for target, name in enumerate(("cat", "dog"))]
    result = guided_classification(MODEL, joint, lambda index: both, queries)
    assert result.plain_correct.tolist() == [1, 0]
    assert result.guided_correct.tolist() == [1, 1]
    assert result.to_json()["items"] == 2
    with pytest.raises(UserError, match="no image has an object that a text identifies uniquely"):
        guided_classification(MODEL, joint, lambda index: both, [])
