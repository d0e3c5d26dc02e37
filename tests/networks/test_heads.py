import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coalign.losses.contrastive import nt_xent
from coalign.networks.batch_norm import GlobalBatchNorm1d
from coalign.networks.heads import MLP, spread


def alone(tensor):
    return tensor


def test_equals_slips_head_under_its_loss(oracles):
    oracle = oracles("slip")
    get = {key.removeprefix("slip_head_simclr."): value for key, value in oracle.items() if "head_simclr" in key}
    head = MLP([12, 16, 16, 8]).double()
    for number, (layer, norm) in enumerate(zip(head.layers, [*head.norms, None]), 1):
        for module, name in ((layer, f"layer{number}"), (norm, f"bn{number}")):
            for part in ("weight", "bias") if module else ():
                getattr(module, part).data = get[f"par.{name}.{part}"]
    views = [get[f"in.{name}"].requires_grad_() for name in ("h1", "h2")]
    embeds = [head(view, alone) for view in views]
    for ours, name in zip(embeds, ("aug1_embed", "aug2_embed")):
        torch.testing.assert_close(ours.detach(), get[f"out.{name}"])
    first, second = (F.normalize(x, dim=-1) for x in embeds)
    loss = nt_xent(first, second, first, second, torch.arange(8), 0.1) / 16
    loss.backward()
    torch.testing.assert_close(loss.detach(), get["out.loss"])
    for view, name in zip(views, ("grad_h1", "grad_h2")):
        torch.testing.assert_close(view.grad, get[f"out.{name}"])


@pytest.mark.parametrize("affine", [True, False])
def test_global_batch_norm_equals_torchs(affine):
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm1d(5, affine=affine).double(), nn.BatchNorm1d(5, affine=affine).double()
    x = torch.randn(7, 5, dtype=torch.float64) * 3 + 10
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (ours(one, alone) ** 3).sum().backward()
    (theirs(other) ** 3).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    ours.move_statistics(alone, keep=True)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x, alone), theirs.eval()(x))


def test_statistics_stay_when_the_step_is_skipped_and_without_gradient():
    norm = GlobalBatchNorm1d(5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.randn(7, 5), alone)
    norm.move_statistics(alone, keep=False)
    with torch.no_grad():
        norm(torch.randn(7, 5), alone)
    norm.move_statistics(alone, keep=True)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_one_row_and_half_precision():
    norm = GlobalBatchNorm1d(5)
    assert norm(torch.randn(1, 5), alone).isfinite().all()
    x = torch.randn(64, 5) + 100
    half = norm(x.bfloat16(), alone)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float(), alone), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("last_norm", "norms", "learned"), [("none", 1, 2), ("plain", 2, 2), ("affine", 2, 4)])
def test_the_last_norm(last_norm, norms, learned):
    head = MLP([4, 6, 3], last_norm, bias=False)
    assert len(head.norms) == norms
    assert sum(p.numel() > 0 for norm in head.norms for p in norm.parameters()) == learned
    out = head(torch.randn(32, 4), alone)
    assert out.shape == (32, 3)
    if last_norm != "none":
        torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_spread_is_one_on_a_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert spread(torch.randn(4000, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(10, 32)).item() == pytest.approx(0, abs=1e-6)
