"""The file of features, the views that it holds, and the loader that reads them."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pairs import BAD, CONTEXT, SIZE, Pairs, make_loader

from coalign.data.loading import feature_file
from coalign.data.loading.cached_views import CachedImages, CachedTexts, CachedViews, to_bits, to_float
from coalign.data.loading.feature_file import BAD as BAD_ROW
from coalign.data.loading.feature_file import FeatureFile
from coalign.data.loading.feature_inputs import ImageVariants, TextVariants, check_record
from coalign.data.loading.samples import read_samples
from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import BadSample, UserError
from coalign.types import CLIP_PREPROCESS, EVALUATION, STRONG, WEAK, Record, TextPolicy, ViewPlan

KEY = {"weights": "a1", "data": "b2"}
PLAN = ViewPlan(
    images={"weak": WEAK, "strong": STRONG, "plain": EVALUATION},
    texts={"caption": TextPolicy(), "changed": TextPolicy("eda"), "again": TextPolicy()},
)


def new_file(folder, rows=5, variants=2, width=3, num_params=11, key=KEY):
    file = FeatureFile(folder / "features" / "images", rows, variants, width, num_params)
    return file, file.prepare(key)


# ---------------------------------------------------------------- the file


def test_rows_are_read_as_they_were_written(tmp_path):
    file, _ = new_file(tmp_path)
    random = np.random.default_rng(0)
    features = random.integers(0, 1 << 15, (3, 2, 3)).astype(np.uint16)
    params = random.random((3, 2, 11), np.float32)
    file.write(1, features, params, np.array([False, True, False]))
    assert file.state.tolist() == [0, 1, 2, 1, 0]
    rows, variants = np.array([3, 1, 3]), np.array([1, 0, 0])
    copy = pickle.loads(pickle.dumps(file))
    np.testing.assert_array_equal(copy.features(rows, variants), features[rows - 1, variants])
    np.testing.assert_array_equal(copy.params(rows, variants), params[rows - 1, variants])


def test_features_are_rounded_to_bfloat16():
    values = torch.randn(100, dtype=torch.float64)
    restored = to_float(to_bits(values))
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored.double(), values, rtol=2**-8, atol=0)  # bfloat16 keeps eight bits


def test_the_file_takes_little_more_than_its_numbers(tmp_path):
    images, texts = new_file(tmp_path, 1000, 1, 1280)[0], FeatureFile(tmp_path / "texts", 1001, 1, 384)
    texts.prepare(KEY)
    sizes = [os.path.getsize(file.path) for file in (images, texts)]
    assert sizes == [images.num_bytes, texts.num_bytes]
    assert sum(sizes) <= 1.05 * 2 * (1280 + 384) * 1000


def test_a_complete_file_is_kept_and_another_one_replaced(tmp_path):
    file, reason = new_file(tmp_path)
    assert reason is None
    file.write(0, np.ones((5, 2, 3), np.uint16), np.ones((5, 2, 11), np.float32), np.zeros(5, bool))
    kept, reason = new_file(tmp_path)
    assert (reason, kept.state.all()) == (None, True)

    other, reason = new_file(tmp_path, key={"weights": "c3", "data": "b2"})
    assert (reason, other.state.any()) == ("it was made with other weights", False)
    with open(other.path, "r+b") as opened:
        opened.truncate(other.num_bytes - 1)
    again, reason = new_file(tmp_path, key={"weights": "c3", "data": "b2"})
    assert reason == f"it has {other.num_bytes - 1:,} bytes instead of {other.num_bytes:,}"
    assert os.path.getsize(again.path) == again.num_bytes
    again.path.write_bytes(b"\x00" * 2000)
    assert new_file(tmp_path)[1] == "its first bytes are damaged"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    file, _ = new_file(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        UserError, match=r"^The features in .* could not be written \(No space left on device\); free some"
    ):
        file.write(0, np.ones((1, 2, 3), np.uint16), None, np.zeros(1, bool))
    assert not file.state.any()
    with pytest.raises(
        UserError, match=r"^The features in .* take 2,000\.0 TB, .* more than the disk has free; free some"
    ):
        FeatureFile(tmp_path / "large", 10**9, 1, 10**6).prepare(KEY)
    assert not (tmp_path / "large").exists()


def test_a_row_is_complete_only_after_its_features_are_on_disk(tmp_path, monkeypatch):
    """A process that is killed between any two writes leaves the row missing."""
    file, _ = new_file(tmp_path)
    writes = []
    pwrite = os.pwrite

    def stop_before(number):
        def write(*arguments):
            if len(writes) == number:
                raise KeyboardInterrupt
            writes.append(arguments)
            return pwrite(*arguments)

        return write

    for number in range(3):  # features, parameters, state
        writes.clear()
        monkeypatch.setattr(os, "pwrite", stop_before(number))
        with pytest.raises(KeyboardInterrupt):
            file.write(0, np.ones((1, 2, 3), np.uint16), np.ones((1, 2, 11), np.float32), np.zeros(1, bool))
        assert not file.state.any()


def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    """A batch from four gigabytes, which take no space on disk as they are not written, needs few pages."""
    file, _ = new_file(tmp_path, 1_500_000, 1, 1280, 0)
    rows = np.random.default_rng(0).integers(0, file.rows, 256)

    def resident():
        return next(
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
        )

    before = resident()
    for _ in range(10):
        file.features(rows, np.zeros(256, np.int64))
    assert resident() - before < 50_000  # kB


# ---------------------------------------------------------------- variants


def variants(views, source=None, plan=PLAN):
    source = source or Pairs()
    return ImageVariants(source, np.arange(len(source)), plan.images, views, SIZE, CLIP_PREPROCESS, seed=7)


def test_variants_are_the_views_of_the_first_epochs():
    loader = make_loader(plan=PLAN)
    drawn = variants(3)
    pixels, params, bad = drawn.load(slice(0, 40))
    assert not bad.any()
    assert drawn.of_view() == {"weak": (0, 1, 2), "strong": (3, 4, 5), "plain": (6,)}  # without randomness, once
    for step, loaded in enumerate(loader.batches(0, 3 * loader.steps_per_epoch)):
        epoch = step // loader.steps_per_epoch
        for name, numbers in drawn.of_view().items():
            view, number = loaded.batch.images[name], numbers[min(epoch, len(numbers) - 1)]
            np.testing.assert_array_equal(params[loaded.batch.indices, number], view.params)
            # a pool of three views is decoded once, at the highest of their resolutions; these images at a single one
            np.testing.assert_array_equal(pixels[loaded.batch.indices, number], view.pixels)


def test_a_single_variant_is_the_evaluation_view_for_every_view():
    drawn = variants(1)
    pixels, params, _ = drawn.load(slice(3, 8))
    assert drawn.of_view() == {"weak": (0,), "strong": (0,), "plain": (0,)}
    evaluated = make_loader(plan=ViewPlan(images={"view": EVALUATION}, texts={"caption": TextPolicy()}))
    for loaded in evaluated.batches(0, evaluated.steps_per_epoch):
        for row, index in enumerate(loaded.batch.indices.tolist()):
            if 3 <= index < 8:
                np.testing.assert_array_equal(pixels[index - 3, 0], loaded.batch.images["view"].pixels[row])
                np.testing.assert_array_equal(params[index - 3, 0], loaded.batch.images["view"].params[row])


def test_unreadable_images_are_bad_rows():
    _, _, bad = variants(2, Pairs(**BAD)).load(slice(0, 40))
    assert set(np.flatnonzero(bad)) == BAD["no_image"]


def text_variants(views, source=None, policies=PLAN.texts):
    source = source or Pairs()
    samples = read_samples(source, np.arange(len(source)), lambda _: [], lambda _: None, {}, None)
    return samples, TextVariants(samples, policies, views, load_tokenizer("clip"), CONTEXT, seed=7)


def test_text_variants_are_the_caption_once_and_changed_captions_of_the_first_epochs():
    samples, drawn = text_variants(2)
    assert drawn.of_view() == {"caption": (0,), "changed": (1, 2), "again": (0,)}
    tokens = drawn.load(slice(0, len(samples.captions)))
    assert len(tokens) == 3 * len(samples.captions)
    encoded = [load_tokenizer("clip").encode(caption, CONTEXT) for caption in samples.captions]
    assert tokens[::3] == encoded
    loader = make_loader(plan=PLAN)
    for step, loaded in enumerate(loader.batches(0, 2 * loader.steps_per_epoch)):
        changed, plain = loaded.batch.texts["changed"], loaded.batch.texts["caption"]
        for row, index in enumerate(loaded.batch.indices.tolist()):
            shown = plain.ids[row, : plain.lengths[row]].tolist()
            first = samples.first_caption[index]
            number = first + encoded[first : first + samples.num_captions[index]].index(shown)
            expected = tokens[3 * number + 1 + step // loader.steps_per_epoch]
            assert changed.ids[row, : changed.lengths[row]].tolist() == expected


def test_paraphrases_are_variants():
    class Paraphrased(Pairs):
        def record(self, index):
            return Record(str(index), ("one",), facts={"paraphrases": {"one": ["first", "second", "third"]}})

    policies = {name: TextPolicy("paraphrase") for name in ("a", "b")}
    _, drawn = text_variants(2, Paraphrased(size=4), policies)
    assert drawn.of_view() == {"a": (0, 1), "b": (2, 3)}
    tokenizer = load_tokenizer("clip")
    texts = [tokenizer.decode(each) for each in drawn.load(slice(0, 4))]
    assert set(texts) == {"first", "second", "third"}
    for row in range(4):
        a, b = texts[4 * row : 4 * row + 2], texts[4 * row + 2 : 4 * row + 4]
        assert all(one != other for one, other in zip(a, b))  # the views of an epoch differ


def test_malformed_paraphrases_are_bad_records():
    record = Record("key", ("one",), facts={"paraphrases": {"one": 3}})
    with pytest.raises(BadSample, match="malformed paraphrases"):
        check_record({"a": TextPolicy("paraphrase")}, False, record)
    check_record({"a": TextPolicy("eda")}, False, record)


# ---------------------------------------------------------------- the loader


def cached_loader(folder, source, plan=PLAN, **changes):
    """A loader of features that name their image (or caption) and variant, and the samples of the texts."""
    images = variants(3, source, plan)
    samples, texts = text_variants(2, source, plan.texts)
    files = [
        FeatureFile(folder / "images", len(source), len(images.drawn()), 2, 11),
        FeatureFile(folder / "texts", len(samples.captions), len(texts.drawn()), 2),
    ]
    for file in files:
        file.prepare(KEY)
        rows, numbers = np.meshgrid(np.arange(file.rows), np.arange(file.variants), indexing="ij")
        params = (
            np.repeat(rows[..., None] + numbers[..., None] / 8, 11, 2).astype(np.float32) if file.num_params else None
        )
        bad = np.isin(np.arange(file.rows), list(source.no_image)) & bool(file.num_params)
        named = to_bits(torch.from_numpy(np.stack([rows, numbers], 2)))
        file.write(0, named, params, np.broadcast_to(bad, file.rows))
    cached = CachedViews(
        CachedImages(files[0], images.of_view(), source, images.indices),
        CachedTexts(files[1], texts.of_view(), samples),
    )
    return make_loader(source, plan=plan, cached=cached, **changes), samples


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_rows_of_the_same_samples_and_captions(tmp_path, workers):
    source = Pairs(no_image={0, 20, 21, 22})
    loader, samples = cached_loader(tmp_path, source, workers=workers)
    steps = 6 * loader.steps_per_epoch
    seen = {"weak": set(), "strong": set(), "plain": set(), "caption": set(), "changed": set(), "again": set()}
    uncached = make_loader(source, plan=PLAN)
    for loaded, expected in zip(loader.batches(0, steps), uncached.batches(0, steps), strict=True):
        batch = loaded.batch
        assert [(entry.key, entry.epoch) for entry in loaded.bad] == [
            (entry.key, entry.epoch) for entry in expected.bad
        ]
        assert [entry.reason for entry in loaded.bad] == [entry.reason for entry in expected.bad]
        for name in ("indices", "caption_ids", "has_caption"):
            assert torch.equal(getattr(batch, name), getattr(expected.batch, name))
        for name, view in batch.images.items():
            assert view.pixels.dtype == torch.float32
            assert torch.equal(view.pixels[:, 0].long(), batch.indices)
            number = view.pixels[:, 1]
            assert torch.equal(view.params[:, 4], batch.indices + number / 8)
            seen[name] |= set(number.tolist())
        for name, view in batch.texts.items():
            for row, (number, variant) in enumerate(view.ids.long().tolist()):
                assert samples.caption_ids[number] == batch.caption_ids[row]
                seen[name].add(float(variant))
    assert seen == {
        "weak": {0, 1, 2}, "strong": {3, 4, 5}, "plain": {6}, "caption": {0}, "changed": {1, 2}, "again": {0},
    }  # fmt: skip


def test_views_draw_their_variants_independently(tmp_path):
    loader, _ = cached_loader(tmp_path, Pairs(size=400), batch_size=400)
    batches = [next(loader.batches(step, step + 1)).batch for step in range(2)]
    of_view = {name: view.pixels[:, 1] % 3 for name, view in batches[0].images.items()}
    again = {name: view.pixels[:, 1] % 3 for name, view in batches[1].images.items()}
    by_sample = batches[0].indices.argsort(), batches[1].indices.argsort()
    for one, other in (
        (of_view["weak"], of_view["strong"]),
        (of_view["weak"][by_sample[0]], again["weak"][by_sample[1]]),
    ):
        assert abs((one == other).float().mean() - 1 / 3) < 0.1  # a third by chance; four standard deviations


def test_ranks_and_a_resume_read_the_same_batches(tmp_path):
    whole, _ = cached_loader(tmp_path / "whole", Pairs())
    expected = [loaded.batch for loaded in whole.batches(0, 10)]
    for step, loaded in enumerate(cached_loader(tmp_path / "late", Pairs())[0].batches(6, 10), 6):
        assert torch.equal(loaded.batch.images["weak"].pixels, expected[step].images["weak"].pixels)
    for rank in range(2):
        loader, _ = cached_loader(tmp_path / str(rank), Pairs(), rank=rank, world_size=2)
        for step, loaded in enumerate(loader.batches(0, 10)):
            rows = slice(4 * rank, 4 * rank + 4)
            assert torch.equal(loaded.batch.texts["changed"].ids, expected[step].texts["changed"].ids[rows])
            assert torch.equal(loaded.batch.images["weak"].pixels, expected[step].images["weak"].pixels[rows])


def test_a_repaired_image_stays_bad(tmp_path):
    """Its features are missing, so it is still replaced."""
    source = Pairs(no_image={0})
    loader, _ = cached_loader(tmp_path, source)
    images = loader.cached.images
    assert images.file.state[0] == BAD_ROW
    source.no_image.clear()
    entries = [entry for loaded in loader.batches(0, 5) for entry in loaded.bad]
    assert [(entry.key, entry.reason) for entry in entries] == [("pair-0", "unreadable image")]


def test_the_key_fits_its_place():
    key = dict.fromkeys(("weights", "preprocessing", "data", "views"), "0" * 24)
    assert len(json.dumps(key)) < feature_file._KEY_BYTES
