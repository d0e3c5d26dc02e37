import pytest
import torch
from helpers.metrics import by_name, values
from torch.nn import functional as F

from coalign.data.text.prompts import class_prompts
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
    found = bootstrapped_guidance(MODEL, encode_joint, batches, labels, class_prompts(NAMES, ["a {}"]), top_k=2)
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in found] == [
        ("plain", "Image alone", "rate", None, 3),
        ("guided", "Image with a text", "rate", None, 3),
        ("difference", "Difference, percentage points", "difference", None, 3),
    ]
    outcomes = {metric.name: metric.outcome.values.tolist() for metric in found}
    assert outcomes == {"plain": [0, 1, 0], "guided": [1, 1, 1], "difference": [1, 0, 1]}
    assert values(found) == pytest.approx({"plain": 1 / 3, "guided": 1, "difference": 2 / 3})
    assert all(metric.outcome.groups.tolist() == [0, 1, 2] for metric in found)
    # a class outside the top k is not considered
    far = torch.stack([image(200, 0, 150)])
    found = bootstrapped_guidance(
        MODEL, encode_joint, [([0], far, [])], {0: 1}, class_prompts(NAMES, ["a {}"]), top_k=2
    )
    assert values(found)["guided"] == 0
    with pytest.raises(UserError, match="nothing to classify"):
        bootstrapped_guidance(MODEL, encode_joint, batches, {}, class_prompts(NAMES, ["a {}"]))


def test_guide_selects_the_object_it_names():
    """An image of a cat and a dog is nearer to the cat alone, and nearer to the dog with "dog" beside it."""
    both = image(200, 150, 0)

    def joint(pixels, texts):
        return pixels.float().mean((2, 3)) / 255 + torch.stack([one_hot(text) for text in texts])

    queries = [GuidedQuery(0, name, ("a cat", "a dog"), target) for target, name in enumerate(("cat", "dog"))]
    found = by_name(guided_classification(MODEL, joint, lambda index: both, queries))
    outcomes = {name: metric.outcome.values.tolist() for name, metric in found.items()}
    assert outcomes == {"plain": [1, 0], "guided": [1, 1], "difference": [0, 1]}
    for metric in found.values():
        assert metric.count == 2
        assert metric.outcome.groups.tolist() == [0, 0]  # the queries of an image are drawn together
        assert metric.low == metric.value == metric.high
    with pytest.raises(UserError, match="no image has an object that a text identifies uniquely"):
        guided_classification(MODEL, joint, lambda index: both, [])
