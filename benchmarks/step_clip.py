"""One CLIP ViT-B/32 training step on the CPU: ours compared with open_clip's, with the same batch, weights and precision.

A step is forward, loss, backward, optimizer, and clamping of the scale. open_clip's is its own `train_one_epoch` on a loader of one batch
(captions padded to 77 tokens, images already normalized to floats, AdamW as in its `main`). Ours is the trainer's (captions without
padding, uint8 images normalized in the step, gradient norm, fused AdamW, freed memory kept). Each trains in its own process, from the same
weights, alternating. The first step is not timed: its loss, gradients and update must agree, and must not with two captions exchanged. In
fp32 the losses of the next steps must agree too; in bf16 rounding is amplified from step to step. A ratio is of neighboring steps.

With one thread (the default), CPU time is measured, so that other programs hardly affect it; with more, wall-clock time. A processor
without AMX or AVX512-BF16 emulates bf16: use the fp32 numbers there.

Run: python benchmarks/step_clip.py [--data DATA] [--precision bf16] [--threads 1] [--repeats 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from captions import CAPTIONS
from limits import product_flops
from lines import line
from open_clip_train import params, train
from open_clip_train.distributed import init_distributed_device
from peer_training import build_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from coalign.config import OptimizerConfig
from coalign.data.sources.open import open_source
from coalign.data.text.tokenizer import load_tokenizer
from coalign.methods.clip.config import CLIPConfig
from coalign.methods.clip.method import CLIP
from coalign.networks.towers.spec import TowerSpec
from coalign.optim import build_optimizers, clip_gradients
from coalign.training.allocator import keep_freed_memory
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.training.trainer import autocast_dtype
from coalign.types import Batch, ImageView, StepInfo, TextView
from coalign.workflows.train.step_cost import CPU_ATTENTION

MODEL, CONTEXT, LR, DECAY = "ViT-B-32", 77, 5e-4, 0.2
PRECISIONS = {"bf16": "amp_bf16", "fp32": "fp32"}  # our name -> open_clip's
# largest relative difference of the losses, largest of the gradients of a parameter, smallest cosine of the updates
TOLERANCES = {"bf16": (2e-3, 0.3, 0.9), "fp32": (1e-5, 1e-3, 0.999)}
LOSS_STEPS, LOSS_TOLERANCE = 3, 2e-4  # number of steps whose losses are compared in fp32
SAMPLE = 1000  # compared elements per parameter, evenly spaced
Step = Callable[[], float]  # runs a training step and returns its loss
Parameters = dict[str, Tensor]  # or their gradients, by open_clip's names


class FirstStep(NamedTuple):
    """What both sides must agree on: the loss, and samples of the gradients and updates."""

    loss: float
    gradients: Parameters
    updates: Parameters


def make_batch(captions: list[str], side: int = 224) -> Batch:
    """Our batch: the captions, with random pixels; their values do not affect the time."""
    ids, lengths = load_tokenizer("clip")(captions, CONTEXT)
    size = len(captions)
    pixels = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
    rows = torch.arange(size)
    return Batch(
        rows, {"image": ImageView(pixels, torch.zeros(size, 11))}, {"caption": TextView(ids, lengths)}, rows, rows >= 0
    )


def read_captions(data: str, size: int) -> list[str]:
    source = open_source(data)
    chosen = np.random.default_rng(0).choice(len(source), size, replace=False)
    return [source.record(index).captions[0] for index in chosen.tolist()]


# ---------------------------------------------------------------- the two sides


def peer_step(
    captions: list[str], batch: Batch, precision: str, name: str = MODEL, device_name: str = "cpu"
) -> tuple[Step, torch.nn.Module, Optimizer]:
    """Returns open_clip's training step, its model and its optimizer. The batch stays on its device."""
    args = params.parse_args(
        [
            "--model",
            name,
            "--device",
            device_name,
            "--precision",
            PRECISIONS[precision],
            "--batch-size",
            str(len(captions)),
        ]
    )
    args.lr, args.wd, args.skip_scheduler, args.distill, args.wandb = LR, DECAY, True, False, False
    device = init_distributed_device(args)
    torch.manual_seed(0)
    model = open_clip.create_model(name, precision=args.precision, device=device, output_dict=True)
    optimizer = build_optimizer(model, args)
    loss = RecordingLoss(open_clip.create_loss(args))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = batch.images["image"].pixels
    images = (pixels / 255 - mean.to(pixels.device)) / std.to(pixels.device)
    ours = batch.texts["caption"].ids
    ids = open_clip.get_tokenizer(name)(captions).to(ours.device)
    assert torch.equal(ids[:, : ours.shape[1]], ours), "the tokenizers differ"
    loader = OneBatch((images, ids))
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}

    def step() -> float:
        train.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
        return loss.value

    return step, model, optimizer


class RecordingLoss:
    """open_clip's loss, with its last value."""

    def __init__(self, loss: Callable[..., dict[str, Tensor]]) -> None:
        self.loss, self.value = loss, float("nan")

    def __call__(self, **arguments: Tensor) -> dict[str, Tensor]:
        losses = self.loss(**arguments)
        self.value = losses["contrastive_loss"].item()
        return losses


class OneBatch(list):
    """A data loader of one batch, for `train_one_epoch`."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__([batch])
        self.num_batches, self.num_samples = 1, len(batch[0])


def our_step(batch: Batch, precision: str, name: str = MODEL, device_name: str = "cpu") -> tuple[Step, CLIP, Optimizer]:
    """Returns our training step, as in the trainer, our model and its optimizer."""
    world = World(0, 1, torch.device(device_name))
    torch.manual_seed(0)
    method = CLIP(CLIPConfig(), TowerSpec(name, load_tokenizer("clip").vocab_size, CONTEXT))
    method.train().to(world.device).to(memory_format=torch.channels_last)
    config = OptimizerConfig(lr=LR, start_lr=LR, final_lr=LR, weight_decay=DECAY, betas=(0.9, 0.98), eps=1e-6)
    optimizers = build_optimizers(method.parameter_groups(), config, method)
    parameters = optimizers.parameters()
    gather, autocast, info = RankGather(world), autocast_dtype(precision, world.device), StepInfo(0, 1000)

    def step() -> float:
        optimizers.set_lr(info.step, info.total_steps)
        result = forward_backward(method, batch, info, world, autocast=autocast)
        assert torch.isfinite(clip_gradients(parameters, None))
        optimizers.step()
        method.after_step(result.features, result.targets, gather, info)
        optimizers.zero_grad()
        return result.loss

    return step, method, optimizers.by_kind["adamw"]


def their_name(name: str) -> str:
    """Returns open_clip's name of one of our parameters."""
    for ours, theirs in (("image.trunk.", "visual."), ("text.transformer.", "")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return {"image.projection.weight": "visual.proj", "text.projection.weight": "text_projection"}.get(
        name, "logit_scale"
    )


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters of either side by open_clip's names."""
    ours = isinstance(model, CLIP)
    return {their_name(name) if ours else name: parameter for name, parameter in model.named_parameters()}


def oriented(name: str, values: Tensor, ours: bool) -> Tensor:
    """Returns a parameter, or its gradient, in open_clip's shape."""
    values = values.detach()
    return values.T if ours and name in ("visual.proj", "text_projection") else values


@torch.no_grad()
def copy_weights(theirs: Parameters, method: CLIP) -> None:
    """Copies open_clip's weights to our model."""
    for name, parameter in parameters_of(method).items():
        oriented(name, parameter, True).copy_(theirs[name])


# ---------------------------------------------------------------- agreement


def sample(values: dict[str, Tensor], ours: bool) -> Parameters:
    """Returns `SAMPLE` elements of each parameter or gradient."""
    flat = {name: oriented(name, value, ours).reshape(-1) for name, value in values.items()}
    return {name: value[:: max(1, len(value) // SAMPLE)].clone() for name, value in flat.items()}


def gradients_of(model: torch.nn.Module) -> Parameters:
    gradients = {name: parameter.grad for name, parameter in parameters_of(model).items()}
    return sample({name: each for name, each in gradients.items() if each is not None}, isinstance(model, CLIP))


def first_step(step: Step, model: torch.nn.Module, optimizer: Optimizer) -> FirstStep:
    """Runs a step and returns what both sides must agree on."""
    gradients: Parameters = {}
    hook = optimizer.register_step_pre_hook(lambda *_: gradients.update(gradients_of(model)))
    ours, parameters = isinstance(model, CLIP), parameters_of(model)
    before = sample(parameters, ours)
    loss = step()
    hook.remove()
    after = sample(parameters, ours)
    return FirstStep(loss, gradients, {name: after[name] - value for name, value in before.items()})


def planted_gradients(method: CLIP, batch: Batch, precision: str) -> Parameters:
    """Returns our gradients of the first step with the captions of two pairs exchanged."""
    rows = torch.arange(len(batch))
    rows[:2] = rows[:2].flip(0)
    caption = batch.texts["caption"]
    exchanged = replace(batch, texts={"caption": TextView(caption.ids[rows], caption.lengths[rows])})
    world = World(0, 1, torch.device("cpu"))
    forward_backward(method, exchanged, StepInfo(0, 1000), world, autocast=autocast_dtype(precision, world.device))
    gradients = gradients_of(method)
    method.zero_grad()
    return gradients


def gradient_difference(ours: Parameters, theirs: Parameters) -> tuple[float, str]:
    """Returns the largest relative difference of the gradient of a parameter, and its name."""
    assert ours.keys() == theirs.keys()
    return max((float((ours[name] - value).norm() / value.norm()), name) for name, value in theirs.items())


def check_agreement(ours: FirstStep, theirs: FirstStep, planted: Parameters, precision: str) -> None:
    """Prints how well the first steps agree. Raises AssertionError if they do not, or if an error would not be found."""
    loss_tolerance, gradient_tolerance, least_cosine = TOLERANCES[precision]
    loss = abs(ours.loss / theirs.loss - 1)
    gradient, name = gradient_difference(ours.gradients, theirs.gradients)
    wrong, _ = gradient_difference(planted, theirs.gradients)
    updates = [torch.cat([each.updates[key] for key in theirs.updates]) for each in (ours, theirs)]
    cosine = float(torch.cosine_similarity(*updates, dim=0))
    print(
        f"  first step: losses differ by {loss:.1e}, gradients by at most {gradient:.1e} ({name}; with two captions exchanged "
        f"{wrong:.1e}), cosine of the updates {cosine:.4f}"
    )
    assert loss < loss_tolerance, "the losses differ"
    assert gradient < gradient_tolerance < wrong, "the gradients differ, or do not although two captions were exchanged"
    assert cosine > least_cosine, "the updates differ"


# ---------------------------------------------------------------- measuring


class Side:
    """One side, in its own process (the allocator's settings are per process), which runs one step per request."""

    def __init__(self, name: str, captions: list[str], precision: str, weights: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (name, captions, precision, weights, torch.get_num_threads(), other)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        # the first step; the gradients of ours with a planted error
        self.first, self.planted = self.pipe.recv()

    def step(self) -> tuple[float, float]:
        """Runs a step. Returns its seconds and its loss."""
        self.pipe.send("step")
        return self.pipe.recv()

    def close(self) -> tuple[float, float, float]:
        """Ends the process. Returns its peak memory in GB and, for ours, the FLOPs per step and the FLOP/s of matrix products alone."""
        self.pipe.send("end")
        return self.pipe.recv()


def serve(name: str, captions: list[str], precision: str, weights: Path, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = make_batch(captions)
    planted: Parameters = {}
    if name == "open_clip":
        step, model, optimizer = peer_step(captions, batch, precision)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    else:
        keep_freed_memory()  # as in the trainer
        step, model, optimizer = our_step(batch, precision)
        copy_weights(load_file(weights), model)
        planted = planted_gradients(model, batch, precision)
    pipe.send((first_step(step, model, optimizer), planted))
    while pipe.recv() == "step":
        pipe.send(timed(step))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pipe.send((memory, *((0.0, 0.0) if name == "open_clip" else measure_flops(step, precision))))


def measure_flops(step: Step, precision: str) -> tuple[float, float]:
    """Returns the FLOPs of a step and the FLOP/s of matrix products alone."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    speed = product_flops(torch.bfloat16 if precision == "bf16" else torch.float32)
    return float(counter.get_total_flops()), speed


def compare(captions: list[str], precision: str, repeats: int) -> None:
    """Prints the losses, speed and peak memory of both sides, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = (
            Side(name, captions, precision, Path(folder) / "weights.safetensors") for name in ("open_clip", "coalign")
        )
        print(precision)
        check_agreement(ours.first, peer.first, ours.planted, precision)
        turns = [(peer.step(), ours.step()) for _ in range(repeats)]
        (their_memory, *_), (our_memory, flops, speed) = peer.close(), ours.close()
    memory = their_memory, our_memory
    shares = [flops / mine[0] / speed for _, mine in turns]
    times = [(theirs[0], mine[0]) for theirs, mine in turns]
    losses = [(peer.first.loss, ours.first.loss), *((theirs[1], mine[1]) for theirs, mine in turns)][:LOSS_STEPS]
    print(f"  losses     {', '.join(f'{a:.5f} | {b:.5f}' for a, b in losses)}")
    if precision == "fp32":
        worst = max(abs(theirs / mine - 1) for theirs, mine in losses)
        assert worst < LOSS_TOLERANCE, f"the losses differ by {worst:.1e}"
    for name, values, peak in zip(("open_clip", "coalign"), zip(*times), memory):
        print(f"  {name:10s} {len(captions) / statistics.median(values):6.2f} pairs/s, peak memory {peak:.2f} GB")
    line(f"step of ViT-B/32 in {precision}, open_clip's time over ours", [a / b for a, b in times], at_least=1.5)
    line(f"step of ViT-B/32 in {precision}, open_clip's peak memory over ours", [memory[0] / memory[1]])
    line(f"step of ViT-B/32 in {precision}, FLOP/s over matrix products alone", shares)


def timed(step: Step) -> tuple[float, float]:
    """Runs a step. Returns its seconds and its loss."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    loss = step()
    return clock() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="dataset of the captions, as for `coalign train` (default: built-in captions)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=list(PRECISIONS), help="default: all, one after another")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, tokenizer = options.batch_size, load_tokenizer("clip")
    captions = read_captions(options.data, size) if options.data else (CAPTIONS * (size // len(CAPTIONS) + 1))[:size]
    lengths = [len(tokenizer.encode(caption, CONTEXT)) for caption in captions]
    average = statistics.mean(lengths)
    print(
        f"{MODEL}, batch {size}, threads {options.threads}; captions of {average:.1f} tokens on average, at most {max(lengths)}"
    )
    chosen = [options.precision] if options.precision else list(PRECISIONS)
    for precision in chosen:
        compare(captions, precision, options.repeats)


if __name__ == "__main__":
    main()
