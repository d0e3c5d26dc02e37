"""One CLIP ViT-B/32 training step on this machine's CPU: ours against open_clip's, on the same batch, weights and precision.

A step is forward, loss, backward, optimiser, clamp of the scale. open_clip's is its own `train_one_epoch` over a loader of one batch
(captions padded to 77 tokens, images already normalised to floats, AdamW as its `main` builds it); ours is what the trainer does
(captions as they are, uint8 images normalised in the step, gradient norm, fused AdamW, freed memory kept). Each trains in a process of
its own, from the same weights, taking turns, and must find the same losses in the first steps, the optimiser's steps included; the first
is not timed. The ratio is that of neighbouring steps.

On one thread (the default) processor time is measured, so that other programs disturb little; on more, time on the wall. A processor
without AMX or AVX512-BF16 emulates bf16: look at fp32 there.

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
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from captions import CAPTIONS
from limits import product_flops
from lines import line
from open_clip_train import params, train
from open_clip_train.distributed import init_distributed_device
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coalign.data.sources import open_source
from coalign.data.tokenizer import load_tokenizer
from coalign.methods.clip import CLIP
from coalign.networks.towers import TowerSpec
from coalign.optim import OptimiserConfig, build_optimisers, clip_gradients
from coalign.recipes.clip import CLIPConfig
from coalign.run.cost import CPU_ATTENTION
from coalign.training.allocator import keep_freed_memory
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.training.trainer import autocast_dtype
from coalign.types import Batch, ImageView, StepInfo, TextView

MODEL, CONTEXT, LR, DECAY = "ViT-B-32", 77, 5e-4, 0.2
PRECISIONS = {"bf16": "amp_bf16", "fp32": "fp32"}  # our name: open_clip's
LOSS_TOLERANCE = {"bf16": 2e-2, "fp32": 2e-4}
LOSS_STEPS = 3  # are compared
Step = Callable[[], float]  # trains once, returns the loss


def make_batch(captions: list[str]) -> Batch:
    """Our batch: these captions and random pixels, which cost what others cost."""
    ids, lengths = load_tokenizer("clip")(captions, CONTEXT)
    size = len(captions)
    pixels = torch.randint(256, (size, 3, 224, 224), dtype=torch.uint8)
    rows = torch.arange(size)
    return Batch(
        rows, {"image": ImageView(pixels, torch.zeros(size, 11))}, {"caption": TextView(ids, lengths)}, rows, rows >= 0
    )


def read_captions(data: str, size: int) -> list[str]:
    source = open_source(data)
    chosen = np.random.default_rng(0).choice(len(source), size, replace=False)
    return [source.record(index).captions[0] for index in chosen.tolist()]


# ---------------------------------------------------------------- the two sides


def peer_step(captions: list[str], batch: Batch, precision: str) -> tuple[Step, torch.nn.Module]:
    """open_clip's training step, and its model."""
    args = params.parse_args(
        ["--model", MODEL, "--device", "cpu", "--precision", PRECISIONS[precision], "--batch-size", str(len(captions))]
    )
    args.lr, args.wd, args.skip_scheduler, args.distill, args.wandb = LR, DECAY, True, False, False
    device = init_distributed_device(args)
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, precision=args.precision, device=device, output_dict=True)
    vectors = [p for p in model.parameters() if p.ndim < 2]  # by its rule: norms, biases, class embedding, scale
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimiser = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": args.wd}],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
    )
    loss = RecordingLoss(open_clip.create_loss(args))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images = (batch.images["image"].pixels / 255 - mean) / std
    ids = open_clip.get_tokenizer(MODEL)(captions)
    ours = batch.texts["caption"].ids
    assert torch.equal(ids[:, : ours.shape[1]], ours), "the tokenizers disagree"
    loader = OneBatch((images, ids))
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}

    def step() -> float:
        train.train_one_epoch(model, data, loss, 0, optimiser, None, None, None, args)
        return loss.value

    return step, model


class RecordingLoss:
    """open_clip's loss, remembering its value."""

    def __init__(self, loss: Callable[..., dict[str, Tensor]]) -> None:
        self.loss, self.value = loss, float("nan")

    def __call__(self, **arguments: Tensor) -> dict[str, Tensor]:
        losses = self.loss(**arguments)
        self.value = losses["contrastive_loss"].item()
        return losses


class OneBatch(list):
    """A data loader of one batch, as `train_one_epoch` wants it."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__([batch])
        self.num_batches, self.num_samples = 1, len(batch[0])


def our_step(batch: Batch, precision: str) -> tuple[Step, CLIP]:
    """Our training step, as the trainer takes it, and our model."""
    torch.manual_seed(0)
    method = CLIP(CLIPConfig(), TowerSpec(MODEL, load_tokenizer("clip").vocab_size, CONTEXT))
    method.train().to(memory_format=torch.channels_last)
    config = OptimiserConfig(lr=LR, start_lr=LR, final_lr=LR, weight_decay=DECAY, betas=(0.9, 0.98), eps=1e-6)
    optimisers = build_optimisers(method.parameter_groups(), config, method)
    parameters = optimisers.parameters()
    world = World(0, 1, torch.device("cpu"))
    gather, autocast, info = RankGather(world), autocast_dtype(precision, world.device), StepInfo(0, 1000)

    def step() -> float:
        optimisers.set_lr(info.step, info.total_steps)
        result = forward_backward(method, batch, info, world, autocast=autocast)
        assert torch.isfinite(clip_gradients(parameters, None))
        optimisers.step()
        method.after_step(result.features, result.targets, gather, info)
        optimisers.zero_grad()
        return result.loss

    return step, method


@torch.no_grad()
def copy_weights(theirs: dict[str, Tensor], method: CLIP) -> None:
    """Puts open_clip's weights into our model."""
    visual = {name.removeprefix("visual."): value for name, value in theirs.items() if name.startswith("visual.")}
    method.image.projection.weight.copy_(visual.pop("proj").T)
    method.image.trunk.load_state_dict(visual)
    text = method.text.transformer
    text.load_state_dict({name: theirs[name] for name in text.state_dict()})
    method.text.projection.weight.copy_(theirs["text_projection"].T)
    method.log_logit_scale.copy_(theirs["logit_scale"])


# ---------------------------------------------------------------- measuring


class Side:
    """One side in a process of its own, since the allocator's settings are a process's; it takes a step when it is told to."""

    def __init__(self, name: str, captions: list[str], precision: str, weights: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (name, captions, precision, weights, torch.get_num_threads(), other)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        self.pipe.recv()  # it is ready

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and its loss."""
        self.pipe.send("step")
        return self.pipe.recv()

    def close(self) -> tuple[float, float, float]:
        """Ends it: gigabytes that it held at most; of ours, a step's operations, and what products alone do a second."""
        self.pipe.send("end")
        return self.pipe.recv()


def serve(name: str, captions: list[str], precision: str, weights: Path, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = make_batch(captions)
    if name == "open_clip":
        step, model = peer_step(captions, batch, precision)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    else:
        keep_freed_memory()  # as the trainer does
        step, method = our_step(batch, precision)
        copy_weights(load_file(weights), method)
    pipe.send("ready")
    while pipe.recv() == "step":
        pipe.send(timed(step))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pipe.send((memory, *((0.0, 0.0) if name == "open_clip" else of_limits(step, precision))))


def of_limits(step: Step, precision: str) -> tuple[float, float]:
    """A step's operations, and the operations a second of products alone."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    speed = product_flops(torch.bfloat16 if precision == "bf16" else torch.float32)
    return float(counter.get_total_flops()), speed


def compare(captions: list[str], precision: str, repeats: int) -> None:
    """Prints both sides' losses, speed, peak memory, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = (
            Side(name, captions, precision, Path(folder) / "weights.safetensors") for name in ("open_clip", "coalign")
        )
        turns = [(peer.step(), ours.step()) for _ in range(1 + repeats)]
        (their_memory, *_), (our_memory, flops, speed) = peer.close(), ours.close()
    memory = their_memory, our_memory
    shares = [flops / mine[0] / speed for _, mine in turns[1:]]
    losses = [(theirs[1], mine[1]) for theirs, mine in turns]
    times = [(theirs[0], mine[0]) for theirs, mine in turns[1:]]
    compared = ", ".join(f"{a:.5f} | {b:.5f}" for a, b in losses[:LOSS_STEPS])
    print(f"{precision}\n  losses     {compared}")
    worst = max(abs(theirs / mine - 1) for theirs, mine in losses[:LOSS_STEPS])
    assert worst < LOSS_TOLERANCE[precision], f"the losses differ by {worst:.1e}"
    for name, values, peak in zip(("open_clip", "coalign"), zip(*times), memory):
        print(f"  {name:10s} {len(captions) / statistics.median(values):6.2f} pairs/s, peak memory {peak:.2f} GB")
    line(f"step of ViT-B/32 in {precision}, open_clip's time over ours", [a / b for a, b in times], at_least=1.5)
    line(f"step of ViT-B/32 in {precision}, open_clip's peak memory over ours", [memory[0] / memory[1]])
    line(f"step of ViT-B/32 in {precision}, its operations over what products alone do in its time", shares)


def timed(step: Step) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    loss = step()
    return clock() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="take captions from here (anything `coalign train` takes); default: built in")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=list(PRECISIONS), help="default: one after the other")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, tokenizer = options.batch_size, load_tokenizer("clip")
    captions = read_captions(options.data, size) if options.data else (CAPTIONS * (size // len(CAPTIONS) + 1))[:size]
    lengths = [len(tokenizer.encode(caption, CONTEXT)) for caption in captions]
    average = statistics.mean(lengths)
    print(
        f"{MODEL}, batch {size}, threads {options.threads}; captions of {average:.1f} tokens, the longest {max(lengths)}"
    )
    chosen = [options.precision] if options.precision else list(PRECISIONS)
    for precision in chosen:
        compare(captions, precision, options.repeats)


if __name__ == "__main__":
    main()
