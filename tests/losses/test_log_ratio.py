import itertools

import pytest
import torch
from torch.nn import functional as F

from coalign.losses import tiled
from coalign.losses.log_ratio import (
    all_log_distances,
    log_distances,
    negative_log_ratio,
    noisy_log_ratio,
    noisy_log_ratio_of_texts,
    positive_log_ratio,
)

NORMS = {"squared": lambda x: x * x, "absolute": abs}
TERMS = ["positive", "negative", "noisy", "noisy of texts"]


def embeds(number=6, dim=5, seed=0, dtype=torch.float64):
    """Returns normalized student v, ṽ, t and teacher v, ṽ; the teacher uses the student's text."""
    torch.manual_seed(seed)
    return [F.normalize(torch.randn(number, dim, dtype=dtype), dim=-1).requires_grad_() for _ in range(5)]


def term(name, norm, v, augmented, t, teacher_v, teacher_augmented, rows=slice(None)):
    """Returns one term's sum over the local `rows`, from residuals as in the method, and its number of index pairs."""
    positives, fixed = torch.arange(len(t))[rows], t.detach()

    def residuals(student, teacher, rows):
        return log_distances(student[rows], t[rows]) - log_distances(teacher[rows], fixed[rows])

    num_pairs = len(positives) * (len(t) - 1)
    if name == "positive":
        pairs = residuals(v, teacher_v, rows), residuals(augmented, teacher_augmented, rows)
        return positive_log_ratio(*pairs, norm), len(positives)
    if name == "negative":
        views = (x[rows] for x in (v, augmented, teacher_v, teacher_augmented))
        return negative_log_ratio(*views, t, positives, norm), num_pairs
    if name == "noisy":
        gathered = residuals(v, teacher_v, slice(None))
        return noisy_log_ratio(residuals(v, teacher_v, rows), gathered, norm), num_pairs
    return noisy_log_ratio_of_texts(v[rows], teacher_v[rows], t, positives, norm), num_pairs


def naive(name, norm, v, augmented, t, teacher_v, teacher_augmented):
    """Computes Eqs. 6-9 with loops over their indices, from explicit distances."""
    fixed = t.detach()

    def log_distance(a, b):
        return torch.log(torch.sqrt(((a - b) ** 2).sum() + 1e-4 / len(a)) + 1e-6)

    def log_ratio(student, teacher):  # each ((a, b), (c, d))
        pairs = [log_distance(*ab) - log_distance(*cd) for ab, cd in (student, teacher)]
        return NORMS[norm](pairs[0] - pairs[1])

    n, terms = len(t), []
    for i, j in itertools.product(range(n), range(n)):
        if name == "positive" and i == j:
            student = (v[i], t[i]), (augmented[i], t[i])
            teacher = (teacher_v[i], fixed[i]), (teacher_augmented[i], fixed[i])
        elif name == "negative" and i != j:
            student = (v[i], t[j]), (augmented[i], t[j])
            teacher = (teacher_v[i], fixed[j]), (teacher_augmented[i], fixed[j])
        elif name == "noisy" and i != j:
            student, teacher = ((v[i], t[i]), (v[j], t[j])), ((teacher_v[i], fixed[i]), (teacher_v[j], fixed[j]))
        elif name == "noisy of texts" and i != j:
            student, teacher = ((v[i], t[i]), (v[i], t[j])), ((teacher_v[i], fixed[i]), (teacher_v[i], fixed[j]))
        else:
            continue
        terms.append(log_ratio(student, teacher))
    return torch.stack(terms).mean()


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("tile", [2, 1024])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TERMS)
def test_equals_naive_loops(monkeypatch, name, norm, tile):
    monkeypatch.setattr(tiled, "TILE", tile)
    inputs = embeds()
    total, count = term(name, norm, *inputs)
    expected = naive(name, norm, *inputs)
    torch.testing.assert_close(total / count, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(total / count, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for student in inputs[:3] if name in ("positive", "negative") else (inputs[0], inputs[2]):
        assert gradients(total, [student])[0].abs().sum() > 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TERMS)
def test_local_rows_against_gathered_columns_add_up(name, norm):
    inputs = embeds()
    whole, count = term(name, norm, *inputs)
    parts = [term(name, norm, *inputs, rows=rows) for rows in (slice(0, 3), slice(3, 6))]
    assert sum(part_count for _, part_count in parts) == count
    summed = sum(part for part, _ in parts)
    torch.testing.assert_close(summed, whole)
    for ours, theirs in zip(gradients(summed, inputs), gradients(whole, inputs)):
        torch.testing.assert_close(ours, theirs)


def test_equals_official_log_ratio_loss(oracles):
    """An anchor and six other points: the mean over pairs equals Eq. 9 with the distances to the anchor instead of D(v_i, t_i)."""
    oracle = {key.removeprefix("logratio."): value for key, value in oracles("distillation").items()}
    points, labels = oracle["in.input"].requires_grad_(), oracle["in.gt_dist"].requires_grad_()
    others = points[1:]
    residuals = log_distances(points[:1].expand_as(others), others) - (labels + 1e-6).log()
    loss = noisy_log_ratio(residuals, residuals, "squared") / (6 * 5)
    loss.backward()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss.detach(), oracle["out.loss"], **close)
    torch.testing.assert_close(points.grad, oracle["out.grad_input"], **close)
    torch.testing.assert_close(labels.grad, oracle["out.grad_gt_dist"], **close)


def test_squared_noisy_term_is_twice_the_sample_variance():
    residuals = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    mean = noisy_log_ratio(residuals, residuals, "squared") / (50 * 49)
    torch.testing.assert_close(mean, 2 * residuals.var(), rtol=1e-9, atol=0)


def test_absolute_noisy_term_has_zero_gradient_for_ties():
    residuals = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    total = noisy_log_ratio(residuals, residuals, "absolute")
    assert total.item() == 2 * 3 * 2.0
    assert gradients(total, residuals)[0].tolist() == [-2.0, -2.0, 6.0, -2.0]  # 2 Σ_j sign(r_i − r_j)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TERMS)
def test_zero_if_student_equals_teacher(name, norm):
    v, augmented, t = embeds()[:3]
    total, _ = term(name, norm, v, augmented, t, v.detach(), augmented.detach())
    assert total.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(total, (v, augmented, t)))


@pytest.mark.parametrize("number", [1, 2, 512])
@pytest.mark.parametrize("kind", ["identical", "zero", "random"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TERMS)
def test_degenerate_inputs_are_finite(name, norm, kind, number):
    inputs = embeds(number, 512, dtype=torch.float32)
    if kind != "random":
        make = torch.zeros_like if kind == "zero" else lambda x: F.normalize(torch.ones_like(x), dim=-1)
        inputs[:3] = [make(x).requires_grad_() for x in inputs[:3]]
    total, _ = term(name, norm, *inputs)
    assert torch.isfinite(total)
    assert total >= 0
    assert number > 1 or name == "positive" or total == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(total, inputs[:3]))


def test_distance_of_identical_embeddings_is_eps_with_zero_gradient():
    same = F.normalize(torch.randn(4, 16, dtype=torch.float64), dim=-1).requires_grad_()
    logs = log_distances(same, same.detach())
    torch.testing.assert_close(logs.exp(), torch.full((4,), (1e-4 / 16) ** 0.5 + 1e-6, dtype=torch.float64))
    assert gradients(logs.sum(), same)[0].abs().sum() == 0


def test_all_log_distances_equal_log_distances():
    a, b = embeds(6)[0], embeds(4)[1]
    pairwise = torch.stack([log_distances(a, b[j].expand_as(a)) for j in range(4)], dim=1)
    torch.testing.assert_close(all_log_distances(a, b), pairwise)


@pytest.mark.parametrize("name", TERMS)
def test_half_precision_inputs_are_computed_in_float32(name):
    inputs = [x.detach().bfloat16() for x in embeds(8, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = term(name, "squared", *inputs)
    expected, _ = term(name, "squared", *(x.double() for x in inputs))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_noisy_term_needs_linear_memory():
    # a matrix of all pairs would take 320 GB
    residuals = torch.arange(200_000, dtype=torch.float64)[torch.randperm(200_000)]
    pairs = 200_000 * 199_999
    assert noisy_log_ratio(residuals, residuals, "absolute").item() / pairs == pytest.approx(200_001 / 3)
    assert noisy_log_ratio(residuals, residuals, "squared").item() / pairs == pytest.approx(200_000 * 200_001 / 6)
