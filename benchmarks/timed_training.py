"""Runs `coalign train` without its evaluations and prints the time of each epoch as JSON, data loading, logging and updates included.

Works with earlier revisions too, through PYTHONPATH. With --towers, also the CPU time of each epoch inside the towers, forward and
backward, and the time of each pass through a tower in isolation: forward and backward, on the last batch, in the run's precision.

Run: python benchmarks/timed_training.py [--towers] --epochs N [options of `coalign train`]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from coalign.cli.main import main as coalign
from coalign.training.trainer import Trainer
from coalign.types import StepInfo

REPEATS = 5  # of a pass through a tower


def num_parameters(model: torch.nn.Module) -> int:
    """Returns the number of parameters apart from token embeddings, which depend on the captions."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("token_embedding.weight"))


class TowerClock:
    """Adds up the CPU time that the main thread spends in towers and their projections. Their backward pass begins when the first gradient
    arrives at one, as the loss comes before, and ends with the step's."""

    def __init__(self, trainer: Trainer) -> None:
        from coalign.networks.towers.spec import find_towers

        self.seconds = 0.0
        self._since: float | None = None
        for tower in find_towers(trainer.method):
            for module in (tower, tower.projection):
                module.register_forward_pre_hook(lambda *_: self._start())
                module.register_forward_hook(lambda *_: self._stop())
            tower.projection.register_forward_hook(lambda *call: self._watch(call[-1]))
        backward = torch.Tensor.backward

        def timed_backward(tensor: torch.Tensor) -> None:
            backward(tensor)
            self._stop()

        torch.Tensor.backward = timed_backward  # type: ignore[method-assign,assignment]

    def _start(self) -> None:
        self._since = self._since or time.thread_time()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.thread_time() - self._since
            self._since = None

    def _watch(self, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self._start())


def isolated_passes(trainer: Trainer, batch: Any) -> list[dict[str, Any]]:
    """Returns the kind, the number of samples and the seconds of each pass through a tower in a step."""
    from coalign.networks.towers.spec import find_towers

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = []
    hooks = [
        tower.register_forward_pre_hook(lambda *call: calls.append((*call, torch.is_grad_enabled())), with_kwargs=True)
        for tower in find_towers(trainer.method)
    ]
    dtype, info = trainer.autocast, StepInfo(0, trainer.total_steps)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    with autocast():
        trainer.method.encode(batch, info)
        with torch.no_grad():
            trainer.method.encode_targets(batch, info)
    for hook in hooks:
        hook.remove()
    passes = []
    for tower, arguments, options, trained in calls:
        seconds = []
        for _ in range(1 + REPEATS):
            start = time.process_time()
            with torch.set_grad_enabled(trained):
                with autocast():
                    pooled, parts = tower(*arguments, **options)
                    total = tower.projection(pooled).float().sum() + (0 if parts is None else parts.float().sum())
                if trained:
                    total.backward()
            seconds.append(time.process_time() - start)
            tower.zero_grad()
        kind, count = tower.describe_pass(*arguments)
        passes.append({"kind": kind, "count": count, "trained": trained, "seconds": statistics.median(seconds[1:])})
    return passes


def time_training(options: list[str], epochs: int, towers: bool) -> None:
    fit = Trainer.fit

    def timed_fit(self: Trainer) -> None:
        batches, marks, seen = self.batches, [], []
        steps = self.num_pairs // self.config.batch_size
        clock = TowerClock(self) if towers else None

        def marked(first: int, stop: int) -> Iterator[Any]:
            loader = batches(first, stop)
            for step in range(first, stop):
                if step % steps == 0:
                    marks.append((time.process_time(), time.perf_counter(), clock.seconds if clock else 0.0))
                loaded = next(loader)
                seen[:] = [loaded.batch]
                yield loaded

        # the epoch after the last one is not trained: its mark ends the last one
        self.batches, self.total_steps = marked, epochs * steps + 1
        fit(self)
        used, wall, inside = ([b - a for a, b in pairwise(times)] for times in zip(*marks))
        result = {
            "pairs": steps * self.config.batch_size, "steps": steps, "cpu": used, "wall": wall, "in_towers": inside,
            "precision": "fp32" if self.autocast is None else "bf16",
            "model": self.config.model, "context_length": self.config.context_length,
            "vocab_size": len(json.loads((self.run_dir / "tokenizer.json").read_text())["model"]["vocab"]),
            "parameters": num_parameters(self.method),
            "passes": isolated_passes(self, seen[0]) if towers else [],
        }  # fmt: skip
        sys.stdout.flush()
        print(json.dumps(result), flush=True)
        sys.exit()  # no evaluation, no report

    Trainer.fit = timed_fit  # type: ignore[method-assign,assignment]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(coalign(["train", *options, "--out", f"{folder}/run", "--evals", "0", "--epochs", str(epochs + 1)]))


def main() -> None:
    options = sys.argv[1:]
    towers = "--towers" in options
    if towers:
        options.remove("--towers")
    at = options.index("--epochs")
    epochs = int(options[at + 1])
    del options[at : at + 2]
    time_training(options, epochs, towers)


if __name__ == "__main__":
    main()
