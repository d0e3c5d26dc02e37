"""VSE++ on frozen features: the loss against its definition, and learning."""

import pytest
import torch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.embed import ImageEmbeds
from coalign.evaluation.probes.vse import WordGRU, max_hinge_loss, split_words, vse

THINGS = ("apple", "boat", "chair", "door", "engine", "flower", "guitar", "hammer")


def test_loss_matches_its_definition():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    rows = [0, 1, 1, 2, 3, 4]  # two captions of one image
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if rows[j] != rows[i]]
        expected += max(max(0.0, float(0.2 - images[i] @ texts[i] + images[i] @ texts[j])) for j in others)
        expected += max(max(0.0, float(0.2 - images[i] @ texts[i] + images[j] @ texts[i])) for j in others)
    image_rows = torch.tensor(rows)
    assert float(max_hinge_loss(images, texts, image_rows[:, None] == image_rows[None])) == pytest.approx(expected)


def test_words():
    assert split_words("Two red apples, on a_table!") == ["two", "red", "apples", "on", "a", "table"]
    gru = WordGRU(["red red red red", "once"])
    assert gru.word_ids == {"red": 1}
    one, other, none = gru(["red once", "red twice, ", "!"])
    assert not torch.equal(one, none)
    torch.testing.assert_close(one, other)  # both words are unknown
    torch.testing.assert_close(gru(["red", "red red red once"])[0], gru(["red"])[0])  # padding is ignored


def data(count, seed):
    """Features that encode a kind, with noise, and captions that name it."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(8, (count,), generator=generator)
    features = F.one_hot(kinds, 8).float() + 0.1 * torch.randn(count, 8, generator=generator)
    things = [THINGS[kind] for kind in kinds]
    images = ImageEmbeds(features, list(range(count)))
    return images, lambda index: [f"a {things[index]} here", f"this is the {things[index]}"]


def test_vse_learns_from_informative_features():
    """The splits are of different datasets: the same index is another image, with other captions."""
    (train, train_captions), (test, test_captions) = data(200, 0), data(40, 1)
    state = torch.random.get_rng_state()
    result = vse(train, test, train_captions, test_captions, epochs=6).result
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.image_to_text.recall[1].value > 0.9
    assert result.image_to_text.recall[1].chance < 0.2
    with pytest.raises(UserError, match="fewer than two training images"):
        vse(train, test, lambda index: [], test_captions)
