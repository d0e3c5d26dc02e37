import math

import pytest
import torch
from torch.nn import functional as F

from coalign.losses.contrastive import nt_xent


def loss(first, second, temperature):
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    return nt_xent(first, second, first, second, torch.arange(len(first)), temperature) / (2 * len(first))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["slip_simclr", "slip_simclr_t05"])
def test_equals_released_code(oracles, name, dtype, tolerance):
    oracle = oracles("slip")
    first, second = (oracle[f"{name}.in.{x}"].to(dtype).requires_grad_() for x in ("aug1", "aug2"))
    value = loss(first, second, oracle[f"{name}.par.temperature"].item())
    value.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(value.detach(), oracle[f"{name}.out.loss"], **close)
    torch.testing.assert_close(first.grad, oracle[f"{name}.out.grad_aug1"], **close)
    torch.testing.assert_close(second.grad, oracle[f"{name}.out.grad_aug2"], **close)


def test_equals_released_code_on_two_processes(oracles):
    """Each rank of the released code has half of the rows; its gradients are twice the gradients of the mean over ranks."""
    oracle = oracles("slip")
    first, second = (oracle[f"slip_simclr_world2.in.{x}"].requires_grad_() for x in ("aug1", "aug2"))
    a, b = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    sums = [nt_xent(a[rows], b[rows], a, b, torch.arange(8)[rows], 0.1) for rows in (slice(0, 4), slice(4, 8))]
    for rank, total in enumerate(sums):
        torch.testing.assert_close((total / 8).detach(), oracle[f"slip_simclr_world2.out.loss_rank{rank}"])
    sum(total / 8 for total in sums).backward()
    torch.testing.assert_close(first.grad, oracle["slip_simclr_world2.out.grad_aug1"])
    torch.testing.assert_close(second.grad, oracle["slip_simclr_world2.out.grad_aug2"])


def test_views_that_share_a_label_are_not_contrasted():
    first, second = F.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=-1)
    groups = [0, 1, 0, 2, 1, 0]
    views, owner = torch.cat([first, second]), [*range(6), *range(6)]
    expected = 0.0
    for i in range(12):
        positive = (i + 6) % 12
        kept = [j for j in range(12) if j == positive or groups[owner[j]] != groups[owner[i]]]
        scores = views @ views[i] / 0.1
        expected += scores[kept].logsumexp(0) - scores[positive]
    labels = torch.tensor(groups)
    ours = nt_xent(first, second, first, second, torch.arange(6), 0.1, (labels, labels))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["identical", "zero", "one pair", "large"])
def test_degenerate_inputs_are_finite(kind, dtype):
    g = torch.Generator().manual_seed(0)
    size = {"one pair": 1, "large": 1024}.get(kind, 6)
    first, second = (torch.randn(size, 8, generator=g).to(dtype) for _ in range(2))
    if kind == "identical":
        first = second = first[:1].repeat(size, 1)
    elif kind == "zero":
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = loss(first, second, 0.01)
    value.backward()
    assert value.isfinite()
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()
    if kind in ("identical", "zero"):
        assert value.item() == pytest.approx(math.log(2 * size - 1), rel=1e-5)
    if kind == "one pair":
        assert value.item() == 0
