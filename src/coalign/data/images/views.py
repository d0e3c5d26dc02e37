"""Image views: `sample_params` turns random numbers into augmentation parameters, and `make_views` applies them to some images at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.data.images.cache import CachedImage
from coalign.data.images.colors import finish as finish_colors
from coalign.data.images.decode import TILE, OpenedImage, open_image
from coalign.data.images.evaluation_view import evaluation_view
from coalign.errors import BadSample
from coalign.types import CLIP_PREPROCESS, EVALUATION, AugmentationParams, AugmentationPolicy, Preprocess

AnyImage = OpenedImage | CachedImage
NUM_PARAMS = len(AugmentationParams().vector())
_X, _Y, _W, _H, *_, _BLUR, _FLIPPED, _GRAYED = range(NUM_PARAMS)
BOX_ATTEMPTS = 10
NUM_DRAWS = 9 + 4 * BOX_ATTEMPTS  # uniform numbers per view
HELD_BYTES = 32 << 20  # of undecoded images whose views are made at once


# ---------------------------------------------------------------- sampling parameters


def sample_params(
    draws: np.ndarray, policy: AugmentationPolicy, sizes: np.ndarray, resize_mode: str = "shortest"
) -> np.ndarray:
    """Draws the parameters of one view of each image.

    draws: uniform numbers in [0, 1), float64 [image, NUM_DRAWS]. sizes: int64 [image, 2], width and height. resize_mode: of evaluation
    views, as in `Preprocess`. Returns float64 [image, 11]: the fields of `AugmentationParams` in order. The box of a padded evaluation
    view is larger than the image.

    Distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur under RandomApply, and
    RandomHorizontalFlip. The box is aligned to pixels of the full image; an evaluation view shows its box up to a pixel.
    """
    u = draws.T
    params = np.zeros((NUM_PARAMS, len(draws)))
    is_evaluation = policy.crop_scale is None
    boxes = _evaluation_boxes(sizes, resize_mode) if is_evaluation else _random_boxes(draws[:, 9:], policy, sizes)
    params[:4] = (boxes / np.tile(sizes, 2)).T
    jittered = u[4] < policy.jitter_p
    for row, strength in enumerate((policy.brightness, policy.contrast, policy.saturation), _H + 1):
        least = -min(1.0, strength)  # the factor is uniform on [max(0, 1 - strength), 1 + strength]
        params[row] = np.where(jittered, least + (strength - least) * u[row - _H - 1], 0.0)
    params[_BLUR - 1] = np.where(jittered, policy.hue * (2 * u[3] - 1), 0.0)
    min_sigma, max_sigma = policy.blur_sigma
    params[_BLUR] = np.where(u[6] < policy.blur_p, min_sigma + (max_sigma - min_sigma) * u[5], 0.0)
    params[_FLIPPED] = u[7] < policy.flip_p
    params[_GRAYED] = u[8] < policy.gray_p
    return params.T


def _evaluation_boxes(sizes: np.ndarray, resize_mode: str) -> np.ndarray:
    """The central square, the whole image, or the square around it: boxes (left, top, width, height) in pixels, int64 [image, 4]."""
    if resize_mode == "squash":
        return np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    side = sizes.max(1, keepdims=True) if resize_mode == "longest" else sizes.min(1, keepdims=True)
    sides = np.repeat(side, 2, axis=1)
    return np.concatenate([np.rint((sizes - sides) / 2).astype(np.int64), sides], axis=1)


def _random_boxes(draws: np.ndarray, policy: AugmentationPolicy, sizes: np.ndarray) -> np.ndarray:
    """Random crop boxes: the first of `BOX_ATTEMPTS` drawn boxes that fits, else the largest central box with an allowed ratio.

    draws: [image, 4 · BOX_ATTEMPTS]. Returns boxes (left, top, width, height) in pixels, int64 [image, 4].
    """
    assert policy.crop_scale is not None
    (min_scale, max_scale), (min_ratio, max_ratio) = policy.crop_scale, policy.crop_ratio
    u = draws.reshape(len(draws), 4, BOX_ATTEMPTS)
    width, height = sizes[:, :1], sizes[:, 1:]
    area = width * height * (min_scale + (max_scale - min_scale) * u[:, 0])
    ratio = min_ratio * (max_ratio / min_ratio) ** u[:, 1]
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [image, attempt]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    drawn = np.stack([u[:, 2] * (width - w + 1), u[:, 3] * (height - h + 1), w, h], axis=1)
    first = fits.argmax(1)
    boxes = np.take_along_axis(drawn, first[:, None, None], axis=2)[:, :, 0].astype(np.int64)
    for row in np.flatnonzero(~fits.any(1)).tolist():
        boxes[row] = _largest_box(int(sizes[row, 0]), int(sizes[row, 1]), min_ratio, max_ratio)
    return boxes


def _largest_box(width: int, height: int, min_ratio: float, max_ratio: float) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < min_ratio:
        h = max(1, round(width / min_ratio))
    elif width / height > max_ratio:
        w = max(1, round(height * max_ratio))
    return (width - w) // 2, (height - h) // 2, w, h


# ---------------------------------------------------------------- applying parameters

_RESIZE: Any = torch._C._nn._upsample_bilinear2d_aa


def crop_resize(image: np.ndarray, params: Sequence[float], out: np.ndarray) -> None:
    """Crops and resizes with antialiasing in one pass.

    image: uint8 [height, width, 3], at full or reduced resolution; the box is rounded to its pixels.
    out: uint8 [size, size, 3].
    """
    height, width = image.shape[:2]
    x, y, w, h, *_ = params
    columns, rows = max(1, round(w * width)), max(1, round(h * height))
    left, top = min(round(x * width), width - columns), min(round(y * height), height - rows)
    crop = image[top : top + rows, left : left + columns]
    if crop.shape == out.shape:
        out[:] = crop
        return
    # interpolate(antialias=True) calls the same function, but returns planar memory, and the conversion costs as much as resizing.
    # With `out`, it stays in channels-last memory, where it is fast.
    source, target = (torch.from_numpy(each[None]).permute(0, 3, 1, 2) for each in (crop.copy(), out))
    _RESIZE(source, out.shape[:2], False, out=target)


def apply(
    image: np.ndarray,
    params: AugmentationParams,
    output_size: int,
    finish: bool = True,
) -> Tensor:
    """Makes a view of known parameters: crop and resize, flip, color, blur. Returns uint8 [3, output_size, output_size]."""
    vector = np.array([params.vector()])
    view = np.empty((1, output_size, output_size, 3), np.uint8)
    crop_resize(image, params.vector(), view[0])
    return torch.from_numpy(_finished(view, vector, finish)[0])


def _finished(views: np.ndarray, params: np.ndarray, finish: bool) -> np.ndarray:
    """Flips the views, and applies color and blur unless that is left to the device: [view, size, size, 3] -> [view, 3, size, size]."""
    planar = np.ascontiguousarray(views.transpose(0, 3, 1, 2))
    flipped = np.flatnonzero(params[:, _FLIPPED])
    planar[flipped] = planar[flipped][..., ::-1]
    if finish:
        finish_colors(planar, params)
    return planar


# ---------------------------------------------------------------- all views of some images


def in_groups(images: Iterable[tuple[int, AnyImage]]) -> Iterator[tuple[list[int], list[AnyImage]]]:
    """Groups numbered images whose views to make at once, as lists of numbers and images. Undecoded images take much memory."""
    numbers: list[int] = []
    group: list[AnyImage] = []
    held = 0
    for number, image in images:
        numbers.append(number)
        group.append(image)
        held += image.num_bytes
        if held > HELD_BYTES:
            yield numbers, group
            numbers, group, held = [], [], 0
    if numbers:
        yield numbers, group


@dataclass
class Views:
    """Views of some images."""

    pixels: np.ndarray  # uint8 [view, image, 3, size, size]
    params: np.ndarray  # float64 [view, image, 11], as `sample_params` returns
    failures: dict[int, BadSample]  # by image: those that could not be decoded


def draw_views(
    policies: Mapping[str, AugmentationPolicy],
    uniform: Callable[[str, int], np.ndarray],
    sizes: np.ndarray,
    output_size: int,
    preprocess: Preprocess = CLIP_PREPROCESS,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the parameters of all views, [view, image, 11], and computes the scale at which to decode each image, [image].

    It is the lowest that upsamples no view, except views larger than their box in the full image. Evaluation views need every pixel, except
    of images too large to be converted in one piece. The other arguments are those of `make_views` and `sample_params`.
    """
    params = np.empty((len(policies), len(sizes), NUM_PARAMS))
    for view, (name, policy) in enumerate(policies.items()):
        params[view] = sample_params(uniform(name, NUM_DRAWS), policy, sizes, preprocess.resize_mode)
    scales = np.minimum(1.0, (output_size / (params[:, :, [_W, _H]] * sizes)).max((0, 2), initial=0.0))
    if any(policy.crop_scale is None for policy in policies.values()):
        scales[sizes.prod(1) <= TILE**2] = 1.0
    return params, scales


def make_views(
    images: Sequence[AnyImage],
    policies: Mapping[str, AugmentationPolicy],
    uniform: Callable[[str, int], np.ndarray],
    output_size: int,
    finish: bool = True,
    preprocess: Preprocess = CLIP_PREPROCESS,
) -> Views:
    """Makes all views of some images, from the draws `uniform(view name, NUM_DRAWS)` [image, NUM_DRAWS].

    Parameters are drawn given the sizes in the headers. Each image is then decoded once. `preprocess` has the interpolation and
    the geometry of evaluation views. Without `finish`, color and blur are left to `device_views`.
    """
    sizes = np.array([image.size for image in images], np.int64).reshape(-1, 2)
    params, scales = draw_views(policies, uniform, sizes, output_size, preprocess)
    cropped = np.zeros((len(policies), len(images), output_size, output_size, 3), np.uint8)
    is_evaluation = [policy.crop_scale is None for policy in policies.values()]
    boxes = params[:, :, :4].transpose(1, 0, 2).tolist()
    failures: dict[int, BadSample] = {}
    for row, image in enumerate(images):
        try:
            pixels = image.decode(scales[row])
        except BadSample as bad:
            failures[row] = bad.copy()
            continue
        for view, box in enumerate(boxes[row]):
            if is_evaluation[view]:
                cropped[view, row] = evaluation_view(pixels, output_size, preprocess)
            else:
                crop_resize(pixels, box, cropped[view, row])
    finished = _finished(cropped.reshape(-1, *cropped.shape[2:]), params.reshape(-1, NUM_PARAMS), finish)
    return Views(finished.reshape(*cropped.shape[:2], 3, output_size, output_size), params, failures)


def make_view(
    data: bytes | np.ndarray,
    output_size: int,
    policy: AugmentationPolicy = EVALUATION,
    draws: np.ndarray | None = None,
    preprocess: Preprocess = CLIP_PREPROCESS,
) -> tuple[Tensor, AugmentationParams]:
    """Makes one view of an image: uint8 [3, output_size, output_size]. Raises `BadSample` if the image cannot be decoded.

    draws: uniform numbers in [0, 1), [NUM_DRAWS]. The evaluation view needs none.
    """
    numbers = np.zeros(NUM_DRAWS) if draws is None else draws
    views = make_views(
        [open_image(data)], {"view": policy}, lambda *_: numbers[None], output_size, preprocess=preprocess
    )
    if views.failures:
        raise views.failures[0]
    return torch.from_numpy(views.pixels[0, 0]), AugmentationParams(*views.params[0, 0].tolist())
