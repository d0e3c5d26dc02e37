import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coalign.losses.contrastive import nt_xent
from coalign.networks.batch_norm import GlobalBatchNorm1d
from coalign.networks.heads import MLP, MaskedLanguageHead, ModalityBlindMLP, spread


def no_sum(tensor):
    return tensor


def test_mlp_equals_slips_head(oracles):
    oracle = oracles("slip")
    get = {key.removeprefix("slip_head_simclr."): value for key, value in oracle.items() if "head_simclr" in key}
    head = MLP([12, 16, 16, 8]).double()
    for number, (layer, norm) in enumerate(zip(head.layers, [*head.norms, None]), 1):
        for module, name in ((layer, f"layer{number}"), (norm, f"bn{number}")):
            for part in ("weight", "bias") if module else ():
                getattr(module, part).data = get[f"par.{name}.{part}"]
    views = [get[f"in.{name}"].requires_grad_() for name in ("h1", "h2")]
    embeds = [head(view, no_sum) for view in views]
    for ours, name in zip(embeds, ("aug1_embed", "aug2_embed")):
        torch.testing.assert_close(ours.detach(), get[f"out.{name}"])
    first, second = (F.normalize(x, dim=-1) for x in embeds)
    loss = nt_xent(first, second, first, second, torch.arange(8), 0.1) / 16
    loss.backward()
    torch.testing.assert_close(loss.detach(), get["out.loss"])
    for view, name in zip(views, ("grad_h1", "grad_h2")):
        torch.testing.assert_close(view.grad, get[f"out.{name}"])


@pytest.mark.parametrize("affine", [True, False])
def test_global_batch_norm_equals_torch(affine):
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm1d(5, affine=affine).double(), nn.BatchNorm1d(5, affine=affine).double()
    x = torch.randn(7, 5, dtype=torch.float64) * 3 + 10
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (ours(one, no_sum) ** 3).sum().backward()
    (theirs(other) ** 3).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    ours.move_statistics(ours.take_statistics())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x, no_sum), theirs.eval()(x))


def test_running_statistics_ignore_skipped_steps_and_no_grad_passes():
    norm = GlobalBatchNorm1d(5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.randn(7, 5), no_sum)
    assert norm.take_statistics() is not None  # a skipped step's are taken, but not moved
    with torch.no_grad():
        norm(torch.randn(7, 5), no_sum)
    assert norm.take_statistics() is None
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_single_row_and_half_precision():
    norm = GlobalBatchNorm1d(5)
    assert norm(torch.randn(1, 5), no_sum).isfinite().all()
    x = torch.randn(64, 5) + 100
    half = norm(x.bfloat16(), no_sum)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float(), no_sum), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("last_norm", [False, True])
def test_last_norm(last_norm):
    torch.manual_seed(0)
    head, norms = MLP([4, 6, 3], last_norm), [nn.BatchNorm1d(width) for width in (6, 3)]
    x = torch.randn(32, 4)
    expected = head.layers[1](norms[0](head.layers[0](x)).relu())
    torch.testing.assert_close(head(x, no_sum), norms[1](expected) if last_norm else expected)


def test_spread_is_one_on_a_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert spread(torch.randn(4000, 32)).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(10, 32)).item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- rows of several kinds


def rows(*kinds):
    return {
        kind: torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * (n + 1) + 3 * n
        for n, kind in enumerate(kinds)
    }


def test_batch_covers_all_kinds():
    """Equals MoCo-v3's head (last norm without learned scale) with all rows as one batch."""
    torch.manual_seed(0)
    ours = ModalityBlindMLP([4, 16, 3], ["a", "b"], "batch").double()
    first, last = ours.layers
    theirs = nn.Sequential(first, nn.BatchNorm1d(16), nn.ReLU(), last, nn.BatchNorm1d(3, affine=False)).double()
    given = rows("a", "b")
    out = ours(given, no_sum)
    torch.testing.assert_close(torch.cat([out["a"], out["b"]]), theirs(torch.cat(list(given.values()))))
    assert (out["a"].mean(0) - out["b"].mean(0)).abs().max() > 0.1  # the difference between kinds is kept


def test_batch_apart_has_separate_statistics_per_kind():
    torch.manual_seed(0)
    head = ModalityBlindMLP([4, 16, 3], ["a", "b"], "batch_apart").double()
    given = rows("a", "b")
    out = head(given, no_sum)
    for kind in given:
        torch.testing.assert_close(out[kind], head({kind: given[kind]}, no_sum)[kind])
        torch.testing.assert_close(out[kind].mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    for _ in range(200):
        head(given, no_sum)
        for module in head.modules():
            if hasattr(module, "take_statistics") and (totals := module.take_statistics()) is not None:
                module.move_statistics(totals)
    head.eval()
    for kind in given:
        evaluated = head({kind: given[kind]}, no_sum)[kind]
        assert F.cosine_similarity(evaluated, out[kind]).min() > 0.99


def test_layer_norm_is_independent_of_the_batch():
    torch.manual_seed(0)
    head = ModalityBlindMLP([4, 16, 3], ["a", "b"], "layer").double()
    given = rows("a", "b")
    out = head(given, no_sum)
    torch.testing.assert_close(head({"b": given["b"][2:3]}, no_sum)["b"], out["b"][2:3])
    hidden = F.layer_norm(head.layers[0](given["a"]), (16,)).relu()
    torch.testing.assert_close(out["a"], F.layer_norm(head.layers[1](hidden), (3,)))


# ---------------------------------------------------------------- masked language modeling


def test_masked_language_head_starts_near_chance():
    torch.manual_seed(0)
    head, tokens = MaskedLanguageHead(512, 2000), F.layer_norm(torch.randn(64, 512), (512,))
    logits = head(tokens)
    assert logits.shape == (64, 2000)
    assert F.cross_entropy(logits, torch.randint(2000, (64,))).item() == pytest.approx(math.log(2000), abs=0.4)
