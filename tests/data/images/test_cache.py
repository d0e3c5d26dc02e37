"""Cached images equal decoded ones, whichever process wrote them; without a usable cache, images are decoded."""

import dataclasses
import gc
import io
import multiprocessing
import os
import pickle
import tempfile

import numpy as np
import pytest
import torch
from helpers.pairs import BAD, PLAN, Pairs, assert_same_batches, make_loader
from PIL import Image

from coalign.data.images import decode as images
from coalign.data.images.cache import ImageCache
from coalign.data.images.decode import open_image
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
def test_cached_images_are_not_read_again_and_equal_decoded_ones(tmp_path, data):
    cache = ImageCache(4, PLENTY, tmp_path / "cache" / "images")
    for _ in range(2):
        for scale in SCALES:
            cached = cache.open(2, lambda: data)
            plain = open_image(data)
            assert cached.size == plain.size
            assert np.array_equal(cached.decode(scale), plain.decode(scale))
    for scale in SCALES:
        assert np.array_equal(cache.open(2, unread).decode(scale), open_image(data).decode(scale))
    other = ImageCache(4, PLENTY, tmp_path / "cache" / "images")  # as in a resumed run
    assert np.array_equal(other.open(2, unread).decode(1.0), open_image(data).decode(1.0))
    with pytest.raises(AssertionError, match="read again"):
        other.open(3, unread)


def test_images_reduced_by_any_factor_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "TILE", 32)
    data = encoded(1)
    cache = ImageCache(1, PLENTY, tmp_path / "cache" / "images")
    for scale in (1.0, 0.3):
        assert cache.open(0, lambda: data).decode(scale).shape == open_image(data).decode(scale).shape
    assert not is_kept(cache, 0)


def test_the_cache_stays_within_its_limit(tmp_path):
    cache = ImageCache(8, 3.5 * 90 * 60 * 3 + 1_000, tmp_path / "cache" / "images")  # 3.5 images and the index
    for index in range(8):
        cache.open(index, lambda: encoded(index)).decode(1.0)  # noqa: B023
    kept = [index for index in range(8) if is_kept(cache, index)]
    assert kept == [0, 1, 2]
    assert (tmp_path / "cache" / "images").stat().st_size <= cache.max_bytes


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("written", [0, 2], ids=["nothing", "the index"])
def test_images_are_decoded_without_space(tmp_path, monkeypatch, place, written):
    """Also if there was only enough for the index, which takes two writes."""
    writes = []
    original = os.pwrite

    def pwrite(*arguments):
        writes.append(arguments)
        if len(writes) > written:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    cache = ImageCache(2, PLENTY, tmp_path / "cache" / "images" if place == "disk" else None)
    for _ in range(2):
        pixels = cache.open(0, lambda: encoded(0)).decode(1.0)
        assert np.array_equal(pixels, open_image(encoded(0)).decode(1.0))
    assert len(writes) > written


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_cache_without_a_path_is_shared_and_leaves_no_file(tmp_path, monkeypatch, in_memory):
    """Forked processes and those that receive it share it."""
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ImageCache(4, PLENTY)
    child = os.fork()
    if child == 0:
        cache.open(1, lambda: encoded(1)).decode(1.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert is_kept(cache, 1)
    assert np.array_equal(cache.open(1, unread).decode(1.0), open_image(encoded(1)).decode(1.0))
    sent = pickle.loads(pickle.dumps(cache))
    assert is_kept(sent, 1)
    sent.open(2, lambda: encoded(2)).decode(1.0)
    assert is_kept(cache, 2)
    assert len(list(tmp_path.iterdir())) == (not in_memory)
    del cache, sent
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_cache_in_memory_is_freed():
    cache = ImageCache(4, PLENTY)
    cache.open(1, lambda: encoded(1)).decode(1.0)
    pixels, file = cache.open(1, unread).decode(1.0), cache._file
    del cache
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file)
    assert pixels.shape == (60, 90, 3)


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut", "zeros"])
def test_images_of_a_damaged_cache_file_are_decoded_again(tmp_path, damage):
    """Damage as left by a cleaner of temporary files or a crashed machine."""
    ImageCache(2, PLENTY / 1000, tmp_path / "cache" / "images").open(0, lambda: encoded(0)).decode(1.0)
    path = tmp_path / "cache" / "images"
    content = path.read_bytes()[:20_000]  # what is used
    path.unlink()
    if damage != "removed":
        path.write_bytes({"emptied": b"", "cut": content[:9_000], "zeros": bytes(len(content))}[damage])
    again = ImageCache(2, PLENTY, tmp_path / "cache" / "images").open(0, lambda: encoded(0))
    assert np.array_equal(again.decode(1.0), open_image(encoded(0)).decode(1.0))


def test_only_the_owner_can_read_the_cache(tmp_path):
    cache = ImageCache(2, PLENTY, tmp_path / "cache" / "images")
    cache.open(0, lambda: encoded(0)).decode(1.0)
    assert [path.stat().st_mode & 0o077 for path in (cache.shared_path.parent, cache.shared_path)] == [0, 0]


def test_bad_images_raise_every_time(tmp_path):
    cache = ImageCache(1, PLENTY, tmp_path / "cache" / "images")
    for _ in range(2):
        with pytest.raises(BadSample, match="not an image"):
            cache.open(0, lambda: b"not an image")


def fill(folder, numbers):
    cache = ImageCache(64, PLENTY, folder / "images")
    for index in numbers:
        cache.open(index, lambda: encoded(index)).decode(1.0)  # noqa: B023


def test_processes_can_write_concurrently(tmp_path):
    context = multiprocessing.get_context("spawn")
    parts = [range(0, 40), range(20, 64), range(64)]
    processes = [context.Process(target=fill, args=(tmp_path / "cache", part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = ImageCache(64, PLENTY, tmp_path / "cache" / "images")
    for index in range(64):
        assert np.array_equal(cache.open(index, unread).decode(1.0), open_image(encoded(index)).decode(1.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_cache(tmp_path, workers):
    plain = list(make_loader(Pairs(**BAD)).batches(0, 12))
    cache = ImageCache(40, PLENTY, tmp_path / "cache" / "images")
    assert_same_batches(list(make_loader(Pairs(**BAD), workers=workers, cache=cache).batches(0, 12)), plain)
    source = Pairs(**BAD)
    reads = []
    original = source.image
    source.image = lambda index: (reads.append(index), original(index))[1]
    assert_same_batches(list(make_loader(source, cache=cache).batches(0, 12)), plain)
    assert set(reads) <= BAD["no_image"]  # all others are cached


def test_substitute_images_do_not_depend_on_the_cache(tmp_path):
    """A sample without an image shows the same substitute with a cache, also if other images cannot be read."""

    class Imageless(Pairs):
        def image(self, index):
            if index % 3 == 0:
                raise NoImage("no image")
            return super().image(index)

    plan = dataclasses.replace(PLAN, imageless=True)
    broken = {1, 4, 7, 10, 20, 22}
    plain = list(make_loader(Imageless(no_image=broken), plan=plan).batches(0, 12))
    cache = ImageCache(40, PLENTY, tmp_path / "cache" / "images")
    assert_same_batches(list(make_loader(Imageless(no_image=broken), plan=plan, cache=cache).batches(0, 12)), plain)


def test_samples_repeated_in_an_epoch_are_cached_once(tmp_path):
    """Repeated samples of a mixture have indices beyond its length."""

    class Repeated(Pairs):
        def record(self, index):
            return super().record(index % self.size)

        def image(self, index):
            return super().image(index % self.size)

    indices = np.arange(80)
    plain = list(make_loader(Repeated(), indices).batches(0, 12))
    cache = ImageCache(40, PLENTY, tmp_path / "cache" / "images")
    assert_same_batches(list(make_loader(Repeated(), indices, cache=cache).batches(0, 12)), plain)


def test_finishing_on_a_device_matches_finishing_in_workers():
    """On the CPU as device: within 1 of 255, and equal for most pixels."""
    ours = list(make_loader(finish_on=torch.device("cpu")).batches(0, 5))
    for one, other in zip(ours, make_loader().batches(0, 5)):
        for name in PLAN.images:
            a, b = one.batch.images[name], other.batch.images[name]
            off = (a.pixels.int() - b.pixels.int()).abs()
            assert off.max() <= 1
            assert off.float().mean() < 1e-3
            assert torch.equal(a.params, b.params)
            assert torch.equal(a.patch_ranks, b.patch_ranks)
        assert torch.equal(one.batch.texts["masked"].ids, other.batch.texts["masked"].ids)
