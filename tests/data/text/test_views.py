from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from coalign.data.text import views as text_views
from coalign.data.text.lexicon import synonyms
from coalign.data.text.tokenizer import Tokenizer, load_tokenizer
from coalign.data.text.views import (
    choose_paraphrases,
    delete_words,
    eda,
    mask_tokens,
    replace_synonym,
    swap_words,
)
from coalign.errors import BadSample

ORACLES = Path(__file__).parents[2] / "oracles" / "text.npz"
CAPTION = "A small dog chases the red ball, near a Polar T-shirt."


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return load_tokenizer("clip")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_rate(hits: int, trials: int, p: float) -> None:
    """Within 4.5 standard deviations: one false alarm in 150,000, and the seeds are fixed."""
    assert abs(hits - trials * p) < 4.5 * (trials * p * (1 - p)) ** 0.5, (hits / trials, p)


# ---------------------------------------------------------------- EDA


def test_synonym_replacement_changes_one_word_to_a_synonym() -> None:
    words = CAPTION.split()
    cores = [word.strip(",.") for word in words]
    generator, counts = rng(), Counter()
    for _ in range(3000):
        new = replace_synonym(words, generator)
        (position,) = [i for i, (old, changed) in enumerate(zip(words, new)) if old != changed]
        counts[cores[position]] += 1
        assert new[position].strip(",.") in synonyms(cores[position])
        assert new[position].endswith(words[position][len(cores[position]) :])  # keeps "," and "."
    with_synonyms = [core for core in cores if synonyms(core)]
    assert set(counts) == set(with_synonyms) == {"small", "dog", "chases", "red", "ball", "Polar", "T-shirt"}
    for count in counts.values():
        assert_rate(count, 3000, 1 / len(with_synonyms))


def test_synonym_replacement_replaces_all_occurrences() -> None:
    new = replace_synonym(["dog,", "and", "a", "dog"], rng())
    assert new[0] == new[3] + ","
    assert new[3] in synonyms("dog")
    assert new[1:3] == ["and", "a"]


def test_synonyms_are_drawn_uniformly() -> None:
    generator = rng()
    counts = Counter(replace_synonym(["car"], generator)[0] for _ in range(9000))
    assert set(counts) == set(synonyms("car"))
    for count in counts.values():
        assert_rate(count, 9000, 1 / len(synonyms("car")))


def test_swapped_positions_are_drawn_uniformly() -> None:
    words, generator, counts = list("abcd"), rng(), Counter()
    for _ in range(6000):
        new = swap_words(words, generator)
        positions = tuple(i for i in range(4) if new[i] != words[i])
        assert sorted(new) == words
        assert len(positions) == 2
        counts[positions] += 1
    assert len(counts) == 6
    for count in counts.values():
        assert_rate(count, 6000, 1 / 6)


def test_deletion_removes_a_tenth_of_the_words_and_keeps_their_order() -> None:
    words, generator = [f"w{i:03}" for i in range(100)], rng()
    kept = [delete_words(words, generator) for _ in range(1000)]
    assert all(new == sorted(set(new)) and set(new) <= set(words) for new in kept)
    assert_rate(sum(map(len, kept)), 100_000, 0.9)
    assert_rate(sum(new[0] == "w000" for new in kept), 1000, 0.9)


def test_deletion_keeps_at_least_one_word() -> None:
    generator = rng()
    kept = Counter(tuple(delete_words(["a", "b"], generator)) for _ in range(20_000))
    assert set(kept) == {("a", "b"), ("a",), ("b",)}
    assert_rate(kept["a", "b"], 20_000, 0.81)
    assert_rate(kept["a",], 20_000, 0.095)  # 0.9 · 0.1 + 0.1 · 0.1 / 2


def test_eda_draws_its_operations_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("replace_synonym", "swap_words", "delete_words")
    for name in names:
        monkeypatch.setattr(text_views, name, lambda words, generator, name=name: [name])
    generator = rng()
    counts = Counter(eda(CAPTION, generator) for _ in range(9000))
    assert set(counts) == set(names)
    for count in counts.values():
        assert_rate(count, 9000, 1 / 3)


@pytest.mark.parametrize("caption", ["sunset", "xqzt", "the", "...", "a b", "狗在雪地里跑", " two  spaces "])
def test_eda_of_short_captions_is_never_empty(caption: str) -> None:
    generator = rng()
    for _ in range(200):
        new = eda(caption, generator)
        assert new.split()
        if len(caption.split()) == 1 and not synonyms(caption):
            assert new == caption
    assert eda("", generator) == ""


def test_eda_is_deterministic_given_the_generator() -> None:
    views = [[eda(CAPTION, rng(seed)) for seed in range(50)] for _ in range(2)]
    assert views[0] == views[1]
    assert len(set(views[0])) > 25


# ---------------------------------------------------------------- masking


def masked_one(ids: list[int], mask_p: float, generator: np.random.Generator, clip: Tokenizer) -> list[list[int]]:
    draws = generator.random((3, 1, len(ids)))
    return [row[0].tolist() for row in mask_tokens(np.array([ids]), np.array([len(ids)]), mask_p, draws, clip)]


def test_mask_rates(clip: Tokenizer) -> None:
    ids = [clip.start_id, *rng(1).integers(1000, 2000, size=200_000).tolist(), clip.end_id]
    masked, labels = (np.array(row) for row in masked_one(ids, 0.15, rng(), clip))
    selected = labels != -100
    assert_rate(selected.sum(), 200_000, 0.15)
    assert (labels[selected] == np.array(ids)[selected]).all()
    assert (masked[~selected] == np.array(ids)[~selected]).all()
    assert not selected[[0, -1]].any()
    is_mask, unchanged = masked[selected] == clip.mask_id, masked[selected] == labels[selected]
    assert_rate(is_mask.sum(), selected.sum(), 0.8)
    assert_rate(unchanged.sum(), selected.sum(), 0.1)
    random_ids = masked[selected][~is_mask & ~unchanged]
    assert random_ids.max() < clip.start_id
    # uniform over all ordinary tokens
    for low, high in [(0, 1000), (20_000, 30_000), (48_000, clip.start_id)]:
        assert_rate(((low <= random_ids) & (random_ids < high)).sum(), len(random_ids), (high - low) / clip.start_id)


def test_masking_everything_and_nothing(clip: Tokenizer) -> None:
    ids = [clip.start_id, 5, clip.mask_id, 6, clip.end_id]
    assert masked_one(ids, 0.0, rng(), clip) == [ids, [-100] * 5]
    assert masked_one(ids, 1.0, rng(), clip)[1] == [-100, 5, -100, 6, -100]
    assert masked_one([clip.start_id, clip.end_id], 1.0, rng(), clip) == [[clip.start_id, clip.end_id], [-100, -100]]


def test_padding_is_not_masked(clip: Tokenizer) -> None:
    ids, lengths = np.array([[clip.start_id, 5, clip.end_id, 0, 0], [clip.start_id, 5, 6, 7, clip.end_id]]), [3, 5]
    masked, labels = mask_tokens(ids, np.array(lengths), 1.0, rng().random((3, 2, 5)), clip)
    assert masked[0, 3:].tolist() == [0, 0]
    assert labels.tolist() == [[-100, 5, -100, -100, -100], [-100, 5, 6, 7, -100]]


def test_declip_mask_oracle(clip: Tokenizer) -> None:
    """Given the draws of DeCLIP's code, from torch's seeded stream in the same order, masks and labels are the same."""
    with np.load(ORACLES, allow_pickle=False) as oracles:
        arrays = {key.rpartition(".")[2]: oracles[key] for key in oracles.files if key.startswith("declip_mlm_mask")}

    def ours(ids: np.ndarray) -> list[int]:
        theirs = [ids == arrays[name] for name in ("sot", "eot", "mask")]
        return np.select(theirs, [clip.start_id, clip.end_id, clip.mask_id], ids).tolist()

    size = len(arrays["tokens"])
    torch.manual_seed(123)
    decisions = [torch.bernoulli(torch.full((size,), p)).bool().numpy() for p in (0.15, 0.8, 0.5)]
    words = torch.randint(int(arrays["vocab"]), (size,)).numpy()
    selected, masked, random = decisions
    draws = np.stack(  # uniform numbers on the same side of our thresholds
        [
            np.where(selected, 0.0, 0.999),
            np.where(masked, 0.5, np.where(random, 0.85, 0.95)),
            (words + 0.5) / clip.start_id,
        ]
    )[:, None]
    ids = np.array([ours(arrays["tokens"])])
    masked, labels = (row[0].tolist() for row in mask_tokens(ids, np.array([size]), 0.15, draws, clip))
    assert masked == ours(arrays["masked"])
    assert labels == arrays["labels"].tolist()


# ---------------------------------------------------------------- paraphrases


def test_paraphrases_are_distinct_as_far_as_available() -> None:
    generator = rng()
    stored = {CAPTION: ["ein hund", "un chien"]}
    for count, pool in ((1, set(stored[CAPTION])), (2, set(stored[CAPTION])), (3, {CAPTION, *stored[CAPTION]})):
        drawn = [tuple(choose_paraphrases(CAPTION, stored, count, generator)) for _ in range(3000)]
        assert all(set(texts) <= pool and len(set(texts)) == count for texts in drawn)
        counts = Counter(texts[0] for texts in drawn)
        for text in pool:
            assert_rate(counts[text], 3000, 1 / len(pool))
    for nothing in (None, {}, {"another": ["x"]}, {CAPTION: []}):
        assert choose_paraphrases(CAPTION, nothing, 2, generator) == [CAPTION] * 2


@pytest.mark.parametrize("stored", ["text", ["text"], {CAPTION: "text"}, {CAPTION: [1]}])
def test_malformed_paraphrases(stored: object) -> None:
    with pytest.raises(BadSample, match="malformed paraphrases"):
        choose_paraphrases(CAPTION, stored, 1, rng())
