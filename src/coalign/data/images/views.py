"""Image views: `sample_params` draws random augmentation parameters, and `apply` applies them deterministically."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from coalign.data.images.cache import CachedImage
from coalign.data.images.decode import OpenedImage, open_image
from coalign.types import AugmentationParams, AugmentationPolicy

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GRAY = np.tile(LUMA, (3, 1))  # projects a color onto its gray value
_CHROMA = np.eye(3) - _GRAY  # the remaining chroma, which a hue shift rotates in the I-Q plane of YIQ color space
_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
# Rotates hue by a quarter turn, from red toward yellow as in HSV.
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ


# ---------------------------------------------------------------- sampling parameters


def sample_params(
    generator: np.random.Generator, policy: AugmentationPolicy, size: tuple[int, int]
) -> AugmentationParams:
    """Draws the parameters of one view of an image of `size` (width, height).

    Distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur under RandomApply, and
    RandomHorizontalFlip. The box is aligned to pixels of the full image.
    """
    left, top, width, height = _box(generator, policy, size)
    # One call for all numbers is faster than nine. Factors are uniform on [max(0, 1 - strength), 1 + strength].
    u = generator.random(9).tolist()
    changes = [
        -min(1.0, strength) + (min(1.0, strength) + strength) * u[i]
        for i, strength in enumerate((policy.brightness, policy.contrast, policy.saturation))
    ]
    if u[4] >= policy.jitter_p:
        changes = [0.0, 0.0, 0.0]
    min_sigma, max_sigma = policy.blur_sigma
    return AugmentationParams(
        x=left / size[0],
        y=top / size[1],
        w=width / size[0],
        h=height / size[1],
        brightness=changes[0],
        contrast=changes[1],
        saturation=changes[2],
        hue=policy.hue * (2 * u[3] - 1) if u[4] < policy.jitter_p else 0.0,
        blur=min_sigma + (max_sigma - min_sigma) * u[5] if u[6] < policy.blur_p else 0.0,
        flipped=float(u[7] < policy.flip_p),
        grayed=float(u[8] < policy.gray_p),
    )


def _box(
    generator: np.random.Generator, policy: AugmentationPolicy, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Draws the crop box (left, top, width, height) in pixels. The evaluation view takes the central square."""
    width, height = size
    if policy.crop_scale is None:
        side = min(size)
        return round((width - side) / 2), round((height - side) / 2), side, side
    (min_scale, max_scale), (min_ratio, max_ratio) = policy.crop_scale, policy.crop_ratio
    for _ in range(10):
        u = generator.random(4).tolist()
        area = width * height * (min_scale + (max_scale - min_scale) * u[0])
        ratio = min_ratio * (max_ratio / min_ratio) ** u[1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1)), w, h
    w, h = width, height  # none of the drawn boxes fits: take the largest central box with an allowed ratio
    if width / height < min_ratio:
        h = max(1, round(width / min_ratio))
    elif width / height > max_ratio:
        w = max(1, round(height * max_ratio))
    return (width - w) // 2, (height - h) // 2, w, h


# ---------------------------------------------------------------- applying parameters


def apply(
    image: np.ndarray,
    params: AugmentationParams,
    output_size: int,
    interpolation: str = "bilinear",
    finish: bool = True,
) -> Tensor:
    """Makes a view: crop and antialiased resize in one pass, flip, color, blur. Deterministic.

    image: uint8 [height, width, 3], at full or reduced resolution; the box is rounded to its pixels.
    interpolation: "bilinear" or "bicubic".
    finish: whether to apply color and blur; if not, `device_views` applies them.
    Returns uint8 [3, output_size, output_size].

    Color is one affine map in the fixed order brightness, contrast (about the view's mean gray), saturation, hue, grayscale, clipped
    once at the end. torchvision draws the order at random, clips after every operation and rotates hue in HSV; here, hue rotates in
    YIQ, which preserves luma. For a rotation by 0.1 turns, the results differ by 22 of 255 on average over all colors and by about 125
    at most; over muted colors (channels from 90 to 165), by 3.5 on average.
    """
    view = _crop_resize(image, params, output_size, interpolation)  # [size, size, 3]
    if params.flipped:
        view = view[:, ::-1]
    view = np.ascontiguousarray(view.transpose(2, 0, 1))
    if not finish:
        return torch.from_numpy(view)
    if params.brightness or params.contrast or params.saturation or params.hue or params.grayed:
        view = _color(view, params)
    if params.blur:
        view = _blur(view, params.blur * output_size / 224)
    return torch.from_numpy(view if len(view) == 3 else view.repeat(3, axis=0))


_RESIZE = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa.out, "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out}


def _crop_resize(image: np.ndarray, params: AugmentationParams, size: int, interpolation: str) -> np.ndarray:
    height, width = image.shape[:2]
    w, h = max(1, round(params.w * width)), max(1, round(params.h * height))
    left, top = min(round(params.x * width), width - w), min(round(params.y * height), height - h)
    crop = image[top : top + h, left : left + w].copy()
    if (w, h) == (size, size):
        return crop
    # interpolate(antialias=True) calls the same operator, but returns planar memory, and the conversion costs as much as resizing.
    # With `out`, the operator stays in channels-last memory, where it is fast.
    result = np.empty((1, size, size, 3), np.uint8)
    source, target = torch.from_numpy(crop[None]).permute(0, 3, 1, 2), torch.from_numpy(result).permute(0, 3, 1, 2)
    _RESIZE[interpolation](source, [size, size], False, None, None, out=target)
    return result[0]


def _color(view: np.ndarray, params: AugmentationParams) -> np.ndarray:
    """uint8 [3, size, size] -> uint8 [3 (1 if grayed), size, size]."""
    pixels = torch.from_numpy(view).reshape(3, -1).to(torch.float32)
    matrix = torch.from_numpy(gray_matrix(params)[:1] if params.grayed else color_matrix(params))
    offset = 0.5  # makes the truncating cast below round
    if params.contrast:
        offset -= params.contrast * (1 + params.brightness) * float(pixels.mean(1).numpy() @ LUMA)
    changed = (matrix @ pixels).add_(offset).clamp_(0, 255.5)
    # numpy casts, because torch casts float to uint8 slowly.
    return changed.numpy().astype(np.uint8).reshape(-1, *view.shape[1:])


def _gain(params: AugmentationParams) -> float:
    return (1 + params.brightness) * (1 + params.contrast)


def gray_matrix(params: AugmentationParams) -> np.ndarray:
    """`color_matrix` of a grayscale view."""
    return (_gain(params) * _GRAY).astype(np.float32)


def color_matrix(params: AugmentationParams) -> np.ndarray:
    """Linear map of brightness, contrast, saturation and hue, applied in this order; contrast also shifts colors along the gray axis.

    Returns float32 [3, 3], or [view, 3, 3] for parameters that are arrays [view, 1, 1]. The form is simple because saturation and hue
    preserve gray and luma.
    """
    angle = 2 * math.pi * params.hue
    colorful = (1 + params.saturation) * (np.cos(angle) * _CHROMA + np.sin(angle) * _QUARTER_TURN)
    return (_gain(params) * (_GRAY + colorful)).astype(np.float32)


def blur_weights(sigma: float, size: int) -> np.ndarray:
    """Blur weights of the neighbors at distance 1, 2, …, uint16 in units of 1/256. The center's weight completes the sum to 256."""
    taps = np.arange(1, min(size - 1, math.ceil(3 * sigma)) + 1)
    half = np.exp(-0.5 * (taps / sigma) ** 2)
    # Rounding cumulative sums instead of weights keeps the total at 256 for any sigma.
    sums = np.rint(np.cumsum(256 * half / (1 + 2 * half.sum())))
    return np.trim_zeros(np.diff(sums, prepend=0).astype(np.uint16), "b")


def _blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with reflected borders, in 16-bit fixed point: uint8 [channel, size, size] -> uint8 [channel, size, size].

    Weights are multiples of 1/256, so that sums fit in 16 bits. Channels are blurred one by one, so that the arrays fit in a core's cache.
    """
    size = view.shape[-1]
    weights = blur_weights(sigma, size)
    radius = len(weights)
    if radius == 0:
        return view
    padded = size + 2 * radius
    source, blurred, pair = np.empty((3, padded * padded), np.uint16)
    image = source.reshape(padded, padded)
    result = np.empty_like(view)
    for channel in range(len(view)):
        image[radius:-radius, radius:-radius] = view[channel]
        image[:radius] = image[2 * radius : radius : -1]
        image[-radius:] = image[-radius - 2 : -2 * radius - 2 : -1]
        image[:, :radius] = image[:, 2 * radius : radius : -1]
        image[:, -radius:] = image[:, -radius - 2 : -2 * radius - 2 : -1]
        for step, read, write in ((1, source, blurred), (padded, blurred, source)):  # along rows, then columns
            # All rows as one long row: values that cross a border end up in the padding.
            np.multiply(read, np.uint16(256 - 2 * int(weights.sum())), out=write)
            for tap, weight in enumerate(weights, 1):
                shift = tap * step
                both, middle = pair[2 * shift :], write[shift:-shift]
                np.add(read[2 * shift :], read[: -2 * shift], out=both)
                np.multiply(both, weight, out=both)
                np.add(middle, both, out=middle)
            write += 128
            write >>= 8
        result[channel] = image[radius:-radius, radius:-radius]
    return result


def make_views(
    data: bytes | np.ndarray | OpenedImage | CachedImage,
    policies: Mapping[str, AugmentationPolicy],
    generators: Callable[[str], np.random.Generator],
    output_size: int,
    finish: bool = True,
) -> dict[str, tuple[Tensor, AugmentationParams]]:
    """Makes all views of one image: name -> (pixels uint8 [3, output_size, output_size], parameters).

    Parameters are drawn given the size in the header. The image is then decoded once, at the lowest resolution that upsamples no view,
    except views larger than their box in the full image. Evaluation views are resized bicubically, as in CLIP. Without `finish`, color and
    blur are left to `device_views`. Raises `BadSample` if the image cannot be decoded.
    """
    image = open_image(data) if isinstance(data, (bytes, np.ndarray)) else data
    width, height = image.size
    params = {name: sample_params(generators(name), policy, image.size) for name, policy in policies.items()}
    scale = max(max(output_size / (p.w * width), output_size / (p.h * height)) for p in params.values())
    pixels = image.decode(min(1.0, scale))
    return {
        name: (
            apply(pixels, view, output_size, "bicubic" if policies[name].crop_scale is None else "bilinear", finish),
            view,
        )
        for name, view in params.items()
    }
