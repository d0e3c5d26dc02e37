import pytest
import torch
from torch.nn import functional as F

from coalign.losses.ranking import margin_ranking


def unit(*shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_both_directions_equal_vse_sum_of_hinges(oracles, dtype, tolerance):
    oracle = oracles("mct")
    image, text = (oracle[f"vse_sum.in.{x}"].to(dtype).requires_grad_() for x in ("im", "s"))
    margin, own = float(oracle["vse_sum.par.margin"]), torch.eye(len(image), dtype=torch.bool)
    loss = margin_ranking(image, text, text, margin, own).sum() + margin_ranking(text, image, image, margin, own).sum()
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss.detach(), oracle["vse_sum.out.loss"], **close)
    torch.testing.assert_close(image.grad, oracle["vse_sum.out.grad_im"], **close)
    torch.testing.assert_close(text.grad, oracle["vse_sum.out.grad_s"], **close)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_naive_loops(masked):
    queries, keys, queue = unit(4, 3, seed=0).requires_grad_(), unit(4, 3, seed=1), unit(9, 3, seed=2)
    ignored = torch.rand(4, 9, generator=torch.Generator().manual_seed(3)) < 0.3 if masked else None
    ours = margin_ranking(queries, keys, queue, 0.2, ignored)
    for i, loss in enumerate(ours):
        total = 0 * queries.sum()
        for j, key in enumerate(queue):
            hinge = 0.2 - queries[i] @ keys[i] + queries[i] @ key
            if hinge > 0 and not (masked and ignored[i, j]):
                total = total + hinge
        torch.testing.assert_close(loss, total)
        torch.testing.assert_close(*(torch.autograd.grad(x, queries, retain_graph=True)[0] for x in (loss, total)))
    assert (ours > 0).any()


def test_satisfied_margins_have_zero_loss():
    queries = torch.tensor([[1.0, 0.0]], requires_grad=True)
    others = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.79, 0.0], [0.81, 0.0]])
    loss = margin_ranking(queries, queries.detach(), others, 0.2)
    assert loss.item() == pytest.approx(0.01, abs=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(queries.grad[0], others[3] - queries.detach()[0])


@pytest.mark.parametrize("rows", [0, 3])
def test_no_others_or_rows_have_zero_loss_and_gradient(rows):
    queries = unit(rows, 4, seed=0).requires_grad_()
    loss = margin_ranking(
        queries, unit(rows, 4, seed=1), unit(5, 4, seed=2), 0.2, torch.ones(rows, 5, dtype=torch.bool)
    )
    loss.sum().backward()
    assert loss.shape == (rows,)
    assert not loss.detach().any()
    assert not queries.grad.any()


@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
@pytest.mark.parametrize("number", [1, 4096])
def test_degenerate_inputs_are_finite(kind, number):
    x = {"random": torch.randn(number, 8), "identical": torch.ones(number, 8), "zero": torch.zeros(number, 8)}[kind]
    x = F.normalize(x, dim=-1).requires_grad_()
    loss = margin_ranking(x, x.flip(0), x.detach(), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    if kind != "random":
        torch.testing.assert_close(loss.detach(), torch.full((number,), 0.2 * number), rtol=1e-4, atol=1e-4)


def test_half_precision_inputs_are_computed_in_float32():
    queries, keys, queue = (unit(n, 16, seed=n, dtype=torch.bfloat16) for n in (4, 5, 9))
    expected = margin_ranking(queries.double(), keys[:4].double(), queue.double(), 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = margin_ranking(queries, keys[:4], queue.float(), 0.2)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)
