import pytest
import torch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.guidance import GuidedQuery, bootstrapped_guidance, guided_answers
from coalign.types import DualEncoder

NAMES = ["cat", "dog", "cow"]


def one_hot(text):
    return F.one_hot(torch.tensor(next(i for i, name in enumerate(NAMES) if name in text)), 3).float()


MODEL = DualEncoder(
    encode_image=lambda pixels: pixels.float().mean((2, 3)),  # an image's three channels are its embedding
    encode_text=lambda texts: torch.stack([one_hot(text) for text in texts]),
    image_size=2,
)


def image(*channels):
    return torch.tensor(channels, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)


def knows_better(pixels, texts):
    """A joint encoder for which a dog beside a bright third channel is a dog, and anything else says nothing."""
    rows = []
    for picture, text in zip(pixels, texts):
        sure = "dog" in text and picture[2, 0, 0] > 100
        rows.append(one_hot(text) if sure else torch.ones(3))
    return torch.stack(rows)


def test_the_likeliest_classes_are_asked_again_beside_the_image():
    pixels = torch.stack([image(200, 190, 150), image(200, 10, 0), image(0, 100, 120)])
    batches = [([0, 1], pixels[:2], []), ([2], pixels[2:], [])]
    labels = {0: 1, 1: 0, 2: 1}
    result = bootstrapped_guidance(MODEL, knows_better, batches, labels, NAMES, ["a {}"], top_k=2)
    assert result.plain_correct.tolist() == [0, 1, 0]
    assert result.guided_correct.tolist() == [1, 1, 1]
    assert result.difference.value == pytest.approx(2 / 3)
    # a class that is not among the likeliest is not asked
    far = torch.stack([image(200, 0, 150)])
    assert (
        bootstrapped_guidance(MODEL, knows_better, [([0], far, [])], {0: 1}, NAMES, ["a {}"], top_k=2).guided.value == 0
    )
    with pytest.raises(UserError, match="nothing to classify"):
        bootstrapped_guidance(MODEL, knows_better, batches, {}, NAMES, ["a {}"])


def test_a_guide_turns_the_answer_to_what_it_names():
    """An image of a cat and a dog: alone it is nearer to the cat, with "dog" beside it to the dog."""
    both = image(200, 150, 0)

    def joint(pixels, texts):
        return pixels.float().mean((2, 3)) / 255 + torch.stack([one_hot(text) for text in texts])

    queries = [GuidedQuery(0, name, ("a cat", "a dog"), right) for right, name in enumerate(("cat", "dog"))]
    result = guided_answers(MODEL, joint, lambda index: both, queries)
    assert result.plain_correct.tolist() == [1, 0]
    assert result.guided_correct.tolist() == [1, 1]
    assert result.to_json()["items"] == 2
    with pytest.raises(UserError, match="nothing to ask"):
        guided_answers(MODEL, joint, lambda index: both, [])
