from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coalign.config import OptimizerConfig, RoleConfig
from coalign.errors import UserError
from coalign.optim import build_optimizers, clip_gradients, lr_at

ORACLES = np.load(Path(__file__).parent / "oracles" / "optim.npz", allow_pickle=False)


class TwoTowers(nn.Module):
    """Two towers with norms and biases, a scale, and a frozen teacher."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.text = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.teacher = nn.Linear(2, 2).requires_grad_(False)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"image": [*self.image.parameters()], "text": [*self.text.parameters()], "scale": [self.scale]}

    def fill_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


MIXED = OptimizerConfig(
    lr=1e-3,
    start_lr=1e-4,
    final_lr=0.0,
    weight_decay=0.05,
    warmup_fraction=0.2,
    roles={
        "text": RoleConfig(kind="sgd", lr=0.02, start_lr=1e-3, weight_decay=1e-4),
        "scale": RoleConfig(lr_multiplier=10),
    },
)


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, coalign.optim; coalign.config.OptimizerConfig().for_role('x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_schedule_matches_slip() -> None:
    names = ("base", "final", "epochs", "niter", "warmup_epochs", "start")
    params = {name: ORACLES[f"slip_lr.par.{name}"].item() for name in names}
    total, warmup = params["epochs"] * params["niter"], params["warmup_epochs"] * params["niter"]
    ours = [lr_at(step, total, params["base"], warmup, params["start"], params["final"]) for step in range(total)]
    np.testing.assert_allclose(ours, ORACLES["slip_lr.out.lr"], rtol=1e-12)


def test_schedule_that_reaches_the_final_rate_matches_declip() -> None:
    iterations = ORACLES["declip_lr.in.iter"]
    ours = [lr_at(int(i) - 1, 30, 1e-3, warmup_steps=6, start=1e-4, final=0.0, reaches_final=True) for i in iterations]
    np.testing.assert_allclose(ours, ORACLES["declip_lr.out.lr"], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("reaches_final", [False, True])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5), (5, 9), (100, 7)])
def test_schedule_stays_within_its_bounds(total: int, warmup: int, reaches_final: bool) -> None:
    rates = [lr_at(step, total, 1.0, warmup, 0.01, 0.1, reaches_final) for step in range(total)]
    assert all(0.01 <= rate <= 1.0 for rate in rates)
    decay = rates[warmup:]
    assert decay == sorted(decay, reverse=True)
    if warmup == 0 and not reaches_final:
        assert rates[0] == 1.0


def test_updates_match_the_equations_for_each_role() -> None:
    """Three steps against AdamW and SGD transcribed from their equations, with the weight decay and learning rate of each parameter."""
    model = TwoTowers().double()
    optimizers = build_optimizers(model.groups(), MIXED, model)
    assert set(optimizers.by_kind) == {"adamw", "sgd"}
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(3):
        model.fill_gradients(step)
        lrs = optimizers.set_lr(step, 10)
        assert lrs["scale"] == pytest.approx(10 * lrs["image"])
        assert lrs["text"] == pytest.approx(lr_at(step, 10, 0.02, 2, 1e-3, 0.0))
        for name, value in values.items():
            grad = model.get_parameter(name).grad.clone()
            role = name.split(".")[0]
            lr, decays = lrs[role], value.ndim >= 2
            if role == "text":
                grad += 1e-4 * value * decays
                first[name] = 0.9 * first[name] + grad
                value -= lr * first[name]
            else:
                value *= 1 - lr * 0.05 * decays
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.98 * second[name] + 0.02 * grad**2
                corrected = second[name] / (1 - 0.98 ** (step + 1))
                value -= lr * first[name] / (1 - 0.9 ** (step + 1)) / (corrected.sqrt() + 1e-8)
        optimizers.step()
    for name, value in values.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-12, atol=1e-14)


def test_parameters_below_two_dimensions_are_not_decayed() -> None:
    model = TwoTowers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimizerConfig(lr=0.1, start_lr=0, final_lr=0, weight_decay=0.5)
    optimizers = build_optimizers(model.groups(), config, model)
    for parameter in optimizers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        shrinks = parameter.ndim >= 2 and parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if shrinks else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_matches_the_plain_implementation(dtype: torch.dtype) -> None:
    fused, plain = TwoTowers().to(dtype), TwoTowers().to(dtype)
    ours = build_optimizers(fused.groups(), MIXED, fused)
    assert all(optimizer.defaults["fused"] for optimizer in ours.optimizers)
    theirs = build_optimizers(plain.groups(), MIXED, plain)
    for optimizer in theirs.optimizers:
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = False, False
    for step in range(20):
        for model, optimizers in ((fused, ours), (plain, theirs)):
            model.fill_gradients(step)
            optimizers.set_lr(step, 20)
            optimizers.step()
            optimizers.zero_grad()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for actual, expected in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_training_resumes_from_a_state_dict_bit_for_bit() -> None:
    def run(model: TwoTowers, optimizers, steps: range) -> None:
        for step in steps:
            model.fill_gradients(step)
            if step < 6:  # the first gradient of these parameters comes after the checkpoint
                model.text[0].weight.grad = model.image[0].bias.grad = None
            optimizers.set_lr(step, 10)
            optimizers.step()

    uninterrupted = TwoTowers()
    run(uninterrupted, build_optimizers(uninterrupted.groups(), MIXED, uninterrupted), range(10))
    first = TwoTowers()
    optimizers = build_optimizers(first.groups(), MIXED, first)
    run(first, optimizers, range(5))
    state = optimizers.state_dict()
    assert set(state["image.0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(state["text.1.weight"]) == {"momentum_buffer"}
    assert "image.0.bias" not in state
    saved = state["image.0.weight"]["exp_avg"].clone()
    second = TwoTowers(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizers(second.groups(), MIXED, second)
    resumed.load_state_dict(state)
    run(second, resumed, range(5, 10))
    for expected, actual in zip(uninterrupted.parameters(), second.parameters()):
        assert torch.equal(expected, actual)
    assert torch.equal(saved, state["image.0.weight"]["exp_avg"])  # the loaded state is a copy


def test_settings_come_from_the_configuration_not_the_checkpoint() -> None:
    model = TwoTowers()
    optimizers = build_optimizers(model.groups(), MIXED, model)
    model.fill_gradients(0)
    optimizers.step()
    config = OptimizerConfig(weight_decay=0.3, roles={"text": RoleConfig(kind="sgd")})
    changed = build_optimizers(model.groups(), config, model)
    changed.load_state_dict(optimizers.state_dict())
    assert {group["weight_decay"] for group in changed.by_kind["adamw"].param_groups} == {0.3, 0.0}


def test_mismatched_state_is_rejected() -> None:
    model = TwoTowers()
    optimizers = build_optimizers(model.groups(), MIXED, model)
    model.fill_gradients(0)
    optimizers.step()
    state = optimizers.state_dict()
    with pytest.raises(UserError, match=r"'text\.\d\.\w+' in the checkpoint does not match adamw"):
        build_optimizers(model.groups(), OptimizerConfig(), model).load_state_dict(state)
    other = {"image": [*model.image.parameters()]}
    with pytest.raises(UserError, match=r"'scale' .* is not a trained parameter"):
        build_optimizers(other, OptimizerConfig()).load_state_dict({"scale": state["scale"]})
    state["image.0.weight"]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"'image\.0\.weight' .* shape \(5, 6\)"):
        optimizers.load_state_dict(state)


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = TwoTowers()
    groups = model.groups()
    with pytest.raises(AssertionError, match=r"image\.0\.weight is in the groups 'image' and 'scale'"):
        build_optimizers(groups | {"scale": [model.scale, groups["image"][0]]}, OptimizerConfig(), model)
    with pytest.raises(AssertionError, match=r"image\.2\.bias .* is not in any group"):
        build_optimizers(groups | {"image": groups["image"][:-1]}, OptimizerConfig(), model)
    with pytest.raises(AssertionError, match=r"teacher\.weight of group 'text' is frozen"):
        build_optimizers(groups | {"text": [*groups["text"], model.teacher.weight]}, OptimizerConfig(), model)
    with pytest.raises(AssertionError, match=r"extra\.0 of group 'extra' is not in the model"):
        build_optimizers(groups | {"extra": [nn.Parameter(torch.ones(1))]}, OptimizerConfig(), model)
    assert len(build_optimizers(groups, OptimizerConfig(), model).parameters()) == len([*model.parameters()]) - 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(roles={"txet": RoleConfig()}), "'txet', but the roles of this model are image, text, scale"),
        (OptimizerConfig(lr=-1.0), "lr is -1.0"),
        (OptimizerConfig(lr=math.nan), "lr is nan"),
        (OptimizerConfig(lr=1e-6, final_lr=1e-5), r"final_lr is 1e-05, but must be between 0 and lr \(1e-06\)"),
        (OptimizerConfig(roles={"text": RoleConfig(momentum=1.0)}), "role 'text': momentum is 1.0"),
        (OptimizerConfig(betas=(0.9, 1.0)), "betas"),
        (OptimizerConfig(warmup_fraction=1.5), "warmup_fraction"),
        (OptimizerConfig(weight_decay=-0.1), "weight_decay"),
    ],
)
def test_invalid_settings_are_rejected(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizers(TwoTowers().groups(), config)


def test_warmup_by_fraction_or_by_steps() -> None:
    assert OptimizerConfig(warmup_fraction=0.1).num_warmup_steps(500) == 50
    assert OptimizerConfig(warmup_fraction=0.1, warmup_steps=7).num_warmup_steps(500) == 7
    assert OptimizerConfig(warmup_steps=0).num_warmup_steps(500) == 0


def test_clipping_scales_all_gradients_by_a_common_factor() -> None:
    model = TwoTowers().double()
    model.fill_gradients(0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = math.sqrt(sum(float((grad**2).sum()) for grad in before))
    assert clip_gradients(model.parameters(), None).item() == pytest.approx(expected, rel=1e-12)
    with_grad = [p for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(with_grad, before))
    assert clip_gradients(model.parameters(), 2 * expected).item() == pytest.approx(expected)
    assert clip_gradients(model.parameters(), expected / 4).item() == pytest.approx(expected)
    for parameter, grad in zip(with_grad, before):
        torch.testing.assert_close(parameter.grad, grad / 4, rtol=1e-6, atol=0)


def test_non_finite_norm_is_returned() -> None:
    model = TwoTowers()
    model.fill_gradients(0)
    model.scale.grad = torch.tensor([math.inf])
    assert not torch.isfinite(clip_gradients(model.parameters(), 1.0))


def test_a_constant_schedule_cools_down_by_one_minus_the_square_root() -> None:
    """Hägele et al. 2024, Eq. 1, with the 1-sqrt shape: f(n) = 1 − √((n − (N − N_decay)) / N_decay)."""
    config = OptimizerConfig(
        lr=1e-3, start_lr=1e-6, final_lr=1e-5, schedule="constant", cooldown_fraction=0.2, warmup_steps=5
    )
    total, decay = 50, 10
    assert config.cooldown_start(total) == total - decay
    ours = [lr_at(step, total, 1e-3, 5, 1e-6, 1e-5, cooldown_start=total - decay) for step in range(total)]
    assert ours[5 : total - decay] == [1e-3] * 35
    for n in range(total - decay, total):
        assert ours[n] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - ((n - (total - decay)) / decay) ** 0.5))
    reached = [lr_at(step, total, 1e-3, 5, 1e-6, 1e-5, True, total - decay) for step in range(total)]
    assert reached[-1] == pytest.approx(1e-5)
    longer = [lr_at(step, 2 * total, 1e-3, 5, 1e-6, 1e-5, cooldown_start=80) for step in range(2 * total)]
    assert longer[: total - decay] == ours[: total - decay]
    assert OptimizerConfig().cooldown_start(total) is None


def test_a_cool_down_starts_after_the_warm_up() -> None:
    config = OptimizerConfig(schedule="constant", cooldown_fraction=0.9, warmup_fraction=0.5)
    assert config.cooldown_start(10) == 5
    with pytest.raises(UserError, match="cooldown_fraction is 1, but must be at least 0 and less than 1"):
        OptimizerConfig(cooldown_fraction=1).for_role("image")
