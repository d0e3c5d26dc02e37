"""Speed and memory at full size: against open_clip's trainer, with gradient checkpointing, and as a share of the device's peak."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import step_clip
import torch
from captions import CAPTIONS
from torch.utils.flop_counter import FlopCounterMode

from coalign.data.images.device_views import finish
from coalign.data.images.views import NUM_DRAWS, sample_params
from coalign.networks.checkpointing import checkpoint_blocks
from coalign.networks.towers.spec import find_towers
from coalign.training.distributed import World
from coalign.training.step import forward_backward
from coalign.types import STRONG, Batch, StepInfo
from coalign.workflows.train.gpu_plan import GPUS
from coalign.workflows.train.step_cost import CPU_ATTENTION
from gpu_checks.harness import Check, Machine, Row, measured
from gpu_checks.models import transformer

PEAKS = {gpu.name: gpu.flops for gpu in GPUS} | {"H200": 989e12}  # FLOP/s in half precision
LIMIT_GB, BATCH_SHARE = 24, 8  # of ViT-B/16 at an effective batch of 4,096; slices of it


def model_name(machine: Machine, name: str) -> tuple[str, int]:
    """Returns the name of the model and its image size. At toy size, registers a small model with open_clip."""
    if not machine.toy:
        return name, 224
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu-check-toy.json"
        config = transformer(machine)
        config["text_cfg"]["context_length"] = step_clip.CONTEXT
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return "gpu-check-toy", 32


def clip_batch(size: int, side: int, device: torch.device) -> tuple[list[str], Batch]:
    captions = (CAPTIONS * (size // len(CAPTIONS) + 1))[:size]
    return captions, step_clip.make_batch(captions, side).to(device)


def open_clip_step(machine: Machine) -> list[Row]:
    """Compares the step of ViT-B/32 in bf16 with open_clip's, from the same weights and on the same batch, which is on the device."""
    name, side = model_name(machine, "ViT-B-32")
    captions, batch = clip_batch(8 if machine.toy else 1024, side, machine.device)
    device = machine.device.type
    step, model, _ = step_clip.peer_step(captions, batch, "bf16", name, device)
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    theirs = _losses_seconds_peak(step, machine)
    del step, model
    machine.free()
    step, method, _ = step_clip.our_step(batch, "bf16", name, device)
    step_clip.copy_weights(weights, method)
    ours = _losses_seconds_peak(step, machine)
    # the third step amplifies rounding: the rate is high and the weights are random
    differences = [abs(a / b - 1) for a, b in zip(ours[0][:2], theirs[0][:2])]
    return [
        measured("losses of two steps, relative difference", max(differences), at_most=2e-2),
        measured("pairs per second", len(batch) / ours[1], "/s"),
        measured("time of open_clip over ours", theirs[1] / ours[1], at_least=machine.limit(1.0)),
        measured("peak memory of open_clip over ours", theirs[2] / ours[2], at_least=machine.limit(1.0)),
    ]


def _losses_seconds_peak(step: step_clip.Step, machine: Machine) -> tuple[list[float], float, float]:
    """Returns the losses of the first two steps, then the time and the peak memory of later ones."""
    losses = [step(), step()]
    return losses, machine.seconds(step), machine.peak_gb(step)


def large_batch(machine: Machine) -> list[Row]:
    """ViT-B/16 in bf16 at an effective batch of 4,096, in micro-batches with gradient checkpointing, within 24 GB."""
    name, side = model_name(machine, "ViT-B-16")
    if machine.is_cuda:  # so that more memory fails as on a smaller GPU
        total = torch.cuda.get_device_properties(machine.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_GB * 2**30 / total), machine.device)
    try:
        _, batch = clip_batch(16 if machine.toy else 4096, side, machine.device)
        train_step, method, _ = step_clip.our_step(batch, "bf16", name, machine.device.type)
        del train_step  # it encodes the whole batch at once
        for tower in find_towers(method):
            checkpoint_blocks(tower)
        world, size = World(0, 1, machine.device), len(batch) // BATCH_SHARE
        slices = [slice(first, first + size) for first in range(0, len(batch), size)]
        optimizer = torch.optim.AdamW(method.parameters(), fused=True)

        def step() -> None:
            forward_backward(method, batch, StepInfo(0, 1000), world, slices=slices, autocast=torch.bfloat16)
            optimizer.step()
            optimizer.zero_grad()

        peak = machine.peak_gb(step, reserved=True)  # also warms up
        return [
            measured("peak memory", peak, "GB", at_most=LIMIT_GB),
            measured("pairs per second", len(batch) / machine.seconds(step, repeats=1, warmup=0), "/s"),
        ]
    finally:
        if machine.is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, machine.device)


def share_of_peak(machine: Machine) -> list[Row]:
    """The FLOP/s of whole steps in bf16, as a share of those of matrix products alone and of the data sheet's."""
    side = 256 if machine.toy else 8192
    matrix = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    products = 2 * side**3 / machine.seconds(partial(torch.mm, matrix, matrix), repeats=10)
    rows = [measured("matrix products", products / 1e12, "TFLOP/s")]
    del matrix
    for label, name, size in (("ViT-B/32", "ViT-B-32", 1024), ("ViT-B/16", "ViT-B-16", 256)):
        model, pixels = model_name(machine, name)
        _, batch = clip_batch(8 if machine.toy else size, pixels, machine.device)
        step, _method, _ = step_clip.our_step(batch, "bf16", model, machine.device.type)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            step()
        speed = counter.get_total_flops() / machine.seconds(step)
        rows.append(measured(f"{label}: share of matrix products alone", speed / products))
        peak = data_sheet_peak(machine)
        if peak:
            rows.append(measured(f"{label}: share of the data sheet's peak", speed / peak))
        del step, _method, batch
    return rows


def data_sheet_peak(machine: Machine) -> float | None:
    if not machine.is_cuda:
        return None
    name = torch.cuda.get_device_name(machine.device)
    return next((flops for key, flops in PEAKS.items() if key in name), None)


def device_views(machine: Machine) -> list[Row]:
    """Color jitter and blur on the device, compared with the CPU: values, and views per second."""
    size, side = (16, 32) if machine.toy else (1024, 224)
    draws = np.random.default_rng(0).random((size, NUM_DRAWS))
    params = torch.from_numpy(sample_params(draws, STRONG, np.full((size, 2), side))).float()
    pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
    some = slice(0, 64)
    exact = finish(pixels[some], params[some], torch.device("cpu"))
    off = (finish(pixels[some], params[some], machine.device).cpu().int() - exact.int()).abs()
    return [
        measured("largest difference of 255", float(off.max()), at_most=1),
        measured("share of values that differ", float((off > 0).float().mean()), at_most=1e-2),
        measured(
            "views per second, copy included",
            size / machine.seconds(partial(finish, pixels, params, machine.device)),
            "/s",
        ),
    ]


CHECKS = [
    Check("step against open_clip's", open_clip_step, 60),
    Check("ViT-B/16, batch 4,096", large_batch, 60),
    Check("share of the peak", share_of_peak, 40),
    Check("views on the device", device_views, 10),
]
