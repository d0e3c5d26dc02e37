"""Cached images are those that decoding gives, whoever wrote them, and a cache that cannot be written to is none."""

import dataclasses
import io
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import BAD, PLAN, Pairs, assert_same, make, tokenizer  # noqa: F401  fixtures

from coalign.data import images
from coalign.data.image_cache import ImageCache
from coalign.data.images import open_image
from coalign.errors import BadSample, NoImage

SCALES = (1.0, 0.6, 0.5, 0.3, 0.25, 0.1, 0.01)
PLENTY = 10**9


def encoded(index: int, size: tuple[int, int] = (90, 60)) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if index % 3 else "JPEG", exif=Image.Exif())
    return file.getvalue()


def rotated() -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encoded(0))).save(file, "JPEG", exif=exif)
    return file.getvalue()


def unread() -> bytes:
    raise AssertionError("was read again")


def is_kept(cache: ImageCache, index: int) -> bool:
    try:
        cache.open(index, unread).decode(1.0)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("data", [encoded(0), encoded(1), rotated(), np.zeros((5, 7, 3), np.uint8)])
def test_the_second_time_nothing_is_read_and_pixels_are_the_same(tmp_path, data):
    cache = ImageCache(tmp_path / "cache", 4, PLENTY)
    for _ in range(2):
        for scale in SCALES:
            found = cache.open(2, lambda: data)
            plain = open_image(data)
            assert found.size == plain.size
            assert np.array_equal(found.decode(scale), plain.decode(scale))
    for scale in SCALES:
        assert np.array_equal(cache.open(2, unread).decode(scale), open_image(data).decode(scale))
    other = ImageCache(tmp_path / "cache", 4, PLENTY)  # of a run that goes on
    assert np.array_equal(other.open(2, unread).decode(1.0), open_image(data).decode(1.0))
    with pytest.raises(AssertionError, match="read again"):
        other.open(3, unread)


def test_what_is_reduced_by_any_factor_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "TILE", 32)
    data = encoded(1)
    cache = ImageCache(tmp_path / "cache", 1, PLENTY)
    for scale in (1.0, 0.3):
        assert cache.open(0, lambda: data).decode(scale).shape == open_image(data).decode(scale).shape
    assert not is_kept(cache, 0)


def test_no_more_is_kept_than_fits(tmp_path):
    cache = ImageCache(tmp_path / "cache", 8, 3.5 * 90 * 60 * 3 + 10_000)  # and the index
    for index in range(8):
        cache.open(index, lambda: encoded(index)).decode(1.0)  # noqa: B023
    kept = [index for index in range(8) if is_kept(cache, index)]
    assert kept == [0, 1, 2]
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes


def test_a_full_disk_is_a_full_cache(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    cache = ImageCache(tmp_path / "cache", 2, PLENTY)
    monkeypatch.setattr(os, "write", no_space)
    for _ in range(2):
        pixels = cache.open(0, lambda: encoded(0)).decode(1.0)
        assert np.array_equal(pixels, open_image(encoded(0)).decode(1.0))


def test_without_a_place_for_its_index_there_is_no_cache(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    cache = ImageCache(tmp_path / "cache", 2, PLENTY)
    assert np.array_equal(cache.open(0, lambda: encoded(0)).decode(1.0), open_image(encoded(0)).decode(1.0))


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "zeros"])
def test_a_file_that_is_not_what_it_was_is_decoded_again(tmp_path, damage):
    """As a cleaner of temporary files leaves it, or a machine that went down."""
    ImageCache(tmp_path / "cache", 2, PLENTY).open(0, lambda: encoded(0)).decode(1.0)
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name != "index")
    size = path.stat().st_size
    path.unlink()
    if damage != "removed":
        path.write_bytes(b"\0" * {"emptied": 0, "cut": size // 2, "zeros": size}[damage])
    again = ImageCache(tmp_path / "cache", 2, PLENTY).open(0, lambda: encoded(0))
    assert np.array_equal(again.decode(1.0), open_image(encoded(0)).decode(1.0))


def test_only_its_owner_can_read_it(tmp_path):
    cache = ImageCache(tmp_path / "cache", 2, PLENTY)
    cache.open(0, lambda: encoded(0)).decode(1.0)
    assert [path.stat().st_mode & 0o077 for path in (cache.folder, *cache.folder.iterdir())] == [0, 0, 0]


def test_bad_images_stay_bad(tmp_path):
    cache = ImageCache(tmp_path / "cache", 1, PLENTY)
    for _ in range(2):
        with pytest.raises(BadSample, match="not an image"):
            cache.open(0, lambda: b"this is no image")


def fill(folder, numbers):
    cache = ImageCache(folder, 64, PLENTY)
    for index in numbers:
        cache.open(index, lambda: encoded(index)).decode(1.0)  # noqa: B023


def test_processes_that_write_at_once_write_what_each_reads(tmp_path):
    context = multiprocessing.get_context("spawn")
    parts = [range(0, 40), range(20, 64), range(64)]
    processes = [context.Process(target=fill, args=(tmp_path / "cache", part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = ImageCache(tmp_path / "cache", 64, PLENTY)
    for index in range(64):
        assert np.array_equal(cache.open(index, unread).decode(1.0), open_image(encoded(index)).decode(1.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_it(make, tmp_path, workers):  # noqa: F811
    plain = list(make(Pairs(**BAD)).batches(0, 12))
    cache = ImageCache(tmp_path / "cache", 40, PLENTY)
    assert_same(list(make(Pairs(**BAD), workers=workers, cache=cache).batches(0, 12)), plain)
    source = Pairs(**BAD)
    reads = []
    original = source.image
    source.image = lambda index: (reads.append(index), original(index))[1]
    assert_same(list(make(source, cache=cache).batches(0, 12)), plain)
    assert set(reads) <= BAD["no_image"]  # all others were kept


def test_samples_without_an_image_do_not_depend_on_it(make, tmp_path):  # noqa: F811
    """What stands in for one that has none is the same, also where it cannot be read."""

    class Imageless(Pairs):
        def image(self, index):
            if index % 3 == 0:
                raise NoImage("no image")
            return super().image(index)

    plan = dataclasses.replace(PLAN, imageless=True)
    broken = {1, 4, 7, 10, 20, 22}
    plain = list(make(Imageless(no_image=broken), plan=plan).batches(0, 12))
    cache = ImageCache(tmp_path / "cache", 40, PLENTY)
    assert_same(list(make(Imageless(no_image=broken), plan=plan, cache=cache).batches(0, 12)), plain)


def test_samples_that_are_seen_twice_an_epoch_are_kept_once(make, tmp_path):  # noqa: F811
    """A mixture with weights numbers them beyond its length."""

    class Repeated(Pairs):
        def record(self, index):
            return super().record(index % self.size)

        def image(self, index):
            return super().image(index % self.size)

    indices = np.arange(80)
    plain = list(make(Repeated(), indices).batches(0, 12))
    cache = ImageCache(tmp_path / "cache", 40, PLENTY)
    assert_same(list(make(Repeated(), indices, cache=cache).batches(0, 12)), plain)


def test_colour_and_blur_of_a_batch_are_those_of_each_view(make):  # noqa: F811
    """On the device, here a CPU: within 1 of 255, and most of them the same."""
    ours = list(make(finish_on=torch.device("cpu")).batches(0, 5))
    for one, other in zip(ours, make().batches(0, 5)):
        for name in PLAN.images:
            a, b = one.batch.images[name], other.batch.images[name]
            off = (a.pixels.int() - b.pixels.int()).abs()
            assert off.max() <= 1
            assert off.float().mean() < 1e-3
            assert torch.equal(a.params, b.params)
            assert torch.equal(a.patch_ranks, b.patch_ranks)
        assert torch.equal(one.batch.texts["masked"].ids, other.batch.texts["masked"].ids)
