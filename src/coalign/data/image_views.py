"""Image views: what is drawn (`sample_params`), and the deterministic making of it (`apply`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from coalign.data.image_cache import CachedImage
from coalign.data.images import OpenedImage, open_image
from coalign.types import AugmentationParams, AugmentationPolicy

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GREY = np.tile(LUMA, (3, 1))  # a colour's grey
_CHROMA = (
    np.eye(3) - _GREY
)  # what a colour has beside its grey; hue turns it, in the plane of I and Q of the YIQ colour space
_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_QUARTER_TURN = (
    np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ
)  # from red towards yellow, as HSV's hue


# ---------------------------------------------------------------- drawing


def sample_params(
    generator: np.random.Generator, policy: AugmentationPolicy, size: tuple[int, int]
) -> AugmentationParams:
    """Draw one view of an image of `size` (width, height), with the distributions of torchvision's RandomResizedCrop, ColorJitter,
    RandomGrayscale, GaussianBlur under RandomApply, and RandomHorizontalFlip. The box lies on whole pixels of the full image."""
    left, top, width, height = _box(generator, policy, size)
    # One call for all numbers: calls cost more than numbers. Factors are uniform on [max(0, 1 - strength), 1 + strength].
    u = generator.random(9).tolist()
    changes = [
        -min(1.0, strength) + (min(1.0, strength) + strength) * u[i]
        for i, strength in enumerate((policy.brightness, policy.contrast, policy.saturation))
    ]
    if u[4] >= policy.jitter_p:
        changes = [0.0, 0.0, 0.0]
    least, most = policy.blur_sigma
    return AugmentationParams(
        x=left / size[0],
        y=top / size[1],
        w=width / size[0],
        h=height / size[1],
        brightness=changes[0],
        contrast=changes[1],
        saturation=changes[2],
        hue=policy.hue * (2 * u[3] - 1) if u[4] < policy.jitter_p else 0.0,
        blur=least + (most - least) * u[5] if u[6] < policy.blur_p else 0.0,
        flipped=float(u[7] < policy.flip_p),
        greyed=float(u[8] < policy.grey_p),
    )


def _box(
    generator: np.random.Generator, policy: AugmentationPolicy, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels: the central square for the evaluation view, else RandomResizedCrop's box."""
    width, height = size
    if policy.crop_scale is None:
        side = min(size)
        return round((width - side) / 2), round((height - side) / 2), side, side
    (smallest, largest), (narrowest, widest) = policy.crop_scale, policy.crop_ratio
    for _ in range(10):
        u = generator.random(4).tolist()
        area = width * height * (smallest + (largest - smallest) * u[0])
        ratio = narrowest * (widest / narrowest) ** u[1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1)), w, h
    w, h = width, height  # no box of these areas and ratios fits: the largest central one of an allowed ratio
    if width / height < narrowest:
        h = max(1, round(width / narrowest))
    elif width / height > widest:
        w = max(1, round(height * widest))
    return (width - w) // 2, (height - h) // 2, w, h


# ---------------------------------------------------------------- making


def apply(
    image: np.ndarray,
    params: AugmentationParams,
    output_size: int,
    interpolation: str = "bilinear",
    finish: bool = True,
) -> Tensor:
    """Make the view: crop and antialiased resize in one pass, flip, colour, blur. Deterministic. Without `finish`, `device_views` has
    colour and blur still to do.

    image: uint8 [height, width, 3], at full or reduced resolution; the box is rounded to its pixels.
    Returns uint8 [3, output_size, output_size]. `interpolation` is "bilinear" or "bicubic".

    Colour is one affine map in the fixed order brightness, contrast (about the view's mean grey), saturation, hue, grey, clipped
    once at the end. torchvision draws the order at random, clips after every operation and turns hue in HSV; here hue turns in
    YIQ, which keeps the luma. At 0.1 turns the two hues differ by 22 of 255 on average over all colours, at most by about 125;
    3.5 on average between muted ones (channels from 90 to 165).
    """
    view = _crop_resize(image, params, output_size, interpolation)  # [size, size, 3]
    if params.flipped:
        view = view[:, ::-1]
    view = np.ascontiguousarray(view.transpose(2, 0, 1))
    if not finish:
        return torch.from_numpy(view)
    if params.brightness or params.contrast or params.saturation or params.hue or params.greyed:
        view = _colour(view, params)
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
    # What interpolate(antialias=True) calls. It gives planes, which costs as much again as the resizing; into channels-last
    # memory (where it is fast) it writes only when that memory is given.
    result = np.empty((1, size, size, 3), np.uint8)
    source, target = torch.from_numpy(crop[None]).permute(0, 3, 1, 2), torch.from_numpy(result).permute(0, 3, 1, 2)
    _RESIZE[interpolation](source, [size, size], False, None, None, out=target)
    return result[0]


def _colour(view: np.ndarray, params: AugmentationParams) -> np.ndarray:
    """uint8 [3, size, size] -> uint8 [3 (1 if greyed), size, size]."""
    pixels = torch.from_numpy(view).reshape(3, -1).to(torch.float32)
    matrix = torch.from_numpy(grey_matrix(params)[:1] if params.greyed else colour_matrix(params))
    offset = 0.5  # makes the cut to whole numbers below a rounding
    if params.contrast:
        offset -= params.contrast * (1 + params.brightness) * float(pixels.mean(1).numpy() @ LUMA)
    changed = (matrix @ pixels).add_(offset).clamp_(0, 255.5)
    # numpy's cast, because torch's from float to uint8 is slow.
    return changed.numpy().astype(np.uint8).reshape(-1, *view.shape[1:])


def _gain(params: AugmentationParams) -> float:
    return (1 + params.brightness) * (1 + params.contrast)


def grey_matrix(params: AugmentationParams) -> np.ndarray:
    """`colour_matrix` of a view that is made grey."""
    return (_gain(params) * _GREY).astype(np.float32)


def colour_matrix(params: AugmentationParams) -> np.ndarray:
    """What brightness, contrast, saturation and hue, in this order, do to a colour, beside contrast's shift along the grey axis.

    float32 [3, 3], or [view, 3, 3] of parameters that are arrays [view, 1, 1]. Saturation and hue leave grey and luma alone, so that their
    product has this short form.
    """
    angle = 2 * math.pi * params.hue
    colourful = (1 + params.saturation) * (np.cos(angle) * _CHROMA + np.sin(angle) * _QUARTER_TURN)
    return (_gain(params) * (_GREY + colourful)).astype(np.float32)


def blur_weights(sigma: float, size: int) -> np.ndarray:
    """Of the neighbours at distance 1, 2, …, in 256ths, uint16; the pixel's own is what is left of the whole."""
    taps = np.arange(1, min(size - 1, math.ceil(3 * sigma)) + 1)
    half = np.exp(-0.5 * (taps / sigma) ** 2)
    # Rounding sums instead of weights keeps the whole at 256 for any sigma.
    sums = np.rint(np.cumsum(256 * half / (1 + 2 * half.sum())))
    return np.trim_zeros(np.diff(sums, prepend=0).astype(np.uint16), "b")


def _blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with reflected borders, in 16-bit fixed point: uint8 [channel, size, size] -> the same.

    The weights are multiples of 1/256, so that sums fit 16 bits. A channel's three arrays fit a core's cache, all channels' do not.
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
            # As one long row: what runs over a border stays in the padding.
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
    """All views of one image, by name: (uint8 [3, output_size, output_size], what was drawn).

    The parameters are drawn from the size in the header; then the image is decoded once, at the smallest resolution at which no
    view is enlarged that would not be enlarged from the full image. Evaluation views are resized bicubically, as CLIP's are.
    Without `finish`, colour and blur are left to `device_views`. Raises `BadSample` for what cannot be decoded.
    """
    image = open_image(data) if isinstance(data, (bytes, np.ndarray)) else data
    width, height = image.size
    params = {name: sample_params(generators(name), policy, image.size) for name, policy in policies.items()}
    scale = max(max(output_size / (p.w * width), output_size / (p.h * height)) for p in params.values())
    pixels = image.decode(min(1.0, scale))
    return {
        name: (
            apply(pixels, drawn, output_size, "bicubic" if policies[name].crop_scale is None else "bilinear", finish),
            drawn,
        )
        for name, drawn in params.items()
    }
