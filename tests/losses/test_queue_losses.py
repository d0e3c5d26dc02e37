"""InfoNCE against a queue, with and without tags."""

import math

import pytest
import torch
from torch.nn import functional as F

from coalign.losses import contrastive
from coalign.losses.contrastive import common_tags, info_nce, queue_info_nce, tag_info_nce


def unit(*shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


@pytest.fixture(params=[3, 8192], ids="slot chunk {}".format)
def slot_chunk(request, monkeypatch):
    """Compares the queue in a single chunk and in several."""
    monkeypatch.setattr(contrastive, "SLOT_CHUNK", request.param)


def with_tags(queries, keys, queue, temperature, positives, ignored=None):
    rows = queue_info_nce(queries, keys, queue, temperature, ignored)
    return tag_info_nce(rows, queries, keys, queue, temperature, positives)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["mocov1_t007", "mocov2"])
def test_equals_moco(oracles, slot_chunk, name, dtype, tolerance):
    oracle = oracles("mct")
    queries = oracle[f"{name}.in.q"].to(dtype).requires_grad_()
    keys = F.normalize(oracle[f"{name}.in.k"].to(dtype), dim=-1)
    queue = oracle[f"{name}.par.queue0"].T.to(dtype)
    loss = queue_info_nce(F.normalize(queries, dim=-1), keys, queue, float(oracle[f"{name}.par.T"])).mean()
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"], **close)
    torch.testing.assert_close(queries.grad, oracle[f"{name}.out.grad_q"], **close)


def naive(i, queries, keys, queue, temperature, ignored, positives):
    """Computes Eq. 5 with loops; without positives, this is Eq. 3."""
    own = torch.exp((queries[i] * keys[i]).sum() / temperature)
    slots = [torch.exp((queries[i] * key).sum() / temperature) for key in queue]
    denominator = own + sum(x for x, is_ignored in zip(slots, ignored[i]) if not is_ignored)
    numerators = [own] + [x for x, is_positive in zip(slots, positives[i]) if is_positive]
    return -sum(torch.log(x / denominator) for x in numerators) / len(numerators)


def test_equals_naive_loops(slot_chunk):
    queries, keys, queue = unit(4, 6, seed=0).requires_grad_(), unit(4, 6, seed=1), unit(7, 6, seed=2)
    ignored = torch.zeros(4, 7, dtype=torch.bool)
    ignored[0, 2] = ignored[3, :] = True
    positives = torch.zeros_like(ignored)
    positives[0, [0, 5]] = positives[1, 1] = True  # 3, 2, 1 and 1 positives, including the own key
    inputs, weights = (queries, keys, queue, 0.07), torch.tensor([1.0, 0.3, 2.0, 0.7], dtype=torch.float64)
    for ours, marks in (
        (queue_info_nce(*inputs, ignored), torch.zeros_like(ignored)),
        (with_tags(*inputs, positives, ignored), positives),
    ):
        theirs = torch.stack([naive(i, *inputs, ignored, marks) for i in range(4)])
        torch.testing.assert_close(ours, theirs)
        (gradient,), (expected,) = (
            torch.autograd.grad(weights @ rows, queries, retain_graph=True) for rows in (ours, theirs)
        )
        torch.testing.assert_close(gradient, expected)
        assert not gradient[3].any()  # row 3 has no negatives


def test_tag_info_nce_without_positives_is_info_nce():
    inputs = unit(3, 4, seed=0), unit(3, 4, seed=1), unit(5, 4, seed=2), 0.07
    torch.testing.assert_close(with_tags(*inputs, torch.zeros(3, 5, dtype=torch.bool)), queue_info_nce(*inputs))


def test_positives_attract_and_negatives_do_not():
    queries, keys, queue = unit(1, 8, seed=0).requires_grad_(), unit(1, 8, seed=1), unit(6, 8, seed=2)
    positives = torch.arange(6)[None] == 4
    (plain,) = torch.autograd.grad(queue_info_nce(queries, keys, queue, 0.07).sum(), queries)
    (tagged,) = torch.autograd.grad(with_tags(queries, keys, queue, 0.07, positives).sum(), queries)
    difference = (keys[0] - queue[4]) / 0.07 / 2  # half of the pull goes from the own key to the positive
    torch.testing.assert_close(tagged[0] - plain[0], difference)


def test_batch_as_queue_equals_info_nce():
    queries, keys = unit(5, 4, seed=0), unit(5, 4, seed=1)
    ours = queue_info_nce(queries, keys, keys, 0.1, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(ours.sum(), info_nce(queries, keys, torch.arange(5), 10.0))


@pytest.mark.parametrize("slots", [0, 1, 10_000])
@pytest.mark.parametrize("kind", ["random", "identical", "opposite", "zero"])
def test_degenerate_inputs_are_finite_at_low_temperature(kind, slots):
    x = {"random": torch.randn(10_000, 8), "zero": torch.zeros(10_000, 8)}.get(kind, torch.ones(10_000, 8))
    x = F.normalize(x, dim=-1)
    queries = (-x[:3] if kind == "opposite" else x[:3].clone()).requires_grad_()
    positives = torch.arange(slots).expand(3, -1) % 7 == 0
    inputs = queries, x[3:6], x[:slots], 0.01
    for loss in (queue_info_nce(*inputs).sum(), with_tags(*inputs, positives).sum()):
        (gradient,) = torch.autograd.grad(loss, queries, retain_graph=True)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        if kind != "random":  # all similarities are the same, 1, -1 or 0
            assert loss.item() / 3 == pytest.approx(math.log(1 + slots), abs=1e-3)


@pytest.mark.parametrize("rows", [0, 4])
def test_empty_queue_or_batch_has_zero_loss_and_gradient(slot_chunk, rows):
    queries = unit(rows, 4, seed=0).requires_grad_()
    ignored = torch.ones(rows, 5, dtype=torch.bool)
    inputs = queries, unit(rows, 4, seed=1), torch.zeros(5, 4, dtype=torch.float64), 0.07
    for loss in (queue_info_nce(*inputs, ignored), with_tags(*inputs, ~ignored, ignored)):
        (gradient,) = torch.autograd.grad(loss.sum(), queries, retain_graph=True)
        assert loss.shape == (rows,)
        assert not loss.detach().any()
        assert not gradient.any()


def test_half_precision_inputs_are_computed_in_float32():
    queries, keys, queue = (unit(n, 16, seed=n, dtype=torch.bfloat16) for n in (4, 5, 9))
    keys, positives = keys[:4], torch.arange(9).expand(4, -1) < 3
    for loss, *more in ((queue_info_nce,), (with_tags, positives)):
        expected = loss(queries.double(), keys.double(), queue.double(), 0.07, *more)
        leaf = queries.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            ours = loss(leaf, keys, queue.float(), 0.07, *more)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-6)
        ours.sum().backward()
        assert leaf.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- tags


def random_tags(count, most, vocabulary, seed):
    g = torch.Generator().manual_seed(seed)
    tags = torch.full((count, most), -1)
    for row in tags:
        number = int(torch.randint(most + 1, (), generator=g))
        row[:number] = torch.randperm(vocabulary, generator=g)[:number].sort().values
    return tags


@pytest.mark.parametrize("vocabulary", [6, 40, 100_000])
def test_common_tags_equals_set_intersections(slot_chunk, vocabulary):
    tags, queue = random_tags(9, 5, vocabulary, seed=0), random_tags(23, 6, vocabulary, seed=1)
    tags[0], queue[3:5] = torch.arange(5), -1
    queue[3, :3] = tags[0, 2:]
    sets = [[set(row.tolist()) - {-1} for row in each] for each in (tags, queue)]
    counts = common_tags(tags, queue)
    assert counts.tolist() == [[len(sample & slot) for slot in sets[1]] for sample in sets[0]]
    assert counts[0, 3] == 3


def test_common_tags_equals_product_of_multi_hot_vectors():
    tags, queue, vocabulary = random_tags(7, 6, 12, seed=2), random_tags(30, 6, 12, seed=3), 12
    binary = [(each[:, :, None] == torch.arange(vocabulary)).any(1).double() for each in (tags, queue)]
    assert torch.equal(common_tags(tags, queue).double(), binary[0] @ binary[1].T)


def test_common_tags_without_tags():
    none = torch.full((3, 4), -1)
    some = torch.tensor([[0, 1, -1, -1]]).repeat(5, 1)
    for tags, queue in ((none, some), (some, none), (none, none), (some[:0], some)):
        counts = common_tags(tags, queue)
        assert counts.shape == (len(tags), len(queue))
        assert not counts.any()


def test_common_tags_memory_at_the_papers_queue_size():
    """With 65,536 slots and 18,157 tags, temporary memory is below 50 MB; multi-hot vectors would take 4.8 GB."""
    g = torch.Generator().manual_seed(0)
    queue = torch.randint(18_157, (65_536, 8), generator=g)
    tags = queue[:16].clone()
    with torch.profiler.profile(profile_memory=True) as profile:
        counts = common_tags(tags, queue)
    expected = [len(set(row.tolist()) & set(slot.tolist())) for row, slot in zip(tags, queue)]
    assert counts[:, :16].diagonal().tolist() == expected
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 50e6
