"""The training loop. It depends only on the `Method` interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.method import Method
from coalign.optim import Rate, build_optimizers, clip_gradients
from coalign.training import checkpoint
from coalign.training.allocator import keep_freed_memory
from coalign.training.distributed import RankGather, World
from coalign.training.log import BadSampleLog, NonFiniteGuard, RunLog, StopSignal
from coalign.training.sharding import full_tensors, load_weights, unsharded
from coalign.training.step import StepResult, forward_backward, move_statistics
from coalign.training.stopwatch import timed
from coalign.types import Batch, StepInfo

CHECKPOINT_SECONDS = 600.0  # longest time between checkpoints


class Loaded(Protocol):
    """A loader's output for one step: this rank's batch, and the bad samples that were replaced in it."""

    batch: Batch
    bad: list[Any]  # each has key, reason, detail, epoch


class Tuning(Protocol):
    """Which parts of the method are trained, and at which rates."""

    def groups(self) -> Mapping[str, Sequence[torch.nn.Parameter]]:
        """Returns the parameters that are trained, by role."""

    def rates(self) -> Mapping[Tensor, Rate]:
        """Returns the rates of the parameters that do not have their role's."""

    def set_heads_only(self, on: bool) -> None:
        """Freezes the parts that wait in the head steps, or trains them."""


@dataclass
class ValidationResult:
    """Metrics to log, and the score that selects the best checkpoint (higher is better)."""

    values: Mapping[str, float]
    score: float


@dataclass
class Progress:
    """Progress of a run. Checkpoints store it with the weights and the optimizer."""

    step: int = 0  # completed steps
    total_steps: int = 0  # of the run at this time; an extended run has more
    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    # of the non-finite guard, the bad-sample log and the gradient scaler
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainResult:
    """How a training run ended.

    Attributes:
        step: Completed optimizer steps.
        ended: "finished", "stopped early" (by `config.patience`) or "interrupted" (by a signal; resume it).
        best_step: The step of the best validation score, whose weights are in `best/`; None without validations.
        seconds: Training time, validations included, without data preparation and the final evaluation.
        cpu_seconds: Processor time of it by all threads of the first rank's process. Unlike `seconds`, other programs hardly add to it.
        bad_samples: The number of unreadable samples by reason. They were replaced by others.
        skipped_steps: Steps without an update, because the loss or the gradient was not finite.
        precision: "fp32", "bf16" or "fp16": the autocast precision, to which `config.precision` "auto" was resolved.
    """

    step: int
    ended: Literal["finished", "stopped early", "interrupted"]
    best_step: int | None
    seconds: float
    cpu_seconds: float
    bad_samples: dict[str, int]
    skipped_steps: int
    precision: str


class Trainer:
    """Trains a method and writes logs and checkpoints to a run folder.

    batches: (first step, stop step) -> iterator of this rank's `Loaded`.
    validate: called on all ranks in evaluation mode, `config.evals` times, evenly spaced.
    save_checkpoints: False writes no "last" checkpoints.
    tuning: None trains all parameters at the rates of their roles. The first `head_steps` train only what does not wait.
    Call `resume` before `fit` to continue from the newest checkpoint.
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
        validate: Callable[[StepInfo], ValidationResult] | None = None,
        interactive: bool = False,
        save_checkpoints: bool = True,
        tuning: Tuning | None = None,
        head_steps: int = 0,
    ) -> None:
        self.method, self.config, self.world, self.run_dir = method, config, world, run_dir
        self.batches, self.num_pairs, self.total_steps, self.validate = batches, num_pairs, total_steps, validate
        self.interactive, self.save_checkpoints = interactive, save_checkpoints
        self.autocast = autocast_dtype(config.precision, world.device)
        self.scaler = torch.amp.GradScaler(init_scale=2.0**12) if self.autocast == torch.float16 else None
        self.tuning, self.head_steps = tuning, head_steps
        groups, rates = (method.parameter_groups(), {}) if tuning is None else (tuning.groups(), tuning.rates())
        self.optimizers = build_optimizers(groups, config.optimizer, method, rates)
        self.parameters = self.optimizers.parameters()
        self.gather = RankGather(world)
        self.progress = Progress(total_steps=total_steps)
        self.stable_step = config.optimizer.cooldown_start(total_steps)
        self.eval_steps = {round(total_steps * (k + 1) / config.evals) for k in range(config.evals)} - {0}

    def resume(self) -> int:
        """Loads the newest intact checkpoint of the run folder, if there is one. Returns the number of completed steps.

        If the run is longer than when the checkpoint was saved and that was in its cool-down, loads the one before the cool-down, "stable".
        """
        latest = checkpoint.load_latest(self.run_dir)
        if latest is None:
            return 0
        for warning in latest.warnings if self.world.is_first else []:
            print(warning)
        saved = Progress(**latest.trainer)
        cooldown_start = self.config.optimizer.cooldown_start(saved.total_steps)
        if saved.total_steps != self.total_steps and cooldown_start is not None and saved.step > cooldown_start:
            latest = checkpoint.load(self.run_dir / "stable")
        load_weights(self.method, latest.model)
        self.optimizers.load_state_dict(latest.optimizer)
        self.progress = Progress(**latest.trainer)
        if saved.total_steps != self.total_steps:  # `best` is the best so far, also of a cool-down that is left out
            self.progress.best_score, self.progress.best_step = saved.best_score, saved.best_step
            self.progress.total_steps, self.progress.evals_since_best = self.total_steps, 0
        if self.scaler:
            self.scaler.load_state_dict(self.progress.state["scaler"])
        return self.progress.step

    def fit(self) -> TrainResult:
        """Trains until the last step, early stopping or a signal, and saves a checkpoint in each case."""
        if self.world.device.type == "cpu":
            keep_freed_memory()
        state, start = self.progress.state, self.progress.step
        first = self.world.is_first
        self._guard = NonFiniteGuard(
            self.run_dir if first else None, self.config.max_non_finite, start, state.get("guard")
        )
        self._began = time.monotonic() - self.progress.seconds
        self._cpu_began = time.process_time() - self.progress.cpu_seconds
        self._last_save = time.monotonic()
        ended: Literal["finished", "stopped early", "interrupted"] = "finished"
        with ExitStack() as stack:
            signal = stack.enter_context(StopSignal())
            evals = len([step for step in self.eval_steps if step > start]) if self.validate else 0
            log = RunLog(self.run_dir, self.total_steps, self.interactive, start, evals=evals) if first else None
            self._log = log and stack.enter_context(log)
            self._bad = BadSampleLog(self.run_dir, self.config.max_bad_fraction, state.get("bad")) if first else None
            if self._bad:
                stack.callback(self._bad.close)
            self.method.train()
            loader = self.batches(start, self.total_steps)
            stack.callback(lambda: getattr(loader, "close", lambda: None)())
            for step in range(start, self.total_steps):
                if self._out_of_patience():
                    ended = "stopped early"
                    break
                if self.tuning and self.head_steps and step in (start, self.head_steps):
                    self.tuning.set_heads_only(step < self.head_steps)
                with timed("other"):
                    interrupted = self._one_step(step, loader, signal)
                self._after_step(step, interrupted)
                if interrupted and step + 1 < self.total_steps:
                    ended = "interrupted"
                    break
            bad = dict(self._bad.counts) if self._bad else {}
        return TrainResult(
            step=self.progress.step,
            ended=ended,
            best_step=self.progress.best_step,
            seconds=time.monotonic() - self._began,
            cpu_seconds=time.process_time() - self._cpu_began,
            bad_samples=bad,
            skipped_steps=self._guard.total,
            precision=precision_name(self.autocast),
        )

    def _one_step(self, step: int, loader: Iterator[Loaded], signal: StopSignal) -> bool:
        """Trains on one batch. Returns whether any rank received a stop signal."""
        start = time.monotonic()
        with timed("data loading"):
            loaded = next(loader)
        wait_seconds = time.monotonic() - start
        info = StepInfo(step, self.total_steps)
        with timed("copy to device"):
            batch = loaded.batch.to(self.world.device)
        lrs = self.optimizers.set_lr(step, self.total_steps, self.head_steps)
        result = forward_backward(
            self.method, batch, info, self.world, slices=self._slices(len(batch)), autocast=self.autocast, scaler=self.scaler,
            seed=self.config.seed,
        )  # fmt: skip
        with timed("optimizer, teacher and queue updates"):
            grad_norm = self._update(result, batch, info)
        num_stopping, num_bad = self.world.sum(
            torch.tensor([signal.requested is not None, len(loaded.bad)], device=self.world.device)
        ).tolist()
        if num_bad:
            self._log_bad_samples(loaded.bad, step)
        self.progress.step = step + 1
        if self._log:
            values = {
                "epoch": (step + 1) * self.config.batch_size / self.num_pairs,
                "loss": result.loss,
                **({f"loss/{name}": value for name, value in result.terms.items()} if len(result.terms) > 1 else {}),
                "lr": next(iter(lrs.values())),
                **({f"lr/{name}": lr for name, lr in lrs.items()} if any("." in name for name in lrs) else {}),
                "grad_norm": grad_norm,
                **self.method.scalars(),
            }
            bad = self._bad.total if self._bad else 0
            self._log.step(step, values, pairs=self.config.batch_size, wait_seconds=wait_seconds, bad_samples=bad)
        return bool(num_stopping)

    def _update(self, result: StepResult, batch: Batch, info: StepInfo) -> Tensor:
        """Updates the weights and the method's state, unless loss or gradient is not finite. Returns the gradient norm."""
        if self.scaler:
            for optimizer in self.optimizers.optimizers:
                self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.parameters, self.config.max_grad_norm)
        # equal on all ranks, as norm and loss are sums over ranks
        finite = bool(torch.isfinite(norm)) and abs(result.loss) < float("inf")
        if finite:
            for optimizer in self.optimizers.optimizers:
                self.scaler.step(optimizer) if self.scaler else optimizer.step()
        if self.scaler:
            self.scaler.update()
        move_statistics(self.method, self.world, keep=finite)
        if finite:
            self.method.after_step(result.features, result.targets, self.gather, info)
        self.optimizers.zero_grad()
        indices = [] if finite else self.gather(batch.indices).tolist()
        self._guard.step(info.step, finite, indices)
        return norm

    def _after_step(self, step: int, interrupted: bool) -> None:
        """Validates, then saves a checkpoint, if either is due."""
        num_steps = step + 1
        if self.validate and num_steps in self.eval_steps:
            self._evaluate(StepInfo(step, self.total_steps))
        save_every = self.config.save_every
        due = num_steps in self.eval_steps if save_every is None else num_steps % save_every == 0
        ends = interrupted or num_steps == self.total_steps or self._out_of_patience()
        if (
            self.save_checkpoints and num_steps == self.stable_step
        ):  # before `last`, from which the step is not repeated
            self._save("stable")
        if self.save_checkpoints and (due or ends or self._time_to_save()):
            self._save()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.evals_since_best >= self.config.patience

    def _evaluate(self, info: StepInfo) -> None:
        assert self.validate is not None
        began = time.monotonic()
        self.method.eval()
        with torch.no_grad(), unsharded(self.method):
            result = self.validate(info)
        self.method.train()
        progress = self.progress
        if self._log:
            self._log.evaluation(info.step, result.values, time.monotonic() - began)
        if progress.best_score is None or result.score > progress.best_score:
            progress.best_score, progress.best_step, progress.evals_since_best = result.score, progress.step, 0
            weights = full_tensors(self.method.state_dict(), self.world.is_first)
            if self.world.is_first:
                checkpoint.save(self.run_dir, "best", weights)
        else:
            progress.evals_since_best += 1

    def _save(self, name: str = "last") -> None:
        self._last_save = time.monotonic()
        weights, optimizer = (
            full_tensors(each.state_dict(), self.world.is_first) for each in (self.method, self.optimizers)
        )
        if self.world.is_first:
            assert self._log is not None
            assert self._bad is not None
            self._log.sync()
            self.progress.seconds = time.monotonic() - self._began
            self.progress.cpu_seconds = time.process_time() - self._cpu_began
            scaler = {"scaler": self.scaler.state_dict()} if self.scaler else {}
            self.progress.state = {"guard": self._guard.state_dict(), "bad": self._bad.state_dict(), **scaler}
            checkpoint.save(self.run_dir, name, weights, optimizer, vars(self.progress))
        self.world.barrier()

    def _time_to_save(self) -> bool:
        if self.world.size > 1 and self.progress.step % 50:
            return False  # clocks differ between ranks, so rank 0 decides; every 50 steps, to save broadcasts
        return self.world.broadcast(time.monotonic() - self._last_save > CHECKPOINT_SECONDS)

    def _log_bad_samples(self, entries: list[Any], step: int) -> None:
        """Logs the bad samples of all ranks. Raises UserError on all ranks if their budget is exceeded."""
        failure = None
        by_rank = self.world.gather_objects([(e.key, e.reason, e.detail, e.epoch) for e in entries])
        if self._bad:
            self._bad.add(entry for rank_entries in by_rank for entry in rank_entries)
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


def precision_name(autocast: torch.dtype | None) -> str:
    """Returns the name of an autocast dtype, as in `--precision`."""
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[autocast]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the autocast dtype of a precision, None for float32. "auto" is bfloat16 if the device is fast at it."""
    if precision == "fp16":
        if device.type != "cuda":
            raise UserError("--precision fp16 needs a CUDA device; on others, use bf16 or fp32.")
        return torch.float16
    if precision == "auto":
        precision = "bf16" if _fast_bfloat16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":  # never measured
        return False
    # AMX or AVX512-BF16; other CPUs emulate bfloat16, slower than float32
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
