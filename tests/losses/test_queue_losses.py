"""InfoNCE against a queue, with tags and without."""

import math

import pytest
import torch
from torch.nn import functional as F

from coalign.losses import contrastive
from coalign.losses.contrastive import common_tags, info_nce, queue_info_nce, tag_info_nce


def unit(*shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


@pytest.fixture(params=[3, 8192], ids="slots at once {}".format)
def slots_at_once(request, monkeypatch):
    """The queue in one piece, and in several."""
    monkeypatch.setattr(contrastive, "SLOTS_AT_ONCE", request.param)


def with_tags(queries, keys, queue, temperature, positives, ignored=None):
    rows = queue_info_nce(queries, keys, queue, temperature, ignored)
    return tag_info_nce(rows, queries, keys, queue, temperature, positives)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["mocov1_t007", "mocov2"])
def test_equals_moco(oracles, slots_at_once, name, dtype, tolerance):
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
    """Eq. 5 written as loops; Eq. 3 where there are no positives."""
    own = torch.exp((queries[i] * keys[i]).sum() / temperature)
    others = [torch.exp((queries[i] * key).sum() / temperature) for key in queue]
    below = own + sum(x for x, out in zip(others, ignored[i]) if not out)
    of_positives = [own] + [x for x, is_one in zip(others, positives[i]) if is_one]
    return -sum(torch.log(x / below) for x in of_positives) / len(of_positives)


def test_equals_the_equations_written_as_loops(slots_at_once):
    queries, keys, queue = unit(4, 6, seed=0).requires_grad_(), unit(4, 6, seed=1), unit(7, 6, seed=2)
    ignored = torch.zeros(4, 7, dtype=torch.bool)
    ignored[0, 2] = ignored[3, :] = True
    positives = torch.zeros_like(ignored)
    positives[0, [0, 5]] = positives[1, 1] = True  # three in all, two, one, one
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
        assert not gradient[3].any()  # there is nothing to tell it from


def test_without_positives_tags_change_nothing():
    inputs = unit(3, 4, seed=0), unit(3, 4, seed=1), unit(5, 4, seed=2), 0.07
    torch.testing.assert_close(with_tags(*inputs, torch.zeros(3, 5, dtype=torch.bool)), queue_info_nce(*inputs))


def test_a_positive_is_drawn_near_and_a_negative_is_not():
    queries, keys, queue = unit(1, 8, seed=0).requires_grad_(), unit(1, 8, seed=1), unit(6, 8, seed=2)
    positives = torch.arange(6)[None] == 4
    (plain,) = torch.autograd.grad(queue_info_nce(queries, keys, queue, 0.07).sum(), queries)
    (tagged,) = torch.autograd.grad(with_tags(queries, keys, queue, 0.07, positives).sum(), queries)
    difference = (keys[0] - queue[4]) / 0.07 / 2  # half of the pull goes from the own key to the positive
    torch.testing.assert_close(tagged[0] - plain[0], difference)


def test_with_the_batch_as_queue_it_is_info_nce():
    queries, keys = unit(5, 4, seed=0), unit(5, 4, seed=1)
    ours = queue_info_nce(queries, keys, keys, 0.1, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(ours.sum(), info_nce(queries, keys, torch.arange(5), 10.0))


@pytest.mark.parametrize("slots", [0, 1, 10_000])
@pytest.mark.parametrize("kind", ["random", "identical", "opposite", "zero"])
def test_safe_at_temperature_one_hundredth(kind, slots):
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
def test_an_empty_queue_and_no_rows_give_zero_with_a_gradient_of_zero(slots_at_once, rows):
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
            found = loss(leaf, keys, queue.float(), 0.07, *more)
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
        found.sum().backward()
        assert leaf.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- tags


def lists(count, most, vocabulary, seed):
    g = torch.Generator().manual_seed(seed)
    tags = torch.full((count, most), -1)
    for row in tags:
        number = int(torch.randint(most + 1, (), generator=g))
        row[:number] = torch.randperm(vocabulary, generator=g)[:number].sort().values
    return tags


@pytest.mark.parametrize("vocabulary", [6, 40, 100_000])
def test_common_tags_are_counted(slots_at_once, vocabulary):
    tags, queue = lists(9, 5, vocabulary, seed=0), lists(23, 6, vocabulary, seed=1)
    tags[0], queue[3:5] = torch.arange(5), -1
    queue[3, :3] = tags[0, 2:]
    sets = [[set(row.tolist()) - {-1} for row in each] for each in (tags, queue)]
    found = common_tags(tags, queue)
    assert found.tolist() == [[len(one & other) for other in sets[1]] for one in sets[0]]
    assert found[0, 3] == 3


def test_common_tags_are_the_product_of_binary_vectors():
    tags, queue, vocabulary = lists(7, 6, 12, seed=2), lists(30, 6, 12, seed=3), 12
    binary = [(each[:, :, None] == torch.arange(vocabulary)).any(1).double() for each in (tags, queue)]
    assert torch.equal(common_tags(tags, queue).double(), binary[0] @ binary[1].T)


def test_who_has_no_tags_has_none_in_common():
    none = torch.full((3, 4), -1)
    some = torch.tensor([[0, 1, -1, -1]]).repeat(5, 1)
    for tags, queue in ((none, some), (some, none), (none, none), (some[:0], some)):
        found = common_tags(tags, queue)
        assert found.shape == (len(tags), len(queue))
        assert not found.any()


def test_a_full_queue_of_the_paper_stays_far_below_dense_vectors():
    """65,536 slots and 18,157 tags: what is allocated beside the result is megabytes, where binary vectors take 4.8 GB."""
    g = torch.Generator().manual_seed(0)
    queue = torch.randint(18_157, (65_536, 8), generator=g)
    tags = queue[:16].clone()
    with torch.profiler.profile(profile_memory=True) as profile:
        found = common_tags(tags, queue)
    own = [len(set(row.tolist()) & set(slot.tolist())) for row, slot in zip(tags, queue)]
    assert found[:, :16].diagonal().tolist() == own
    most = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < most < 50e6
