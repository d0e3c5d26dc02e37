"""Fine-tuning for retrieval: its loss, which weights it trains and how fast, that it learns, and the weights between."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coalign.evaluation.embed import embed_images
from coalign.evaluation.finetune import ALPHAS, FineTuneConfig
from coalign.evaluation.finetune_retrieval import Retriever, fine_tune_retrieval, retrieval_between
from coalign.evaluation.retrieval import retrieve
from coalign.optim import Optimisers
from coalign.types import DualEncoder

WORDS = ("red", "green", "blue", "dark", "light", "plain")


class Image(nn.Module):
    """A stem, two blocks, and a text tower that images do not pass."""

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
        self.table = nn.Embedding(len(WORDS) + 1, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU())])
        self.shared = shared

    def forward(self, texts):
        known = {word: number for number, word in enumerate(WORDS)}
        x = torch.stack([self.table(torch.tensor([known.get(w, 6) for w in text.split()])).mean(0) for text in texts])
        x = x + self.blocks[0](x)
        return x if self.shared is None else self.shared(x)


def pairs(count, seed):
    """Pictures of 2 x 2 pixels of three colours, each dark or light, and what they show."""
    rng = np.random.default_rng(seed)
    colour, light = rng.integers(0, 3, count), rng.integers(0, 2, count)
    pixels = rng.integers(0, 40, (count, 3, 2, 2))
    pixels[np.arange(count), colour] += (60 + 120 * light)[:, None, None]
    captions = [(f"{WORDS[3 + b]} {WORDS[a]}", f"plain {WORDS[3 + b]} {WORDS[a]}") for a, b in zip(colour, light)]
    return torch.from_numpy(pixels.astype(np.uint8)), captions


@pytest.fixture
def retriever():
    torch.manual_seed(0)
    return Retriever(Image(), Text(), 10.0, 2)


def test_the_loss_is_infonce_with_equal_texts_as_right(retriever):
    pixels = pairs(5, 0)[0]
    texts = ["dark red", "light blue", "dark red", "plain", "dark red"]
    logits = 10 * F.normalize(retriever.image(pixels)) @ F.normalize(retriever.text(texts)).T
    total = 0.0
    for one in range(5):
        right = [other for other in range(5) if texts[other] == texts[one]]
        for row in (logits[one], logits[:, one]):
            total -= sum(row.log_softmax(0)[other] for other in right) / len(right)
    torch.testing.assert_close(retriever.loss(pixels, texts), total / 10)


def test_layers_lie_side_by_side_from_the_last(retriever):
    names = {parameter: name for name, parameter in retriever.named_parameters()}
    found = [{names[parameter] for parameter in layer} for layer in retriever.layers]
    assert found == [
        {"image.stem.weight", "image.stem.bias"},
        {"image.blocks.0.0.weight", "image.blocks.0.0.bias", "text.table.weight"},
        {"image.blocks.1.0.weight", "image.blocks.1.0.bias", "text.blocks.0.0.weight", "text.blocks.0.0.bias"},
    ]


def test_what_both_pass_is_trained_once_and_in_its_place():
    shared = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    shared.forward = lambda x: shared[1](shared[0](x))
    retriever = Retriever(Image(shared), Text(shared), 10.0, 2)
    trained = [parameter for layer in retriever.layers for parameter in layer]
    assert len(trained) == len(set(trained)) == len(list(retriever.parameters())) - 1  # but the scale
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained)
    place = {id(parameter): depth for depth, layer in enumerate(retriever.layers) for parameter in layer}
    assert place[id(shared[1][0].weight)] == 4
    assert place[id(retriever.image.blocks[1][0].weight)] == place[id(retriever.text.blocks[0][0].weight)] == 2


def test_it_learns_and_measures_the_weights_between(retriever):
    pixels, captions = pairs(300, 0)
    test, of_test = pairs(60, 1)
    start = copy.deepcopy(retriever.state_dict())
    batches = [(list(range(s, min(s + 64, 300))), pixels[s : s + 64], []) for s in range(0, 300, 64)]
    fine_tune_retrieval(retriever, lambda epoch: batches, 300, captions.__getitem__, FineTuneConfig(epochs=20, lr=3e-2))
    end = copy.deepcopy(retriever.state_dict())
    asked = [(list(range(60)), test, ["bad"])]
    result, bad = retrieval_between(retriever, start, asked, of_test.__getitem__, 2)
    assert bad == ["bad"]
    assert list(result.by_alpha) == list(ALPHAS)
    assert all(torch.equal(value, end[name]) for name, value in retriever.state_dict().items())
    before, after = (result.by_alpha[alpha].image_to_text.recall[1].value for alpha in (0.0, 1.0))
    assert before < 0.4 < 0.9 < after
    values = result.to_json()
    assert values["text_retrieval_recall@1"] == values["intervals"]["image to text R@1, fine-tuned"]["value"] == after
    half = Retriever(Image(), Text(), 10.0, 2)  # a point between, by hand
    half.load_state_dict({name: (start[name] + end[name]) / 2 for name in start})
    encoder = DualEncoder(half.image, half.text, 2)
    by_hand = retrieve(encoder, embed_images(encoder, asked), of_test.__getitem__).result
    assert result.by_alpha[0.5].to_json() == by_hand.to_json()


def test_the_rate_ends_where_the_steps_do(retriever, monkeypatch):
    """A last batch of one pair, which has nothing to be told from, is no step."""
    pixels, captions = pairs(65, 0)
    batches = [([*range(64)], pixels[:64], []), ([64], pixels[64:], [])]
    asked = []
    original = Optimisers.set_lr
    monkeypatch.setattr(
        Optimisers, "set_lr", lambda self, step, total: asked.append((step, total)) or original(self, step, total)
    )
    fine_tune_retrieval(retriever, lambda epoch: batches, 65, captions.__getitem__, FineTuneConfig(epochs=3))
    assert asked == [(0, 3), (1, 3), (2, 3)]


def test_deep_layers_move_less(retriever):
    pixels, captions = pairs(60, 0)
    start = copy.deepcopy(retriever.state_dict())
    config = FineTuneConfig(epochs=1, lr=1e-3, layer_decay=0.5, weight_decay=0.0, batch_size=6)
    batches = [([*range(6)], pixels[:6], [])] * 2  # the second step is the first after the warm-up's zero
    fine_tune_retrieval(retriever, lambda epoch: batches, 60, lambda index: captions[index][:1], config)
    moved = {name: float((value - start[name]).abs().median()) for name, value in retriever.state_dict().items()}
    assert moved["log_scale"] == pytest.approx(2 * moved["text.blocks.0.0.weight"], rel=0.2)
    assert moved["text.blocks.0.0.weight"] == pytest.approx(moved["image.blocks.1.0.weight"], rel=0.2)
    assert moved["image.blocks.1.0.weight"] == pytest.approx(2 * moved["image.blocks.0.0.weight"], rel=0.2)
    assert moved["image.blocks.0.0.weight"] == pytest.approx(2 * moved["image.stem.weight"], rel=0.2)
