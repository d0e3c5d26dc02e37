"""A model with its own similarity, token by token: every evaluation compares by it, as loops over the samples do."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.metrics import by_name, values
from helpers.token_wise import TokenEmbeds, loop_similarity, token_similarity
from torch import nn

from coalign import embeds as embeds_module
from coalign.data.text.prompts import class_prompts
from coalign.embeds import on_device, take, transposed
from coalign.errors import UserError
from coalign.evaluation.compositionality import evaluate_foils, evaluate_pairs
from coalign.evaluation.embed import embed_images, embed_joint, embed_texts
from coalign.evaluation.encoder_wrappers import cached, in_bfloat16, shard_texts
from coalign.evaluation.finetune.classification import Classifier, FineTuneConfig, evaluate_interpolated, fine_tune
from coalign.evaluation.finetune.retrieval import Retriever, evaluate_interpolated_retrieval, fine_tune_retrieval
from coalign.evaluation.guidance import GuidedQuery, bootstrapped_guidance, guided_classification
from coalign.evaluation.retrieval import retrieve, retrieve_in_folds
from coalign.evaluation.zero_shot import classify, embed_classes
from coalign.types import DualEncoder, Foil, dot_product

DIM = 5


def vectors(*key):
    """Random vectors, the same for the same key: [token, DIM], as many tokens as the key has words."""
    digest = hashlib.blake2b(" ".join(key).encode(), digest_size=6).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return 3 * torch.randn(len(key), DIM, generator=generator)  # not normalized


def padded(samples):
    longest = max(map(len, samples))
    valid = torch.arange(longest) < torch.tensor([len(sample) for sample in samples])[:, None]
    tokens = torch.zeros(len(samples), longest, DIM)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample)] = sample
    return TokenEmbeds(tokens, valid)


def encode_image(pixels):
    """Two or three tokens, depending on the first pixel."""
    samples = [[str(value) for value in image.flatten().tolist()] for image in pixels]
    return padded([vectors(*sample[: 2 + int(sample[0]) % 2]) for sample in samples])


def encode_text(texts):
    return padded([vectors(*text.split()) for text in texts])


def encode_joint(pixels, texts):
    images, captions = encode_image(pixels), encode_text(texts)
    return padded(
        [
            torch.cat([image[:1], text[valid]])
            for image, text, valid in zip(images.tokens, captions.tokens, captions.valid)
        ]
    )


MODEL = DualEncoder(
    encode_image, encode_text, 2, "token-wise", similarity=token_similarity, weights=lambda: {"w": torch.ones(1)}
)


def images(count, seed=0):
    return torch.randint(256, (count, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def embedded(pixels, batch_size=4):
    starts = range(0, len(pixels), batch_size)
    return embed_images(
        MODEL, [(list(range(s, min(s + batch_size, len(pixels)))), pixels[s : s + batch_size], []) for s in starts]
    )


def loop_scores(pixels, texts):
    return loop_similarity(encode_image(pixels), encode_text(texts)).numpy()


def captions_of(index):
    return [f"caption {index}", f"one more caption of {index}"][: 1 + index % 2]


@pytest.fixture(params=[7, 8_000_000], autouse=True)
def block_size(request, monkeypatch):
    """Everything holds for blocks of single comparisons, and for one block."""
    monkeypatch.setattr(embeds_module, "_CHUNK", request.param)


def test_embeds_of_batches_are_padded_and_kept_as_they_are():
    pixels = images(9)
    result = embedded(pixels, batch_size=2)
    expected = encode_image(pixels)
    assert isinstance(result.embeds, TokenEmbeds)
    assert torch.equal(result.embeds.tokens, expected.tokens)
    assert torch.equal(result.embeds.valid, expected.valid)
    encoded = []
    counting = replace(MODEL, encode_text=lambda texts: encoded.extend(texts) or encode_text(texts))
    texts = ["a", "a long text", "a", "two words"]
    assert torch.equal(embed_texts(counting, texts, batch_size=1).tokens, encode_text(texts).tokens)
    assert sorted(encoded) == sorted(set(texts))
    joint = embed_joint(MODEL, encode_joint, pixels[:4], texts, batch_size=3)
    assert torch.equal(joint.tokens, encode_joint(pixels[:4], texts).tokens)


def test_invalid_embeds_are_rejected():
    with pytest.raises(UserError, match="token-wise: text embeddings are not finite for 1 of 2"):
        embed_texts(
            replace(MODEL, encode_text=lambda texts: padded([torch.ones(1, DIM), torch.full((1, DIM), torch.nan)])),
            ["a", "b"],
        )
    with pytest.raises(ValueError, match="'valid': 1"):
        embed_texts(
            replace(MODEL, encode_text=lambda texts: TokenEmbeds(torch.ones(2, 1, DIM), torch.ones(1, 1))), ["a", "b"]
        )
    with pytest.raises(ValueError, match=r"returned shape TokenEmbeds .* expected \[batch, dim\]"):
        embed_texts(replace(MODEL, similarity=dot_product), ["a", "b"])


def test_retrieval_ranks_by_the_similarity():
    pixels = images(12)
    evaluation = retrieve(MODEL, embedded(pixels), captions_of)
    texts = [text for index in range(12) for text in captions_of(index)]
    image_of_text = np.array([index for index in range(12) for _ in captions_of(index)])
    scores = loop_scores(pixels, texts)  # [image, text]
    result = evaluation.result
    for row, text in enumerate(image_of_text):
        assert result.text_to_image.ranks[row] == 1 + (scores[:, row] > scores[text, row]).sum()
    for row in range(12):
        best = scores[row, image_of_text == row].max()
        assert result.image_to_text.ranks[row] == 1 + (scores[row, image_of_text != row] > best).sum()
    np.testing.assert_allclose(result.image_to_text.top_scores, -np.sort(-scores, 1)[:, :10], rtol=1e-5)
    assert result.modality_gap is None
    assert "modality_gap" not in by_name(result.metrics())
    folds = retrieve_in_folds(MODEL, embedded(pixels), captions_of, range(12), fold=6)
    separate = [
        retrieve(MODEL, embedded(pixels[start : start + 6]), lambda index, start=start: captions_of(start + index))
        for start in (0, 6)
    ]
    for pooled, *parts in zip(folds.metrics, *(evaluation.result.metrics() for evaluation in separate), strict=True):
        assert all(part.name == pooled.name for part in parts)
        np.testing.assert_array_equal(pooled.outcome.values, np.concatenate([part.outcome.values for part in parts]))


def test_a_class_has_the_mean_similarity_of_its_prompts():
    pixels, names = images(20), ["cat", "big dog", "cow"]
    templates = ["{}", "a photo of a {}", "the {} there"]
    labels = {index: index % 3 for index in range(18)}
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    result = classify(MODEL, embedded(pixels), labels, names, prompts).result
    scores = np.stack([loop_scores(pixels[:18], group).mean(1) for group in prompts], 1)  # [image, class]
    assert result.predictions.tolist() == scores.argmax(1).tolist()
    single = np.stack([loop_scores(pixels[:18], group[:1])[:, 0] for group in prompts], 1)
    assert single.argmax(1).tolist() != scores.argmax(1).tolist()  # the other templates matter


def test_foils_and_pairs():
    pixels = images(10)
    foils = [
        Foil(index, f"kind {index % 2}", "swap", f"true {index}", f"false {index}")
        for index in (3, 1, 3, *range(2, 10))
    ]
    found = by_name(evaluate_foils(MODEL, embedded(pixels), foils).result)["mean_per_kind"]
    for foil, correct in zip(foils, found.outcome.values, strict=True):
        true, false = loop_scores(pixels[foil.index : foil.index + 1], [foil.true, foil.false])[0]
        assert correct == (true > false)
    assert 0 < found.value < 1
    pixels, expected = images(60), []
    for first in range(0, 60, 2):
        scores = loop_scores(pixels[first : first + 2], [f"caption {first}", f"caption {first + 1}"])
        text, image = all(scores.argmax(1) == [0, 1]), all(scores.argmax(0) == [0, 1])
        expected.append((text, image, text and image))
    pairs = values(evaluate_pairs(MODEL, embedded(pixels), lambda index: f"caption {index}"))
    assert pairs == pytest.approx(dict(zip(("text", "image", "group"), np.mean(expected, 0).tolist())))
    assert 0 < pairs["text"] < 1


def test_guidance():
    pixels, names, templates = images(9), ["cat", "big dog", "cow", "small bird"], ["a {}", "the {} there"]
    labels = {index: index % 4 for index in range(9)}
    found = bootstrapped_guidance(
        MODEL, encode_joint, [(list(range(9)), pixels, [])], labels, class_prompts(names, templates), top_k=2
    )
    correct = {metric.name: metric.outcome.values for metric in found}
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    for row in range(9):
        one = pixels[row : row + 1]
        scores = np.array([loop_scores(one, group).mean() for group in prompts])
        top = (-scores).argsort()[:2]
        guided = [
            float(loop_similarity(encode_joint(one, [prompts[c][0]]), encode_text(prompts[c])).mean()) for c in top
        ]
        assert correct["plain"][row] == (top[0] == labels[row])
        assert correct["guided"][row] == (top[int(np.argmax(guided))] == labels[row])
    queries = [
        GuidedQuery(i, f"guide {i}", (f"one {i}", f"two {i}", f"three {i}")[: 2 + i % 2], i % 2) for i in range(9)
    ]
    found = guided_classification(MODEL, encode_joint, pixels.__getitem__, queries)
    correct = {metric.name: metric.outcome.values for metric in found}
    for i, query in enumerate(queries):
        alone = loop_scores(pixels[i : i + 1], query.candidates)[0].argmax()
        both = loop_similarity(encode_joint(pixels[i : i + 1], [query.guide]), encode_text(query.candidates))[
            0
        ].argmax()
        assert correct["plain"][i] == (alone == query.target)
        assert correct["guided"][i] == (both == query.target)
    assert correct["plain"].tolist() != correct["guided"].tolist()


def test_cache_restores_the_embeds(tmp_path):
    calls = []
    counting = replace(
        MODEL,
        encode_image=lambda pixels: calls.append("image") or encode_image(pixels),
        encode_text=lambda texts: calls.append("text") or encode_text(texts),
    )
    for expected in (4, 2):  # two fingerprints, and two batches that are cached the second time
        calls.clear()
        model = cached(counting, tmp_path)
        image, text = model.encode_image(images(3)), model.encode_text(["a", "b c d"])
        assert len(calls) == expected
        for embeds, own in ((image, encode_image(images(3))), (text, encode_text(["a", "b c d"]))):
            assert isinstance(embeds, TokenEmbeds)
            assert torch.equal(embeds.tokens, own.tokens)
            assert torch.equal(embeds.valid, own.valid)


def test_bfloat16_check_compares_every_field():
    def rounds(texts):
        tokens, valid = encode_text(texts)
        return TokenEmbeds(tokens @ torch.eye(DIM), valid)  # a matrix product is in bfloat16 under autocast

    model = in_bfloat16(replace(MODEL, encode_text=rounds), "cpu")
    embeds = model.encode_text(["a", "b c"])
    assert embeds.tokens.dtype == torch.float32
    assert not torch.equal(embeds.tokens, encode_text(["a", "b c"]).tokens)

    def masks(texts):
        tokens, valid = rounds(texts)
        return TokenEmbeds(
            tokens, valid & (tokens @ torch.ones(DIM, DIM))[..., 0].sub(tokens.float().sum(-1)).abs().lt(1e-9)
        )

    def cancels(texts):
        tokens, valid = encode_text(texts)
        return TokenEmbeds((tokens + 1000) @ torch.eye(DIM) - (tokens * 0 + 1000) @ torch.eye(DIM), valid)

    for broken in (masks, cancels):
        with pytest.raises(UserError, match="the cosine between its text embeddings"):
            in_bfloat16(replace(MODEL, encode_text=broken), "cpu").encode_text(["a", "b c", "d e f"])


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_texts_are_sharded(count, world_size):
    texts = [" ".join(f"{number}" * (1 + number % 3)) for number in range(count)]
    parts = [encode_text(texts[rank::world_size]) for rank in range(world_size)] if count >= world_size else []
    sharded = shard_texts(MODEL, 1, world_size, lambda own: [*parts[:1], own, *parts[2:]]).encode_text(texts)
    assert torch.equal(sharded.tokens, encode_text(texts).tokens)
    assert torch.equal(sharded.valid, encode_text(texts).valid)


def test_transposed_and_moved_similarities():
    one, other = encode_image(images(3)), encode_text(["a b c", "d"])
    torch.testing.assert_close(transposed(token_similarity)(other, one), loop_similarity(one, other).T)
    assert transposed(dot_product) is dot_product
    device = torch.device("cpu")
    assert on_device(dot_product, device) is dot_product
    weight = nn.Parameter(torch.ones(1))
    moved = on_device(lambda x, y: token_similarity(x, y) * weight, device)
    assert not moved(one, other).requires_grad
    one.tokens.requires_grad_()
    moved(one, other).sum().backward()
    assert one.tokens.grad is not None


class Encoder(nn.Module):
    """Pixels of 2 × 2, or texts of digits, to tokens: one per color, or one per word."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.words = nn.ModuleList(nn.Linear(4, width) for _ in range(3)), nn.Embedding(10, width)

    def forward(self, inputs):
        if isinstance(inputs, torch.Tensor):
            tokens = torch.stack([self.linear[c](inputs[:, c].flatten(1).float() / 255) for c in range(3)], 1)
            return TokenEmbeds(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        ids = [torch.tensor([int(word) if word.isdigit() else 0 for word in text.split()]) for text in inputs]
        valid = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True).bool()
        tokens = self.words(nn.utils.rnn.pad_sequence(ids, batch_first=True))
        return TokenEmbeds(tokens * valid[..., None], valid)


def colored(count, seed):
    """Images in three classes by color."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = rng.integers(0, 120, (count, 3, 2, 2))
    pixels[np.arange(count), labels] += 100
    return torch.from_numpy(pixels.astype(np.uint8)), dict(enumerate(labels.tolist()))


def test_fine_tuned_classifier_learns():
    torch.manual_seed(0)
    image, text = Encoder(8), Encoder(8)
    model = DualEncoder(None, text, 2, similarity=token_similarity)
    classes = embed_classes(model, class_prompts(["1", "2 3", "4"], ["{}", "5 {}"]))
    classifier = Classifier(image, classes, 10.0, 2, token_similarity)
    (pixels, labels), (test, test_labels) = colored(300, 0), colored(200, 1)
    scores = loop_similarity(image(test[:4]), classes.embeds).view(4, 3, 2).mean(2)
    torch.testing.assert_close(classifier(test[:4]), 10 * scores)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    assert [name for name, _ in classifier.head.named_buffers()] == ["class_valid"]
    batches = [(list(range(s, min(s + 64, 300))), pixels[s : s + 64], []) for s in range(0, 300, 64)]
    fine_tune(classifier, lambda epoch: batches, 300, labels, FineTuneConfig(epochs=20, lr=3e-2))
    assert not torch.equal(classifier.head.class_tokens, start["head.class_tokens"])
    found = values(evaluate_interpolated(classifier, start, [(list(range(200)), test, [])], test_labels, 3))
    assert found["alpha_0.acc1"] < 0.6 < 0.9 < found["acc1"]


def test_fine_tuned_encoders_learn():
    torch.manual_seed(0)
    image, text = Encoder(8), Encoder(8)
    retriever = Retriever(image, text, 10.0, 2, token_similarity)
    pixels, labels = colored(60, 0)
    texts = [f"{labels[i] + 1} {i % 3 + 4}" for i in range(4)]
    logits = 10 * loop_similarity(image(pixels[:4]), text(texts))
    same = torch.tensor([[float(one == other) for other in texts] for one in texts])
    targets = same / same.sum(1, keepdim=True)
    expected = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(retriever.loss(pixels[:4], texts), expected)
    start = {name: value.clone() for name, value in retriever.state_dict().items()}
    batches = [(list(range(s, s + 10)), pixels[s : s + 10], []) for s in range(0, 60, 10)]

    def captions(index):
        return [f"{labels[index] + 1}"]

    fine_tune_retrieval(
        retriever, lambda epoch: batches, 60, captions, FineTuneConfig(epochs=20, lr=3e-2, batch_size=10)
    )
    result, _ = evaluate_interpolated_retrieval(retriever, start, batches, captions, 2)
    recalls = [result.by_alpha[alpha].image_to_text.recall[1].value for alpha in (0.0, 1.0)]
    assert recalls[0] < 0.6 < 0.9 < recalls[1]


def test_take_keeps_the_type():
    assert isinstance(take(encode_text(["a", "b"]), [0]), TokenEmbeds)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pairs():
    """Comparing all tokens of 500 images and 4,000 texts at once would take 7.8 GB, and keeping a result per block fragments the heap."""
    code = """
import resource, torch
from coalign.evaluation.retrieval import retrieval
from helpers.token_wise import TokenEmbeds, token_similarity

def embeds(number, tokens):
    return TokenEmbeds(torch.randn(number, tokens, 16), torch.ones(number, tokens, dtype=torch.bool))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

images, texts = embeds(500, 49), embeds(4000, 20)
before = peak()
retrieval(images, texts, torch.arange(4000) // 8, similarity=token_similarity)
print(peak() - before)
"""
    path = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(embeds_module.__file__).parents[1])))
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 500_000  # KiB
