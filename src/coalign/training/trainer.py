"""The training loop. It knows the contract of a method and no method by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.method import Method
from coalign.optim import build_optimisers, clip_gradients
from coalign.training import checkpoint
from coalign.training.allocator import keep_freed_memory
from coalign.training.distributed import RankGather, World
from coalign.training.log import BadSampleLog, NonFiniteGuard, RunLog, StopSignal
from coalign.training.sharding import gathered, load_weights, whole
from coalign.training.step import StepResult, forward_backward, move_statistics
from coalign.training.stopwatch import part
from coalign.types import Batch, StepInfo

CHECKPOINT_SECONDS = 600.0


class Loaded(Protocol):
    """What a loader yields for a step: the batch of this rank, and the samples that had to be replaced in it."""

    batch: Batch
    bad: list[Any]  # each with key, reason, detail, epoch


@dataclass
class Score:
    """One validation: numbers for the log, and the one by which checkpoints are compared (larger is better)."""

    values: Mapping[str, float]
    score: float


@dataclass
class Progress:
    """Where the run stands, beside the weights and the optimiser: what a checkpoint keeps."""

    step: int = 0  # steps done
    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    seconds: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)  # of the guard, the bad-sample log and the gradient scaler


@dataclass
class TrainResult:
    step: int
    ended: Literal["finished", "stopped early", "interrupted"]
    best_step: int | None
    seconds: float
    bad_samples: dict[str, int]
    skipped_steps: int


class Trainer:
    """Trains one method in one run directory.

    batches: (first step, stop step) -> iterator of this rank's `Loaded`. validate: called on every rank, in evaluation mode, after the
    steps in `eval_steps`. saves: whether checkpoints are written. With `resume`, goes on from the newest whole checkpoint if there is one.
    """

    def __init__(
        self,
        method: Method,
        config: TrainConfig,
        world: World,
        run_dir: Path,
        *,
        batches: Callable[[int, int], Iterator[Loaded]],
        num_pairs: int,
        total_steps: int,
        validate: Callable[[StepInfo], Score] | None = None,
        interactive: bool = False,
        saves: bool = True,
    ) -> None:
        self.method, self.config, self.world, self.run_dir = method, config, world, run_dir
        self.batches, self.num_pairs, self.total_steps, self.validate = batches, num_pairs, total_steps, validate
        self.interactive, self.saves = interactive, saves
        self.autocast = autocast_dtype(config.precision, world.device)
        self.scaler = torch.amp.GradScaler(init_scale=2.0**12) if self.autocast == torch.float16 else None
        self.optimisers = build_optimisers(method.parameter_groups(), config.optimiser, method)
        self.parameters = self.optimisers.parameters()
        self.gather = RankGather(world)
        self.progress = Progress()
        self.eval_steps = {round(total_steps * (k + 1) / config.evals) for k in range(config.evals)} - {0}

    def resume(self) -> int:
        """Takes up the newest whole checkpoint of the run directory, if there is one. Returns the number of steps done."""
        found = checkpoint.load_latest(self.run_dir)
        if found is None:
            return 0
        for warning in found.warnings if self.world.is_first else []:
            print(warning)
        load_weights(self.method, found.model)
        self.optimisers.load_state_dict(found.optimiser)
        self.progress = Progress(**found.trainer)
        if self.scaler:
            self.scaler.load_state_dict(self.progress.state["scaler"])
        return self.progress.step

    def fit(self) -> TrainResult:
        """Trains to the end, or until a signal or early stopping. Every way out but a crash leaves a checkpoint to go on from."""
        if self.world.device.type == "cpu":
            keep_freed_memory()
        state, start = self.progress.state, self.progress.step
        first = self.world.is_first
        self._guard = NonFiniteGuard(
            self.run_dir if first else None, self.config.max_non_finite, start, state.get("guard")
        )
        self._began = time.monotonic() - self.progress.seconds
        self._last_save = time.monotonic()
        ended: Literal["finished", "stopped early", "interrupted"] = "finished"
        with ExitStack() as stack:
            signal = stack.enter_context(StopSignal())
            self._log = (
                stack.enter_context(RunLog(self.run_dir, self.total_steps, self.interactive, start)) if first else None
            )
            self._bad = BadSampleLog(self.run_dir, self.config.max_bad_fraction, state.get("bad")) if first else None
            if self._bad:
                stack.callback(self._bad.close)
            self.method.train()
            incoming = self.batches(start, self.total_steps)
            stack.callback(lambda: getattr(incoming, "close", lambda: None)())
            for step in range(start, self.total_steps):
                if self._out_of_patience():
                    ended = "stopped early"
                    break
                with part("the rest"):
                    interrupted = self._one_step(step, incoming, signal)
                self._after_step(step, interrupted)
                if interrupted and step + 1 < self.total_steps:
                    ended = "interrupted"
                    break
            bad = dict(self._bad.counts) if self._bad else {}
        return TrainResult(
            self.progress.step, ended, self.progress.best_step, time.monotonic() - self._began, bad, self._guard.total
        )

    def _one_step(self, step: int, incoming: Iterator[Loaded], signal: StopSignal) -> bool:
        """Trains on one batch. True when some rank was asked to stop."""
        asked = time.monotonic()
        with part("waiting for data"):
            loaded = next(incoming)
        waited = time.monotonic() - asked
        info = StepInfo(step, self.total_steps)
        with part("to the device"):
            batch = loaded.batch.to(self.world.device)
        lrs = self.optimisers.set_lr(step, self.total_steps)
        result = forward_backward(
            self.method, batch, info, self.world, slices=self._slices(len(batch)), autocast=self.autocast, scaler=self.scaler,
            seed=self.config.seed,
        )  # fmt: skip
        with part("optimiser, teachers and queues"):
            grad_norm = self._update(result, batch, info)
        requested, num_bad = self.world.sum(
            torch.tensor([signal.requested is not None, len(loaded.bad)], device=self.world.device)
        ).tolist()
        if num_bad:
            self._note_bad(loaded.bad, step)
        self.progress.step = step + 1
        if self._log:
            values = {
                "epoch": (step + 1) * self.config.batch_size / self.num_pairs,
                "loss": result.loss,
                **({f"loss/{name}": value for name, value in result.terms.items()} if len(result.terms) > 1 else {}),
                "lr": next(iter(lrs.values())),
                "grad_norm": grad_norm,
                **self.method.scalars(),
            }
            bad = self._bad.total if self._bad else 0
            self._log.step(step, values, pairs=self.config.batch_size, waited=waited, bad_samples=bad)
        return bool(requested)

    def _update(self, result: StepResult, batch: Batch, info: StepInfo) -> Tensor:
        """The optimiser's step and what follows it, unless loss or gradient is not finite. Returns the gradient's norm."""
        if self.scaler:
            for optimiser in self.optimisers.optimisers:
                self.scaler.unscale_(optimiser)
        norm = clip_gradients(self.parameters, self.config.max_grad_norm)
        finite = bool(torch.isfinite(norm)) and abs(result.loss) < float(
            "inf"
        )  # the same on every rank: both are sums over ranks
        if finite:
            for optimiser in self.optimisers.optimisers:
                self.scaler.step(optimiser) if self.scaler else optimiser.step()
        if self.scaler:
            self.scaler.update()
        move_statistics(self.method, self.world, keep=finite)
        if finite:
            self.method.after_step(result.features, result.targets, self.gather, info)
        self.optimisers.zero_grad()
        indices = [] if finite else self.gather(batch.indices).tolist()
        self._guard.step(info.step, finite, indices)
        return norm

    def _after_step(self, step: int, interrupted: bool) -> None:
        """Validation where it is due, then a checkpoint where that is."""
        done = step + 1
        if self.validate and done in self.eval_steps:
            self._evaluate(StepInfo(step, self.total_steps))
        due = done in self.eval_steps if self.config.save_every is None else done % self.config.save_every == 0
        ends = interrupted or done == self.total_steps or self._out_of_patience()
        if self.saves and (due or ends or self._time_to_save()):
            self._save()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.evals_since_best >= self.config.patience

    def _evaluate(self, info: StepInfo) -> None:
        assert self.validate is not None
        self.method.eval()
        with torch.no_grad(), whole(self.method):
            result = self.validate(info)
        self.method.train()
        progress = self.progress
        if self._log:
            self._log.evaluation(info.step, result.values)
        if progress.best_score is None or result.score > progress.best_score:
            progress.best_score, progress.best_step, progress.evals_since_best = result.score, progress.step, 0
            weights = gathered(self.method.state_dict(), self.world.is_first)
            if self.world.is_first:
                checkpoint.save(self.run_dir, "best", weights)
        else:
            progress.evals_since_best += 1

    def _save(self) -> None:
        self._last_save = time.monotonic()
        weights, optimiser = (
            gathered(each.state_dict(), self.world.is_first) for each in (self.method, self.optimisers)
        )
        if self.world.is_first:
            assert self._log is not None
            assert self._bad is not None
            self._log.sync()
            self.progress.seconds = time.monotonic() - self._began
            scaler = {"scaler": self.scaler.state_dict()} if self.scaler else {}
            self.progress.state = {"guard": self._guard.state_dict(), "bad": self._bad.state_dict(), **scaler}
            checkpoint.save(self.run_dir, "last", weights, optimiser, vars(self.progress))
        self.world.barrier()

    def _time_to_save(self) -> bool:
        if self.world.size > 1 and self.progress.step % 50:
            return False  # clocks differ: the first rank's decides, now and then
        return self.world.broadcast(time.monotonic() - self._last_save > CHECKPOINT_SECONDS)

    def _note_bad(self, entries: list[Any], step: int) -> None:
        failure = None
        everyones = self.world.gather_objects([(e.key, e.reason, e.detail, e.epoch) for e in entries])
        if self._bad:
            self._bad.add(entry for rank in everyones for entry in rank)
            try:
                self._bad.check(min((step + 1) * self.config.batch_size, self.num_pairs))
            except UserError as error:
                failure = str(error)
        failure = self.world.broadcast(failure)
        if failure:
            raise UserError(failure)

    def _slices(self, size: int) -> list[slice]:
        micro = self.config.micro_batch or size
        return [slice(first, min(first + micro, size)) for first in range(0, size, micro)]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of a precision on a device; "auto" is bfloat16 where it is fast, else None (float32)."""
    if precision == "fp16":
        if device.type != "cuda":
            raise UserError("Precision fp16 needs a CUDA device; on a CPU use --precision bf16 or fp32.")
        return torch.float16
    if precision == "auto":
        precision = "bf16" if _fast_bfloat16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX or AVX512-BF16; elsewhere a CPU emulates bfloat16, slower than float32
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
