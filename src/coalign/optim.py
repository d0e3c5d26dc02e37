"""Optimisers and learning-rate schedules, by role. Imports no torch at module level: help shows the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from coalign.divided import divided_like, is_divided
from coalign.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Kind = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class RoleConfig:
    """What differs for the parameters of one role ("image", "text", "scale", …). None: as in `OptimiserConfig`."""

    kind: Kind | None = None  # another optimiser
    lr: float | None = None  # another peak
    start_lr: float | None = None  # another start of the warm-up
    final_lr: float | None = None  # another end
    lr_multiplier: float = 1.0  # of the whole schedule: its start, its peak and its end
    weight_decay: float | None = None  # another decay
    betas: tuple[float, float] | None = None  # other decay rates of AdamW's moments
    eps: float | None = None  # another term in AdamW's denominator
    momentum: float | None = None  # another momentum of SGD


@dataclass(frozen=True)
class OptimiserConfig:
    """How the parameters are trained. The defaults are CLIP's as trained in SLIP's experiments, on a run of any length.

    Weight decay leaves out everything with fewer than two dimensions: norms, biases, scales.
    """

    kind: Annotated[Kind, arg(name="optimiser")] = "adamw"  # the optimisation algorithm
    lr: float = 5e-4  # learning rate at its peak, after the warm-up
    start_lr: float = 1e-6  # learning rate of the first step of the warm-up
    final_lr: float = 1e-5  # learning rate to which half a cosine falls
    warmup_fraction: float = 0.04  # share of the run in which the learning rate rises (0.04: one epoch of 25)
    warmup_steps: int | None = None  # steps of the warm-up, if given instead of the fraction
    reaches_final: bool = False  # the last step has the final learning rate itself, not one step before it
    weight_decay: float = 0.5  # decay of matrices and convolutions; norms, biases and scales have none
    betas: tuple[float, float] = (0.9, 0.98)  # decay rates of AdamW's two moments
    eps: float = 1e-8  # AdamW's term in the denominator
    momentum: float = 0.9  # momentum of SGD
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)

    def for_role(self, role: str) -> OptimiserConfig:
        """The settings of one role, overrides and multiplier applied. Raises UserError where they make no sense."""
        override = self.roles.get(role, RoleConfig())
        given = {name: value for name, value in vars(override).items() if value is not None and name != "lr_multiplier"}
        merged = replace(self, **given, roles={})
        times = override.lr_multiplier
        rates = {name: getattr(merged, name) * times for name in ("lr", "start_lr", "final_lr")}
        merged = replace(merged, **rates)
        _check(role, merged)
        return merged

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps


def _check(role: str, config: OptimiserConfig) -> None:
    def demand(condition: bool, name: str, what: str) -> None:
        if not condition:
            value = getattr(config, name)
            raise UserError(
                f"The optimiser of the role '{role}' cannot be built: {name} is {value}, but must be {what}."
            )

    demand(config.kind in ("adamw", "sgd"), "kind", "adamw or sgd")
    demand(0 <= config.lr < math.inf, "lr", "a finite number of at least 0")
    for name in ("start_lr", "final_lr"):
        demand(0 <= getattr(config, name) <= config.lr, name, f"between 0 and lr, which is {config.lr}")
    demand(0 <= config.warmup_fraction <= 1, "warmup_fraction", "between 0 and 1")
    demand((config.warmup_steps or 0) >= 0, "warmup_steps", "at least 0")
    demand(config.weight_decay >= 0, "weight_decay", "at least 0")
    demand(all(0 <= beta < 1 for beta in config.betas), "betas", "at least 0 and less than 1")
    demand(config.eps >= 0, "eps", "at least 0")
    demand(0 <= config.momentum < 1, "momentum", "at least 0 and less than 1")


def lr_at(
    step: int,
    total_steps: int,
    base: float,
    warmup_steps: int = 0,
    start: float = 0.0,
    final: float = 0.0,
    reaches_final: bool = False,
) -> float:
    """Learning rate of a step (0 for the first): linear from `start` to `base`, then half a cosine to `final`.

    The warm-up includes both its ends. With `reaches_final` off (SLIP) the cosine begins with `base` once more and
    would be at `final` one step after the last; on (DeCLIP), it begins one step further: the last step has `final`.
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps + reaches_final) / max(1, total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimisers:
    """One torch optimiser per kind that is in use, behind one face. Built by `build_optimisers`."""

    def __init__(
        self,
        optimisers: Mapping[str, torch.optim.Optimizer],
        names: Mapping[Tensor, str],
        roles: Mapping[str, OptimiserConfig],
    ) -> None:
        self.by_kind = dict(optimisers)
        self._names = dict(names)
        self._roles = dict(roles)
        self._clear()

    @property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        return list(self.by_kind.values())

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, each once."""
        groups = (group for optimiser in self.optimisers for group in optimiser.param_groups)
        return [parameter for group in groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimiser in self.optimisers:
            optimiser.step()

    def set_lr(self, step: int, total_steps: int) -> dict[str, float]:
        """Set the learning rates of this step; returns them by role, for the log. Depends on nothing but the step."""
        lrs = {}
        for role, own in self._roles.items():
            warmup = own.num_warmup_steps(total_steps)
            lrs[role] = lr_at(step, total_steps, own.lr, warmup, own.start_lr, own.final_lr, own.reaches_final)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lrs[group["role"]]
        return lrs

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Moments and counters by parameter name. Settings are not in it: they come from the configuration."""
        states = {}
        for optimiser in self.optimisers:
            for parameter, state in optimiser.state.items():
                states[self._names[parameter]] = {key: value for key, value in state.items() if value is not None}
        return states

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take a copy of what `state_dict` gave. Raises UserError if it is of other parameters or of another kind."""
        advice = "resume with the settings that the run was started with"
        unknown = sorted(set(states) - set(self._names.values()))
        if unknown:
            raise UserError(
                f"The checkpoint's optimiser state does not fit this model: '{unknown[0]}' (one of {len(unknown)}) is "
                f"not trained here; {advice}."
            )
        self._clear()
        for kind, optimiser in self.by_kind.items():
            wanted = {"step", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"momentum_buffer"}
            for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
                name = self._names[parameter]
                state = states.get(name)
                if not state:  # it never had a gradient, or it is trained by SGD without momentum
                    continue
                shapes_fit = all(value.ndim == 0 or value.shape == parameter.shape for value in state.values())
                if set(state) != wanted or not shapes_fit:
                    raise UserError(
                        f"The checkpoint's optimiser state of '{name}' is not that of {kind} for a parameter of shape "
                        f"{tuple(parameter.shape)}; {advice}."
                    )
                optimiser.state[parameter] = {
                    key: _like(parameter, value, optimiser.defaults["fused"]) for key, value in state.items()
                }

    def _clear(self) -> None:
        import torch

        for kind, optimiser in self.by_kind.items():
            optimiser.state.clear()
            for group in optimiser.param_groups:
                if kind == "sgd" and group["momentum"] > 0:
                    # Zeros change no result, and fused SGD fails if only some have a buffer: gradients may start late.
                    for parameter in group["params"]:
                        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _like(parameter: Tensor, value: Tensor, fused: bool) -> Tensor:
    """A copy of a state tensor as the optimiser wants it: moments like the parameter, the step counter in float32."""
    import torch

    if value.ndim == 0:
        return value.to(parameter.device if fused else "cpu", torch.float32, copy=True)
    if is_divided(parameter):
        return divided_like(parameter, value)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def build_optimisers(
    groups: Mapping[str, Sequence[nn.Parameter]], config: OptimiserConfig, model: nn.Module | None = None
) -> Optimisers:
    """The optimisers of parameters that are grouped by role.

    With `model`, the groups must hold exactly its trained parameters, and its names for them are used in errors and in
    the state. Raises UserError for settings that make no sense or that name an absent role; AssertionError, with the
    name, for a parameter in two groups or in none.
    """
    import torch

    absent = sorted(set(config.roles) - set(groups))
    if absent:
        raise UserError(
            f"There are optimiser settings for the role '{absent[0]}', but this model's are: {', '.join(groups)}."
        )
    roles = {role: config.for_role(role) for role in groups}
    names = _name_each_once(groups, model)
    torch_groups: dict[str, list[dict[str, Any]]] = {}
    for role, parameters in groups.items():
        own = roles[role]
        settings = {"betas": own.betas, "eps": own.eps} if own.kind == "adamw" else {"momentum": own.momentum}
        for decays, divided in product((True, False), (False, True)):  # one kernel takes no tensors of both kinds
            members = [p for p in parameters if (p.ndim >= 2) == decays and is_divided(p) == divided]
            if members:
                decay = own.weight_decay if decays else 0.0
                group = {"params": members, "role": role, "lr": own.lr, "weight_decay": decay, **settings}
                torch_groups.setdefault(own.kind, []).append(group)
    # Fused: one pass over the memory instead of ten. It exists for CPUs and CUDA devices.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in names)
    classes: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimisers = {kind: classes[kind](members, fused=fused) for kind, members in torch_groups.items()}
    return Optimisers(optimisers, names, roles)


def _name_each_once(groups: Mapping[str, Sequence[nn.Parameter]], model: nn.Module | None) -> dict[Tensor, str]:
    known = {parameter: name for name, parameter in model.named_parameters()} if model is not None else {}
    role_of: dict[Tensor, str] = {}
    names: dict[Tensor, str] = {}
    for role, parameters in groups.items():
        for position, parameter in enumerate(parameters):
            name = known.get(parameter, f"{role}.{position}")
            assert model is None or parameter in known, f"parameter {name} is in group '{role}', but not in the model"
            assert parameter.requires_grad, f"parameter {name} is in group '{role}', but is frozen"
            assert parameter not in names, f"parameter {name} is in group '{role_of[parameter]}' and again in '{role}'"
            role_of[parameter], names[parameter] = role, name
    left_out = [name for parameter, name in known.items() if parameter.requires_grad and parameter not in names]
    assert not left_out, f"parameter {left_out[0]} is in no group ({len(left_out)} such parameters)"
    return names


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients together to a norm of at most `max_norm` (None: leave them). Returns the norm before, [].

    If the norm is not finite, the gradients are worthless afterwards: the caller skips the step.
    """
    import torch
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    kinds: dict[bool, list[nn.Parameter]] = {}  # one kernel takes no tensors of both kinds
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(is_divided(parameter), []).append(parameter)
    norms: list[Any] = [get_total_norm([p.grad for p in members if p.grad is not None]) for members in kinds.values()]
    norms = [norm.full_tensor() if is_divided(norm) else norm for norm in norms]
    norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    if max_norm is not None:
        for members in kinds.values():
            clip_grads_with_norm_(members, max_norm, norm)
    return norm
