"""Fine-tuning for retrieval: the loss, layer-wise learning rates, and interpolated weights."""

import copy

import numpy as np
import pytest
import torch
from helpers.metrics import by_name
from torch import nn
from torch.nn import functional as F

from coalign.evaluation.embed import embed_images
from coalign.evaluation.finetune.classification import ALPHAS, FineTuneConfig
from coalign.evaluation.finetune.retrieval import Retriever, evaluate_interpolated_retrieval, fine_tune_retrieval
from coalign.evaluation.retrieval import retrieve
from coalign.optim import Optimizers
from coalign.types import DualEncoder

WORDS = ("red", "green", "blue", "dark", "light", "plain")


class Image(nn.Module):
    """A stem, two blocks and, optionally, a module shared with the text encoder."""

    def __init__(self, shared=None):
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.shared = shared

    def forward(self, pixels):
        x = self.stem(pixels.float().flatten(1) / 255)
        for block in self.blocks:
            x = x + block(x)
        return x if self.shared is None else self.shared(x)


class Text(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS) + 1, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU())])
        self.shared = shared

    def forward(self, texts):
        word_ids = {word: i for i, word in enumerate(WORDS)}
        x = torch.stack(
            [self.embedding(torch.tensor([word_ids.get(w, 6) for w in text.split()])).mean(0) for text in texts]
        )
        x = x + self.blocks[0](x)
        return x if self.shared is None else self.shared(x)


def pairs(count, seed):
    """Images of 2 x 2 pixels in three colors, each dark or light, with captions."""
    rng = np.random.default_rng(seed)
    color, light = rng.integers(0, 3, count), rng.integers(0, 2, count)
    pixels = rng.integers(0, 40, (count, 3, 2, 2))
    pixels[np.arange(count), color] += (60 + 120 * light)[:, None, None]
    captions = [(f"{WORDS[3 + b]} {WORDS[a]}", f"plain {WORDS[3 + b]} {WORDS[a]}") for a, b in zip(color, light)]
    return torch.from_numpy(pixels.astype(np.uint8)), captions


@pytest.fixture
def retriever():
    torch.manual_seed(0)
    return Retriever(Image(), Text(), 10.0, 2)


def test_loss_is_info_nce_with_equal_texts_as_positives(retriever):
    pixels = pairs(5, 0)[0]
    texts = ["dark red", "light blue", "dark red", "plain", "dark red"]
    logits = 10 * F.normalize(retriever.image(pixels)) @ F.normalize(retriever.text(texts)).T
    total = 0.0
    for one in range(5):
        positives = [other for other in range(5) if texts[other] == texts[one]]
        for row in (logits[one], logits[:, one]):
            total -= sum(row.log_softmax(0)[other] for other in positives) / len(positives)
    torch.testing.assert_close(retriever.loss(pixels, texts), total / 10)


def test_layers_of_both_encoders_are_aligned_at_the_last(retriever):
    names = {parameter: name for name, parameter in retriever.named_parameters()}
    layers = [{names[parameter] for parameter in layer} for layer in retriever.layers]
    assert layers == [
        {"image.stem.weight", "image.stem.bias"},
        {"image.blocks.0.0.weight", "image.blocks.0.0.bias", "text.embedding.weight"},
        {"image.blocks.1.0.weight", "image.blocks.1.0.bias", "text.blocks.0.0.weight", "text.blocks.0.0.bias"},
    ]


def test_shared_parameters_belong_to_the_image_encoder():
    shared = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    shared.forward = lambda x: shared[1](shared[0](x))
    retriever = Retriever(Image(shared), Text(shared), 10.0, 2)
    trained = [parameter for layer in retriever.layers for parameter in layer]
    assert len(trained) == len(set(trained)) == len(list(retriever.parameters())) - 1  # all but the scale
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained)
    depth_of = {id(parameter): depth for depth, layer in enumerate(retriever.layers) for parameter in layer}
    assert depth_of[id(shared[1][0].weight)] == 4
    assert depth_of[id(retriever.image.blocks[1][0].weight)] == depth_of[id(retriever.text.blocks[0][0].weight)] == 2


def test_fine_tuning_learns_and_evaluates_interpolated_weights(retriever):
    pixels, captions = pairs(300, 0)
    test, test_captions = pairs(60, 1)
    start = copy.deepcopy(retriever.state_dict())
    batches = [(list(range(s, min(s + 64, 300))), pixels[s : s + 64], []) for s in range(0, 300, 64)]
    fine_tune_retrieval(retriever, lambda epoch: batches, 300, captions.__getitem__, FineTuneConfig(epochs=20, lr=3e-2))
    end = copy.deepcopy(retriever.state_dict())
    test_batches = [(list(range(60)), test, ["bad"])]
    result, bad = evaluate_interpolated_retrieval(retriever, start, test_batches, test_captions.__getitem__, 2)
    assert bad == ["bad"]
    assert list(result.by_alpha) == list(ALPHAS)
    assert all(torch.equal(value, end[name]) for name, value in retriever.state_dict().items())
    before, after = (result.by_alpha[alpha].image_to_text.recall[1].value for alpha in (0.0, 1.0))
    assert before < 0.4 < 0.9 < after
    tuned = result.by_alpha[1.0].metrics()
    assert result.metrics()[: len(tuned)] == tuned
    others = result.metrics()[len(tuned) :]
    assert [(metric.name, metric.title) for metric in others] == [
        (f"alpha_{alpha}.{side}.r1", f"{title} R@1, {words}")
        for alpha, words in (
            ("0.75", "0.75 of the way"),
            ("0.5", "0.5 of the way"),
            ("0.25", "0.25 of the way"),
            ("0", "zero-shot"),
        )
        for side, title in (("image_to_text", "Image → text"), ("text_to_image", "Text → image"))
    ]
    found = by_name(result.metrics())
    assert found["image_to_text.r1"].value == after
    assert found["alpha_0.image_to_text.r1"].value == before
    assert result.details()["captions"] == 120
    half = Retriever(Image(), Text(), 10.0, 2)  # the midpoint, computed directly
    half.load_state_dict({name: (start[name] + end[name]) / 2 for name in start})
    encoder = DualEncoder(half.image, half.text, 2)
    expected = retrieve(encoder, embed_images(encoder, test_batches), test_captions.__getitem__).result
    gap = "modality_gap"  # sums of other memory layouts differ in the last bit
    assert [m for m in result.by_alpha[0.5].metrics() if m.name != gap] == [
        m for m in expected.metrics() if m.name != gap
    ]
    assert by_name(result.by_alpha[0.5].metrics())[gap].value == pytest.approx(by_name(expected.metrics())[gap].value)
    assert found["alpha_0.5.text_to_image.r1"].value == expected.text_to_image.recall[1].value


def test_schedule_counts_only_batches_with_negatives(retriever, monkeypatch):
    """A last batch of a single pair is skipped."""
    pixels, captions = pairs(65, 0)
    batches = [([*range(64)], pixels[:64], []), ([64], pixels[64:], [])]
    steps = []
    original = Optimizers.set_lr
    monkeypatch.setattr(
        Optimizers, "set_lr", lambda self, step, total: steps.append((step, total)) or original(self, step, total)
    )
    fine_tune_retrieval(retriever, lambda epoch: batches, 65, captions.__getitem__, FineTuneConfig(epochs=3))
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_learning_rate_decays_with_depth(retriever):
    pixels, captions = pairs(60, 0)
    start = copy.deepcopy(retriever.state_dict())
    config = FineTuneConfig(epochs=1, lr=1e-3, layer_decay=0.5, weight_decay=0.0, batch_size=6)
    batches = [([*range(6)], pixels[:6], [])] * 2  # the second step is the first after the warm-up's zero
    fine_tune_retrieval(retriever, lambda epoch: batches, 60, lambda index: captions[index][:1], config)
    updates = {name: float((value - start[name]).abs().median()) for name, value in retriever.state_dict().items()}
    assert updates["log_scale"] == pytest.approx(2 * updates["text.blocks.0.0.weight"], rel=0.2)
    assert updates["text.blocks.0.0.weight"] == pytest.approx(updates["image.blocks.1.0.weight"], rel=0.2)
    assert updates["image.blocks.1.0.weight"] == pytest.approx(2 * updates["image.blocks.0.0.weight"], rel=0.2)
    assert updates["image.blocks.0.0.weight"] == pytest.approx(2 * updates["image.stem.weight"], rel=0.2)
