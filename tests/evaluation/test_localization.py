import numpy as np
import pytest
import torch

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
    result = evaluate_localization(localizer, lambda index: torch.zeros(3, 8, 8, dtype=torch.uint8), queries)
    assert result.pointing.value == pytest.approx(2 / 3)
    assert result.pointing_other_text.value == pytest.approx(1 / 3)
    assert result.pointing_center.value == pytest.approx(0.5)
    assert result.iou.value > result.iou_other_text.value
    assert result.hits.tolist() == [1, 1, 0]
    assert result.to_json()["queries"] == 3
    with pytest.raises(UserError, match="nothing to localize"):
        evaluate_localization(localizer, lambda index: torch.zeros(3, 8, 8), [])
