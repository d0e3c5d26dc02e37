from __future__ import annotations

import gc
import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.pairs import (
    BAD,
    CLIP_PLAN,
    PLAN,
    SIZE,
    WORDS,
    Pairs,
    assert_same_batches,
    batch_tensors,
    decode,
    make_loader,
)
from PIL import Image

from coalign.data.images.decode import OpenedImage, open_image
from coalign.data.images.views import make_view, make_views
from coalign.data.loading import train as loader
from coalign.data.loading.eval import image_batches
from coalign.data.loading.order import order
from coalign.data.loading.samples import BadEntry
from coalign.data.loading.train import tag_vocabulary
from coalign.data.sources.open import open_source
from coalign.errors import BadSample, UserError
from coalign.randomness import Draws
from coalign.types import EVALUATION, STRONG, WEAK, Preprocess, Record, TextPolicy, ViewPlan

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ---------------------------------------------------------------- purity


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(monkeypatch, workers):
    monkeypatch.setattr(loader, "CHUNK", 3)
    expected = list(make_loader(Pairs(**BAD)).batches(0, 12))
    assert sum(len(loaded.bad) for loaded in expected) >= 12
    assert_same_batches(list(make_loader(Pairs(**BAD), workers=workers).batches(0, 12)), expected)


def test_batches_do_not_depend_on_the_chunk_size(monkeypatch):
    whole = list(make_loader(Pairs(**BAD)).batches(0, 7))
    monkeypatch.setattr(loader, "CHUNK", 3)
    assert_same_batches(list(make_loader(Pairs(**BAD)).batches(0, 7)), whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_load_slices_of_the_global_batch(world_size):
    whole = list(make_loader(Pairs(**BAD)).batches(0, 7))
    ranks = [list(make_loader(Pairs(**BAD), rank=r, world_size=world_size).batches(0, 7)) for r in range(world_size)]
    for step, loaded in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [len(share.batch) for share in shares] == [8 // world_size] * world_size
        assert [entry for share in shares for entry in share.bad] == loaded.bad
        for name, value in batch_tensors(loaded.batch).items():
            parts = [batch_tensors(share.batch)[name] for share in shares]
            # padded to the share's longest
            if name == "tags" or (name.endswith(("ids", "labels")) and value.ndim == 2):
                padding = -1 if name == "tags" else -100 if name.endswith("labels") else 0
                width = value.shape[1]
                parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in parts]
            assert torch.equal(torch.cat(parts), value), name


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_resumes_at_any_step_without_replay(start):
    source = Pairs()
    read = []
    original = source.image
    source.image = lambda index: (read.append(index), original(index))[1]
    whole = list(make_loader().batches(0, 12))
    assert_same_batches(list(make_loader(source).batches(start, 12)), whole[start:])
    assert len(read) == (12 - start) * 8


def test_kept_records_change_nothing():
    """Loading an epoch or more at once keeps what is read; single batches are read as they are loaded."""
    whole = list(make_loader(Pairs(**BAD)).batches(0, 7))
    pair_loader = make_loader(Pairs(**BAD))
    assert_same_batches([next(pair_loader.batches(step, step + 1)) for step in range(7)], whole)


def test_records_are_read_once():
    class Counting(Pairs):
        read = 0

        def record(self, index: int) -> Record:
            self.read += 1
            return super().record(index)

    source = Counting()
    assert len(list(make_loader(source).batches(0, 20))) == 20
    assert source.read == 40


def test_views_are_drawn_from_seed_epoch_sample_and_name():
    source = Pairs()
    pair_loader = make_loader(source, indices=np.arange(2, 40))
    epoch, position = divmod(6, pair_loader.steps_per_epoch)
    [loaded] = pair_loader.batches(6, 7)
    expected = 2 + order(38, 7, epoch)[np.arange(position * 8, position * 8 + 8)]
    assert loaded.batch.indices.tolist() == expected.tolist()
    images = [open_image(source.image(index)) for index in expected.tolist()]
    views = make_views(images, PLAN.images, Draws(7, epoch, expected).uniform, SIZE)
    for view, name in enumerate(PLAN.images):
        assert (loaded.batch.images[name].pixels.numpy() == views.pixels[view]).all()
        assert (loaded.batch.images[name].params.numpy() == views.params[view].astype(np.float32)).all()


# ---------------------------------------------------------------- epochs


def test_an_epoch_has_every_sample_at_most_once_and_drops_the_tail():
    pair_loader = make_loader(Pairs(45), indices=np.arange(1, 45))  # 44 samples: 5 batches of 8, 4 samples dropped
    assert pair_loader.steps_per_epoch == 5
    epochs = []
    for epoch in range(2):
        loaded = list(pair_loader.batches(5 * epoch, 5 * epoch + 5))
        epochs.append([index for step in loaded for index in step.batch.indices.tolist()])
        assert len(set(epochs[-1])) == 40
        assert set(epochs[-1]) <= set(range(1, 45))
        assert [entry for step in loaded for entry in step.bad] == []
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # each epoch drops other samples


def test_two_epochs_show_different_views_of_a_sample():
    pair_loader = make_loader(Pairs(8), plan=PLAN)
    first, second = (next(pair_loader.batches(step, step + 1)).batch for step in (0, 1))
    first_rows, second_rows = first.indices.argsort(), second.indices.argsort()
    assert torch.equal(first.indices[first_rows], second.indices[second_rows])
    for name in PLAN.images:
        same = first.images[name].params[first_rows] == second.images[name].params[second_rows]
        assert same[:, :4].all(1).sum() < 2  # boxes in whole pixels of a small image can coincide
        assert (first.images[name].patch_ranks[first_rows] != second.images[name].patch_ranks[second_rows]).all()


def test_views_of_one_sample_are_independent():
    twice = ViewPlan(images={"a": STRONG, "b": STRONG}, texts={}, patch_ranks=True)
    [loaded] = make_loader(plan=twice).batches(0, 1)
    a, b = loaded.batch.images["a"], loaded.batch.images["b"]
    assert (a.params[:, :4] == b.params[:, :4]).all(1).sum() < 2
    assert not (a.patch_ranks == b.patch_ranks).any()


def test_every_caption_of_a_sample_is_chosen_equally_often():
    class Four(Pairs):
        def record(self, index: int) -> Record:
            return Record(f"pair-{index}", tuple(f"{index} {word}" for word in WORDS[:4]))

    plan = ViewPlan(images={"view": WEAK}, texts={"one": TextPolicy(), "two": TextPolicy()})
    counts: Counter[str] = Counter()
    for loaded in make_loader(Four(8), plan=plan).batches(0, 100):
        one, two = loaded.batch.texts["one"], loaded.batch.texts["two"]
        assert torch.equal(one.ids, two.ids)  # the text views of a sample share a caption
        for index, ids, length in zip(loaded.batch.indices, one.ids, one.lengths):
            number, word = decode(ids[:length]).split()
            assert int(number) == index
            counts[word] += 1
    assert set(counts) == set(WORDS[:4])
    assert all(abs(count - 200) < 60 for count in counts.values())  # five standard deviations


# ---------------------------------------------------------------- content of a batch


def test_shapes_types_and_padding():
    loaded = list(make_loader().batches(0, 20))
    ranks = []
    for batch in (step.batch for step in loaded):
        for image in batch.images.values():
            assert (image.pixels.dtype, image.pixels.shape) == (torch.uint8, (8, 3, SIZE, SIZE))
            assert (image.params.dtype, image.params.shape) == (torch.float32, (8, 11))
            assert (image.patch_ranks.dtype, image.patch_ranks.shape) == (torch.float32, (8, 2, 3))
            ranks.append(image.patch_ranks)
        for name, text in batch.texts.items():
            longest = int(text.lengths.max())
            assert text.ids.dtype == text.lengths.dtype == torch.int64
            assert text.ids.shape == (8, longest)
            beyond = torch.arange(longest) >= text.lengths[:, None]
            assert (text.ids[beyond] == 0).all()
            assert (text.ids[:, 0] == 49406).all()
            assert (text.ids.gather(1, text.lengths[:, None] - 1) == 49407).all()
            assert (text.labels is None) == (name == "caption")
        assert (batch.texts["masked"].labels[torch.arange(8), batch.texts["masked"].lengths - 1] == -100).all()
        assert len(batch[2:5]) == 3
        assert batch[2:5].images["weak"].pixels.shape[0] == 3
    ranks = torch.cat(ranks)
    assert ranks.min() >= 0
    assert ranks.max() < 1
    assert abs(ranks.mean() - 0.5) < 0.03
    assert any((step.batch.texts["masked"].labels != -100).any() for step in loaded)


def test_tags_are_ids_of_the_vocabulary():
    source, vocabulary = Pairs(), {"red": 0, "boat": 1, "tree": 2}
    for loaded in make_loader(source).batches(0, 5):
        for index, row in zip(loaded.batch.indices.tolist(), loaded.batch.tags.tolist()):
            known = sorted(vocabulary[tag] for tag in source.record(index).tags if tag in vocabulary)
            assert row == known + [-1] * (len(row) - len(known))
    assert make_loader(plan=CLIP_PLAN).batches(0, 1).send(None).batch.tags is None


def test_caption_ids_are_equal_exactly_if_captions_are():
    class Shared(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), (("a red boat", "A red boat", f"boat {index}")[index % 3],))

    [loaded] = make_loader(Shared(12), plan=CLIP_PLAN, batch_size=12).batches(0, 1)
    captions = [Shared(12).record(index).captions[0] for index in loaded.batch.indices.tolist()]
    same_text = torch.tensor([[left == right for left in captions] for right in captions])
    ids = loaded.batch.caption_ids
    assert torch.equal(ids[:, None] == ids, same_text)


def test_samples_without_captions_are_used_if_the_plan_allows():
    source = Pairs(8, no_captions={2, 5})
    [loaded] = make_loader(source).batches(0, 1)
    batch = loaded.batch
    assert loaded.bad == []
    assert batch.has_caption.tolist() == [index not in (2, 5) for index in batch.indices.tolist()]
    assert len(set(batch.caption_ids[~batch.has_caption].tolist())) == 2
    for text in batch.texts.values():
        assert (text.lengths[~batch.has_caption] == 2).all()
        assert (text.ids[~batch.has_caption, :2] == torch.tensor([49406, 49407])).all()

    [loaded] = make_loader(source, plan=ViewPlan(images={"a": WEAK}, texts={})).batches(0, 1)
    assert loaded.bad == []
    assert loaded.batch.texts == {}

    [loaded] = make_loader(source, plan=CLIP_PLAN).batches(0, 1)
    assert {(entry.key, entry.reason) for entry in loaded.bad} >= {("pair-2", "no caption"), ("pair-5", "no caption")}
    assert loaded.batch.has_caption.all()


def test_views_show_stored_paraphrases():
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            paraphrases = {"one": ["in other words"], "two": ["put differently"]}
            return Record(str(index), ("one", "two"), facts={"paraphrases": paraphrases})

    plan = ViewPlan(images={"view": WEAK}, texts={"as is": TextPolicy(), "other": TextPolicy("paraphrase")})
    batch = next(make_loader(Paraphrased(20), plan=plan, batch_size=20).batches(0, 1)).batch
    seen = set()
    for one, other, length in zip(batch.texts["as is"].ids, batch.texts["other"].ids, batch.texts["other"].lengths):
        seen.add((decode(one[:3]), decode(other[:length])))
    assert seen == {("one", "in other words"), ("two", "put differently")}


@pytest.mark.parametrize("stored", [[], ["A"], ["A", "B"], ["A", "B", "C"], ["A", "A"]], ids=str)
def test_views_get_distinct_paraphrases_if_available(stored):
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), ("original",), facts={"paraphrases": {"original": [x.lower() for x in stored]}})

    plan = ViewPlan(images={"view": WEAK}, texts={"q": TextPolicy("paraphrase"), "k": TextPolicy("paraphrase")})
    [loaded] = make_loader(Paraphrased(60), plan=plan, batch_size=60).batches(0, 1)
    query, key = (
        [decode(ids[:length]) for ids, length in zip(view.ids, view.lengths)] for view in loaded.batch.texts.values()
    )
    known = {x.lower() for x in stored}
    pool = known if len(known) >= 2 else known | {"original"}
    pairs = set(zip(query, key))
    assert pairs == {(one, other) for one in pool for other in pool if one != other or len(pool) == 1}


# ---------------------------------------------------------------- bad samples


@pytest.mark.parametrize(
    "stored", ["in other words", ["in other words"], {"original": "in other words"}, {"original": [1]}]
)
def test_malformed_paraphrases_are_bad_samples(stored):
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), ("original",), facts={"paraphrases": stored if index < 2 else None})

    plan = ViewPlan(images={"view": WEAK}, texts={"q": TextPolicy("paraphrase")})
    [loaded] = make_loader(Paraphrased(20), plan=plan, batch_size=20).batches(0, 1)
    assert {entry.reason for entry in loaded.bad} == {"malformed paraphrases"}
    assert not {0, 1} & set(loaded.batch.indices.tolist())


def test_bad_samples_are_replaced_and_reported():
    source = Pairs(no_record={3, 11}, no_image={0, 20})
    pair_loader = make_loader(source)
    for epoch in range(3):
        loaded = list(pair_loader.batches(5 * epoch, 5 * epoch + 5))
        used = [index for step in loaded for index in step.batch.indices.tolist()]
        assert len(used) == 40
        assert not {0, 3, 11, 20} & set(used)
        assert set(used) == set(range(40)) - {0, 3, 11, 20}
        entries = [entry for step in loaded for entry in step.bad]
        assert {entry.key for entry in entries} == {"pairs[3]", "pairs[11]", "pair-0", "pair-20"}
        assert {entry.epoch for entry in entries} == {epoch}
        assert BadEntry("pairs[3]", "unreadable row", "row 3", epoch) in entries
        assert all(entry.reason for entry in entries)


def test_a_replacement_has_different_views_than_the_sample_itself():
    source = Pairs(8, no_record={1, 2, 3})
    [loaded] = make_loader(source).batches(0, 1)
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(loaded.batch.indices.tolist()):
        rows.setdefault(index, []).append(row)
    doubled = [pair for pair in rows.values() if len(pair) > 1]
    assert doubled
    boxes = loaded.batch.images["strong"].params[:, :4]
    for first, second, *_ in doubled:
        assert not torch.equal(boxes[first], boxes[second])


def test_a_bad_sample_leaves_no_traces_in_its_replacement():
    """A sample that fails after its text has been tokenized must not leave tokens in the replacement's padding."""
    source = Pairs(no_image=set(range(0, 40, 3)))
    for loaded in make_loader(source).batches(0, 5):
        for text in loaded.batch.texts.values():
            beyond = torch.arange(text.ids.shape[1]) >= text.lengths[:, None]
            assert (text.ids[beyond] == 0).all()
            assert text.labels is None or (text.labels[beyond] == -100).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_data_is_an_error_with_reasons(workers):
    source = Pairs(no_record=set(range(20)), no_image=set(range(20, 40)))
    with pytest.raises(UserError, match=r"^The data in pairs seems unusable: 21 .*unreadable row \(\d+\)") as caught:
        next(make_loader(source, workers=workers).batches(0, 1))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_treated_as_a_bad_sample(workers):
    class Buggy(Pairs):
        def image(self, index: int) -> bytes | np.ndarray:
            if index == 9:
                raise ZeroDivisionError("a bug")
            return super().image(index)

    with pytest.raises(ZeroDivisionError) as caught:
        list(make_loader(Buggy(), workers=workers).batches(0, 5))
    assert "pairs[9]" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))


# ---------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        (0, {}, "no training pairs"),
        (1, {}, "one training pair, .* at least two"),
        (5, {}, "5 training pairs, fewer than --batch-size 8; use --batch-size 5 or less"),
        (7, {"world_size": 2}, "7 training pairs, fewer than --batch-size 8; use --batch-size 6 or less"),
        (3, {"world_size": 4}, "use at most 3 processes"),
        (40, {"batch_size": 1}, "Batch size 1 is too small"),
        (40, {"world_size": 3}, "8 is not divisible by the number of processes, 3; use --batch-size 9"),
    ],
)
def test_invalid_sizes_are_rejected(pairs, settings, message):
    with pytest.raises(UserError, match=message):
        make_loader(Pairs(), indices=np.arange(pairs), **settings)


# ---------------------------------------------------------------- evaluation images and tags


@pytest.mark.parametrize("workers", [0, 2])
def test_image_batches_yield_evaluation_views_in_order(workers):
    source = Pairs(no_record={4}, no_image={4, 6, 7, 8, 9})
    indices = [12, 3, 4, 5, 6, 7, 8, 9, 10]
    batches = list(image_batches(source, indices, SIZE, batch_size=4, workers=workers))
    assert [good for good, _, _ in batches] == [[12, 3, 5], [], [10]]
    assert [pixels.shape[0] for _, pixels, _ in batches] == [3, 0, 1]
    assert [[entry.key for entry in bad] for _, _, bad in batches] == [
        ["pairs[4]"],
        ["pair-6", "pair-7", "pair-8", "pair-9"],
        [],
    ]
    for good, pixels, _ in batches:
        for index, view in zip(good, pixels):
            expected, _ = make_view(source.image(index), SIZE)
            assert torch.equal(view, expected)


@pytest.mark.parametrize("resize_mode", ["squash", "longest"])
def test_evaluation_views_in_training_are_those_of_evaluation(resize_mode):
    """With the preprocessing of the image tower. Random crops have none."""
    preprocess = Preprocess(interpolation="bilinear", resize_mode=resize_mode)
    plan = ViewPlan({"fixed": EVALUATION, "random": WEAK}, {"base": TextPolicy()})
    batch = next(make_loader(Pairs(), plan=plan, preprocess=preprocess).batches(0, 1)).batch
    ((_, pixels, _),) = image_batches(Pairs(), batch.indices.numpy(), SIZE, preprocess=preprocess)
    assert torch.equal(batch.images["fixed"].pixels, pixels)
    other = next(make_loader(Pairs(), plan=plan).batches(0, 1)).batch
    assert torch.equal(batch.images["random"].pixels, other.images["random"].pixels)
    assert not torch.equal(batch.images["fixed"].pixels, other.images["fixed"].pixels)


def test_image_batches_of_no_indices():
    assert list(image_batches(Pairs(), [], SIZE)) == []


def test_tag_vocabulary_ranks_by_frequency_then_name():
    class Tagged(Pairs):
        def record(self, index: int) -> Record:
            if index == 4:
                raise BadSample("unreadable row")
            tags = [("b", "a", "c"), ("c", "c", "c"), ("a", "b", "c"), ("d",)][index]
            return Record(str(index), (), tags)

    assert tag_vocabulary(Tagged(), [0, 1, 2, 3, 4], 3) == {"c": 0, "a": 1, "b": 2}
    assert tag_vocabulary(Tagged(), [3], 3) == {"d": 0}


def test_images_without_a_caption_are_used_if_the_plan_allows(tmp_path):
    """A table with present, empty and missing captions. All tags count, and all images are shown."""
    rows = []
    for number, caption in enumerate(["a cat", "", None, "a dog", "  ", "a cow"]):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": caption, "tags": [f"tag {number}", "animal"]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "pairs.jsonl"))
    vocabulary = tag_vocabulary(source, range(6), 10)
    assert set(vocabulary) == {"animal", *(f"tag {number}" for number in range(6))}

    plan = ViewPlan(images={"a": WEAK}, texts={"text": TextPolicy()}, tags=10, captionless=True)
    [loaded] = make_loader(source, plan=plan, indices=np.arange(6), batch_size=6, tag_vocabulary=vocabulary).batches(
        0, 1
    )
    batch = loaded.batch
    assert loaded.bad == []
    assert sorted(batch.indices.tolist()) == list(range(6))
    for index, has_caption, tags, pixels in zip(
        batch.indices.tolist(), batch.has_caption, batch.tags, batch.images["a"].pixels
    ):
        assert bool(has_caption) == (index in (0, 3, 5))
        assert {vocabulary["animal"], vocabulary[f"tag {index}"]} == set(tags.tolist()) - {-1}
        assert pixels.float().mean().item() == pytest.approx(40 * index, abs=1)

    [loaded] = make_loader(source, plan=CLIP_PLAN, indices=np.arange(6), batch_size=6).batches(0, 1)
    assert {(entry.key, entry.reason) for entry in loaded.bad} == {
        ("1.png", "empty caption"),
        ("2.png", "no caption"),
        ("4.png", "empty caption"),
    }


def test_captions_without_an_image_are_used_if_the_plan_allows(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "a cat"}, {"image": None, "caption": "a dog"}, {"caption": "a cow"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "pairs.jsonl"))
    assert [source.record(index).captions for index in range(3)] == [("a cat",), ("a dog",), ("a cow",)]
    plan = ViewPlan(images={"a": WEAK}, texts={"text": TextPolicy()}, imageless=True)
    [loaded] = make_loader(source, plan=plan, indices=np.arange(3), batch_size=3).batches(0, 1)
    batch = loaded.batch
    assert loaded.bad == []
    for index, has_image, pixels in zip(batch.indices.tolist(), batch.has_image, batch.images["a"].pixels):
        assert bool(has_image) == (index == 0)
        assert pixels.float().mean().item() == 200  # samples without an image show another sample's
    texts = open_source(str(tmp_path / "texts.jsonl"))
    [loaded] = make_loader(texts, plan=plan, indices=np.arange(2), batch_size=2).batches(0, 1)
    assert not loaded.batch.has_image.any()
    assert not loaded.batch.images["a"].pixels.any()  # no sample has an image
    [loaded] = make_loader(source, plan=CLIP_PLAN, indices=np.arange(3), batch_size=3).batches(0, 1)
    assert {entry.reason for entry in loaded.bad} == {"no image path"}
    assert loaded.batch.has_image is None


def test_a_substitute_that_cannot_be_decoded_is_not_counted_as_the_texts(tmp_path):
    """Its own sample is bad; the caption that it stands in for is not."""
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "cut.jpg", quality=95)
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])  # its header can be read
    rows = [{"image": "good.png", "caption": "good"}, {"image": "cut.jpg", "caption": "cut"}]
    rows += [{"caption": f"text {number}"} for number in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = ViewPlan(images={"a": WEAK}, texts={"text": TextPolicy()}, imageless=True)
    source = open_source(str(tmp_path / "pairs.jsonl"))
    [loaded] = make_loader(source, plan=plan, indices=np.arange(32), batch_size=32).batches(0, 1)
    assert {entry.key for entry in loaded.bad} == {source.record(1).key}
    assert set(loaded.batch.indices.tolist()) >= {0, *range(2, 32)}
    values = {pixels.float().mean().item() for pixels in loaded.batch.images["a"].pixels}
    assert values == {0.0, 200.0}


def test_group_ids_stand_for_the_values_of_a_column():
    class Products(Pairs):
        def record(self, index: int) -> Record:
            product = [0, 0.0, "7", None, "", float("nan")][index % 6]
            return Record(str(index), (f"caption {index // 12}",), facts={"product": product})

    source = Products(24)
    [loaded] = make_loader(source, plan=CLIP_PLAN, batch_size=24, group_column="product").batches(0, 1)
    indices = loaded.batch.indices.tolist()
    # a sample without a value is its own group
    groups = [{0: "0", 1: "0.0", 2: "7"}.get(index % 6, f"sample {index}") for index in indices]
    same = torch.tensor([[left == right for left in groups] for right in groups])
    ids = loaded.batch.group_ids
    assert torch.equal(ids[:, None] == ids, same)
    [plain] = make_loader(source, plan=CLIP_PLAN, batch_size=24).batches(0, 1)
    assert plain.batch.group_ids is None
    assert torch.equal(plain.batch.caption_ids, loaded.batch.caption_ids)
    parts = [
        make_loader(source, plan=CLIP_PLAN, batch_size=24, group_column="product", rank=rank, world_size=2)
        for rank in range(2)
    ]
    of_ranks = [next(part.batches(0, 1)).batch.group_ids for part in parts]
    assert torch.equal(torch.cat(of_ranks), ids)


def test_bad_samples_do_not_keep_the_memory_of_their_batch():
    """Without garbage collection, which may come late: the traceback of an error refers to all that its functions have."""

    def images_in_memory() -> int:
        return sum(type(each) is OpenedImage for each in gc.get_objects())

    source = Pairs(**BAD)
    source.image = lambda index: source.__class__.image(source, index)[: 100 if index == 8 else None]  # truncated
    gc.collect()
    gc.disable()
    try:
        before = images_in_memory()
        [loaded] = make_loader(source, batch_size=32).batches(0, 1)
        assert len(loaded.bad) > 3
        assert images_in_memory() == before
        [(_, _, bad)] = image_batches(source, np.arange(32), SIZE)
        assert len(bad) == 5
        assert images_in_memory() == before
    finally:
        gc.enable()
