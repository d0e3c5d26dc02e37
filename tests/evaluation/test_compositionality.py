import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.compositionality import choose_captions, tell_pairs_apart
from coalign.evaluation.embed import ImageEmbeds
from coalign.types import DualEncoder, Foil

WORDS = ("red", "blue", "left", "right")


def encoder():
    """Captions are embedded as the one word of `WORDS` that they are."""
    return DualEncoder(
        encode_image=lambda pixels: pixels.float(),
        encode_text=lambda texts: torch.stack([F.one_hot(torch.tensor(WORDS.index(t)), 4).float() for t in texts]),
        image_size=1,
    )


def images(*rows):
    return ImageEmbeds(F.normalize(torch.tensor(rows).float(), dim=-1), list(range(10, 10 + len(rows))))


def test_counts_by_kind_and_takes_a_tie_for_one_half():
    foils = [
        Foil(10, "colour", "replace", "red", "blue"),  # nearer to the true caption
        Foil(11, "colour", "replace", "red", "blue"),  # nearer to the false one
        Foil(10, "colour", "replace", "red", "left"),
        Foil(11, "side", "swap", "left", "right"),  # a tie
    ]
    result = choose_captions(encoder(), images([2, 1, 0, 0], [0, 1, 0, 0]), foils).result
    assert result.correct.tolist() == [1, 0, 1, 0.5]
    assert {kind: metric.value for kind, metric in result.by_kind.items()} == pytest.approx(
        {"colour": 2 / 3, "side": 0.5}
    )
    assert result.overall.value == pytest.approx((2 / 3 + 0.5) / 2)  # of the kinds, not of the items
    values = result.to_json()
    assert (values["chance"], values["by_kind"]["colour"]["n"]) == (0.5, 3)


def test_the_bootstrap_draws_an_image_with_all_of_its_items():
    """Ten items of each of two images, which agree within an image: as wide as for two items, one an image."""
    embeds = images([1, 0, 0, 0], [0, 1, 0, 0])
    foils = [Foil(index, "colour", "replace", "red", "blue") for index in (10, 11) for _ in range(10)]
    many = choose_captions(encoder(), embeds, foils).result.by_kind["colour"]
    few = choose_captions(encoder(), embeds, foils[::10]).result.by_kind["colour"]
    assert (many.low, many.high) == (few.low, few.high) == (0, 1)


def test_outcomes_are_what_the_figures_are_means_of():
    foils = [Foil(10, kind, "replace", "red", "blue") for kind in ("colour", "colour", "side")]
    result = choose_captions(encoder(), images([1, 0, 0, 0]), foils).result
    found = result.outcomes()
    assert found["colour.accuracy"].mean() == result.by_kind["colour"].value
    np.testing.assert_array_equal(found["colour.clusters"], [10, 10])
    np.testing.assert_array_equal(found["classes"], [0, 0, 1])


def test_images_that_could_not_be_read_are_left_out():
    foils = [Foil(10, "colour", "replace", "red", "blue"), Foil(99, "colour", "replace", "red", "blue")]
    assert len(choose_captions(encoder(), images([1, 0, 0, 0]), foils).result.correct) == 1
    with pytest.raises(UserError, match="nothing to choose between"):
        choose_captions(encoder(), images([1, 0, 0, 0]), foils[1:])


def test_winogrounds_scores_on_every_order_of_four_similarities():
    """Against its definition, written out; over all orders they are the chances that are stated."""
    text_n, image_n, group_n = 0, 0, 0
    orders = list(itertools.permutations([0.1, 0.3, 0.5, 0.7]))
    for a, b, c, d in orders:  # image 0 with captions 0 and 1, image 1 with captions 0 and 1
        text, image = a > b and d > c, a > c and d > b
        text_n, image_n, group_n = text_n + text, image_n + image, group_n + (text and image)
        # texts are axes, so that an image's numbers are its similarities; a third axis makes it of unit length
        images = torch.tensor([[a, b, (1 - a * a - b * b) ** 0.5], [c, d, (1 - c * c - d * d) ** 0.5]])
        axes = {"first": torch.tensor([1.0, 0, 0]), "second": torch.tensor([0, 1.0, 0])}
        model = DualEncoder(None, lambda texts, axes=axes: torch.stack([axes[t] for t in texts]), 4)
        found = tell_pairs_apart(model, ImageEmbeds(images, [0, 1]), lambda index: ["first", "second"][index])
        assert (found.text.value, found.image.value, found.group.value) == (text, image, text and image)
    chances = {name: entry["chance"] for name, entry in found.to_json().items() if isinstance(entry, dict)}
    assert chances == {"text": text_n / 24, "image": image_n / 24, "group": group_n / 24}


def test_half_an_example_is_left_out():
    model = DualEncoder(None, lambda texts: torch.eye(4)[: len(texts)], 4)
    found = tell_pairs_apart(model, ImageEmbeds(torch.eye(4)[[3, 0, 1]], [1, 2, 3]), str)
    assert (found.group.n, found.group.value) == (1, 1)
    with pytest.raises(UserError, match="no pair of images could be read"):
        tell_pairs_apart(model, ImageEmbeds(torch.eye(4)[:1], [0]), str)
