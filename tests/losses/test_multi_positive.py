import math

import pytest
import torch
from torch.nn import functional as F

from coalign.losses import tiled
from coalign.losses.multi_positive import (
    Scores,
    balancing_weights,
    compare_views,
    domain_combinations,
    mil_nce,
    mp_nce,
    sup_con,
)

NAMES = ["Eq. 12", "Eq. 11", "Eq. 9", "Eq. 6", "Eq. 4"]


def ours(name, scores, num_images, num_texts):
    """Returns the sum over anchors i of the paper's L_i."""
    size = num_images + num_texts
    off_diagonal = ~torch.eye(size, dtype=torch.bool)
    if name == "Eq. 4":
        return mil_nce(scores, off_diagonal)
    if name == "Eq. 6":
        return sup_con(scores, off_diagonal)
    weights = {"Eq. 12": balancing_weights(num_images, num_texts), "Eq. 11": torch.ones(size, size)}
    return mp_nce(scores, weights.get(name, off_diagonal.double())) / (size - (name == "Eq. 9"))


def naive(name, logits, positives, num_images, num_texts, ignored=None):
    """Computes the same from the paper's definitions: scores s = e^x, sets P_i and N_i."""
    batch, size, global_batch, _ = logits.shape
    total = 0.0
    for i in range(batch):
        for v in range(size):
            s = {(j, w): torch.exp(logits[i, v, j, w]) for j in range(global_batch) for w in range(size)}
            own = positives[i].item()
            with_trivial = name in ("Eq. 12", "Eq. 11")  # P_i ∪ {i}
            p_i = [s[own, w] for w in range(size) if w != v or with_trivial]
            kinds = [(v >= num_images) + (w >= num_images) for w in range(size) if w != v or with_trivial]
            n_i = sum(
                score for (j, _), score in s.items() if j != own and not (ignored is not None and ignored[i, j])
            ) + torch.zeros((), dtype=logits.dtype)
            if name == "Eq. 4":
                total = total - torch.log(sum(p_i) / (sum(p_i) + n_i))
            elif name == "Eq. 6":
                total = total + sum(-torch.log(p / (sum(p_i) + n_i)) for p in p_i) / len(p_i)
            else:
                w_d = [1 / num_images**2, 1 / (2 * num_images * num_texts), 1 / num_texts**2]
                ws = [w_d[kind] if name == "Eq. 12" else 1.0 for kind in kinds]
                total = total + sum(-w * torch.log(p / (p + n_i)) for w, p in zip(ws, p_i)) / len(p_i)
    return total


def leaf(tensor, dtype=torch.float64):
    return tensor.detach().to(dtype).requires_grad_()


def inputs(num_images, num_texts, number=5, dtype=torch.float64):
    """Returns all embeddings, 1/τ_D and b_D as leaves."""
    g = torch.Generator().manual_seed(0)
    embeds = F.normalize(torch.randn(number, num_images + num_texts, 6, generator=g).double(), dim=-1)
    return [leaf(x, dtype) for x in (embeds, torch.tensor([9.0, 14.0, 5.0]), torch.tensor([0.3, -0.2, 0.1]))]


LOCAL, ALL = slice(1, 4), slice(None)  # rows of one of several ranks, and of a single process
CAPTIONS = torch.tensor([7, 8, 7, 9, 8])


def loss_of(function, name, values, num_images, num_texts, rows=LOCAL, labels=None):
    """Returns the loss of `rows` against all embeddings. Pairs that share one of the `labels` [global_batch] are not negatives."""
    embeds, scales, offsets = values
    domains = domain_combinations(num_images, num_texts)
    labels = torch.arange(len(embeds)) if labels is None else labels
    if function is ours:
        scores = compare_views(embeds[rows], embeds, scales[domains], offsets[domains], (labels[rows], labels))
        return ours(name, scores, num_images, num_texts)
    logits = (
        torch.einsum("ivd,jwd->ivjw", embeds[rows].to(scales), embeds.to(scales)) - offsets[domains][:, None]
    ) * scales[domains][:, None]
    return function(name, logits, torch.arange(len(embeds))[rows], num_images, num_texts, labels[rows, None] == labels)


def assert_same(actual, expected, values, expected_values=None, **close):
    torch.testing.assert_close(actual, expected, check_dtype=False, **close)
    gradients = torch.autograd.grad(actual, values), torch.autograd.grad(expected, expected_values or values)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, check_dtype=False, **close)


# ---------------------------------------------------------------- equal to the equations


@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize("rows", [LOCAL, ALL])
@pytest.mark.parametrize("labels", [None, CAPTIONS])
@pytest.mark.parametrize(("num_images", "num_texts"), [(3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_naive_loops(monkeypatch, name, num_images, num_texts, labels, rows, tile):
    monkeypatch.setattr(tiled, "TILE", tile)
    values = inputs(num_images, num_texts)
    actual, expected = (loss_of(f, name, values, num_images, num_texts, rows, labels) for f in (ours, naive))
    assert_same(actual, expected, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_accuracy(name):
    single, double = (inputs(3, 1, dtype=dtype) for dtype in (torch.float32, torch.float64))
    actual, expected = loss_of(ours, name, single, 3, 1), loss_of(ours, name, double, 3, 1)
    assert actual.dtype == torch.float32
    assert_same(actual, expected, single, double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_are_computed_in_float32(name):
    """bfloat16 logits would be off by 1 %. Gradients of bfloat16 embeddings are rounded only at the end."""
    embeds, scales, offsets = inputs(3, 1)
    rounded = leaf(embeds, torch.bfloat16)
    exact = leaf(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(ours, name, [rounded, scales.float(), offsets.float()], 3, 1, ALL)
    full = loss_of(ours, name, [exact, scales, offsets], 3, 1, ALL)
    assert half.item() == pytest.approx(full.item(), rel=1e-6)
    # the sum of two parts that are each rounded
    half_gradient, full_gradient = torch.autograd.grad(half, rounded)[0], torch.autograd.grad(full, exact)[0]
    assert (half_gradient.double() - full_gradient).norm() < 2**-7 * full_gradient.norm()


def test_scores_equal_equation_16():
    embeds, scales, offsets = inputs(2, 1)
    domains = domain_combinations(2, 1)
    indices = torch.arange(5)
    scores = compare_views(embeds[:2], embeds, scales[domains], offsets[domains], (indices[:2], indices))
    for i, v, w in ((0, 0, 1), (1, 1, 2), (1, 2, 2), (0, 2, 0)):
        d = (v == 2) + (w == 2)
        x = scales[d] * (embeds[:, w] @ embeds[i, v] - offsets[d])
        torch.testing.assert_close(scores.own[i, v, w], x[i])
        torch.testing.assert_close(scores.negatives[i, v, w], x[indices != i].logsumexp(0))


def test_balancing_weights_sum_to_one_per_combination():
    torch.testing.assert_close(
        balancing_weights(3, 1),
        torch.tensor([[1 / 9] * 3 + [1 / 6]] * 3 + [[1 / 6] * 3 + [1.0]], dtype=torch.float64),  # §2.2's example
    )
    for num_images, num_texts in ((1, 1), (2, 1), (1, 3), (4, 2)):
        weights, domains = balancing_weights(num_images, num_texts), domain_combinations(num_images, num_texts)
        for kind in range(3):
            assert weights[domains == kind].sum().item() == pytest.approx(1)


# ---------------------------------------------------------------- equal to the official code


def row(positives, negatives):
    """Returns the scores of one anchor with the given positives and negatives."""
    return Scores(positives[None, None], negatives.logsumexp(0)[None, None, None])


def labeled_sup_con(features, same, temperature, num_anchors):
    """Computes SupCon, anchor by anchor, with all samples of a class as positives; `same` [sample, sample]."""
    embeddings = features.transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
    total = 0.0
    for i in range(num_anchors):
        logits = embeddings[i] @ embeddings.T / temperature
        is_positive = same[i % len(same)].repeat(features.shape[1])
        others = torch.arange(len(embeddings)) != i
        own = logits[is_positive & others]
        scores = row(own, logits[~is_positive & others])
        total = total + sup_con(scores, torch.ones(1, len(own), dtype=torch.bool))
    return total / num_anchors


@pytest.mark.parametrize("name", ["supcon", "supcon_t01", "supcon_one", "supcon_mask"])
def test_sup_con_equals_official_code(oracles, name):
    oracle = oracles("multi_positive")
    features = leaf(oracle[f"{name}.in.features"])
    if name == "supcon_mask":
        same = oracle["supcon_mask.in.mask"].bool()
    else:
        labels = oracle[f"{name}.in.labels"]
        same = labels[:, None] == labels
    temperature, base = oracle[f"{name}.par.temperature"], oracle[f"{name}.par.base_temperature"]
    loss = labeled_sup_con(features, same, temperature, 8 if name == "supcon_one" else 16) * temperature / base
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features.grad, oracle[f"{name}.out.grad_features"], rtol=1e-6, atol=1e-6)


def test_sup_con_of_two_views_equals_official_code(oracles):
    oracle = oracles("multi_positive")
    features = leaf(oracle["supcon_unsup.in.features"])
    ones = torch.ones(2, 2, dtype=torch.float64)
    indices = torch.arange(8)
    scales = ones / oracle["supcon_unsup.par.temperature"]
    scores = compare_views(features, features, scales, 0 * ones, (indices, indices))
    loss = sup_con(scores, ~torch.eye(2, dtype=torch.bool)) / 16
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle["supcon_unsup.out.loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(features.grad, oracle["supcon_unsup.out.grad_features"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["milnce", "milnce_k1"])
def test_mil_nce_equals_official_code(oracles, name):
    """The official code sums over a video's texts and a text's videos together, so its denominator contains the positives twice."""
    oracle = oracles("multi_positive")
    video, text = (leaf(oracle[f"{name}.in.{x}"]) for x in ("video", "text"))
    x = (video @ text.T).view(6, 6, -1)  # [video, sample of the text, candidate]
    logits, rows = torch.cat([x, x.transpose(0, 1)], dim=1), torch.arange(6)
    negatives = logits.index_put((rows, rows), torch.tensor(-math.inf).double()).flatten(1).logsumexp(1)
    scores = Scores(x[rows, rows][:, None], negatives[:, None, None])
    loss = mil_nce(scores, torch.ones(1, x.shape[2], dtype=torch.bool)) / 6
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"], rtol=1e-6, atol=1e-6)
    for value, key in ((video, "video"), (text, "text")):
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the paper's statements about gradients


def gradients(name, positives, negatives):
    """Returns dL_i/ds of every positive score."""
    s = torch.tensor(positives, dtype=torch.float64, requires_grad=True)
    scores = row(s.log(), torch.tensor(negatives, dtype=torch.float64).log())
    pairs = torch.ones(1, len(positives), dtype=torch.bool)
    if name == "MP-NCE":
        loss = mp_nce(scores, pairs.double()) / len(positives)
    else:
        loss = {"MIL-NCE": mil_nce, "SupCon": sup_con}[name](scores, pairs)
    return torch.autograd.grad(loss, s)[0].tolist()


EASY_AND_HARD = [8.1e3, 0.9, 2.0]
NEGATIVES = [0.5, 1.5, 3.0, 0.1]


def test_gradients_equal_equations_5_7_and_10():
    p, n, count = sum(EASY_AND_HARD), sum(NEGATIVES), len(EASY_AND_HARD)
    for q, mil, sup, mp in zip(
        EASY_AND_HARD, *(gradients(name, EASY_AND_HARD, NEGATIVES) for name in ("MIL-NCE", "SupCon", "MP-NCE"))
    ):
        assert mil == pytest.approx(-n / (p * (p + n)), rel=1e-9)  # Eq. 5
        assert sup == pytest.approx((q - (p + n) / count) / (q * (p + n)), rel=1e-9)  # Eq. 7
        assert mp == pytest.approx(-n / (count * q * (q + n)), rel=1e-9)  # Eq. 10


def test_easy_positives_suppress_hard_ones_only_in_mil_nce():
    with_easy, with_medium = [1e6, 0.9], [1.0, 0.9]
    hard = {
        name: [gradients(name, p, NEGATIVES)[1] for p in (with_easy, with_medium)] for name in ("MIL-NCE", "MP-NCE")
    }
    assert abs(hard["MIL-NCE"][0]) < 1e-9 * abs(hard["MIL-NCE"][1])
    assert hard["MP-NCE"][0] == pytest.approx(hard["MP-NCE"][1])
    assert hard["MP-NCE"][0] < -0.1


def test_sup_con_repels_the_easiest_positive():
    """If positives outweigh negatives, the gradient has the sign of s_q minus the mean of the positives (Eq. 8)."""
    scores = [900.0, 200.0, 100.0, 350.0]
    for score, gradient in zip(scores, gradients("SupCon", scores, [0.01, 0.02])):
        assert (gradient > 0) == (score > sum(scores) / 4)
    assert max(gradients("SupCon", scores, [0.01, 0.02])) > 1e-4


def test_mp_nce_never_repels_a_positive():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        positives, negatives = ((4 * torch.randn(n, generator=g)).exp().tolist() for n in (4, 7))
        assert max(gradients("MP-NCE", positives, negatives)) < 0


# ---------------------------------------------------------------- offsets


def offset_gradient(name, scales, offsets, num_texts=1):
    values = [inputs(3, num_texts)[0], torch.tensor(scales).double(), leaf(torch.tensor(offsets))]
    return torch.autograd.grad(loss_of(ours, name, values, 3, num_texts), values[2])[0]


@pytest.mark.parametrize("name", NAMES)
def test_shared_offset_cancels(name):
    gradient = offset_gradient(name, [9.0] * 3, [0.2] * 3)
    assert gradient.sum().abs() < 1e-12 < 1e-3 < gradient.abs().min()  # Eq. 15: the gradient of the shared b is the sum


@pytest.mark.parametrize("num_texts", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_have_one_free_direction(name, num_texts):
    """The loss is the same with b_D + c·τ_D for any c."""
    scales = torch.tensor([9.0, 14.0, 5.0])
    gradient = offset_gradient(name, scales.tolist(), [0.3, -0.2, 0.1], num_texts)
    assert (gradient / scales).sum().abs() < 1e-12
    assert gradient.abs().min() > 1e-4


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("number", [1, 2, 4096])
@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_inputs_are_finite_at_low_temperature(name, kind, number):
    torch.manual_seed(0)
    shape = (number, 2, 4)
    x = {"random": torch.randn(shape), "identical": torch.ones(shape), "zero": torch.zeros(shape)}[kind]
    x, scales, offsets = leaf(x, torch.float32), leaf(torch.full([3], 100.0), torch.float32), torch.zeros(3)
    offsets.requires_grad_()
    loss = loss_of(ours, name, [F.normalize(x, dim=-1), scales, offsets], 1, 1, ALL) / number
    loss.backward()
    assert all(torch.isfinite(value).all() for value in (loss, x.grad, scales.grad, offsets.grad))
    if kind != "random":  # all scores are equal
        weight = 0.75 if name == "Eq. 12" else 1.0  # mean of 1 and 1/2
        assert loss.item() == pytest.approx(2 * weight * math.log(1 + 2 * (number - 1)), rel=1e-5)


@pytest.mark.parametrize("rows", [LOCAL, ALL])
@pytest.mark.parametrize("name", NAMES)
def test_no_loss_without_negatives(name, rows):
    values = inputs(1, 2)
    losses = loss_of(ours, name, values, 1, 2, rows, torch.zeros(5, dtype=torch.long))
    expected = loss_of(naive, name, values, 1, 2, rows, torch.zeros(5, dtype=torch.long))
    assert_same(losses, expected, values)
    if name != "Eq. 6":  # SupCon compares positives with each other
        assert losses.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [mil_nce, sup_con])
def test_no_loss_without_positives(loss):
    own, negatives = leaf(torch.randn(3, 2, 3)), leaf(torch.randn(3, 2, 3))
    pairs = torch.tensor([[True, True, False], [False, False, False]])
    actual, expected = loss(Scores(own, negatives), pairs), loss(Scores(own[:, :1], negatives[:, :1]), pairs[:1])
    torch.testing.assert_close(actual, expected)
    for gradient in torch.autograd.grad(actual, (own, negatives)):
        assert torch.isfinite(gradient).all()
        assert not gradient[:, 1].any()
