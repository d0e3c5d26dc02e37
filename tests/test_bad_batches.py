"""Degenerate batches: every method must give finite losses and gradients, and keep a finite state."""

from dataclasses import replace

import pytest
import torch
from helpers.builders import build_method, make_batch

from coalign.methods import METHODS
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward, move_statistics
from coalign.types import StepInfo

WORLD = World(0, 1, torch.device("cpu"))
SIZE = 6


def one_caption(batch):
    """All pairs have the same caption: with `multi_positive`, there are no negatives."""
    texts = {
        name: replace(view, ids=view.ids[:1].repeat(len(batch), 1), lengths=view.lengths[:1].repeat(len(batch)))
        for name, view in batch.texts.items()
    }
    return replace(batch, texts=texts, caption_ids=torch.zeros(len(batch), dtype=torch.long))


def with_masks(batch, masked):
    """Masks all tokens except start and end tokens, or none."""
    texts = {}
    for name, view in batch.texts.items():
        labels = None
        if view.labels is not None:
            inside = torch.arange(view.ids.shape[1]) < view.lengths[:, None] - 1
            labels = torch.where(inside & masked, view.ids, -100)
        texts[name] = replace(view, labels=labels)
    return replace(batch, texts=texts)


def shortest_captions(batch):
    """Captions with start and end tokens only."""
    texts = {
        name: replace(
            view,
            ids=view.ids[:, :2],
            lengths=torch.full_like(view.lengths, 2),
            labels=None if view.labels is None else torch.full_like(view.labels[:, :2], -100),
        )
        for name, view in batch.texts.items()
    }
    return replace(batch, texts=texts)


def one_image(batch):
    images = {name: replace(view, pixels=torch.full_like(view.pixels, 128)) for name, view in batch.images.items()}
    return replace(batch, images=images)


BATCHES = {
    "one caption": one_caption,
    "all tokens masked": lambda batch: with_masks(batch, True),
    "no token masked": lambda batch: with_masks(batch, False),
    "empty captions": shortest_captions,
    "one gray image": one_image,
    "one image and one caption": lambda batch: one_image(one_caption(batch)),
    "one pair": lambda batch: batch[slice(0, 1)],
}


@pytest.mark.parametrize("multi_positive", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", BATCHES)
def test_degenerate_batches_give_finite_results(tmp_path, name, kind, multi_positive):
    method = build_method(name, tmp_path, multi_positive=multi_positive)
    method.float()
    with torch.no_grad():
        for parameter_name, parameter in method.named_parameters():
            if "logit_scale" in parameter_name:
                parameter.fill_(4.6)  # τ = 0.01
    batch = BATCHES[kind](make_batch(method.view_plan, SIZE))
    for step in (StepInfo(500, 1000), StepInfo(501, 1000)):  # the second with the queues and teachers of the first
        method.zero_grad()
        result = forward_backward(method, batch, step, WORLD)
        move_statistics(method, WORLD, keep=True)
        method.after_step(result.features, result.targets, RankGather(WORLD), step)
        assert torch.isfinite(torch.tensor([result.loss, *result.terms.values()])).all(), result.terms
        for parameter_name, parameter in method.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    for state_name, value in method.state_dict().items():
        assert not value.is_floating_point() or value.isfinite().all(), state_name
