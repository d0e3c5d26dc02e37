"""Optimizers and learning rate schedules, with settings by parameter role. Does not import torch at module level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from coalign.config import OptimizerConfig
from coalign.dtensor import is_sharded, sharded_like
from coalign.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def lr_at(
    step: int,
    total_steps: int,
    base: float,
    warmup_steps: int = 0,
    start: float = 0.0,
    final: float = 0.0,
    reaches_final: bool = False,
    cooldown_start: int | None = None,
) -> float:
    """Learning rate of a step, counted from 0: linear warm-up from `start` to `base`, then cosine decay to `final`.

    With `cooldown_start`, the rate is constant after the warm-up, and from that step on falls to `final` by 1 − √(fraction of the
    cool-down), the best of the shapes that Hägele et al. 2024 ("Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations") compare.

    The warm-up includes both endpoints. By default (as in SLIP) the decay starts with another step at `base` and would reach `final` one
    step after the last. With `reaches_final` (as in DeCLIP) it starts one step later in the cosine, so that the last step uses `final`.
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(1, warmup_steps - 1)
    decay_start = warmup_steps if cooldown_start is None else cooldown_start
    progress = (step - decay_start + reaches_final) / max(1, total_steps - decay_start)
    if cooldown_start is not None:
        return base if step < cooldown_start else final + (base - final) * (1 - math.sqrt(min(1.0, progress)))
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Rate:
    """What the learning rate of a parameter depends on, apart from its role."""

    part: str = ""  # part of the role, such as "trunk"; "": the whole role
    is_new: bool = False  # starts from random values, in a model of which other parts do not
    scale: float = 1.0  # multiplier of the whole schedule (layer decay)
    waits: bool = False  # is trained, from its warm-up on, after the head steps


class Optimizers:
    """One torch optimizer per kind in use, with a common interface. Built by `build_optimizers`."""

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        names: Mapping[Tensor, str],
        schedules: Mapping[tuple[str, Rate], OptimizerConfig],
    ) -> None:
        self.by_kind = dict(optimizers)
        self._names = dict(names)
        self._schedules = dict(schedules)
        self._clear()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.by_kind.values())

    def parameters(self) -> list[nn.Parameter]:
        """Returns all trained parameters, each once."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def set_lr(self, step: int, total_steps: int, head_steps: int = 0) -> dict[str, float]:
        """Sets the learning rates of this step, which depend on nothing but the step. Returns them by role, or by role and part, such as
        "image.trunk"; of several in a part, the highest.

        Parameters that wait have a rate of 0 in the first `head_steps`, and the schedule of a run of the other steps after them.
        """
        lrs: dict[str, float] = {}
        by_group = {}
        for (role, rate), config in self._schedules.items():
            start = head_steps if rate.waits else 0
            lr = 0.0
            if step >= start:
                steps = total_steps - start
                warmup, cooldown = config.num_warmup_steps(steps), config.cooldown_start(steps)
                values = (config.lr, warmup, config.start_lr or 0.0, config.final_lr or 0.0, config.reaches_final)
                lr = rate.scale * lr_at(step - start, steps, *values, cooldown)
            by_group[role, rate] = lr
            name = f"{role}.{rate.part}" if rate.part else role
            lrs[name] = max(lr, lrs.get(name, 0.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = by_group[group["role"], group["rate"]]
        return lrs

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns moments and step counters by parameter name. Settings are not included: they come from the configuration."""
        states = {}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                states[self._names[parameter]] = {key: value for key, value in state.items() if value is not None}
        return states

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Loads a copy of the output of `state_dict`. Raises UserError if it is for other parameters or another kind of optimizer."""
        advice = "resume with the settings the run was started with"
        unknown = sorted(set(states) - set(self._names.values()))
        if unknown:
            raise UserError(
                f"The optimizer state of the checkpoint does not match the model: '{unknown[0]}' (one of {len(unknown)}) "
                f"is not a trained parameter; {advice}."
            )
        self._clear()
        for kind, optimizer in self.by_kind.items():
            expected = {"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"momentum_buffer"}
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                name = self._names[parameter]
                state = states.get(name)
                if not state:  # no gradient so far, or SGD without momentum
                    continue
                shapes_match = all(value.ndim == 0 or value.shape == parameter.shape for value in state.values())
                if set(state) != expected or not shapes_match:
                    raise UserError(
                        f"The optimizer state of '{name}' in the checkpoint does not match {kind} with a parameter of "
                        f"shape {tuple(parameter.shape)}; {advice}."
                    )
                optimizer.state[parameter] = {
                    key: _copy_state(value, parameter, optimizer.defaults["fused"]) for key, value in state.items()
                }

    def _clear(self) -> None:
        import torch

        for kind, optimizer in self.by_kind.items():
            optimizer.state.clear()
            for group in optimizer.param_groups:
                if kind == "sgd" and group["momentum"] > 0:
                    # Fused SGD fails if only some parameters have a buffer, as when a gradient first appears later in the run. A zero
                    # buffer gives the same result.
                    for parameter in group["params"]:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _copy_state(value: Tensor, parameter: Tensor, fused: bool) -> Tensor:
    """Copies a state tensor in the optimizer's format: moments match the parameter, the step counter is float32."""
    import torch

    if value.ndim == 0:
        return value.to(parameter.device if fused else "cpu", torch.float32, copy=True)
    if is_sharded(parameter):
        return sharded_like(parameter, value)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def build_optimizers(
    groups: Mapping[str, Sequence[nn.Parameter]],
    config: OptimizerConfig,
    model: nn.Module | None = None,
    rates: Mapping[Tensor, Rate] | None = None,
) -> Optimizers:
    """Builds the optimizers of parameters grouped by role. `rates`: of the parameters that do not have their role's.

    With `model`, the groups must contain exactly its trained parameters, and its parameter names are used in errors and in the state.
    Raises UserError if a setting is out of range or for an unknown role, and AssertionError if a parameter is in two groups or in none.
    """
    import torch

    unknown = sorted(set(config.roles) - set(groups))
    if unknown:
        raise UserError(
            f"Optimizer settings are given for the role '{unknown[0]}', but the roles of this model are {', '.join(groups)}."
        )
    rates, plain = rates or {}, Rate()
    members_of = {
        (role, rate): [p for p in parameters if rates.get(p, plain) == rate]
        for role, parameters in groups.items()
        for rate in dict.fromkeys(rates.get(p, plain) for p in parameters)
    }
    schedules = {(role, rate): config.for_role(role, rate.is_new) for role, rate in members_of}
    names = _parameter_names(groups, model)
    torch_groups: dict[str, list[dict[str, Any]]] = {}
    for (role, rate), parameters in members_of.items():
        settings = schedules[role, rate]
        kwargs = (
            {"betas": settings.betas, "eps": settings.eps}
            if settings.kind == "adamw"
            else {"momentum": settings.momentum}
        )
        # Foreach and fused kernels do not accept a mix of DTensors and plain tensors.
        for decays, sharded in product((True, False), (False, True)):
            members = [p for p in parameters if (p.ndim >= 2) == decays and is_sharded(p) == sharded]
            if members:
                decay = settings.weight_decay if decays else 0.0
                group = {
                    "params": members,
                    "role": role,
                    "rate": rate,
                    "lr": settings.lr,
                    "weight_decay": decay,
                    **kwargs,
                }
                torch_groups.setdefault(settings.kind, []).append(group)
    # Fused optimizers make one pass over memory instead of ten. They exist for CPU and CUDA.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in names)
    classes: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizers = {kind: classes[kind](members, fused=fused) for kind, members in torch_groups.items()}
    return Optimizers(optimizers, names, schedules)


def _parameter_names(groups: Mapping[str, Sequence[nn.Parameter]], model: nn.Module | None) -> dict[Tensor, str]:
    """Names of the grouped parameters. Raises AssertionError unless each trained parameter is in exactly one group."""
    model_names = {parameter: name for name, parameter in model.named_parameters()} if model is not None else {}
    role_of: dict[Tensor, str] = {}
    names: dict[Tensor, str] = {}
    for role, parameters in groups.items():
        for position, parameter in enumerate(parameters):
            name = model_names.get(parameter, f"{role}.{position}")
            assert model is None or parameter in model_names, f"parameter {name} of group '{role}' is not in the model"
            assert parameter.requires_grad, f"parameter {name} of group '{role}' is frozen"
            assert parameter not in names, f"parameter {name} is in the groups '{role_of[parameter]}' and '{role}'"
            role_of[parameter], names[parameter] = role, name
    missing = [name for parameter, name in model_names.items() if parameter.requires_grad and parameter not in names]
    assert not missing, f"parameter {missing[0]} (one of {len(missing)}) is not in any group"
    return names


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales all gradients by a common factor to a norm of at most `max_norm` (None: no clipping). Returns the norm before clipping, [].

    If the norm is not finite, the gradients are invalid afterwards and the caller must skip the step.
    """
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    # foreach kernels do not accept a mix of DTensors and plain tensors
    by_sharding: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_sharding.setdefault(is_sharded(parameter), []).append(parameter)
    norms: list[Any] = [
        get_total_norm([p.grad for p in members if p.grad is not None]) for members in by_sharding.values()
    ]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    if max_norm is not None:
        for members in by_sharding.values():
            clip_grads_with_norm_(members, max_norm, norm)
    return norm
