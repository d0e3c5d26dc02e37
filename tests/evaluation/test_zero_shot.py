from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import by_name, values
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from coalign.data.text.prompts import class_prompts
from coalign.errors import UserError
from coalign.evaluation import zero_shot as module
from coalign.evaluation.embed import embed_images
from coalign.evaluation.zero_shot import ClassEmbeds, class_scores, classify, embed_classes, zero_shot
from coalign.types import DualEncoder, dot_product


def random_problem(images: int, classes: int, dim: int = 16):
    generator = torch.Generator().manual_seed(images + classes)
    weights = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    labels = torch.randint(0, classes, (images,), generator=generator)
    embeds = F.normalize(weights[labels] + 0.5 * torch.randn(images, dim, generator=generator), dim=1)
    return embeds, labels, ClassEmbeds(weights), [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("chunk", [8_000_000, 30])
def test_matches_scikit_learn(monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    embeds, labels, weights, names = random_problem(300, 12)
    result = zero_shot(embeds, labels, weights, names)
    scores, truth = (embeds @ weights.embeds.T).numpy(), labels.numpy()
    predictions = scores.argmax(1)
    np.testing.assert_array_equal(result.predictions, predictions)
    found = values(result.metrics)
    assert 0.3 < found["acc1"] < 0.99  # neither trivial nor impossible
    assert found["acc1"] == pytest.approx(accuracy_score(truth, predictions))
    assert found["acc5"] == pytest.approx(top_k_accuracy_score(truth, scores, k=5, labels=range(12)))
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, predictions))
    np.testing.assert_array_equal(result.confusion, confusion_matrix(truth, predictions, labels=range(12)))
    assert result.per_class == pytest.approx(list(np.diag(result.confusion) / result.confusion.sum(1)))
    assert all(metric.low < metric.value < metric.high for metric in result.metrics)


def test_metrics_have_clip_benchmarks_names_and_outcomes_per_image():
    result = zero_shot(*random_problem(50, 8))
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in result.metrics] == [
        ("acc1", "Zero-shot top-1", "rate", 1 / 8, 50),
        ("acc5", "Zero-shot top-5", "rate", 5 / 8, 50),
        ("mean_per_class_recall", "Zero-shot mean per class", "rate", 1 / 8, 50),
    ]
    top1, top5, per_class = (metric.outcome for metric in result.metrics)
    for outcome in (top1, per_class):
        np.testing.assert_array_equal(outcome.values, result.predictions == result.labels)
    np.testing.assert_array_equal(per_class.groups, result.labels)
    assert set(top5.values[top1.values == 1]) == {1}
    assert [outcome.statistic for outcome in (top1, top5, per_class)] == ["mean", "mean", "mean per class"]


def test_repeated_class_names_are_numbered():
    embeds, labels, weights, _ = random_problem(60, 4)
    result = zero_shot(embeds, labels, weights, ["crane", "dog", "crane", "crane"])
    assert result.per_class_recalls() == dict(zip(("crane", "dog", "crane (2)", "crane (3)"), result.per_class))


def test_top5_needs_more_than_five_classes():
    assert "acc5" not in by_name(zero_shot(*random_problem(20, 5)).metrics)
    assert "acc5" in by_name(zero_shot(*random_problem(20, 6)).metrics)


def test_collapsed_model_scores_exactly_chance():
    embeds, labels, weights, names = random_problem(40, 10)
    same = weights.embeds[:1].expand_as(weights.embeds)
    noise = 1e-8 * torch.randn(same.shape, generator=torch.Generator().manual_seed(9))
    result = zero_shot(embeds[:1].expand_as(embeds), labels, ClassEmbeds(same + noise), names)
    found = by_name(result.metrics)
    for name, chance in (("acc1", 0.1), ("acc5", 0.5)):
        assert found[name].value == pytest.approx(chance)
        assert found[name].chance == pytest.approx(chance)


def test_single_class_and_image():
    result = zero_shot(torch.ones(1, 1), torch.tensor([0]), ClassEmbeds(torch.ones(1, 1)), ["thing"])
    assert [(m.name, m.value, m.low, m.high, m.chance) for m in result.metrics] == [
        ("acc1", 1.0, 1.0, 1.0, 1.0),
        ("mean_per_class_recall", 1.0, 1.0, 1.0, 1.0),
    ]


def test_classes_without_images_do_not_count():
    embeds, labels, weights, names = random_problem(60, 6)
    keep = labels != 3
    result = zero_shot(embeds[keep], labels[keep], weights, names)
    assert result.per_class[3] is None
    mean = np.mean([rate for rate in result.per_class if rate is not None])
    assert values(result.metrics)["mean_per_class_recall"] == pytest.approx(mean)


def test_invalid_inputs():
    embeds, labels, weights, names = random_problem(10, 6)
    with pytest.raises(UserError, match="nothing to classify"):
        zero_shot(embeds[:0], labels[:0], weights, names)
    with pytest.raises(UserError, match="not finite"):
        zero_shot(torch.full_like(embeds, torch.nan), labels, weights, names)
    with pytest.raises(ValueError, match="labels range from 7 to 11, but there are 6 classes"):
        zero_shot(embeds, labels + 6, weights, names)


VECTORS: dict[str, torch.Tensor] = {}


def encode_text(texts):
    """A random but fixed vector for each text, not normalized."""
    for text in texts:
        VECTORS.setdefault(text, 3 * torch.randn(8, generator=torch.Generator().manual_seed(len(VECTORS))))
    return torch.stack([VECTORS[text] for text in texts])


def test_embed_classes_are_normalized_means_of_normalized_embeddings():
    model = DualEncoder(lambda pixels: pixels, encode_text, 4)
    templates = ["a photo of a {}.", "{}", "the {} and {}"]
    weights = embed_classes(model, class_prompts(["cat", "dog {x}"], templates)).embeds
    for row, name in zip(weights, ["cat", "dog {x}"]):
        prompts = [f"a photo of a {name}.", name, f"the {name} and {name}"]
        mean = sum(VECTORS[p] / VECTORS[p].norm() for p in prompts) / 3
        torch.testing.assert_close(row, mean / mean.norm())


@pytest.mark.parametrize("own_similarity", [False, True])
def test_classes_may_have_different_numbers_of_prompts(own_similarity):
    """The reference is a loop over images, classes and prompts."""
    similarity = (lambda images, texts: images @ texts.T) if own_similarity else dot_product
    model = DualEncoder(lambda pixels: pixels, encode_text, 4, similarity=similarity)
    prompts = [["one"], ["two", "three", "four"], ["five", "six"]]
    classes = embed_classes(model, prompts)
    images = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    scores = class_scores(model.similarity, images, classes)
    assert classes.num_classes == 3
    assert scores.shape == (5, 3)
    for image, row in zip(images, scores):
        for own, score in zip(prompts, row):
            if own_similarity:
                expected = sum(image @ VECTORS[prompt] for prompt in own) / len(own)
            else:
                mean = sum(VECTORS[prompt] / VECTORS[prompt].norm() for prompt in own)
                expected = image @ (mean / mean.norm())
            torch.testing.assert_close(score, expected)


def test_classify_from_pixels():
    def encode_color_words(texts):
        return torch.stack([torch.tensor([w in t for w in ("red", "green", "blue")]).float() for t in texts])

    model = DualEncoder(lambda pixels: pixels.float().mean((2, 3)), encode_color_words, 2)
    pixels = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    for i in range(6):
        pixels[i, i % 3] = 200
    batches = [([10, 11, 12, 13], pixels[:4], []), ([14, 15], pixels[4:], ["one bad"])]
    names, templates = ["red", "green", "blue"], ["a {} picture"]
    evaluation = classify(
        model,
        embed_images(model, batches),
        {index: (index - 10) % 3 for index in range(10, 15)},
        names,
        class_prompts(names, templates),
    )
    top1 = by_name(evaluation.result.metrics)["acc1"]
    assert (top1.value, top1.count) == (1.0, 5)  # the sixth has no class
    assert evaluation.images.bad == ["one bad"]
    wrong = classify(
        model,
        embed_images(model, batches),
        {index: (index - 9) % 3 for index in range(10, 16)},
        names,
        class_prompts(names, templates),
    )
    assert values(wrong.result.metrics)["acc1"] == 0.0
