import numpy as np
import pytest
import torch
from helpers.metrics import by_name

from coalign.errors import UserError
from coalign.evaluation.localization import (
    Query,
    evaluate_localization,
    intersection_over_union,
    min_max_scale,
    pointing_hits,
    upsample,
)


def test_hits_and_ious_match_naive_loops():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(5, 6, 6, generator=generator), torch.rand(5, 6, 6, generator=generator) < 0.3
    hits, ious = pointing_hits(maps, masks), intersection_over_union(maps, masks)
    for number, (heat, mask) in enumerate(zip(maps.numpy(), masks.numpy())):
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert hits[number] == mask[row, column]
        predicted = {p for p in np.ndindex(6, 6) if (heat[p] - heat.min()) / (heat.max() - heat.min()) > 0.5}
        target = {p for p in np.ndindex(6, 6) if mask[p]}
        assert ious[number] == pytest.approx(len(predicted & target) / len(predicted | target))


def test_constant_map_scores_chance():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0] = True
    flat = torch.zeros(1, 4, 4)
    assert pointing_hits(flat, masks).item() == 0.25  # all positions tie
    assert intersection_over_union(flat, masks).item() == 0
    assert min_max_scale(flat).eq(0).all()
    assert min_max_scale(flat + 0.3 + 1e-7 * torch.rand_like(flat)).eq(0).all()  # rounding


def test_upsampling_preserves_orientation():
    maps = torch.zeros(1, 2, 2)
    maps[0, 0, 1] = 1
    row, column = divmod(int(upsample(maps, 8)[0].argmax()), 8)
    assert row < 4 <= column


def test_evaluates_text_other_text_and_center():
    """A perfect localizer of "left" and "right", on images whose object is one half."""

    def localizer(pixels, texts):
        maps = torch.zeros(len(texts), 2, 2)
        for heat, text in zip(maps, texts):
            heat[:, 0 if text == "left" else 1] = 1
        return maps

    half = np.zeros((8, 8), bool)
    half[:, :4] = True
    queries = [Query(7, "left", "right", half), Query(8, "right", "left", ~half), Query(8, "left", "right", ~half)]
    found = evaluate_localization(localizer, lambda index: torch.zeros(3, 8, 8, dtype=torch.uint8), queries)
    assert [(metric.name, metric.title, metric.value) for metric in found] == [
        ("pointing", "Pointing game", pytest.approx(2 / 3)),
        ("pointing_other_text", "Pointing game, other text", pytest.approx(1 / 3)),
        ("pointing_center", "Pointing game, image center", pytest.approx(0.5)),
        ("iou", "IoU", pytest.approx(2 / 3)),
        ("iou_other_text", "IoU, other text", pytest.approx(1 / 3)),
    ]
    for metric in found:
        assert (metric.kind, metric.chance, metric.count) == ("rate", None, 3)
        assert metric.outcome.groups.tolist() == [7, 8, 8]
    assert by_name(found)["pointing"].outcome.values.tolist() == [1, 1, 0]
    with pytest.raises(UserError, match="nothing to localize"):
        evaluate_localization(localizer, lambda index: torch.zeros(3, 8, 8), [])
