from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from coalign.data.scenes.drawing import draw, masks
from coalign.data.scenes.layout import COLORS, SHAPES, SPLITS, Pattern, Scene, make_scene


def mirrored(scene: Scene) -> Scene:
    def mirror(pattern: Pattern) -> Pattern:
        return replace(pattern, angle=-pattern.angle, phase_u=-pattern.phase_u)

    return replace(
        scene,
        objects=tuple(replace(o, x=1 - o.x, tilt=-o.tilt, texture=mirror(o.texture)) for o in scene.objects),
        background=mirror(scene.background),
        clutter=tuple(replace(bar, x=1 - bar.x, angle=-bar.angle) for bar in scene.clutter),
        light=(-scene.light[0], scene.light[1]),
    )


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def test_pixels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(4):
            for size in (64, 50):
                pixels = draw(make_scene(0, split, index), size)
                assert pixels.shape == (size, size, 3)
                assert pixels.dtype == np.uint8
                digest.update(pixels.tobytes())
    assert digest.hexdigest() == "ed79cc6e2ddef54fe90d6e38ab1d3c101f6aace6c76f8f51c64ef0a8948690ea"


def test_pixels_are_robust_to_rounding_errors() -> None:
    for index in range(40):
        scene = make_scene(0, "train", index)
        perturbed = replace(
            scene,
            gain=scene.gain * (1 + 1e-13),
            objects=tuple(replace(o, x=o.x * (1 + 1e-13), diameter=o.diameter * (1 - 1e-13)) for o in scene.objects),
        )
        error = difference(draw(scene), draw(perturbed))
        assert error.max() <= 1
        assert error.mean() < 1e-3


@pytest.mark.parametrize("split", SPLITS)
def test_mirrored_scene_is_the_mirrored_image(split: str) -> None:
    """A flipped image is therefore as likely as the image itself: only its facts reveal the flip."""
    for index in range(25):
        scene = make_scene(0, split, index)
        assert difference(draw(mirrored(scene)), draw(scene)[:, ::-1]).max() <= 1
        assert difference(draw(mirrored(scene)), draw(scene)).max() > 5


def test_grayscale_does_not_reveal_the_hue() -> None:
    names = list(COLORS)
    for index in range(60):
        scene = make_scene(0, "train", index)
        gray = np.asarray(Image.fromarray(draw(scene)).convert("L"))
        for shift in (2, 4, 6):  # another hue with the same luma
            other = replace(
                scene,
                objects=tuple(replace(o, color=names[(names.index(o.color) + shift) % 8]) for o in scene.objects),
            )
            assert difference(draw(scene), draw(other)).max() > 40
            error = difference(gray, np.asarray(Image.fromarray(draw(other)).convert("L")))
            assert error.max() <= 3
            assert error.mean() < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_mirror_symmetric(shape: str) -> None:
    scene = make_scene(0, "train", 0)
    item = replace(scene.objects[0], shape=shape, x=0.5, y=0.5, tilt=0.0, diameter=0.7)
    mask = masks(replace(scene, objects=(item,)), 96)[0]
    assert mask.sum() > 500
    np.testing.assert_array_equal(mask, mask[:, ::-1])


def test_shapes_differ_at_the_smallest_size() -> None:
    scene = make_scene(0, "train", 0)
    small = [replace(scene.objects[0], shape=shape, x=0.5, y=0.5, tilt=0.0, diameter=0.14) for shape in SHAPES]
    coverage = masks(replace(scene, objects=tuple(small)), 512).reshape(8, 64, 8, 64, 8).mean((2, 4))
    for i in range(8):
        for j in range(i):
            assert np.abs(coverage[i] - coverage[j]).sum() >= 8  # of about 45 pixels


@pytest.mark.parametrize("size", [64, 200])
def test_boxes_are_tight_around_the_masks(size: int) -> None:
    shapes = set()
    for index in range(120):
        scene = make_scene(0, "train", index)
        object_masks = masks(scene, size)
        assert object_masks.shape == (len(scene.objects), size, size)
        assert object_masks.sum(0).max() == 1  # objects do not overlap
        for item, mask in zip(scene.objects, object_masks):
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # tips can be between pixel centers
            tolerance = 4.0 if item.shape in ("star", "diamond", "triangle", "heart") else 1.0
            np.testing.assert_allclose(box, np.array(item.box) * size, atol=tolerance)
            assert box[0] >= item.box[0] * size - 1
            assert box[2] <= item.box[2] * size + 1
            shapes.add(item.shape)
    assert shapes == set(SHAPES)


def test_boxes_are_exact_at_high_resolution() -> None:
    scene = make_scene(0, "train", 0)
    for shape in SHAPES:
        item = replace(scene.objects[0], shape=shape, x=0.5, y=0.5, tilt=0.02, diameter=0.8)
        rows, columns = np.nonzero(masks(replace(scene, objects=(item,)), 1000)[0])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, np.array(item.box) * 1000, atol=2.5)


def test_objects_stand_out_in_grayscale() -> None:
    for split in ("train", "shifted"):
        contrast = []
        for index in range(150):
            scene = make_scene(0, split, index)
            gray = np.asarray(Image.fromarray(draw(scene)).convert("L")).astype(float)
            object_masks = masks(scene)
            background = gray[~object_masks.any(0)].mean()
            contrast += [abs(gray[mask].mean() - background) for mask in object_masks]
        assert np.quantile(contrast, 0.02) > 10


def test_images_of_different_sizes_agree() -> None:
    errors = []
    for index in range(20):
        downsampled = draw(make_scene(0, "train", index), 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
        errors.append(np.abs(draw(make_scene(0, "train", index), 64) - downsampled).mean())
    assert max(errors) < 4
    assert np.mean(errors) < 2
