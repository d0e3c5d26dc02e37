"""Steps of the methods: values, gradients and state on the device, compared with float64 on the CPU or with the plain step."""

from __future__ import annotations

import copy
from functools import partial

import torch

from coalign.methods import METHODS
from coalign.networks.checkpointing import checkpoint_blocks
from coalign.networks.towers.spec import find_towers
from coalign.training.distributed import World
from coalign.training.step import forward_backward
from gpu_checks.harness import Check, Failed, Machine, Row, measured, relative_error
from gpu_checks.models import MIDWAY, StepValues, batch_for, build, resnet, step, supports, transformer

CPU = torch.device("cpu")
FP32_LOSS, FP32_GRADIENT, FP32_STATE = 1e-5, 1e-4, 1e-5
BF16_LOSS, FP16_LOSS = 5e-2, 2e-2


def step_values(machine: Machine, name: str) -> list[Row]:
    """Compares a method's step on the device, in float32 and bf16, with float64 on the CPU."""
    rows, size = [], 8 if machine.toy else 32
    models = {"Transformer": transformer(machine), "ResNet": resnet(machine)}
    for label, model in models.items():
        if label == "ResNet" and (name not in ("clip", "mcd", "mct") or not supports(name, model)):
            continue
        method = build(name, model)
        float32, bf16 = [], []
        for seed in (0, 1):
            batch = batch_for(method, size, seed)
            exact = step(method, batch, CPU, dtype=torch.float64)
            float32.append(_errors(step(method, batch, machine.device), exact))
            bf16.append(_errors(step(method, batch, machine.device, autocast=torch.bfloat16), exact))
        # of two batches: in one, rounding may move a ReLU's input across zero, which changes the gradient by percents
        (loss, gradient, state), (half_loss, half_gradient, _) = (map(min, zip(*errors)) for errors in (float32, bf16))
        rows += [
            measured(f"{label}, float32: loss, relative error", loss, at_most=FP32_LOSS),
            measured(f"{label}, float32: gradient, relative error", gradient, at_most=FP32_GRADIENT),
            measured(f"{label}, float32: state, relative error", state, at_most=FP32_STATE),
            measured(f"{label}, bf16: loss, relative error", half_loss, at_most=BF16_LOSS),
            measured(f"{label}, bf16: gradient, relative error", half_gradient),
        ]
    return rows


def _errors(result: StepValues, exact: StepValues) -> tuple[float, float, float]:
    """Returns the relative errors of loss, gradient and state."""
    state = relative_error(result[2], exact[2]) if exact[2] else 0.0
    return abs(result[0] / exact[0] - 1), relative_error(result[1], exact[1]), state


def gradient_checkpointing(machine: Machine) -> list[Row]:
    """Compares a step with and without gradient checkpointing: values, and peak memory."""
    rows = []
    for label, model in {"Transformer": transformer(machine), "ResNet": resnet(machine)}.items():
        plain = build("mcd", model)
        checkpointed = copy.deepcopy(plain)
        if not all(map(checkpoint_blocks, find_towers(checkpointed))):
            raise Failed("a tower has no blocks")
        batch = batch_for(plain, 8 if machine.toy else 512)
        losses, gradients, states = zip(*(step(method, batch, machine.device) for method in (plain, checkpointed)))
        # sums of embedding gradients and of index_add are in no fixed order on a GPU
        rows += [
            measured(f"{label}: loss, relative difference", abs(losses[1] / losses[0] - 1), at_most=1e-6),
            measured(f"{label}: gradient, relative difference", relative_error(*reversed(gradients)), at_most=1e-5),
            measured(f"{label}: state, relative difference", relative_error(*reversed(states)), at_most=1e-5),
        ]
        del gradients, states
        peaks = [machine.peak_gb(partial(step, method, batch, machine.device)) for method in (plain, checkpointed)]
        rows.append(measured(f"{label}: peak memory over plain", peaks[1] / peaks[0], at_most=machine.limit(0.8)))
    return rows


def compiled(machine: Machine) -> list[Row]:
    """Compares steps with compiled image towers with plain ones: values, and time."""
    backend = "aot_eager" if machine.toy else "inductor"
    rows = []
    model = transformer(machine)
    plain = build("mcd", model).to(machine.device)
    batch = batch_for(plain, 8 if machine.toy else 512).to(machine.device)
    world = World(0, 1, machine.device)

    def run(method):  # type: ignore[no-untyped-def]
        method.zero_grad()
        return forward_backward(method, batch, MIDWAY, world)

    loss = run(plain).loss
    gradients = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    plain_seconds = machine.seconds(lambda: run(plain))
    for label, checkpoints in (("compiled", False), ("compiled, with gradient checkpointing", True)):
        torch._dynamo.reset()
        method = copy.deepcopy(plain)
        for tower in find_towers(method):
            if checkpoints:
                checkpoint_blocks(tower)
            if tower.has_fixed_shapes:
                tower.compile(backend=backend)
        our_loss = run(method).loss
        ours = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        rows += [
            measured(f"{label}: loss, relative difference", abs(our_loss / loss - 1), at_most=1e-4),
            measured(f"{label}: gradient, relative difference", relative_error(ours, gradients), at_most=1e-3),
            measured(f"{label}: time over plain", machine.seconds(lambda: run(method)) / plain_seconds),  # noqa: B023
        ]
    torch._dynamo.reset()
    return rows


def fp16_scaler(machine: Machine) -> list[Row]:
    """Compares an fp16 step, with a scaled loss, with float32; and checks that the scaler detects an overflow."""
    method = build("clip", transformer(machine))
    batch = batch_for(method, 8 if machine.toy else 256)
    loss, gradients, _ = step(method, batch, machine.device)
    scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**12)  # as the trainer's
    half_loss, scaled, _ = step(method, batch, machine.device, autocast=torch.float16, scaler=scaler)
    unscaled = {name: gradient / scaler.get_scale() for name, gradient in scaled.items()}
    parameter = torch.nn.Parameter(torch.zeros(4, device=machine.device))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full_like(parameter, torch.inf)
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return [
        measured("loss, relative error", abs(half_loss / loss - 1), at_most=FP16_LOSS),
        measured("gradient, relative error", relative_error(unscaled, gradients), at_most=0.1),
        measured("scale after an overflow over before", scaler.get_scale() / before, at_most=0.5),
        measured("update by an overflow", float(parameter.detach().abs().max()), at_most=0.0),
    ]


CHECKS = [
    *(Check(f"step of {name}", partial(step_values, name=name), 10) for name in METHODS),
    Check("gradient checkpointing", gradient_checkpointing, 10),
    Check("fp16 scaler", fp16_scaler, 5),
]
COMPILED = Check("compiled towers", compiled, 70)
