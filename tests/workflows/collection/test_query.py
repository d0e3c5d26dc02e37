"""Queries to a collection in memory: their ranking against formulas written out, filters, and a model's own similarity."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from coalign.embeds import pooled
from coalign.errors import BadSample, UserError
from coalign.types import DualEncoder
from coalign.workflows.collection.nearest import ExactVectors
from coalign.workflows.collection.query import EXCLUDED, Collection, Query, one_vector
from coalign.workflows.collection.records import Records
from coalign.workflows.evaluate.eval_model import EvalModel

_COUNT = 240
_MIX = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
_COLORS = np.random.default_rng(0).integers(0, 256, (_COUNT, 3), dtype=np.uint8)
_FOLDERS = ("", "cats", "cats/young", "dogs")


class Lists(Records):
    """Images of one color each. A row in `gone` has no image any more."""

    def __init__(self):
        self.gone, self.read = set(), []

    def __len__(self):
        return _COUNT

    def key(self, row):
        folder = _FOLDERS[row % 4]
        return f"{folder}/{row}.png".lstrip("/")

    def captions(self, row):
        return (f"image {row}",)

    def tags(self, row):
        return tuple(name for name, every in (("even", 2), ("third", 3)) if row % every == 0)

    def image(self, row):
        self.read.append(row)
        if row in self.gone:
            raise BadSample("it is no longer in the data")
        return np.broadcast_to(_COLORS[row], (8, 8, 3)).copy()


def mean_color(pixels):
    return pixels.float().mean((2, 3)) / 255


def numbers(texts):
    """A text such as "0.1 0.9 0.5" is a color, "… dim" one whose similarities vary less."""
    return torch.tensor([[float(word) for word in text.split()[:3]] for text in texts])


def spread(pixels_or_texts, is_text):
    color = numbers(pixels_or_texts) if is_text else mean_color(pixels_or_texts)
    extra = torch.full((len(color), 1), 0.0)
    if is_text:  # orthogonal to all images, as texts are in a space with a modality gap
        extra = torch.tensor([[5.0 if text.endswith("dim") else 0.0] for text in pixels_or_texts])
    return torch.cat([(color - 0.5) @ _MIX, extra], dim=1)


COSINES = DualEncoder(lambda pixels: spread(pixels, False), lambda texts: spread(texts, True), 8, "stub", 10.0)


class Tokens(NamedTuple):
    vectors: Tensor
    valid: Tensor


def two_tokens(embeds):
    tokens = torch.stack([embeds, embeds.roll(1, 1), torch.full_like(embeds, 7.0)], dim=1)
    valid = torch.tensor([True, True, False]).expand(len(embeds), 3)
    return Tokens(torch.nn.functional.normalize(tokens, dim=-1), valid)


def best_token(images, texts):
    products = torch.einsum("isd,jtd->ijst", images.vectors[:, :2], texts.vectors[:, :2])
    return products.amax(3).mean(2)


OWN = DualEncoder(
    lambda pixels: two_tokens(spread(pixels, False)), lambda texts: two_tokens(spread(texts, True)), 8, "own",
    similarity=best_token,
)  # fmt: skip


def all_pixels():
    return torch.from_numpy(_COLORS)[:, :, None, None].expand(-1, -1, 8, 8)


def collection(encoder=COSINES, **options):
    vectors = pooled(one_vector(encoder).encode_image(all_pixels())).numpy()
    return Collection("shelf", EvalModel(encoder), ExactVectors(vectors), Lists(), **options)


def picture(row):
    return Image.fromarray(np.broadcast_to(_COLORS[row], (8, 8, 3)).copy())


def cosines(query):
    """The cosine of every image and the query, [image]."""
    images = torch.nn.functional.normalize(spread(all_pixels(), False))
    return (images @ torch.nn.functional.normalize(query)[0]).numpy()


def z_scores(values):
    return (values - values.mean()) / values.std()


def assert_ranked(found, scores, count):
    order = np.argsort(-scores, kind="stable")[:count]
    assert [hit.row for hit in found] == order.tolist()
    np.testing.assert_allclose([hit.score for hit in found], scores[order], atol=1e-5)


TEXT = "0.9 0.2 0.1"


def test_one_part_is_ranked_by_its_cosine():
    found = collection().search(Query(TEXT), top=9)
    assert_ranked(found, cosines(spread([TEXT], True)), 9)
    hit = found[0]
    assert (hit.key, hit.captions) == (Lists().key(hit.row), (f"image {hit.row}",))
    assert_ranked(collection().search(Query(image=picture(5)), top=3), cosines(spread(all_pixels()[5:6], False)), 3)


def test_like_is_the_search_by_an_indexed_image_without_reading_it():
    shelf = collection()
    found = shelf.search(Query(like=shelf.records.key(7)), top=5)
    assert [hit.row for hit in found] == [hit.row for hit in shelf.search(Query(image=picture(7)), top=5)]
    assert found[0].row == 7
    assert shelf.records.read == []


@pytest.mark.parametrize("text", [TEXT, f"{TEXT} dim"])
def test_image_and_text_have_equal_influence_whatever_their_spread(text):
    image, words = cosines(spread(all_pixels()[3:4], False)), cosines(spread([text], True))
    answer = collection().answer(Query(text, picture(3)), top=_COUNT)
    scores = (z_scores(image) + z_scores(words)) / 2
    assert_ranked(answer.found, scores, _COUNT)
    assert answer.query == "image and text, each standardized over the collection"
    by_row = np.zeros(_COUNT)
    by_row[[hit.row for hit in answer.found]] = [hit.score for hit in answer.found]
    influence = [np.corrcoef(by_row, part)[0, 1] for part in (image, words)]
    assert influence[0] == pytest.approx(influence[1], abs=1e-4)
    ratio = image.std() / words.std()
    assert (ratio > 2) == text.endswith("dim")  # the mean of the similarities would be ranked by the image


def test_excluded_text_counts_against():
    unwanted = "0.9 0.9 0.1"
    text, other = cosines(spread([TEXT], True)), cosines(spread([unwanted], True))
    answer = collection().answer(Query(TEXT, exclude=unwanted), top=20)
    assert_ranked(answer.found, (z_scores(text) - EXCLUDED * z_scores(other)) / (1 + EXCLUDED), 20)
    assert f"without {unwanted!r}" in answer.query
    without = [hit.row for hit in collection().search(Query(TEXT), top=20)]
    assert other[[hit.row for hit in answer.found]].mean() < other[without].mean()


@pytest.mark.parametrize(
    ("tags", "folder"), [*product([(), ("even",), ("even", "third")], [None, "cats", "cats/young", "dogs/"])]
)
def test_filters_keep_the_order_of_what_they_leave(tags, folder):
    shelf = collection()
    answer = shelf.answer(Query(TEXT, tags=tags, folder=folder), top=_COUNT)
    prefix = "" if folder is None else folder.rstrip("/") + "/"
    expected = [
        hit
        for hit in shelf.search(Query(TEXT), top=_COUNT)
        if hit.key.startswith(prefix) and set(tags) <= set(hit.tags)
    ]
    assert [hit.row for hit in answer.found] == [hit.row for hit in expected]
    assert answer.searched == len(expected)


def test_tags_and_folders_are_counted():
    shelf = collection()
    assert shelf.tags() == [("even", 120), ("third", 80)]
    assert shelf.folders() == [("cats", 120), ("cats/young", 60), ("dogs", 60)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(), "nothing to search for"),
        (Query(exclude="0 0 0"), "nothing to search for"),
        (Query(" "), "to search for is empty"),
        (Query(TEXT, exclude=""), "to exclude is empty"),
        (Query(like="cats/1.pn"), r"no image has the key 'cats/1\.pn'; the nearest is 'cats/1\.png'"),
        (Query(TEXT, tags=("evens",)), "no image has the tag 'evens'; the nearest is 'even'"),
        (Query(TEXT, folder="birds"), "no image has the folder 'birds'"),
    ],
)
def test_invalid_queries_raise(query, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        collection().search(query)


# ---------------------------------------------------------------- a model's own similarity


def own_scores(texts=(TEXT,)):
    return OWN.similarity(OWN.encode_image(all_pixels()), OWN.encode_text(list(texts)))[:, 0].numpy()


def test_own_similarity_ranks_the_candidates_again():
    shelf = collection(OWN)
    found = shelf.search(Query(TEXT), top=10)
    vectors = shelf.embeddings() @ shelf.embed_text(TEXT)
    candidates = np.argsort(-vectors, kind="stable")[:100]
    assert sorted(shelf.records.read) == sorted(candidates.tolist())
    scores = np.full(_COUNT, -np.inf)
    scores[candidates] = own_scores()[candidates]
    assert_ranked(found, scores, 10)


def test_all_candidates_rank_exactly():
    assert_ranked(collection(OWN, candidates=_COUNT).search(Query(TEXT), top=30), own_scores(), 30)


def test_own_similarity_standardizes_parts_over_the_candidates():
    found = collection(OWN, candidates=_COUNT).search(Query(TEXT, picture(3)), top=30)
    image = OWN.similarity(OWN.encode_image(all_pixels()), OWN.encode_image(all_pixels()[3:4]))[:, 0].numpy()
    assert_ranked(found, (z_scores(image) + z_scores(own_scores())) / 2, 30)


def test_images_that_are_gone_are_counted():
    shelf = collection(OWN)
    first = [hit.row for hit in shelf.search(Query(TEXT), top=3)]
    shelf.records.gone = set(first[:2])
    answer = shelf.answer(Query(TEXT), top=5)
    assert answer.missing == 2
    assert answer.found[0].row == first[2]
    shelf.records.gone = set(range(_COUNT))
    with pytest.raises(UserError, match="None of the 100 images nearest to the query can be read"):
        shelf.search(Query(TEXT))
    with pytest.raises(UserError, match=r"cats/1\.png cannot be read: it is no longer in the data"):
        shelf.image_file(1)


def test_mean_vectors_ignore_padding():
    embeds = OWN.encode_text([TEXT])
    valid = embeds.vectors[:, :2].mean(1)
    torch.testing.assert_close(pooled(embeds), torch.nn.functional.normalize(valid))


# ---------------------------------------------------------------- the rest


def test_classes_have_probabilities():
    labels, prompts = ["0.9 0.1 0.1", "0.1 0.9 0.1", "0.1 0.1 0.9"], ["{} in a photo", "{} dim"]
    found = collection().classify(picture(9), labels, prompts)
    normalize = torch.nn.functional.normalize
    classes = [
        normalize(normalize(spread([prompt.replace("{}", label) for prompt in prompts], True)).mean(0), dim=0)
        for label in labels
    ]
    image = normalize(spread(all_pixels()[9:10], False))[0]
    expected = torch.softmax(10 * torch.stack([image @ each for each in classes]), 0).tolist()
    assert [name for name, _ in found] == [labels[i] for i in np.argsort(-np.array(expected))]
    assert [value for _, value in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)


def test_images_come_back_as_they_are():
    np.testing.assert_array_equal(np.asarray(collection().image_file(4)), np.asarray(picture(4)))
    assert collection().embeddings().shape == (_COUNT, 9)
    np.testing.assert_allclose(collection().embed_image(picture(4)), collection().embeddings()[4], atol=1e-6)


def test_threads_get_what_one_gets():
    shelf = collection(OWN)
    queries = [Query(f"0.{i} 0.5 0.{9 - i}") for i in range(10)] * 3
    alone = [shelf.search(query, 5) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: shelf.search(query, 5), queries)) == alone
