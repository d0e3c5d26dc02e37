import itertools

import numpy as np
import pytest
import torch
from helpers.metrics import by_name, values
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
    found = by_name(evaluate_foils(encoder(), images([2, 1, 0, 0], [0, 1, 0, 0]), foils).result)
    assert found["mean_per_kind"].outcome.values.tolist() == [1, 0, 1, 0.5]
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(
        {
            "mean_per_kind": (2 / 3 + 0.5) / 2,  # over the kinds, not the items
            "colour.accuracy": 2 / 3,
            "side.accuracy": 0.5,
            "replace.mean_per_kind": 2 / 3,
            "swap.mean_per_kind": 0.5,
        }
    )


def test_metrics_of_foils_have_names_titles_and_chances():
    """An edit of several kinds has the mean over its kinds."""
    foils = [
        Foil(10, "colour", "replace", "red", "blue"),
        Foil(10, "colour", "replace", "red", "blue"),
        Foil(10, "one_side", "replace", "left", "red"),
        Foil(10, "order", "swap", "blue", "left"),
    ]
    found = evaluate_foils(encoder(), images([2, 1, 0, 0]), foils).result
    assert [(m.name, m.title, m.value, m.count) for m in found] == [
        ("mean_per_kind", "Foils: all kinds", pytest.approx(2 / 3), 4),
        ("colour.accuracy", "Foils: color", 1, 2),
        ("one_side.accuracy", "Foils: one side", 0, 1),
        ("order.accuracy", "Foils: order", 1, 1),
        ("replace.mean_per_kind", "Foils: replace, all kinds", 0.5, 3),
        ("swap.mean_per_kind", "Foils: swap, all kinds", 1, 1),
    ]
    assert {(metric.kind, metric.chance) for metric in found} == {("rate", 1 / 2)}


def test_bootstrap_draws_an_image_with_all_of_its_items():
    """Ten equal items per image give the same interval as one item per image."""
    embeds = images([1, 0, 0, 0], [0, 1, 0, 0])
    foils = [Foil(index, "colour", "replace", "red", "blue") for index in (10, 11) for _ in range(10)]
    many, few = (
        by_name(evaluate_foils(encoder(), embeds, some).result)["colour.accuracy"] for some in (foils, foils[::10])
    )
    assert (many.low, many.high) == (few.low, few.high) == (0, 1)


def test_outcomes_hold_the_items_with_their_images_or_kinds():
    foils = [
        Foil(index, kind, how, "red", "blue")
        for index, kind, how in (
            (11, "colour", "replace"),
            (10, "side", "swap"),
            (10, "colour", "replace"),
            (10, "size", "swap"),
        )
    ]
    found = by_name(evaluate_foils(encoder(), images([1, 0, 0, 0], [0, 1, 0, 0]), foils).result)
    outcomes = {name: metric.outcome for name, metric in found.items()}
    for name, correct, groups in (
        ("mean_per_kind", [0, 1, 1, 1], [0, 1, 0, 2]),
        ("colour.accuracy", [0, 1], [11, 10]),
        ("side.accuracy", [1], [10]),
        ("size.accuracy", [1], [10]),
        ("replace.mean_per_kind", [0, 1], [0, 0]),
        ("swap.mean_per_kind", [1, 1], [1, 2]),
    ):
        outcome = outcomes.pop(name)
        np.testing.assert_array_equal(outcome.values, correct)
        np.testing.assert_array_equal(outcome.groups, groups)
        assert outcome.statistic == ("mean per class" if "mean_per_kind" in name else "mean")
    assert not outcomes


def test_foils_of_unreadable_images_are_dropped():
    foils = [Foil(10, "colour", "replace", "red", "blue"), Foil(99, "colour", "replace", "red", "blue")]
    found = evaluate_foils(encoder(), images([1, 0, 0, 0]), foils).result
    assert [metric.count for metric in found] == [1, 1, 1]  # all kinds, the kind and the edit
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
        found = evaluate_pairs(model, ImageEmbeds(images, [0, 1]), lambda index: ["first", "second"][index])
        assert values(found) == {"text": text, "image": image, "group": text and image}
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in found] == [
        ("text", "Winoground text score", "rate", text_n / 24, 1),
        ("image", "Winoground image score", "rate", image_n / 24, 1),
        ("group", "Winoground group score", "rate", group_n / 24, 1),
    ]


def test_incomplete_examples_are_dropped():
    model = DualEncoder(None, lambda texts: torch.eye(4)[: len(texts)], 4)
    found = evaluate_pairs(model, ImageEmbeds(torch.eye(4)[[3, 0, 1]], [1, 2, 3]), str)
    assert [(metric.count, metric.value) for metric in found] == [(1, 1)] * 3
    with pytest.raises(UserError, match="no pair of images could be read"):
        evaluate_pairs(model, ImageEmbeds(torch.eye(4)[:1], [0]), str)
