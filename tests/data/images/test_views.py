from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as tv
from helpers.image_draws import difference, draws, photograph
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp, kstest
from torchvision import transforms

from coalign.data.images.decode import TILE, OpenedImage, open_image
from coalign.data.images.views import NUM_DRAWS, apply, draw_views, make_view, make_views
from coalign.errors import BadSample
from coalign.randomness import Draws
from coalign.types import EVALUATION, STRONG, WEAK, AugmentationParams, AugmentationPolicy, Preprocess

IDENTITY = AugmentationParams()
SIZE = 64


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


# ---------------------------------------------------------------- sampling parameters


@pytest.mark.parametrize(
    ("size", "scale"),
    [((500, 375), (0.08, 1.0)), ((500, 375), (0.5, 1.0)), ((90, 400), (0.5, 1.0)), ((7, 5), (0.08, 1.0))],
)
def test_boxes_have_torchvisions_distribution(size: tuple[int, int], scale: tuple[float, float]) -> None:
    count = 4000
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    )  # top, left, h, w
    policy = AugmentationPolicy(crop_scale=scale)
    ours = np.array([(p.y * size[1], p.x * size[0], p.h * size[1], p.w * size[0]) for p in draws(policy, size, count)])
    assert np.abs(ours - ours.round()).max() < 1e-9  # whole pixels
    assert (ours[:, 0] + ours[:, 2]).max() <= size[1] + 1e-9
    assert (ours[:, 1] + ours[:, 3]).max() <= size[0] + 1e-9
    ours = ours.round()
    for statistic in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1000, 100), (100, 1000), (1, 50), (50, 1), (1, 1)])
def test_fallback_box_is_torchvisions(size: tuple[int, int]) -> None:
    """A crop of the whole area never fits into an elongated image."""
    top, left, height, width = transforms.RandomResizedCrop.get_params(Image.new("L", size), [1.0, 1.0], [3 / 4, 4 / 3])
    (drawn,) = draws(AugmentationPolicy(crop_scale=(1.0, 1.0)), size, 1)
    ours = (drawn.y * size[1], drawn.x * size[0], drawn.h * size[1], drawn.w * size[0])
    assert ours == pytest.approx((top, left, height, width))


def test_jitter_has_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.3, 1.5, 0.1)
    theirs = np.array(
        [
            transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:]
            for _ in range(4000)
        ]
    )
    policy = replace(STRONG, brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1, jitter_p=1.0)
    ours = np.array(
        [(1 + p.brightness, 1 + p.contrast, 1 + p.saturation, p.hue) for p in draws(policy, (500, 375), 4000)]
    )
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert np.abs(np.corrcoef(ours.T) - np.eye(4)).max() < 0.06


def test_probabilities() -> None:
    drawn = draws(STRONG, (500, 375), 4000)
    jittered = np.array([p.hue != 0 for p in drawn])
    assert all((p.brightness != 0) == (p.contrast != 0) == (p.saturation != 0) == (p.hue != 0) for p in drawn)
    events = {"jitter": jittered}
    for name in ("grayed", "flipped", "blur"):
        events[name] = np.array([getattr(p, name) != 0 for p in drawn])
    for name, probability in (("jitter", 0.8), ("grayed", 0.2), ("flipped", 0.5), ("blur", 0.5)):
        assert abs(events[name].mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / len(drawn))
    names = list(events)
    for i, first in enumerate(names):
        for second in names[:i]:
            table = [
                [np.sum((events[first] == a) & (events[second] == b)) for b in (False, True)] for a in (False, True)
            ]
            assert chi2_contingency(table).pvalue > 1e-3
    sigmas = [p.blur for p in drawn if p.blur]
    assert kstest(sigmas, "uniform", args=(0.1, 1.9)).pvalue > 1e-3
    assert {p.flipped for p in drawn} == {p.grayed for p in drawn} == {0.0, 1.0}


def test_weak_and_evaluation_views_change_no_color() -> None:
    for policy in (WEAK, EVALUATION):
        for drawn in draws(policy, (500, 375), 50):
            assert drawn.vector()[4:] == (0.0,) * 7
    assert draws(EVALUATION, (500, 375), 1)[0] == AugmentationParams(x=62 / 500, y=0, w=375 / 500, h=1)
    assert draws(EVALUATION, (30, 50), 1)[0] == AugmentationParams(x=0, y=10 / 50, w=1, h=30 / 50)


# ---------------------------------------------------------------- applying parameters


def test_identity_changes_nothing() -> None:
    image = photograph(SIZE, SIZE)
    view = apply(image, IDENTITY, SIZE)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()
    assert torch.equal(view, tensor(image))
    before = image.copy()
    view.zero_()
    assert (image == before).all()  # no shared memory


@pytest.mark.parametrize("size", [(500, 375), (333, 999), (211, 97)])
def test_the_recorded_box_reproduces_the_pixels(size: tuple[int, int]) -> None:
    """A crop of exactly the output size copies the image's pixels, wherever it is."""
    image = photograph(*size)
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top = int(rng.integers(0, size[0] - SIZE + 1)), int(rng.integers(0, size[1] - SIZE + 1))
        params = AugmentationParams(x=left / size[0], y=top / size[1], w=SIZE / size[0], h=SIZE / size[1])
        assert torch.equal(apply(image, params, SIZE), tensor(image[top : top + SIZE, left : left + SIZE]))
    for params in draws(WEAK, size, 20):
        left, top, w, h = (
            round(v) for v in (params.x * size[0], params.y * size[1], params.w * size[0], params.h * size[1])
        )
        expected = Image.fromarray(image).resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
        )
        assert difference(apply(image, params, SIZE), tensor(np.asarray(expected))).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (20, 30), (64, 65), (2000, 1500)])
def test_resizing_matches_pillow(size: tuple[int, int]) -> None:
    image = photograph(*size)
    expected = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert difference(apply(image, IDENTITY, SIZE), tensor(expected)).max() <= 3


def test_flipping_twice_is_the_identity() -> None:
    image = photograph(SIZE, SIZE)
    flipped = apply(image, replace(IDENTITY, flipped=1.0), SIZE)
    assert torch.equal(flipped, tensor(image[:, ::-1]))
    assert torch.equal(apply(flipped.permute(1, 2, 0).numpy(), replace(IDENTITY, flipped=1.0), SIZE), tensor(image))


def test_flip_commutes_with_everything_else() -> None:
    image = photograph(SIZE, SIZE)
    params = AugmentationParams(brightness=0.2, contrast=-0.1, saturation=0.3, hue=0.05, blur=1.0, grayed=0.0)
    assert torch.equal(apply(image, replace(params, flipped=1.0), 224), apply(image, params, 224).flip(2))


@pytest.mark.parametrize("jitter", [False, True])
def test_gray_has_equal_channels(jitter: bool) -> None:
    image = photograph(SIZE, SIZE, 60, 180)
    params = AugmentationParams(
        grayed=1.0,
        **({"brightness": 0.1, "contrast": 0.2, "saturation": -0.3, "hue": 0.1, "blur": 3.0} if jitter else {}),
    )
    view = apply(image, params, SIZE)
    assert torch.equal(view[0], view[1])
    assert torch.equal(view[0], view[2])
    colorful = apply(image, replace(params, grayed=0.0), SIZE)
    assert difference(view, tv.rgb_to_grayscale(colorful, 3)).max() <= 2


@pytest.mark.parametrize("seed", range(10))
def test_color_matches_torchvision_without_clipping(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = photograph(SIZE, SIZE, 75, 135, seed=seed)
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    expected = tensor(image).float() / 255
    for operation, factor in (
        (tv.adjust_brightness, brightness),
        (tv.adjust_contrast, contrast),
        (tv.adjust_saturation, saturation),
    ):
        expected = operation(expected, factor)
    assert expected.min() > 0
    assert expected.max() < 1
    params = AugmentationParams(brightness=brightness - 1, contrast=contrast - 1, saturation=saturation - 1)
    assert difference(apply(image, params, SIZE), (expected * 255).round()).max() <= 1
    in_bytes = Image.fromarray(image)
    for adjust, factor in (
        (tv.adjust_brightness, brightness),
        (tv.adjust_contrast, contrast),
        (tv.adjust_saturation, saturation),
    ):
        in_bytes = adjust(in_bytes, factor)
    assert difference(apply(image, params, SIZE), tensor(np.asarray(in_bytes))).max() <= 3


def test_hue_rotates_as_in_hsv_and_preserves_gray_and_luma() -> None:
    image = photograph(SIZE, SIZE, 90, 165)
    luma = tv.rgb_to_grayscale(tensor(image))

    def chroma(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float() - tv.rgb_to_grayscale(pixels.float())

    for turns in (-0.1, -0.05, 0.05, 0.1):
        view = apply(image, replace(IDENTITY, hue=turns), SIZE)
        opposite = apply(image, replace(IDENTITY, hue=-turns), SIZE)
        theirs = chroma(tensor(np.asarray(tv.adjust_hue(Image.fromarray(image), turns))))
        assert difference(tv.rgb_to_grayscale(view), luma).max() <= 1
        # HSV also changes luma. In chroma, our rotation is closer to HSV's than the unrotated image and the opposite rotation are.
        assert (chroma(view) - theirs).abs().mean() < 0.8 * (chroma(tensor(image)) - theirs).abs().mean()
        assert (chroma(view) - theirs).abs().mean() < 0.4 * (chroma(opposite) - theirs).abs().mean()
    gray = np.full((SIZE, SIZE, 3), 77, np.uint8)
    assert torch.equal(apply(gray, replace(IDENTITY, hue=0.37), SIZE), tensor(gray))
    full_turn = apply(image, replace(IDENTITY, hue=1.0), SIZE)
    assert difference(full_turn, tensor(image)).max() <= 1


def test_hue_differs_from_hsv_as_documented() -> None:
    """Over all colors, as stated in the docstring of `colors.finish`."""
    colors = np.stack(np.meshgrid(*[np.linspace(0, 255, 16)] * 3), axis=-1).reshape(64, 64, 3).astype(np.uint8)
    for turns in (-0.1, 0.1):
        hsv = tensor(np.asarray(tv.adjust_hue(Image.fromarray(colors), turns)))
        apart = difference(apply(colors, replace(IDENTITY, hue=turns), SIZE), hsv).float()
        assert 18 < apart.mean() < 27
        assert 90 < apart.max() <= 128


def test_extreme_strengths_clip_and_do_not_wrap() -> None:
    image = photograph(SIZE, SIZE)
    assert (apply(image, replace(IDENTITY, brightness=-1.0), SIZE) == 0).all()
    bright = apply(image, replace(IDENTITY, brightness=3.0), SIZE)
    assert torch.equal(bright, (tensor(image).int() * 4).clamp(0, 255).to(torch.uint8))
    assert apply(image, replace(IDENTITY, contrast=-1.0), SIZE).unique().numel() == 1
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    assert (apply(white, replace(IDENTITY, blur=6.0), SIZE) == 255).all()


@pytest.mark.parametrize("size", [32, 64, 224, 336])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.7, 2.0])
def test_blur_matches_torchvision(size: int, sigma: float) -> None:
    """On white noise, the hardest case. sigma is in pixels of a 224-pixel view."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    view = apply(image, replace(IDENTITY, blur=sigma), size)
    scaled = sigma * size / 224
    radius = max(1, math.ceil(4 * scaled))
    expected = tv.gaussian_blur(tensor(image).float(), [2 * radius + 1] * 2, [scaled] * 2).round()
    assert difference(view, expected).max() <= 2
    assert difference(view, expected).float().mean() < 0.6


@pytest.mark.parametrize("size", [8, 224])
@pytest.mark.parametrize("sigma", [15.0, 40.0, 200.0, 2000.0])
def test_wide_blur(size: int, sigma: float) -> None:
    """For sigmas beyond the papers', weights are coarse, but flat images stay flat and structure is smoothed."""
    params = replace(IDENTITY, blur=sigma)
    assert (apply(np.full((size, size, 3), 201, np.uint8), params, size) == 201).all()
    image = photograph(size, size)
    assert apply(image, params, size).float().std() < 0.9 * image.std()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(
    "size", [(500, 375), (640, 480), (120, 300), (97, 96), (64, 64), (1, 1), (30, 1000), (1603, 1201)]
)
def test_evaluation_views_are_those_of_open_clip(size, resize_mode, interpolation) -> None:
    image = photograph(*size)
    transform = open_clip.image_transform(64, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    *geometry, _, _ = transform.transforms  # without the normalization
    preprocess = Preprocess(resize_mode=resize_mode, interpolation=interpolation)
    for data in (image, jpeg(image)):
        pixels = open_image(data).decode()
        theirs = tensor(np.asarray(transforms.Compose(geometry)(Image.fromarray(pixels))))
        assert torch.equal(make_view(data, 64, preprocess=preprocess)[0], theirs)


def test_evaluation_views_of_long_images_show_their_center() -> None:
    """Resized as a whole, this image would have 900 million pixels."""
    image = np.zeros((2, 60_000, 3), np.uint8)
    image[:, 29_999:30_001] = 255
    view = make_view(image, 172)[0]
    assert view.min() > 100
    assert view[:, :, 80:92].min() > 240
    assert make_view(photograph(20_000, 100), 64)[0].shape == (3, 64, 64)


def test_evaluation_views_need_every_pixel() -> None:
    """Of larger images than `TILE`² pixels, a reduced one is sufficient."""
    sizes = np.array([[800, 200], [TILE, TILE], [TILE, TILE + 1]])
    _, scales = draw_views({"view": EVALUATION}, lambda *_: np.zeros((3, NUM_DRAWS)), sizes, 64)
    assert scales.tolist() == [1.0, 1.0, 64 / TILE]


# ---------------------------------------------------------------- all views of a sample


def jpeg(image: np.ndarray, **options: object) -> bytes:
    out = BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, **options)
    return out.getvalue()


SAMPLES = Draws(3, 1, np.array([4, 9, 2]))
STACKS = {"base": WEAK, "first": STRONG, "second": STRONG}


def opened(*images: bytes | np.ndarray) -> list[OpenedImage]:
    return [open_image(image) for image in images]


def test_views_are_a_function_of_their_draws() -> None:
    """Not of the other views, nor of the images that are made at the same time."""
    images = [jpeg(photograph(500, 375)), photograph(90, 200), photograph(40, 40)]
    once = make_views(opened(*images), STACKS, SAMPLES.uniform, 100)
    assert once.pixels.shape == (3, 3, 3, 100, 100)
    assert not once.failures
    reversed_once = make_views(opened(*images), dict(reversed(STACKS.items())), SAMPLES.uniform, 100)
    assert (once.pixels == reversed_once.pixels[::-1]).all()
    assert (once.params == reversed_once.params[::-1]).all()
    for row, image in enumerate(images):
        alone = make_views(opened(image), STACKS, SAMPLES[np.array([row])].uniform, 100)
        assert (alone.pixels[:, 0] == once.pixels[:, row]).all()
        assert (alone.params[:, 0] == once.params[:, row]).all()
    assert (once.params[1] != once.params[2]).any(1).all()


def test_views_show_their_parameters() -> None:
    """Views made together equal those that `apply` makes of their parameters one by one."""
    count = 40
    images = [photograph(60 + row, 80 - row, seed=row) for row in range(count)]
    views = make_views(opened(*images), STACKS, Draws(0, 0, np.arange(count)).uniform, 32)
    for view, policy in enumerate(STACKS):
        for row, image in enumerate(images):
            params = AugmentationParams(*views.params[view, row].tolist())
            assert torch.equal(apply(image, params, 32), torch.from_numpy(views.pixels[view, row])), policy


def test_images_are_decoded_once_at_the_lowest_sufficient_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that the full image would not upsample are not upsampled from the reduced one either."""
    scales: list[float] = []
    original = OpenedImage.decode

    def spy(self: OpenedImage, min_scale: float = 1.0) -> np.ndarray:
        scales.append(min_scale)
        return original(self, min_scale)

    monkeypatch.setattr(OpenedImage, "decode", spy)
    data, uniform = jpeg(photograph(1603, 1201)), Draws(0, 0, np.zeros(1, int)).uniform
    params = make_views(opened(data), {"a": STRONG, "b": STRONG}, uniform, 64).params[:, 0]
    assert len(scales) == 1
    assert scales[0] == pytest.approx(64 / (params[:, 2:4] * [1603, 1201]).min())
    make_views(opened(data), {"a": STRONG, "b": EVALUATION}, uniform, 1400)
    assert scales[1] == 1.0


def test_images_that_cannot_be_decoded_do_not_affect_the_others() -> None:
    image, broken = photograph(60, 50), jpeg(photograph(300, 200))[:2000]
    views = make_views(opened(image, broken, image), STACKS, SAMPLES.uniform, 32)
    assert {row: bad.reason for row, bad in views.failures.items()} == {1: "truncated image"}
    expected = make_views(opened(image, image), STACKS, SAMPLES[np.array([0, 2])].uniform, 32)
    assert (views.pixels[:, [0, 2]] == expected.pixels).all()


@pytest.mark.parametrize("seed", range(8))
def test_reduced_decoding_changes_views_little(seed: int) -> None:
    """A view from the reduced image is closer to the view from the full image than one shifted by two pixels."""
    image = photograph(1603, 1201, seed=seed)
    data = jpeg(image)
    policy = AugmentationPolicy(crop_scale=(0.3, 0.8))
    view, params = make_view(data, 96, policy, np.random.default_rng(seed).random(NUM_DRAWS))
    full = apply(image, params, 96)
    two_pixels_off = replace(params, x=params.x + 2 * params.w / 96)
    assert (
        difference(view, full).float().mean() < 0.6 * difference(apply(image, two_pixels_off, 96), full).float().mean()
    )


def test_rotated_images_have_upright_boxes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photograph(300, 200)
    data = jpeg(np.ascontiguousarray(np.rot90(image)), exif=exif)
    for policy in (WEAK, EVALUATION):
        numbers = np.random.default_rng(5).random(NUM_DRAWS)
        view, params = make_view(data, 128, policy, numbers)
        expected, same = make_view(image, 128, policy, numbers)
        assert params == same
        assert difference(view, expected).float().mean() < 2.0


def test_truncated_images_are_bad_samples() -> None:
    with pytest.raises(BadSample, match="truncated image"):
        make_view(jpeg(photograph(300, 200))[:2000], 64)
