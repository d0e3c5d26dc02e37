"""Fine-tuning for classification: layer-wise learning rates, frozen parameters, and interpolated weights."""

import copy

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers.metrics import by_name
from torch import nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.finetune.classification import (
    Classifier,
    FineTuneConfig,
    evaluate_interpolated,
    fine_tune,
    layers_by_depth,
    recipe,
)
from coalign.evaluation.zero_shot import ClassEmbeds


class Encoder(nn.Module):
    """A stem, two blocks and a norm, and a text tower that images do not reach."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.text = nn.Linear(3, 3)

    def forward(self, pixels):
        x = self.stem(pixels.float().flatten(1) / 255)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def images(count, seed):
    """Images of 2 x 2 pixels in three classes by color."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = rng.integers(0, 120, (count, 3, 2, 2))
    pixels[np.arange(count), labels] += 100
    return torch.from_numpy(pixels.astype(np.uint8)), dict(enumerate(labels.tolist()))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(Encoder(), ClassEmbeds(F.normalize(torch.randn(3, 8), dim=1)), 10.0, 2)


def test_layers_are_by_depth_without_unused_parameters(classifier):
    encoder = classifier.encoder
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    layers = [[names[parameter] for parameter in layer] for layer in layers_by_depth(encoder)]
    assert layers == [
        ["stem.weight", "stem.bias"],
        ["blocks.0.0.weight", "blocks.0.0.bias"],
        ["blocks.1.0.weight", "blocks.1.0.bias", "norm.weight", "norm.bias"],
    ]
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("make", "count", "last"),
    [
        # stem, and twelve blocks, the last one with everything after it
        (
            lambda: open_clip.create_model("ViT-S-32-alt").visual,
            13,
            {"transformer.resblocks.11.mlp.c_proj.weight", "ln_post.weight"},
        ),
        # stem, and 3 + 4 + 6 + 3 blocks of four stages
        (lambda: timm.create_model("resnet50"), 17, {"layer4.2.conv3.weight", "fc.weight"}),
        (
            lambda: timm.create_model("vit_tiny_patch16_224"),
            13,
            {"blocks.11.mlp.fc2.weight", "norm.weight", "head.bias"},
        ),
    ],
)
def test_layers_of_real_towers(make, count, last):
    tower = make()
    names = {parameter: name for name, parameter in tower.named_parameters()}
    layers = [{names[parameter] for parameter in layer} for layer in layers_by_depth(tower)]
    assert len(layers) == count
    assert last <= layers[-1]
    assert sum(map(len, layers)) == len(names)


def test_fine_tuning_learns_and_keeps_the_text_tower_frozen(classifier):
    pixels, labels = images(300, 0)
    test, test_labels = images(200, 1)
    start = copy.deepcopy(classifier.state_dict())
    batches = [(list(range(s, min(s + 64, 300))), pixels[s : s + 64], []) for s in range(0, 300, 64)]
    fine_tune(classifier, lambda epoch: batches, 300, labels, FineTuneConfig(epochs=20, lr=3e-2))
    end = copy.deepcopy(classifier.state_dict())
    assert torch.equal(end["encoder.text.weight"], start["encoder.text.weight"])
    metrics = evaluate_interpolated(classifier, start, [(list(range(200)), test, [])], test_labels, 3)
    expected = [
        ("acc1", "Fine-tuning top-1"),
        ("mean_per_class_recall", "Fine-tuning mean per class"),
    ]
    for alpha, words in (
        ("alpha_0.75", "0.75 of the way"),
        ("alpha_0.5", "0.5 of the way"),
        ("alpha_0.25", "0.25 of the way"),
        ("alpha_0", "zero-shot"),
    ):
        expected += [(f"{alpha}.{name}", f"{title}, {words}") for name, title in expected[:2]]
    assert [(metric.name, metric.title) for metric in metrics] == expected
    assert {(metric.kind, metric.chance, metric.count) for metric in metrics} == {("rate", 1 / 3, 200)}
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, end[name])
    found = by_name(metrics)
    assert found["alpha_0.acc1"].value < 0.7 < 0.9 < found["acc1"].value
    # the midpoint, computed directly
    half = Classifier(Encoder(), ClassEmbeds(torch.zeros(3, 8)), 10.0, 2)
    half.load_state_dict({name: (start[name] + end[name]) / 2 for name in start})
    correct = half(test).argmax(1) == torch.tensor(list(test_labels.values()))
    np.testing.assert_array_equal(found["alpha_0.5.acc1"].outcome.values, correct)
    assert found["alpha_0.5.acc1"].value == pytest.approx(float(correct.float().mean()))


def test_learning_rate_decays_with_depth(classifier):
    """AdamW's first update of every weight equals the learning rate."""
    pixels, labels = images(60, 0)
    start = copy.deepcopy(classifier.state_dict())
    config = FineTuneConfig(epochs=1, lr=1e-3, layer_decay=0.5, weight_decay=0.0, batch_size=6)
    # the second step is the first after the warm-up's zero
    batches = [([*range(s, s + 6)], pixels[s : s + 6], []) for s in (0, 6)]
    fine_tune(classifier, lambda epoch: batches, 60, labels, config)
    updates = {name: float((value - start[name]).abs().median()) for name, value in classifier.state_dict().items()}
    for shallow, deep in (
        ("head.class_embeds", "encoder.blocks.1.0.weight"),
        ("encoder.blocks.1.0.weight", "encoder.blocks.0.0.weight"),
    ):
        assert updates[shallow] == pytest.approx(2 * updates[deep], rel=0.2)
    assert updates["encoder.blocks.0.0.weight"] == pytest.approx(2 * updates["encoder.stem.weight"], rel=0.2)


def test_recipe_depends_on_dataset_size():
    assert recipe(99_999, 3) == FineTuneConfig(epochs=3)
    large = recipe(100_000, 3)
    assert (large.epochs, large.batch_size, large.weight_decay, large.label_smoothing) == (3, 512, 0.1, 0.0)


def test_no_readable_test_image_raises(classifier):
    with pytest.raises(UserError, match="no readable image"):
        evaluate_interpolated(
            classifier, classifier.state_dict(), [([], torch.zeros(0, 3, 2, 2, dtype=torch.uint8), ["bad"])], {}, 3
        )
