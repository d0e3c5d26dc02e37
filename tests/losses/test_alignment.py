import pytest
import torch

from coalign.losses.alignment import negative_cosine, simsiam_loss


@pytest.mark.parametrize("name", ["simsiam", "declip_simsiam"])
def test_equals_official_code(oracles, name):
    oracle = oracles("declip")
    inputs = {key: oracle[f"{name}.in.{key}"].requires_grad_() for key in ("p1", "z1", "p2", "z2")}
    loss = simsiam_loss(**inputs) / 8  # the official code takes the mean
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"], rtol=1e-9, atol=1e-12)
    for key in ("p1", "p2"):
        torch.testing.assert_close(inputs[key].grad, oracle[f"{name}.out.grad_{key}"], rtol=1e-9, atol=1e-12)
    for key in ("z1", "z2"):
        assert inputs[key].grad is None, "targets must not receive a gradient"


def test_negative_cosine_equals_loops():
    predictions, targets = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = 0.0
    for p, z in zip(predictions.tolist(), targets.tolist()):
        dot, p_norm, z_norm = (sum(a * b for a, b in zip(*pair)) for pair in ((p, z), (p, p), (z, z)))
        expected -= dot / (p_norm * z_norm) ** 0.5
    assert negative_cosine(predictions, targets).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    p, z = torch.randn(2, 16, 64).to(dtype)
    loss = negative_cosine(p, z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, negative_cosine(p.float(), z.float()))


def test_degenerate_inputs_are_finite():
    for rows in (torch.zeros(4, 8), torch.ones(4, 8), torch.full((1, 8), 1e-20), torch.full((2, 8), 1e18)):
        p = rows.clone().requires_grad_()
        loss = negative_cosine(p, rows)
        loss.backward()
        assert torch.isfinite(loss)
        assert p.grad.isfinite().all()
    assert negative_cosine(torch.ones(3, 2), torch.ones(3, 2)).item() == pytest.approx(-3)
