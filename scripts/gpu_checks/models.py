"""Small methods and batches, the same on every device."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_overhead import fill_queues, make_batch
from torch import Tensor

from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.method import Method
from coalign.methods import config_class, method_class
from coalign.networks.towers.spec import TowerSpec
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward, move_statistics
from coalign.types import Batch, StepInfo
from gpu_checks.harness import Machine

MIDWAY = StepInfo(500, 1000)  # all loss terms are active
StepValues = tuple[float, dict[str, Tensor], dict[str, Tensor]]  # loss, gradients, state that is not trained
CONTEXT, GROUP = 77, 4  # the longest of the built-in captions has 45 tokens


def transformer(machine: Machine) -> dict[str, Any]:
    """Returns the configuration of small Transformers. The text tower has CLIP's vocabulary."""
    width, layers = (32, 2) if machine.toy else (256, 6)
    vision = {"image_size": 32, "layers": layers, "width": width, "patch_size": 8, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": layers}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}


def resnet(machine: Machine) -> dict[str, Any]:
    """Returns the same with CLIP's ResNet."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8 if machine.toy else 32, "head_width": 8}
    return {**transformer(machine), "vision_cfg": vision}


def build(name: str, model: dict[str, Any]) -> Method:
    """Returns a method in float32 on the CPU, with full queues. Widths of heads and sizes of queues are small. Raises UserError if the
    method does not support the model."""
    torch.manual_seed(0)
    config = config_class(name)()
    config = replace(config, **{key: 64 for key, value in vars(config).items() if type(value) is int and value >= 100})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(model))
        spec = TowerSpec(str(path), load_tokenizer("clip").vocab_size, CONTEXT, batch_norm_group=GROUP)
        method = method_class(name)(config, spec).train()
    fill_queues(method)
    return method


def supports(name: str, model: dict[str, Any]) -> bool:
    try:
        build(name, model)
    except UserError:
        return False
    return True


def batch_for(method: Method, size: int, seed: int = 0) -> Batch:
    torch.manual_seed(1 + seed)
    return make_batch(method.view_plan, size, side=32, patch=8)


def step(
    method: Method,
    batch: Batch,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> StepValues:
    """Runs a step of a copy of the method on a device, and updates its state."""
    method, world = copy.deepcopy(method).to(device=device, dtype=dtype), World(0, 1, device)
    result = forward_backward(method, batch.to(device), MIDWAY, world, autocast=autocast, scaler=scaler)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    move_statistics(method, world, keep=True)
    method.after_step(result.features, result.targets, RankGather(world), MIDWAY)
    state = method.state_dict(keep_vars=True).items()
    return result.loss, gradients, {n: x for n, x in state if not x.requires_grad and x.is_floating_point()}
