"""Tests in Triton's interpreter, which must be enabled before Triton is imported. `test_tiled_triton.py` runs them in a subprocess."""

import pytest
import torch
from helpers.tiled_sums import assert_same, dense, leaf

from coalign.losses import tiled, tiled_triton


@pytest.fixture
def kernels(monkeypatch):
    """Makes `tiled` use the interpreted kernels for CPU tensors."""
    monkeypatch.setattr(tiled, "_backend", lambda tensor: tiled_triton)


@pytest.mark.parametrize(("first_size", "second_size", "dim"), [(70, 131, 40), (64, 64, 300), (3, 2, 8)])
@pytest.mark.parametrize("direction", ["rows", "both", "within"])
def test_equals_dense(kernels, direction, first_size, second_size, dim):
    torch.manual_seed(0)
    first, second = (leaf(size, dim, dtype=torch.float32) for size in (first_size, second_size))
    scale = torch.tensor([30.0], requires_grad=True)
    rows, columns = torch.randint(0, 9, (first_size, 2)), torch.randint(0, 9, (second_size, 2))
    rows[2] = 0
    exact = [x.detach().double().requires_grad_() for x in (first, second, scale)]
    if direction == "rows":
        ours = tiled.negatives_logsumexp(first, second, scale, rows, columns)
        theirs = dense(*exact, rows, columns)
    elif direction == "both":
        ours = torch.cat(tiled.negatives_logsumexp_both_ways(first, second, scale, rows, columns))
        theirs = torch.cat([dense(*exact, rows, columns), dense(exact[1], exact[0], exact[2], columns, rows)])
    else:
        ours = tiled.negatives_logsumexp_within(first, scale, rows)
        theirs = dense(exact[0], exact[0], exact[2], rows, rows)
        exact.pop(1)
    inputs = [first, scale] if direction == "within" else [first, second, scale]
    assert_same(ours, theirs, inputs, exact, tolerance=2e-5)


def test_empty_sums_have_zero_gradient(kernels):
    torch.manual_seed(0)
    queries, keys = leaf(3, 8, dtype=torch.float32), leaf(4, 8, dtype=torch.float32)
    same = torch.zeros(4, 1, dtype=torch.long)
    sums = tiled.negatives_logsumexp(queries, keys, torch.tensor(5.0), same[:3], same)
    assert (sums < tiled.masked_logit(torch.float32) / 2).all()
    assert not any(gradient.any() for gradient in torch.autograd.grad(sums.sum(), (queries, keys)))
