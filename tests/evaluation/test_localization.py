import numpy as np
import pytest
import torch

from coalign.errors import UserError
from coalign.evaluation.localization import (
    Query,
    intersection_over_union,
    localize,
    pointing_hits,
    scaled,
    upsample,
)


def test_hits_and_ious_equal_loops():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(5, 6, 6, generator=generator), torch.rand(5, 6, 6, generator=generator) < 0.3
    hits, ious = pointing_hits(maps, masks), intersection_over_union(maps, masks)
    for number, (heat, mask) in enumerate(zip(maps.numpy(), masks.numpy())):
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert hits[number] == mask[row, column]
        found = {p for p in np.ndindex(6, 6) if (heat[p] - heat.min()) / (heat.max() - heat.min()) > 0.5}
        true = {p for p in np.ndindex(6, 6) if mask[p]}
        assert ious[number] == pytest.approx(len(found & true) / len(found | true))


def test_a_map_that_says_nothing_points_nowhere():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0] = True
    flat = torch.zeros(1, 4, 4)
    assert pointing_hits(flat, masks).item() == 0.25  # all places tie
    assert intersection_over_union(flat, masks).item() == 0
    assert scaled(flat).eq(0).all()


def test_upsampling_keeps_a_corner_in_its_corner():
    maps = torch.zeros(1, 2, 2)
    maps[0, 0, 1] = 1
    row, column = divmod(int(upsample(maps, 8)[0].argmax()), 8)
    assert row < 4 <= column


def test_scores_the_text_the_other_text_and_the_centre():
    """A localizer that knows where "left" and "right" are, on images of which one half is the object."""

    def localizer(pixels, texts):
        maps = torch.zeros(len(texts), 2, 2)
        for heat, text in zip(maps, texts):
            heat[:, 0 if text == "left" else 1] = 1
        return maps

    half = np.zeros((8, 8), bool)
    half[:, :4] = True
    queries = [Query(7, "left", "right", half), Query(8, "right", "left", ~half), Query(8, "left", "right", ~half)]
    result = localize(localizer, lambda index: torch.zeros(3, 8, 8, dtype=torch.uint8), queries)
    assert result.pointing.value == pytest.approx(2 / 3)
    assert result.pointing_other_text.value == pytest.approx(1 / 3)
    assert result.pointing_centre.value == pytest.approx(0.5)
    assert result.iou.value > result.iou_other_text.value
    assert result.hits.tolist() == [1, 1, 0]
    assert result.to_json()["queries"] == 3
    with pytest.raises(UserError, match="nothing to localise"):
        localize(localizer, lambda index: torch.zeros(3, 8, 8), [])
