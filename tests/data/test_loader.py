from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from coalign.data import loader
from coalign.data.evaluation_views import image_batches
from coalign.data.image_views import make_views
from coalign.data.loader import BadEntry, LoadedBatch, PairLoader, tag_vocabulary
from coalign.data.order import order
from coalign.data.randomness import generator
from coalign.data.sources import open_source
from coalign.data.tokenizer import Tokenizer, load_tokenizer
from coalign.errors import BadSample, NoCaption, UserError
from coalign.types import EVALUATION, STRONG, WEAK, Batch, Record, TextPolicy, ViewPlan

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE, CONTEXT = 16, 24
PLAN = ViewPlan(
    images={"weak": WEAK, "strong": STRONG},
    texts={"caption": TextPolicy(), "masked": TextPolicy("eda", mask_p=0.3)},
    patch_ranks=True,
    tags=3,
    captionless=True,
)
CLIP_PLAN = ViewPlan(images={"view": WEAK}, texts={"caption": TextPolicy()})
WORDS = ["red", "blue", "green", "apple", "pear", "boat", "house", "tree", "small", "large", "old", "left", "top"]


@dataclass
class Pairs:
    """Random pairs: an image differs from every other, has up to four captions and four tags. Some are bad."""

    size: int = 40
    no_record: set[int] = field(default_factory=set)
    no_image: set[int] = field(default_factory=set)
    no_captions: set[int] = field(default_factory=set)
    name: str = "pairs"

    def __len__(self) -> int:
        return self.size

    def record(self, index: int) -> Record:
        if index in self.no_record:
            raise BadSample("unreadable row", f"row {index}")
        random = np.random.default_rng(index)
        captions = [" ".join(random.choice(WORDS, random.integers(2, 12))) for _ in range(random.integers(1, 5))]
        tags = tuple(random.choice(["red", "boat", "tree", "rare"], random.integers(0, 4), replace=False))
        return Record(f"pair-{index}", () if index in self.no_captions else tuple(captions), tags)

    def image(self, index: int) -> bytes | np.ndarray:
        if index in self.no_image:
            return b"this is no image"
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), np.uint8)
        if index % 2:
            return pixels
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("clip")


@pytest.fixture
def make(tokenizer):
    def make(source=None, indices=None, plan=PLAN, **changes) -> PairLoader:
        source = source or Pairs()
        settings = {"image_size": SIZE, "context_length": CONTEXT, "batch_size": 8, "seed": 7} | changes
        if plan.tags:
            settings.setdefault("tag_vocabulary", {"red": 0, "boat": 1, "tree": 2})
        if plan.patch_ranks:
            settings["patch_grid"] = (2, 3)
        return PairLoader(source, np.arange(len(source)) if indices is None else indices, plan, tokenizer, **settings)

    return make


def flat(batch: Batch) -> dict[str, torch.Tensor]:
    tensors = {"indices": batch.indices, "caption_ids": batch.caption_ids, "has_caption": batch.has_caption}
    if batch.tags is not None:
        tensors["tags"] = batch.tags
    for name, view in (batch.images | batch.texts).items():
        tensors |= {f"{name}.{part}": value for part, value in vars(view).items() if value is not None}
    return tensors


def assert_same(left: list[LoadedBatch], right: list[LoadedBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.bad == other.bad
        one, other = flat(one.batch), flat(other.batch)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name


BAD = {"no_record": {3, 11}, "no_image": {0, 20, 21, 22}, "no_captions": {5}}


# ---------------------------------------------------------------- purity


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(make, monkeypatch, workers):
    monkeypatch.setattr(loader, "CHUNK", 3)
    alone = list(make(Pairs(**BAD)).batches(0, 12))
    assert sum(len(loaded.bad) for loaded in alone) >= 12
    assert_same(list(make(Pairs(**BAD), workers=workers).batches(0, 12)), alone)


def test_chunks_do_not_show(make, monkeypatch):
    whole = list(make(Pairs(**BAD)).batches(0, 7))
    monkeypatch.setattr(loader, "CHUNK", 3)
    assert_same(list(make(Pairs(**BAD)).batches(0, 7)), whole)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batch(make, world_size):
    whole = list(make(Pairs(**BAD)).batches(0, 7))
    ranks = [list(make(Pairs(**BAD), rank=r, world_size=world_size).batches(0, 7)) for r in range(world_size)]
    for step, loaded in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [len(share.batch) for share in shares] == [8 // world_size] * world_size
        assert [entry for share in shares for entry in share.bad] == loaded.bad
        for name, value in flat(loaded.batch).items():
            parts = [flat(share.batch)[name] for share in shares]
            if name == "tags" or (
                name.endswith(("ids", "labels")) and value.ndim == 2
            ):  # padded to the share's longest
                padding = -1 if name == "tags" else -100 if name.endswith("labels") else 0
                width = value.shape[1]
                parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in parts]
            assert torch.equal(torch.cat(parts), value), name


@pytest.mark.parametrize("start", [1, 4, 5, 9])
def test_resumes_at_any_step_without_replay(make, start):
    class Counting(Pairs):
        read = 0

        def record(self, index: int) -> Record:
            self.read += 1
            return super().record(index)

    source = Counting()
    whole = list(make().batches(0, 12))
    assert_same(list(make(source).batches(start, 12)), whole[start:])
    assert source.read == (12 - start) * 8


def test_the_views_are_those_of_seed_epoch_sample_and_name(make):
    source = Pairs()
    subject = make(source, indices=np.arange(2, 40))
    epoch, position = divmod(6, subject.steps_per_epoch)
    [loaded] = subject.batches(6, 7)
    expected = 2 + order(38, 7, epoch)[np.arange(position * 8, position * 8 + 8)]
    assert loaded.batch.indices.tolist() == expected.tolist()
    for row, index in enumerate(expected.tolist()):
        views = make_views(
            source.image(index), PLAN.images, lambda name, i=index: generator(7, epoch, i, 0, name), SIZE
        )
        for name, (pixels, params) in views.items():
            assert torch.equal(loaded.batch.images[name].pixels[row], pixels)
            assert torch.equal(loaded.batch.images[name].params[row], torch.tensor(params.vector()))


# ---------------------------------------------------------------- what an epoch holds


def test_an_epoch_holds_every_sample_at_most_once_and_drops_the_tail(make):
    subject = make(Pairs(45), indices=np.arange(1, 45))  # 44 samples: 5 batches of 8, 4 samples dropped
    assert subject.steps_per_epoch == 5
    epochs = []
    for epoch in range(2):
        loaded = list(subject.batches(5 * epoch, 5 * epoch + 5))
        epochs.append([index for step in loaded for index in step.batch.indices.tolist()])
        assert len(set(epochs[-1])) == 40
        assert set(epochs[-1]) <= set(range(1, 45))
        assert [entry for step in loaded for entry in step.bad] == []
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # another tail is dropped


def test_two_epochs_show_different_views_of_a_sample(make):
    subject = make(Pairs(8), plan=PLAN)
    first, second = (next(subject.batches(step, step + 1)).batch for step in (0, 1))
    first_rows, second_rows = first.indices.argsort(), second.indices.argsort()
    assert torch.equal(first.indices[first_rows], second.indices[second_rows])
    for name in PLAN.images:
        same = first.images[name].params[first_rows] == second.images[name].params[second_rows]
        assert same[:, :4].all(1).sum() < 2  # boxes, which are on whole pixels of a small image
        assert (first.images[name].patch_ranks[first_rows] != second.images[name].patch_ranks[second_rows]).all()


def test_views_of_one_sample_are_independent(make):
    twice = ViewPlan(images={"a": STRONG, "b": STRONG}, texts={}, patch_ranks=True)
    [loaded] = make(plan=twice).batches(0, 1)
    a, b = loaded.batch.images["a"], loaded.batch.images["b"]
    assert (a.params[:, :4] == b.params[:, :4]).all(1).sum() < 2
    assert not (a.patch_ranks == b.patch_ranks).any()


def test_every_caption_of_a_sample_is_chosen_equally_often(make, tokenizer):
    class Four(Pairs):
        def record(self, index: int) -> Record:
            return Record(f"pair-{index}", tuple(f"{index} {word}" for word in WORDS[:4]))

    plan = ViewPlan(images={"view": WEAK}, texts={"one": TextPolicy(), "two": TextPolicy()})
    counts: Counter[str] = Counter()
    for loaded in make(Four(8), plan=plan).batches(0, 100):
        one, two = loaded.batch.texts["one"], loaded.batch.texts["two"]
        assert torch.equal(one.ids, two.ids)  # the text views of a sample show one caption
        for index, ids, length in zip(loaded.batch.indices, one.ids, one.lengths):
            number, word = tokenizer.decode(ids[:length].tolist()).split()
            assert int(number) == index
            counts[word] += 1
    assert set(counts) == set(WORDS[:4])
    assert all(abs(count - 200) < 60 for count in counts.values())  # five standard deviations


# ---------------------------------------------------------------- what a batch holds


def test_shapes_types_and_padding(make):
    loaded = list(make().batches(0, 20))
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


def test_tags_are_ids_of_the_vocabulary(make):
    source, vocabulary = Pairs(), {"red": 0, "boat": 1, "tree": 2}
    for loaded in make(source).batches(0, 5):
        for index, row in zip(loaded.batch.indices.tolist(), loaded.batch.tags.tolist()):
            known = sorted(vocabulary[tag] for tag in source.record(index).tags if tag in vocabulary)
            assert row == known + [-1] * (len(row) - len(known))
    assert make(plan=CLIP_PLAN).batches(0, 1).send(None).batch.tags is None


def test_caption_ids_are_equal_exactly_where_captions_are(make):
    class Shared(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), (("a red boat", "A red boat", f"boat {index}")[index % 3],))

    [loaded] = make(Shared(12), plan=CLIP_PLAN, batch_size=12).batches(0, 1)
    captions = [Shared(12).record(index).captions[0] for index in loaded.batch.indices.tolist()]
    same_text = torch.tensor([[left == right for left in captions] for right in captions])
    ids = loaded.batch.caption_ids
    assert torch.equal(ids[:, None] == ids, same_text)


def test_a_sample_without_captions_is_used_where_the_plan_can(make):
    source = Pairs(8, no_captions={2, 5})
    [loaded] = make(source).batches(0, 1)
    batch = loaded.batch
    assert loaded.bad == []
    assert batch.has_caption.tolist() == [index not in (2, 5) for index in batch.indices.tolist()]
    assert len(set(batch.caption_ids[~batch.has_caption].tolist())) == 2
    for text in batch.texts.values():
        assert (text.lengths[~batch.has_caption] == 2).all()
        assert (text.ids[~batch.has_caption, :2] == torch.tensor([49406, 49407])).all()

    [loaded] = make(source, plan=ViewPlan(images={"a": WEAK}, texts={})).batches(0, 1)
    assert loaded.bad == []
    assert loaded.batch.texts == {}

    [loaded] = make(source, plan=CLIP_PLAN).batches(0, 1)
    assert {(entry.key, entry.reason) for entry in loaded.bad} >= {("pair-2", "no caption"), ("pair-5", "no caption")}
    assert loaded.batch.has_caption.all()


def test_stored_paraphrases_reach_the_view(make, tokenizer):
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            paraphrases = {"one": ["said otherwise"], "two": ["put differently"]}
            return Record(str(index), ("one", "two"), facts={"paraphrases": paraphrases})

    plan = ViewPlan(images={"view": WEAK}, texts={"as is": TextPolicy(), "other": TextPolicy("paraphrase")})
    batch = next(make(Paraphrased(20), plan=plan, batch_size=20).batches(0, 1)).batch
    seen = set()
    for one, other, length in zip(batch.texts["as is"].ids, batch.texts["other"].ids, batch.texts["other"].lengths):
        seen.add((tokenizer.decode(one[:3].tolist()), tokenizer.decode(other[:length].tolist())))
    assert seen == {("one", "said otherwise"), ("two", "put differently")}


@pytest.mark.parametrize("stored", [[], ["A"], ["A", "B"], ["A", "B", "C"], ["A", "A"]], ids=str)
def test_views_get_different_paraphrases_where_there_are(make, tokenizer, stored):
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), ("original",), facts={"paraphrases": {"original": [x.lower() for x in stored]}})

    plan = ViewPlan(images={"view": WEAK}, texts={"q": TextPolicy("paraphrase"), "k": TextPolicy("paraphrase")})
    [loaded] = make(Paraphrased(60), plan=plan, batch_size=60).batches(0, 1)
    query, key = (
        [tokenizer.decode(ids[:length].tolist()) for ids, length in zip(view.ids, view.lengths)]
        for view in loaded.batch.texts.values()
    )
    known = {x.lower() for x in stored}
    pool = known if len(known) >= 2 else known | {"original"}
    pairs = set(zip(query, key))
    assert pairs == {(one, other) for one in pool for other in pool if one != other or len(pool) == 1}


# ---------------------------------------------------------------- bad samples


@pytest.mark.parametrize(
    "stored", ["said otherwise", ["said otherwise"], {"original": "said otherwise"}, {"original": [1]}]
)
def test_malformed_paraphrases_are_bad_samples(make, stored):
    class Paraphrased(Pairs):
        def record(self, index: int) -> Record:
            return Record(str(index), ("original",), facts={"paraphrases": stored if index < 2 else None})

    plan = ViewPlan(images={"view": WEAK}, texts={"q": TextPolicy("paraphrase")})
    [loaded] = make(Paraphrased(20), plan=plan, batch_size=20).batches(0, 1)
    assert {entry.reason for entry in loaded.bad} == {"malformed paraphrases"}
    assert not {0, 1} & set(loaded.batch.indices.tolist())


def test_bad_samples_are_replaced_and_reported(make):
    source = Pairs(no_record={3, 11}, no_image={0, 20})
    subject = make(source)
    for epoch in range(3):
        loaded = list(subject.batches(5 * epoch, 5 * epoch + 5))
        used = [index for step in loaded for index in step.batch.indices.tolist()]
        assert len(used) == 40
        assert not {0, 3, 11, 20} & set(used)
        assert set(used) == set(range(40)) - {0, 3, 11, 20}
        entries = [entry for step in loaded for entry in step.bad]
        assert {entry.key for entry in entries} == {"pairs[3]", "pairs[11]", "pair-0", "pair-20"}
        assert {entry.epoch for entry in entries} == {epoch}
        assert BadEntry("pairs[3]", "unreadable row", "row 3", epoch) in entries
        assert all(entry.reason for entry in entries)


def test_a_replacement_shows_other_views_than_the_sample_itself(make):
    source = Pairs(8, no_record={1, 2, 3})
    [loaded] = make(source).batches(0, 1)
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(loaded.batch.indices.tolist()):
        rows.setdefault(index, []).append(row)
    doubled = [pair for pair in rows.values() if len(pair) > 1]
    assert doubled
    boxes = loaded.batch.images["strong"].params[:, :4]
    for first, second, *_ in doubled:
        assert not torch.equal(boxes[first], boxes[second])


def test_a_bad_sample_leaves_nothing_of_itself_behind(make):
    """What fails late, after the text was made, must not shine through in the replacement's padding."""
    source = Pairs(no_image=set(range(0, 40, 3)))
    for loaded in make(source).batches(0, 5):
        for text in loaded.batch.texts.values():
            beyond = torch.arange(text.ids.shape[1]) >= text.lengths[:, None]
            assert (text.ids[beyond] == 0).all()
            assert text.labels is None or (text.labels[beyond] == -100).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_data_stops_with_its_reasons(make, workers):
    source = Pairs(no_record=set(range(20)), no_image=set(range(20, 40)))
    with pytest.raises(UserError, match=r"^The data in pairs seems unusable: 21 .*unreadable row \(\d+\)") as caught:
        next(make(source, workers=workers).batches(0, 1))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_hidden_as_a_bad_sample(make, workers):
    class Buggy(Pairs):
        def image(self, index: int) -> bytes | np.ndarray:
            if index == 9:
                raise ZeroDivisionError("a bug")
            return super().image(index)

    with pytest.raises(ZeroDivisionError) as caught:
        list(make(Buggy(), workers=workers).batches(0, 5))
    assert "pair-9" in str(caught.value) + str(getattr(caught.value, "__notes__", ""))


# ---------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        (0, {}, "no train pairs"),
        (1, {}, "one train pair, .* at least two"),
        (5, {}, "5 train pairs, fewer than --batch-size 8; use --batch-size 5 or less"),
        (7, {"world_size": 2}, "7 train pairs, fewer than --batch-size 8; use --batch-size 6 or less"),
        (3, {"world_size": 4}, "use at most 3 processes"),
        (40, {"batch_size": 1}, "--batch-size 1 is too small"),
        (40, {"world_size": 3}, "8 cannot be shared equally by 3 processes; use --batch-size 9"),
    ],
)
def test_sizes_that_cannot_work(make, pairs, settings, message):
    with pytest.raises(UserError, match=message):
        make(Pairs(), indices=np.arange(pairs), **settings)


# ---------------------------------------------------------------- evaluation images and tags


@pytest.mark.parametrize("workers", [0, 2])
def test_image_batches_give_the_evaluation_view_in_order(workers):
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
            expected = make_views(source.image(index), {"v": EVALUATION}, lambda _: np.random.default_rng(1), SIZE)[
                "v"
            ][0]
            assert torch.equal(view, expected)


def test_image_batches_of_nothing():
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


def test_files_without_a_caption_are_used_by_methods_that_take_an_image_alone(make, tmp_path):
    """Real files: a table whose captions are there, empty and absent. Their tags count, their pictures are shown."""
    rows = []
    for number, caption in enumerate(["a cat", "", None, "a dog", "  ", "a cow"]):
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": caption, "tags": [f"tag {number}", "animal"]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "pairs.jsonl"))
    vocabulary = tag_vocabulary(source, range(6), 10)
    assert set(vocabulary) == {"animal", *(f"tag {number}" for number in range(6))}

    plan = ViewPlan(images={"a": WEAK}, texts={"text": TextPolicy()}, tags=10, captionless=True)
    [loaded] = make(source, plan=plan, indices=np.arange(6), batch_size=6, tag_vocabulary=vocabulary).batches(0, 1)
    batch = loaded.batch
    assert loaded.bad == []
    assert sorted(batch.indices.tolist()) == list(range(6))
    for index, has, tags, pixels in zip(
        batch.indices.tolist(), batch.has_caption, batch.tags, batch.images["a"].pixels
    ):
        assert bool(has) == (index in (0, 3, 5))
        assert {vocabulary["animal"], vocabulary[f"tag {index}"]} == set(tags.tolist()) - {-1}
        assert pixels.float().mean().item() == pytest.approx(40 * index, abs=1)

    [loaded] = make(source, plan=CLIP_PLAN, indices=np.arange(6), batch_size=6).batches(0, 1)
    assert {entry.reason for entry in loaded.bad} == {"empty caption", "no caption"}


def test_a_sample_without_caption_crosses_to_a_worker_and_back():
    bad = pickle.loads(pickle.dumps(NoCaption("no caption", "there", Record("key", (), ("tag",)))))
    assert (str(bad), bad.reason, bad.record.tags) == ("no caption: there", "no caption", ("tag",))


def test_texts_without_an_image_are_used_by_methods_that_take_a_text_alone(make, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "a cat"}, {"image": None, "caption": "a dog"}, {"caption": "a cow"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "pairs.jsonl"))
    assert [source.record(index).captions for index in range(3)] == [("a cat",), ("a dog",), ("a cow",)]
    plan = ViewPlan(images={"a": WEAK}, texts={"text": TextPolicy()}, imageless=True)
    [loaded] = make(source, plan=plan, indices=np.arange(3), batch_size=3).batches(0, 1)
    batch = loaded.batch
    assert loaded.bad == []
    for index, has, pixels in zip(batch.indices.tolist(), batch.has_image, batch.images["a"].pixels):
        assert bool(has) == (index == 0)
        assert pixels.float().mean().item() == 200  # another sample's, where there is none
    texts = open_source(str(tmp_path / "texts.jsonl"))
    [loaded] = make(texts, plan=plan, indices=np.arange(2), batch_size=2).batches(0, 1)
    assert not loaded.batch.has_image.any()
    assert not loaded.batch.images["a"].pixels.any()  # nobody's
    [loaded] = make(source, plan=CLIP_PLAN, indices=np.arange(3), batch_size=3).batches(0, 1)
    assert {entry.reason for entry in loaded.bad} == {"no image path"}
    assert loaded.batch.has_image is None
