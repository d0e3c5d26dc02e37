import pytest
import torch
from helpers.tiled_sums import EMPTY, assert_same, dense, leaf

from coalign.losses import tiled


@pytest.mark.parametrize("tile", [3, 4, 1024])
@pytest.mark.parametrize("direction", ["rows", "both", "within"])
def test_equals_dense(monkeypatch, direction, tile):
    monkeypatch.setattr(tiled, "TILE", tile)
    torch.manual_seed(0)
    first, second, scale = leaf(11, 6), leaf(8, 6), torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    rows, columns = torch.randint(0, 9, (11, 2)), torch.randint(0, 9, (8, 2))
    rows[4, 0] = 2**62  # as large as a caption id
    if direction == "rows":
        ours = tiled.negatives_logsumexp(first, second, scale, rows, columns)
        assert_same(ours, dense(first, second, scale, rows, columns), [first, second, scale])
    elif direction == "both":
        ours = torch.cat(tiled.negatives_logsumexp_both_ways(first, second, scale, rows, columns))
        theirs = dense(first, second, scale, rows, columns), dense(second, first, scale, columns, rows)
        assert_same(ours, torch.cat(theirs), [first, second, scale])
    else:
        ours = tiled.negatives_logsumexp_within(first, scale, rows)
        assert_same(ours, dense(first, first, scale, rows, rows), [first, scale])


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_shared_labels_are_masked_and_empty_sums_have_zero_gradient(monkeypatch, shared):
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    queries, keys = leaf(3, 4), leaf(4, 4)
    rows, columns = torch.zeros(3, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.long)
    columns[:shared] = 0
    sums = tiled.negatives_logsumexp(queries, keys, torch.tensor(5.0).double(), rows, columns)
    if shared == 4:
        assert (sums < EMPTY).all()
        assert not any(gradient.any() for gradient in torch.autograd.grad(sums.sum(), (queries, keys)))
    else:
        torch.testing.assert_close(sums, (queries @ keys[shared:].T * 5).logsumexp(1))


def test_label_columns_are_compared_separately():
    queries, keys = leaf(1, 4), leaf(3, 4)
    columns = torch.tensor([[1, 9], [8, 2], [2, 1]])  # the third has the same values in other columns
    sums = tiled.negatives_logsumexp(queries, keys, torch.tensor(5.0).double(), torch.tensor([[1, 2]]), columns)
    torch.testing.assert_close(sums, (queries @ keys[2:].T * 5).squeeze(1))


@pytest.mark.parametrize("direction", ["rows", "within"])
def test_float32_at_low_temperature(direction):
    """Rows with very different sums, over several tiles."""
    torch.manual_seed(0)
    inputs = [leaf(2100, 16, dtype=torch.float32), torch.tensor(100.0, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    indices = torch.arange(2100)[:, None]
    if direction == "within":
        ours = tiled.negatives_logsumexp_within(*inputs, indices)
    else:
        ours = tiled.negatives_logsumexp(inputs[0], inputs[0], inputs[1], indices, indices)
    theirs = dense(exact[0], exact[0], exact[1], indices, indices)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weights = torch.rand(2100)
    for a, b in zip(torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, exact, weights.double())):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    embeds = leaf(50, 8, dtype=torch.bfloat16)
    indices = torch.arange(50)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        sums = tiled.negatives_logsumexp_within(embeds, torch.tensor(50.0), indices)
    exact = embeds.detach().double()
    torch.testing.assert_close(sums.double(), dense(exact, exact, 50.0, indices, indices), rtol=1e-6, atol=1e-5)
    sums.sum().backward()
    assert embeds.grad.dtype == torch.bfloat16


def test_keys_without_gradient_do_not_change_other_gradients():
    """As for a queue's keys."""
    torch.manual_seed(0)
    queries, keys, scale = leaf(5, 4), leaf(7, 4), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(5)[:, None], torch.arange(7)[:, None]
    both = [
        torch.autograd.grad(tiled.negatives_logsumexp(queries, k, scale, *labels).sum(), (queries, scale))
        for k in (keys, keys.detach())
    ]
    for a, b in zip(*both):
        assert torch.equal(a, b)


def test_over_row_chunks_equals_the_function(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    queries, keys = leaf(5, 4), leaf(3, 4)
    sizes = []

    def hinges(rows):
        sizes.append(len(rows))
        return (rows @ keys.T).relu().sum(1)

    ours = tiled.over_row_chunks(hinges, queries, columns=3)
    assert sizes == [1] * 5
    theirs = (queries @ keys.T).relu().sum(1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (queries, keys)), torch.autograd.grad(theirs.sum(), (queries, keys))
    ):
        torch.testing.assert_close(a, b)


def test_similarity_matrix_is_not_materialized():
    """Checks every tensor of the forward and backward pass, not only those that autograd saves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, value.numel()) if isinstance(value, torch.Tensor) else largest
            return result

    embeds = leaf(3000, 8, dtype=torch.float32)
    with Watch():
        tiled.negatives_logsumexp_within(embeds, torch.tensor(10.0), torch.arange(3000)[:, None]).sum().backward()
    assert largest <= tiled.TILE**2 < 3000**2
