from __future__ import annotations

import subprocess
import sys
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import by_name
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation import retrieval as module
from coalign.evaluation.embed import ImageEmbeds, embed_images
from coalign.evaluation.retrieval import retrieval, retrieve, retrieve_in_folds
from coalign.metric import Metric
from coalign.types import DualEncoder


def problem(images: int = 60, texts: int = 150, ids: int = 150, dim: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    owner = torch.cat([torch.arange(images), torch.randint(0, images, (texts - images,), generator=generator)])
    text_ids = torch.randint(0, ids, (texts,), generator=generator) * 11
    words = torch.randn(11 * ids, dim, generator=generator)
    text = F.normalize(image[owner] + 0.6 * words[text_ids], dim=1)
    return image, text, owner, text_ids


def naive_ranks(image: Tensor, text: Tensor, owner: Tensor, text_ids: Tensor) -> tuple[list[int], list[int]]:
    """Returns the rank of every query's best correct result, from the definition in double loops. Equal captions are one candidate."""
    scores = (image.double() @ text.double().T).tolist()
    captions = [{int(t) for t, o in zip(text_ids, owner) if o == i} for i in range(len(image))]
    by_image, by_text = [], []
    for i in range(len(image)):
        order = sorted((text_ids.tolist().index(t) for t in set(text_ids.tolist())), key=lambda j: -scores[i][j])
        by_image.append(1 + next(rank for rank, j in enumerate(order) if int(text_ids[j]) in captions[i]))
    for j in range(len(text)):
        order = sorted(range(len(image)), key=lambda i: -scores[i][j])
        by_text.append(1 + next(rank for rank, i in enumerate(order) if int(text_ids[j]) in captions[i]))
    return by_image, by_text


@pytest.mark.parametrize("chunk", [8_000_000, 1])
@pytest.mark.parametrize("ids", [100_000, 25])
def test_matches_naive_double_loops(monkeypatch, chunk, ids):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    image, text, owner, text_ids = problem(ids=ids)
    result = retrieval(image, text, owner, text_ids)
    for side, ranks in zip((result.image_to_text, result.text_to_image), naive_ranks(image, text, owner, text_ids)):
        np.testing.assert_array_equal(side.ranks, ranks)
        for k in (1, 5, 10):
            assert side.recall[k].value == pytest.approx(np.mean(np.array(ranks) <= k))
        assert side.median_rank.value == np.median(ranks)
    assert result.num_distinct_texts == len(text_ids.unique())


def test_recall_equals_top_k_accuracy_with_one_caption_per_image():
    generator = torch.Generator().manual_seed(5)
    image = F.normalize(torch.randn(80, 8, generator=generator), dim=1)
    text = F.normalize(image + 0.4 * torch.randn(80, 8, generator=generator), dim=1)
    result = retrieval(image, text, torch.arange(80))
    scores = (image @ text.T).numpy()
    for k in (1, 5, 10):
        assert result.image_to_text.recall[k].value == pytest.approx(top_k_accuracy_score(range(80), scores, k=k))
        assert result.text_to_image.recall[k].value == pytest.approx(top_k_accuracy_score(range(80), scores.T, k=k))
    assert 0.1 < result.image_to_text.recall[1].value < 0.9


def test_equal_captions_are_correct_for_every_image():
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    text = image[[1, 0, 2]]  # the captions of images 0 and 1 are nearest to the other image
    owner = torch.arange(3)
    assert retrieval(image, text, owner).image_to_text.recall[1].value == pytest.approx(1 / 3)
    shared = retrieval(image, text, owner, torch.tensor([7, 7, 9]))
    assert shared.image_to_text.recall[1].value == 1.0
    assert shared.text_to_image.recall[1].value == 1.0


def test_chance_matches_random_embeddings():
    _, _, owner, text_ids = problem(ids=40)
    generator = torch.Generator().manual_seed(1)
    runs = []
    for _ in range(60):
        image = F.normalize(torch.randn(60, 64, generator=generator), dim=1)
        words = F.normalize(torch.randn(int(text_ids.max()) + 1, 64, generator=generator), dim=1)
        text = F.normalize(words[torch.randperm(len(words), generator=generator)[:150]], dim=1)
        runs.append(retrieval(image, text, owner, text_ids))
    assert not _far_from_chance(runs)


@pytest.mark.parametrize("num_ids", [8, 40])
def test_chance_matches_random_embeddings_that_are_equal_for_equal_captions(num_ids):
    generator = torch.Generator().manual_seed(1)
    owner, text_ids = torch.arange(120), torch.arange(120) % num_ids
    runs = []
    for _ in range(200):
        image, words = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (120, num_ids))
        runs.append(retrieval(image, words[text_ids], owner, text_ids))
    assert not _far_from_chance(runs)
    assert runs[0].image_to_text.recall[5].chance == pytest.approx(5 / num_ids)
    assert set(runs[0].image_to_text.top.ravel()) <= set(range(num_ids))  # a row of each caption


def _far_from_chance(runs):
    """The metrics whose mean over the runs differs from the stated chance: (name, mean, chance)."""
    found = []
    for name in ("image_to_text", "text_to_image"):
        sides = [getattr(run, name) for run in runs]
        for k in (1, 5, 10):
            recalls = [side.recall[k].value for side in sides]
            error = np.std(recalls) / len(recalls) ** 0.5
            found.append((f"{name}.r{k}", np.mean(recalls), sides[0].recall[k].chance, 4 * error + 1e-3))
        rank, chance = np.mean([side.median_rank.value for side in sides]), sides[0].median_rank.chance
        found.append((f"{name}.median_rank", rank, chance, 0.1 * chance))
    return [(name, mean, chance) for name, mean, chance, tolerance in found if not abs(mean - chance) < tolerance]


@pytest.mark.parametrize("num_images", [1, 2, 7, 25, 60])
@pytest.mark.parametrize("captions", ["one", "five", "ragged", "shared", "labels"])
def test_collapsed_models_score_exactly_chance(num_images, captions):
    """Whatever the numbers of captions, whether all embeddings are equal, or only those of images or of texts."""
    generator = torch.Generator().manual_seed(num_images)
    counts = torch.randint(1, 6, (num_images,), generator=generator) if captions in ("ragged", "shared") else None
    numbers = counts if counts is not None else torch.full((num_images,), 5 if captions == "five" else 1)
    owner = torch.repeat_interleave(torch.arange(num_images), numbers)
    num_ids = {"shared": 12, "labels": 4}.get(captions)
    ids = None if num_ids is None else torch.randint(num_ids, (len(owner),), generator=generator)
    point, texts = F.normalize(torch.ones(1, 8), dim=1), len(owner)
    varied = F.normalize(torch.randn(max(texts, 12), 8, generator=generator), dim=1)
    varied = varied[:texts] if ids is None else varied[ids]
    for image, text in ((point.repeat(num_images, 1), point.repeat(texts, 1)), (point.repeat(num_images, 1), varied)):
        result = retrieval(image, text, owner, ids)
        sides = [result.text_to_image] + ([result.image_to_text] if text is not varied else [])
        for side in sides:
            for metric in side.metrics():
                assert metric.value == pytest.approx(metric.chance, rel=1e-12), metric.name
                assert not metric.beats_chance()


def test_collapsed_model_scores_exactly_chance():
    _, _, owner, text_ids = problem(ids=40)
    point = F.normalize(torch.ones(1, 12), dim=1)
    noise = 1e-8 * torch.randn(150, 12, generator=torch.Generator().manual_seed(3))
    result = retrieval(point.repeat(60, 1), point + noise, owner, text_ids)
    for side in (result.image_to_text, result.text_to_image):
        for k in (1, 5, 10):
            assert side.recall[k].value == pytest.approx(side.recall[k].chance)
        assert side.median_rank.value == side.median_rank.chance
    # the expected rank of the best of r correct candidates among n in random order is (n + 1) / (r + 1)
    num_correct = np.array([len(set(owner[text_ids == i].tolist())) for i in text_ids])
    np.testing.assert_allclose(result.text_to_image.ranks, 61 / (num_correct + 1))


def test_top_results_are_the_nearest_and_marked():
    image, text, owner, text_ids = problem()
    side = retrieval(image, text, owner, text_ids).text_to_image
    scores = (text @ image.T).numpy()
    np.testing.assert_array_equal(side.top, np.argsort(-scores, axis=1)[:, :10])
    np.testing.assert_allclose(side.top_scores, np.take_along_axis(scores, side.top, 1), atol=1e-6)
    np.testing.assert_array_equal(side.top_correct[:, 0], side.ranks == 1)


def test_images_without_captions_are_distractors():
    image = torch.eye(4)
    result = retrieval(image, torch.eye(4)[[1, 3]], torch.tensor([0, 3]))
    assert result.num_captionless == 2
    np.testing.assert_array_equal(result.image_to_text.queries, [0, 3])
    assert result.text_to_image.recall[1].value == 0.5  # caption 0 retrieves image 1, which has no caption
    assert result.text_to_image.recall[1].count == 2
    assert result.details()["images_without_caption"] == 2


def test_intervals_resample_images_with_all_captions():
    generator = torch.Generator().manual_seed(2)
    image = F.normalize(torch.randn(50, 16, generator=generator), dim=1)
    wrong = torch.rand(50, generator=generator) < 0.5
    points = torch.where(wrong[:, None], -image, image)
    noise = 1e-3 * torch.randn(400, 16, generator=generator)
    text = F.normalize(points.repeat_interleave(8, 0) + noise, dim=1)
    metric = retrieval(image, text, torch.arange(50).repeat_interleave(8)).text_to_image.recall[1]
    p = metric.value
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * (p * (1 - p) / 50) ** 0.5, rel=0.15)


def test_metrics_have_names_titles_and_closed_form_chances():
    """Distinct captions: a random order has a correct one among the first k with a hypergeometric probability."""
    image, text, owner, _ = problem()
    result = retrieval(image, text, owner)
    numbers = np.bincount(owner)  # captions of each image

    def chances(k):
        return np.mean([1 - comb(150 - n, k) / comb(150, k) for n in numbers]), k / 60

    median = next(k for k in range(1, 151) if chances(k)[0] >= 0.5)
    titles = ("image_to_text", "Image → text", 60), ("text_to_image", "Text → image", 150)
    expected = []
    for side, (name, title, count) in enumerate(titles):
        expected += [(f"{name}.r{k}", f"{title} R@{k}", "rate", chances(k)[side], count) for k in (1, 5, 10)]
        expected.append((f"{name}.median_rank", f"{title} median rank", "rank", (median, 30)[side], count))
    mean_chance = np.mean([chances(k) for k in (1, 5, 10)])
    expected.append(("mean_recall", "Mean recall", "rate", mean_chance, 60))
    found = result.metrics()
    gap = found.pop()
    for metric, (*labels, chance, count) in zip(found, expected, strict=True):
        assert [metric.name, metric.title, metric.kind, metric.count] == [*labels, count]
        assert metric.chance == pytest.approx(chance, rel=0.05 if metric.kind == "rank" else 1e-9)
    distance = float(np.linalg.norm(image.numpy().mean(0) - text.numpy().mean(0)))
    assert gap == Metric("modality_gap", "Modality gap", "distance", pytest.approx(distance), count=60)
    assert gap.outcome.values.tolist() == [gap.value]
    assert result.details() == {"images": 60, "captions": 150, "distinct_captions": 150, "images_without_caption": 0}
    assert retrieval(*problem(ids=25)).details()["distinct_captions"] == len(problem(ids=25)[3].unique())


def test_outcomes_are_the_hits_and_ranks_of_queries_grouped_by_image():
    """Image 0 has no caption, so the rows of the others are not their positions among the queries."""
    image, text, owner, _ = problem()
    owner = owner.clamp(min=1)
    result = retrieval(image, text, owner)
    found = by_name(result.metrics())
    for name, groups in (("image_to_text", range(1, 60)), ("text_to_image", owner)):
        ranks = getattr(result, name).ranks
        for k in (1, 5, 10):
            outcome = found[f"{name}.r{k}"].outcome
            assert outcome.statistic == "mean"
            np.testing.assert_array_equal(outcome.values, ranks <= k)
            np.testing.assert_array_equal(outcome.groups, groups)
        outcome = found[f"{name}.median_rank"].outcome
        assert outcome.statistic == "median"
        np.testing.assert_array_equal(outcome.values, ranks)
        np.testing.assert_array_equal(outcome.groups, groups)


def test_mean_recall_is_the_mean_of_the_recalls_and_its_items_are_images_with_their_captions():
    image, text, owner, _ = problem()
    owner = owner.clamp(min=1)  # image 0 has no caption
    result = retrieval(image, text, owner)
    recalls = [side.recall[k] for side in (result.image_to_text, result.text_to_image) for k in (1, 5, 10)]
    metric = by_name(result.metrics())["mean_recall"]
    assert metric.value == pytest.approx(np.mean([each.value for each in recalls]))
    assert metric.chance == pytest.approx(np.mean([each.chance for each in recalls]))
    np.testing.assert_array_equal(metric.outcome.groups, range(1, 60))
    captions = owner.bincount()
    for row, value in zip(range(1, 60), metric.outcome.values, strict=True):
        as_query = np.mean([result.image_to_text.ranks[row - 1] <= k for k in (1, 5, 10)])
        as_result = np.mean([result.text_to_image.ranks[owner == row] <= k for k in (1, 5, 10)])
        assert value == pytest.approx((as_query + as_result * captions[row] * 59 / 150) / 2)
    # recalls that are the same for any model are left out
    few = retrieval(image[:8], text[:8], torch.arange(8))
    recalls = [side.recall[k].value for side in (few.image_to_text, few.text_to_image) for k in (1, 5)]
    assert by_name(few.metrics())["mean_recall"].value == pytest.approx(np.mean(recalls))


def test_the_bootstrap_draws_images_with_the_same_captions_together():
    """Two images have each of 50 pairs of captions: the second image of a pair says nothing new about captions as queries."""
    image, text, _, _ = problem()
    image, text = (torch.cat([embeds, embeds]) for embeds in (image[:50], text[:100]))
    owner, ids = torch.arange(200) // 2, torch.arange(200) % 100
    twice, once = retrieval(image, text, owner, ids), retrieval(image[:50], text[:100], owner[:100], ids[:100])
    for metric in twice.metrics()[:-1]:
        items = owner if metric.name.startswith("text") else np.arange(100)
        np.testing.assert_array_equal(metric.outcome.groups, items % 50)
    for metric, other in zip(twice.image_to_text.metrics(), once.image_to_text.metrics(), strict=True):
        assert (metric.value, metric.low, metric.high) == pytest.approx((other.value, other.low, other.high))
    recalls = [side.recall[k].value for side in (twice.image_to_text, twice.text_to_image) for k in (1, 5, 10)]
    mean_recall = by_name(twice.metrics())["mean_recall"]
    assert (mean_recall.value, mean_recall.count) == (pytest.approx(np.mean(recalls)), 100)
    # one of two captions in common, and fewer than 50 clusters, as of classes
    for other_ids in (torch.where(torch.arange(200) < 101, ids, ids + 200), torch.arange(200) // 2 % 49):
        groups = by_name(retrieval(image, text, owner, other_ids).metrics())["mean_recall"].outcome.groups
        assert len(set(groups)) == 100


def test_single_pair():
    result = retrieval(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]))
    metrics = result.image_to_text.metrics() + result.text_to_image.metrics()
    assert [(metric.value, metric.chance) for metric in metrics] == [(1.0, 1.0)] * 8


def test_invalid_inputs():
    image, text, owner, _ = problem()
    with pytest.raises(UserError, match="0 images and 150 captions"):
        retrieval(image[:0], text, owner)
    with pytest.raises(UserError, match="60 images and 0 captions"):
        retrieval(image, text[:0], owner[:0])
    broken = text.clone()
    broken[3, 0] = torch.nan
    with pytest.raises(UserError, match="Text embeddings are not finite for 1 of 150"):
        retrieval(image, broken, owner)
    with pytest.raises(ValueError, match="image_of_text"):
        retrieval(image, text, owner + 1)
    with pytest.raises(ValueError, match="dimensions"):
        retrieval(image, text[:, :5], owner)


def test_full_similarity_matrix_is_never_in_memory(monkeypatch):
    sizes = []
    count = module._count
    monkeypatch.setattr(module, "_count", lambda mask: sizes.append(mask.numel()) or count(mask))
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(3000, 4, generator=generator), dim=1)
    monkeypatch.setattr(module, "_CHUNK", 300_000)
    retrieval(points, points, torch.arange(3000))
    assert sum(sizes) >= 2 * 3000 * 3000  # every pair, in both directions
    assert max(sizes) <= 300_000


def test_retrieve_drops_bad_images_and_their_captions():
    def encode_text(texts):
        return torch.stack([torch.tensor([t.count(letter) for letter in "abc"]).float() for t in texts])

    model = DualEncoder(lambda pixels: pixels.float().mean((2, 3)), encode_text, 2)
    pixels = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    for i in range(3):
        pixels[i, i] = 100
    captions = {5: ["a", "aa"], 6: ["never seen"], 7: ["b"], 8: ["c", "a"]}
    images = embed_images(model, [([5, 7], pixels[:2], [6]), ([8], pixels[2:], [])])
    evaluation = retrieve(model, images, captions.__getitem__)
    result = evaluation.result
    assert evaluation.images.bad == [6]
    assert (result.num_images, result.num_texts, result.num_distinct_texts) == (3, 5, 4)
    assert result.image_to_text.recall[1].value == 1.0
    # both "a" retrieve image 5, which is correct for both, as images 5 and 8 have this caption
    assert result.text_to_image.recall[1].value == 1.0


def test_folds_are_evaluated_separately_and_pooled():
    """Five captions per image, as in COCO: the pooled metrics are the means over separate evaluations of the folds."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.nn.functional.normalize(torch.randn(23, 4, generator=generator), dim=1)
    text_embeds = {
        f"{i} {j}": embeds[i] + 0.9 * torch.randn(4, generator=generator) for i in range(23) for j in range(5)
    }
    model = DualEncoder(None, lambda texts: torch.stack([text_embeds[text] for text in texts]), 4)

    def captions(index):
        return [f"{index} {j}" for j in range(5)]

    result = retrieve_in_folds(model, ImageEmbeds(embeds, list(range(23))), captions, range(23), fold=10)
    separate = [
        retrieve(model, ImageEmbeds(embeds[s], list(range(23))[s]), captions).result for s in (slice(10), slice(10, 20))
    ]
    found = by_name(result.metrics)
    for name, queries in (("image_to_text", 1), ("text_to_image", 5)):
        for k in (1, 5, 10):
            metric = found.pop(f"{name}.r{k}")
            assert metric.value == pytest.approx(np.mean([getattr(fold, name).recall[k].value for fold in separate]))
            assert metric.title == getattr(separate[0], name).recall[k].title
            assert (metric.kind, metric.count) == ("rate", 20 * queries)
            np.testing.assert_array_equal(metric.outcome.groups, np.arange(20).repeat(queries))
        median = found.pop(f"{name}.median_rank")
        assert median.value == np.median(np.concatenate([getattr(fold, name).ranks for fold in separate]))
        assert (median.kind, median.count) == ("rank", 20 * queries)
        assert median.chance == getattr(separate[0], name).median_rank.chance  # both folds have the same
    sides = {"image_to_text": (1, 5, 10), "text_to_image": (1, 5)}  # R@10 is 100 % among ten images
    recalls = [by_name(result.metrics)[f"{name}.r{k}"].value for name, ks in sides.items() for k in ks]
    assert found.pop("mean_recall").value == pytest.approx(np.mean(recalls))
    assert not found
    assert by_name(result.metrics)["text_to_image.r5"].chance == 0.5
    assert (result.num_folds, result.num_images, result.left_over) == (2, 20, 3)
    # an unreadable image does not shift the folds
    readable = [i for i in range(23) if i != 4]
    without_one = retrieve_in_folds(model, ImageEmbeds(embeds[readable], readable), captions, range(23), fold=10)
    assert (without_one.num_folds, without_one.num_images) == (2, 19)
    for one, other in zip(without_one.metrics, result.metrics, strict=True):
        in_second = [metric.outcome.values[metric.outcome.groups >= 10] for metric in (one, other)]
        np.testing.assert_allclose(*in_second, atol=1e-12)
        assert one.count == other.count * 19 / 20
    chance = by_name(without_one.metrics)["text_to_image.r5"].chance  # of 45 queries, and of 50
    assert chance == pytest.approx((45 * 5 / 9 + 50 * 5 / 10) / 95)
    with pytest.raises(UserError, match="There are 9 images, fewer than one fold of 10"):
        retrieve_in_folds(model, ImageEmbeds(embeds[:9], list(range(9))), captions, range(9), fold=10)
    with pytest.raises(UserError, match="No image of fold 1 could be read"):
        retrieve_in_folds(model, ImageEmbeds(embeds[10:], list(range(10, 23))), captions, range(23), fold=10)


@pytest.mark.slow
def test_coco_5k_fits_in_a_gigabyte():
    """5,000 images and 25,000 captions, whose similarity matrix alone takes half a gigabyte, in a subprocess."""
    code = """
import resource, torch
from coalign.evaluation.retrieval import retrieval
images = torch.nn.functional.normalize(torch.randn(5000, 512), dim=1)
texts = images.repeat_interleave(5, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = retrieval(images, texts, torch.arange(5000).repeat_interleave(5))
print(result.image_to_text.recall[1].value, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    recall, kilobytes = map(float, process.stdout.split())
    assert recall == 1
    assert kilobytes < 1e6


@pytest.mark.parametrize(
    ("captions", "images"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3]),  # all captions are equal
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]),
        ([*range(12)], [*range(12)]),
        ([*([0] * 8), *range(1, 5)], [*range(12)]),
        ([*range(3)] * 10, [*range(30)]),
    ],
)
def test_metrics_that_equal_chance_by_construction_are_known(captions, images):
    """Over many random models, such a rate never varies; every other one does."""
    values: dict[str, set[float]] = {}
    known = {}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        image, text = (F.normalize(torch.randn(len(images), 6, generator=generator), dim=1) for _ in range(2))
        for metric in retrieval(image, text, torch.tensor(images), torch.tensor(captions)).metrics():
            values.setdefault(metric.name, set()).add(round(metric.value, 9))
            known[metric.name] = metric
    for name, metric in known.items():
        if metric.kind == "rate":
            assert metric.can_beat_chance() == (len(values[name]) > 1), name
            assert metric.can_beat_chance() or values[name] == {1.0}
        elif metric.kind == "rank":
            assert metric.can_beat_chance() == (metric.chance > 1)
