import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.compositionality import evaluate_foils, evaluate_pairs
from coalign.evaluation.embed import ImageEmbeds
from coalign.types import DualEncoder, Foil

WORDS = ("red", "blue", "left", "right")


def encoder():
    """Every caption is one of WORDS, and is embedded as its one-hot vector."""
    return DualEncoder(
        encode_image=lambda pixels: pixels.float(),
        encode_text=lambda texts: torch.stack([F.one_hot(torch.tensor(WORDS.index(t)), 4).float() for t in texts]),
        image_size=1,
    )


def images(*rows):
    return ImageEmbeds(F.normalize(torch.tensor(rows).float(), dim=-1), list(range(10, 10 + len(rows))))


def test_accuracy_by_kind_counts_a_tie_as_one_half():
    foils = [
        Foil(10, "colour", "replace", "red", "blue"),  # nearer to the true caption
        Foil(11, "colour", "replace", "red", "blue"),  # nearer to the false one
        Foil(10, "colour", "replace", "red", "left"),
        Foil(11, "side", "swap", "left", "right"),  # a tie
    ]
    result = evaluate_foils(encoder(), images([2, 1, 0, 0], [0, 1, 0, 0]), foils).result
    assert result.correct.tolist() == [1, 0, 1, 0.5]
    assert {kind: metric.value for kind, metric in result.by_kind.items()} == pytest.approx(
        {"colour": 2 / 3, "side": 0.5}
    )
    assert result.overall.value == pytest.approx((2 / 3 + 0.5) / 2)  # mean over the kinds, not the items
    values = result.to_json()
    assert (values["chance"], values["by_kind"]["colour"]["n"]) == (0.5, 3)


def test_bootstrap_draws_an_image_with_all_of_its_items():
    """Ten equal items per image give the same interval as one item per image."""
    embeds = images([1, 0, 0, 0], [0, 1, 0, 0])
    foils = [Foil(index, "colour", "replace", "red", "blue") for index in (10, 11) for _ in range(10)]
    many = evaluate_foils(encoder(), embeds, foils).result.by_kind["colour"]
    few = evaluate_foils(encoder(), embeds, foils[::10]).result.by_kind["colour"]
    assert (many.low, many.high) == (few.low, few.high) == (0, 1)


def test_metrics_are_means_of_the_outcomes():
    foils = [Foil(10, kind, "replace", "red", "blue") for kind in ("colour", "colour", "side")]
    result = evaluate_foils(encoder(), images([1, 0, 0, 0]), foils).result
    outcomes = result.outcomes()
    assert outcomes["colour.accuracy"].mean() == result.by_kind["colour"].value
    np.testing.assert_array_equal(outcomes["colour.clusters"], [10, 10])
    np.testing.assert_array_equal(outcomes["classes"], [0, 0, 1])


def test_foils_of_unreadable_images_are_dropped():
    foils = [Foil(10, "colour", "replace", "red", "blue"), Foil(99, "colour", "replace", "red", "blue")]
    assert len(evaluate_foils(encoder(), images([1, 0, 0, 0]), foils).result.correct) == 1
    with pytest.raises(UserError, match="no image with a false caption could be read"):
        evaluate_foils(encoder(), images([1, 0, 0, 0]), foils[1:])


def test_winoground_scores_on_every_order_of_four_similarities():
    """Against the definition; the means over all orders are the chance levels."""
    text_n, image_n, group_n = 0, 0, 0
    orders = list(itertools.permutations([0.1, 0.3, 0.5, 0.7]))
    for a, b, c, d in orders:  # image 0 with captions 0 and 1, image 1 with captions 0 and 1
        text, image = a > b and d > c, a > c and d > b
        text_n, image_n, group_n = text_n + text, image_n + image, group_n + (text and image)
        # texts are axes, so an image's coordinates are its similarities; the third one gives it unit length
        images = torch.tensor([[a, b, (1 - a * a - b * b) ** 0.5], [c, d, (1 - c * c - d * d) ** 0.5]])
        axes = {"first": torch.tensor([1.0, 0, 0]), "second": torch.tensor([0, 1.0, 0])}
        model = DualEncoder(None, lambda texts, axes=axes: torch.stack([axes[t] for t in texts]), 4)
        result = evaluate_pairs(model, ImageEmbeds(images, [0, 1]), lambda index: ["first", "second"][index])
        assert (result.text.value, result.image.value, result.group.value) == (text, image, text and image)
    chances = {name: entry["chance"] for name, entry in result.to_json().items() if isinstance(entry, dict)}
    assert chances == {"text": text_n / 24, "image": image_n / 24, "group": group_n / 24}


def test_incomplete_examples_are_dropped():
    model = DualEncoder(None, lambda texts: torch.eye(4)[: len(texts)], 4)
    result = evaluate_pairs(model, ImageEmbeds(torch.eye(4)[[3, 0, 1]], [1, 2, 3]), str)
    assert (result.group.n, result.group.value) == (1, 1)
    with pytest.raises(UserError, match="no pair of images could be read"):
        evaluate_pairs(model, ImageEmbeds(torch.eye(4)[:1], [0]), str)
