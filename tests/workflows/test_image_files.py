"""`load_images` returns the pixels that evaluation feeds to the encoder."""

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image

import coalign
from coalign.data.loading.eval import image_batches
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images
from coalign.types import CLIP_PREPROCESS, Preprocess


def encoder(preprocess=CLIP_PREPROCESS):
    return coalign.DualEncoder(
        lambda pixels: pixels.float().mean((2, 3)),
        lambda texts: torch.eye(3)[: len(texts)],
        image_size=20,
        preprocess=preprocess,
    )


def shrink(image):
    return torch.from_numpy(np.asarray(image.resize((20, 20), Image.Resampling.NEAREST)).copy()).permute(2, 0, 1)


@pytest.fixture
def photos(tmp_path):
    """Images of several modes, one rotated by its EXIF data, as an opened folder."""
    tiny.write_pairs(tmp_path, 6)
    gradient = Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint32).reshape(30, 40, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient.save(tmp_path / "a rotated photo.jpg", exif=exif)
    gradient.convert("L").save(tmp_path / "a gray photo.png")
    transparent = gradient.convert("RGBA")
    transparent.putalpha(100)
    transparent.save(tmp_path / "a transparent drawing.png")
    return coalign.open_data(str(tmp_path))


@pytest.mark.parametrize("preprocess", [CLIP_PREPROCESS, Preprocess(resize_mode="longest"), shrink])
def test_pixels_equal_those_of_evaluation(photos, preprocess):
    model = encoder(preprocess)
    ((indices, expected, bad),) = image_batches(photos, range(len(photos)), model.image_size, preprocess=preprocess)
    assert indices == list(range(9))
    assert not bad
    pixels = coalign.load_images([photos.image_path(index) for index in indices], model)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)
    assert torch.equal(coalign.load_images(photos.image_path(3), model), expected[3:4])


def test_from_files_to_embeddings_without_gradient(trained, photos):
    """As on the page of the Python API: two lines, and NumPy arrays can be made of the embeddings."""
    model = coalign.load(trained).encoder()
    embeds = model.encode_image(coalign.load_images([photos.image_path(index) for index in range(9)], model))
    assert embeds.shape == (9, 16)
    assert not embeds.requires_grad
    assert not model.encode_text(["a red apple"]).requires_grad
    assert not model.image_features(coalign.load_images(photos.image_path(0), model)).requires_grad
    evaluated = embed_images(model, image_batches(photos, range(9), model.image_size))
    torch.testing.assert_close(embeds, evaluated.embeds)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"missing\.png could not be read"):
        coalign.load_images(tmp_path / "missing.png", encoder())
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(UserError, match=r"page\.png cannot be used"):
        coalign.load_images([tmp_path / "page.png"], encoder())
    with pytest.raises(UserError, match="no images to load"):
        coalign.load_images([], encoder())
