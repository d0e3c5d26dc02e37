import pytest
import torch
from torch.nn import functional as F

from coalign.losses import tiled

EMPTY = -1e30  # below this there was nothing to sum up


def dense(queries, keys, scale, rows, columns):
    """The definition, with the whole matrix."""
    logits = queries @ keys.T * scale
    shared = (rows[:, None] == columns[None]).any(2)
    return logits.masked_fill(shared, tiled.floor(logits.dtype)).logsumexp(1)


def leaf(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


def assert_same(ours, theirs, inputs, exact=None, tolerance=1e-10):
    real = theirs > EMPTY
    assert torch.equal(ours > EMPTY, real)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(ours[real], theirs[real], **close)
    upstream = torch.randn(len(ours), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((values[real] * upstream[real]).sum(), leaves)
        for values, leaves in ((ours, inputs), (theirs, exact or inputs))
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("tile", [3, 4, 1024])
@pytest.mark.parametrize("direction", ["rows", "both", "within"])
def test_equals_the_whole_matrix(monkeypatch, direction, tile):
    monkeypatch.setattr(tiled, "TILE", tile)
    torch.manual_seed(0)
    first, second, scale = leaf(11, 6), leaf(8, 6), torch.tensor([30.0], dtype=torch.float64, requires_grad=True)
    rows, columns = torch.randint(0, 9, (11, 2)), torch.randint(0, 9, (8, 2))
    rows[4, 0] = 2**62  # a caption's id
    if direction == "rows":
        ours = tiled.sum_over_others(first, second, scale, rows, columns)
        assert_same(ours, dense(first, second, scale, rows, columns), [first, second, scale])
    elif direction == "both":
        ours = torch.cat(tiled.sum_over_others_both_ways(first, second, scale, rows, columns))
        theirs = dense(first, second, scale, rows, columns), dense(second, first, scale, columns, rows)
        assert_same(ours, torch.cat(theirs), [first, second, scale])
    else:
        ours = tiled.sum_over_others_within(first, scale, rows)
        assert_same(ours, dense(first, first, scale, rows, rows), [first, scale])


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_labels_leave_out_what_they_say_and_an_empty_sum_has_no_gradient(monkeypatch, shared):
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    queries, keys = leaf(3, 4), leaf(4, 4)
    rows, columns = torch.zeros(3, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.long)
    columns[:shared] = 0
    sums = tiled.sum_over_others(queries, keys, torch.tensor(5.0).double(), rows, columns)
    if shared == 4:
        assert (sums < EMPTY).all()
        assert not any(gradient.any() for gradient in torch.autograd.grad(sums.sum(), (queries, keys)))
    else:
        torch.testing.assert_close(sums, (queries @ keys[shared:].T * 5).logsumexp(1))


def test_two_columns_of_labels_each_leave_out():
    queries, keys = leaf(1, 4), leaf(3, 4)
    columns = torch.tensor([[1, 9], [8, 2], [2, 1]])  # the third shares values, but not in their places
    sums = tiled.sum_over_others(queries, keys, torch.tensor(5.0).double(), torch.tensor([[1, 2]]), columns)
    torch.testing.assert_close(sums, (queries @ keys[2:].T * 5).squeeze(1))


@pytest.mark.parametrize("direction", ["rows", "within"])
def test_float32_at_temperature_one_hundredth(direction):
    """Rows whose sums are far apart, and several tiles."""
    torch.manual_seed(0)
    inputs = [leaf(2100, 16, dtype=torch.float32), torch.tensor(100.0, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    places = torch.arange(2100)[:, None]
    if direction == "within":
        ours = tiled.sum_over_others_within(*inputs, places)
    else:
        ours = tiled.sum_over_others(inputs[0], inputs[0], inputs[1], places, places)
    theirs = dense(exact[0], exact[0], exact[1], places, places)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weights = torch.rand(2100)
    for a, b in zip(torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, exact, weights.double())):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_half_precision_is_computed_in_float32_also_under_autocast():
    torch.manual_seed(0)
    embeds = leaf(50, 8, dtype=torch.bfloat16)
    places = torch.arange(50)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        sums = tiled.sum_over_others_within(embeds, torch.tensor(50.0), places)
    exact = embeds.detach().double()
    torch.testing.assert_close(sums.double(), dense(exact, exact, 50.0, places, places), rtol=1e-6, atol=1e-5)
    sums.sum().backward()
    assert embeds.grad.dtype == torch.bfloat16


def test_keys_without_a_gradient_leave_the_others_as_they_are():
    """As a queue's: the other gradients are those with one."""
    torch.manual_seed(0)
    queries, keys, scale = leaf(5, 4), leaf(7, 4), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(5)[:, None], torch.arange(7)[:, None]
    both = [
        torch.autograd.grad(tiled.sum_over_others(queries, k, scale, *labels).sum(), (queries, scale))
        for k in (keys, keys.detach())
    ]
    for a, b in zip(*both):
        assert torch.equal(a, b)


def test_by_rows_is_the_function_and_its_gradient(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    queries, keys = leaf(5, 4), leaf(3, 4)
    seen = []

    def hinges(rows):
        seen.append(len(rows))
        return (rows @ keys.T).relu().sum(1)

    ours = tiled.by_rows(hinges, queries, columns=3)
    assert seen == [1] * 5
    theirs = (queries @ keys.T).relu().sum(1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (queries, keys)), torch.autograd.grad(theirs.sum(), (queries, keys))
    ):
        torch.testing.assert_close(a, b)


def test_no_tensor_of_all_similarities_is_made():
    """Not one that autograd keeps, and none on the way."""
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
        tiled.sum_over_others_within(embeds, torch.tensor(10.0), torch.arange(3000)[:, None]).sum().backward()
    assert largest <= tiled.TILE**2 < 3000**2
