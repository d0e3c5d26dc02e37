"""The training loop: learning, validation, checkpoints, skipped steps and stopping, with slices and with two processes."""

import json
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import tiny
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from helpers.equal_runs import assert_equal_runs, assert_equal_weights, untimed
from helpers.processes import on_two_processes

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.training import checkpoint
from coalign.training.distributed import World
from coalign.training.trainer import Trainer, ValidationResult

ALONE = World(0, 1, torch.device("cpu"))
BATCH = 8


@dataclass
class Bad:
    key: str
    reason: str = "truncated image"
    detail: str = "test"
    epoch: int = 0


@dataclass
class Loaded:
    batch: object
    bad: list


# not Adam, which would turn rounding errors of a zero gradient into full steps
SGD = OptimizerConfig(kind="sgd", lr=1e-3, start_lr=1e-3, final_lr=1e-4, warmup_fraction=0)


def config(**changes):
    base = TrainConfig(
        method="clip",
        method_config=None,
        batch_size=BATCH,
        precision="fp32",
        evals=0,
        save_every=1000,
        optimizer=OptimizerConfig(lr=1e-3, warmup_fraction=0.1, weight_decay=0.1),
    )
    return replace(base, **changes)


def batches(method, transform=lambda step, loaded: loaded, distinct=1000, rank=0, size=1):
    """A loader whose batches repeat every `distinct` steps, each passed through `transform`. A rank gets its consecutive share."""

    def iterate(first, stop):
        for step in range(first, stop):
            batch = make_batch(method.view_plan, BATCH, seed=step % distinct)
            share = BATCH // size
            yield transform(step, Loaded(batch[slice(rank * share, (rank + 1) * share)], []))

    return iterate


def trainer(folder, method=None, total_steps=6, source=None, settings=None, world=ALONE, **options):
    method = method or build_method("clip", folder.parent)
    return Trainer(
        method, settings or config(), world, folder,
        batches=source or batches(method), num_pairs=4 * BATCH, total_steps=total_steps, **options,
    )  # fmt: skip


def scores(*values):
    """A validation function that returns these scores in turn."""
    remaining = list(values)
    return lambda step: ValidationResult({"val/score": remaining[0]}, remaining.pop(0))


def state(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


# ---------------------------------------------------------------- learning


def test_overfits_two_batches(run):
    method = build_method("clip", run.parent)
    result = trainer(run, method, 60, batches(method, distinct=2)).fit()
    losses = [row["loss"] for row in tiny.rows(run / "metrics.jsonl")]
    assert (result.step, result.ended, result.skipped_steps) == (60, "finished", 0)
    assert [row["step"] for row in tiny.rows(run / "metrics.jsonl")] == list(range(60))
    assert losses[-1] < 0.3 * losses[0]
    assert_equal_weights(checkpoint.load(run / "last").model, method.state_dict())


def test_overfits_two_batches_in_bfloat16(run):
    method = build_method("clip", run.parent).float()
    trainer(run, method, 60, batches(method, distinct=2), config(precision="bf16")).fit()
    losses = [row["loss"] for row in tiny.rows(run / "metrics.jsonl")]
    assert losses[-1] < 0.4 * losses[0]
    assert all(p.dtype == torch.float32 for p in method.parameters())
    other = build_method("clip", run.parent).float()
    trainer(run.with_name("fp32"), other, 1, batches(other, distinct=2)).fit()
    exact = tiny.rows(run.with_name("fp32") / "metrics.jsonl")[0]["loss"]
    assert losses[0] != exact  # bfloat16 was used
    assert losses[0] == pytest.approx(exact, rel=0.02)


def test_float16_needs_cuda(run):
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        trainer(run, settings=config(precision="fp16"))


def test_norms_biases_and_scales_have_no_weight_decay(run):
    method = build_method("clip", run.parent)
    groups = [group for optimizer in trainer(run, method).optimizers.optimizers for group in optimizer.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in method.named_parameters()}
    assert names["logit_scale.log"] == 0
    assert all(value == 0 for name, value in names.items() if name.endswith(".bias") or ".ln_" in name)
    weights = [name for name, p in method.named_parameters() if p.ndim >= 2]
    assert len(weights) > 5
    assert all(names[name] == 0.1 for name in weights)


def test_the_scale_is_clamped_after_the_step(run):
    method = build_method("clip", run.parent, max_logit_scale=14.3)
    with torch.no_grad():
        method.logit_scale.log.fill_(20.0)
    trainer(run, method, 1).fit()
    assert method.logit_scale().item() == pytest.approx(14.3)


@pytest.mark.parametrize("clip", [None, 1e-4])
def test_gradients_are_clipped_to_the_maximum_norm(run, clip):
    method = build_method("clip", run.parent)
    before = state(method)
    sgd = replace(SGD, lr=1.0, start_lr=1.0, momentum=0, weight_decay=0)
    trainer(run, method, 1, settings=config(optimizer=sgd, max_grad_norm=clip)).fit()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in method.named_parameters()]).norm().item()
    norm = tiny.rows(run / "metrics.jsonl")[0]["grad_norm"]
    assert norm > 1e-3
    assert moved == pytest.approx(clip or norm, rel=1e-3)


@pytest.mark.parametrize(("model", "micro"), [(TRANSFORMER, 3), (TRANSFORMER, 1), (BATCH_NORM, 6)])
def test_micro_batches_give_the_weights_of_the_whole_batch(run, model, micro):
    """With a smaller last slice: 3, 3, 2 and 6, 2."""
    whole, sliced = (build_method("clip", run.parent, model) for _ in range(2))
    trainer(run.with_name("whole"), whole, 4, settings=config(optimizer=SGD)).fit()
    trainer(run.with_name("sliced"), sliced, 4, settings=config(optimizer=SGD, micro_batch=micro)).fit()
    assert_equal_weights(whole.state_dict(), sliced.state_dict(), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- validation


def test_the_best_and_the_last_checkpoint_after_validations(run):
    method, validated = build_method("clip", run.parent), []
    values = iter([0.2, 0.7, 0.5])

    def validate(info):
        assert not method.training
        assert not torch.is_grad_enabled()
        validated.append((info.step, state(method)))
        return ValidationResult({"val/score": (value := next(values))}, value)

    result = trainer(run, method, 10, settings=config(evals=3), validate=validate).fit()
    assert [step for step, _ in validated] == [2, 6, 9]  # after steps 3, 7 and 10
    assert result.best_step == 7
    assert_equal_weights(checkpoint.load(run / "best").model, validated[1][1])
    assert_equal_weights(checkpoint.load(run / "last").model, validated[2][1])
    assert {row["step"]: row["val/score"] for row in tiny.rows(run / "metrics.jsonl") if "val/score" in row} == {
        2: 0.2,
        6: 0.7,
        9: 0.5,
    }
    assert method.training


def test_checkpoints_are_saved_at_validations_by_default(run, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda self: saved.append(self.progress.step))
    trainer(run, total_steps=10, settings=config(evals=3, save_every=None), validate=scores(1, 2, 3)).fit()
    assert saved == [3, 7, 10]


def test_more_validations_than_steps(run):
    trainer(run, total_steps=2, settings=config(evals=10), validate=scores(1, 2)).fit()
    assert [row["step"] for row in tiny.rows(run / "metrics.jsonl") if "val/score" in row] == [0, 1]


def test_early_stopping_persists_across_resumes(run):
    settings = config(evals=10, patience=2)
    result = trainer(run, total_steps=20, settings=settings, validate=scores(0.1, 0.5, 0.4, 0.5)).fit()
    assert (result.step, result.ended, result.best_step) == (8, "stopped early", 4)  # an equal score is not better
    again = trainer(run, total_steps=20, settings=settings, validate=scores())
    assert again.resume() == 8
    assert again.fit().ended == "stopped early"
    patient = trainer(run, total_steps=20, settings=config(evals=10, patience=9), validate=scores(*[0.3] * 6))
    assert patient.resume() == 8
    assert (patient.fit().step, patient.progress.evals_since_best) == (20, 8)


# ---------------------------------------------------------------- non-finite steps


def poison(*steps):
    """A transform that makes the loss of these steps NaN, by pixels in floating point."""

    def transform(step, loaded):
        if step in steps:
            loaded.batch.images["image"].pixels = loaded.batch.images["image"].pixels.double() * float("nan")
        return loaded

    return transform


def test_a_non_finite_step_changes_nothing(run):
    method = build_method("clip", run.parent, BATCH_NORM)
    job = trainer(run, method, 4, batches(method, poison(2)))
    states = []

    def record(step, loaded):
        states.append(
            (state(method), {n: {k: v.clone() for k, v in s.items()} for n, s in job.optimizers.state_dict().items()})
        )
        return poison(2)(step, loaded)

    job.batches = batches(method, record)
    result = job.fit()
    before, after = states[2], states[3]
    assert_equal_weights(before[0], after[0])  # weights and running statistics
    assert any("running_mean" in name for name in before[0])
    for name, values in before[1].items():
        assert_equal_weights(values, after[1][name])
    assert any(not torch.equal(states[1][0][name], before[0][name]) for name in before[0])
    assert (result.skipped_steps, result.step) == (1, 4)
    assert tiny.rows(run / "non_finite.jsonl") == [
        {"step": 2, "what": "loss or gradient", "samples": list(range(BATCH))}
    ]
    row = tiny.rows(run / "metrics.jsonl")[2]
    assert row["loss"] is None
    assert all(p.isfinite().all() for p in method.parameters())


def test_consecutive_non_finite_steps_stop_the_run_even_across_a_resume(run):
    settings = config(max_non_finite=3, save_every=1)
    method = build_method("clip", run.parent)
    job = trainer(run, method, 10, batches(method, poison(1, 2, 4, 5, 6)), settings)
    with pytest.raises(UserError, match="not finite for 3 consecutive steps, most recently step 6"):
        job.fit()
    assert [row["step"] for row in tiny.rows(run / "non_finite.jsonl")] == [1, 2, 4, 5, 6]
    again = trainer(run, None, 10, batches(method, poison(6)), settings)
    assert again.resume() == 6
    with pytest.raises(UserError, match="3 consecutive steps"):
        again.fit()


# ---------------------------------------------------------------- bad samples


def with_bad(step, loaded):
    return Loaded(loaded.batch, [Bad(f"sample-{step}-{number}") for number in range(5)])


def test_bad_samples_are_counted_and_limited(run):
    method = build_method("clip", run.parent)
    settings = config(max_bad_fraction=0.02)  # 20 of the first thousand samples
    with pytest.raises(UserError, match=r"truncated image: 25.*budget of 2 %"):
        trainer(run, method, 10, batches(method, with_bad), settings).fit()
    assert len(tiny.rows(run / "bad_samples.jsonl")) == 25
    result = trainer(
        run.with_name("patient"), method, 10, batches(method, with_bad), config(max_bad_fraction=0.5)
    ).fit()
    assert result.bad_samples == {"truncated image": 50}


# ---------------------------------------------------------------- interruption and resume


def interrupt_at(interrupted_step, number=signal.SIGTERM):
    def transform(step, loaded):
        if step == interrupted_step:
            os.kill(os.getpid(), number)
        return loaded

    return transform


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(run, number):
    def job(folder, transform=lambda step, loaded: loaded):
        method = build_method("clip", run.parent)
        return trainer(
            folder, method, 10, batches(method, transform), config(evals=3),
            validate=lambda info: ValidationResult({"val/a": info.step}, 1),
        )  # fmt: skip

    before = signal.getsignal(number)
    job(run.with_name("uninterrupted")).fit()
    first = job(run, interrupt_at(4, number))
    result = first.fit()
    assert (result.step, result.ended) == (5, "interrupted")
    assert signal.getsignal(number) == before
    second = job(run, interrupt_at(6, number))  # the seventh step, which has a validation
    assert second.resume() == 5
    assert second.fit().ended == "interrupted"
    third = job(run)
    assert third.resume() == 7
    assert third.fit().ended == "finished"
    assert_equal_runs(run.with_name("uninterrupted"), run)


def test_a_signal_in_the_last_step_does_not_interrupt_the_run(run):
    method = build_method("clip", run.parent)
    result = trainer(run, method, 3, batches(method, interrupt_at(2))).fit()
    assert (result.step, result.ended) == (3, "finished")


def test_a_crashed_run_resumes_from_the_last_checkpoint(run):
    class CrashError(Exception):
        pass

    def crash(step, loaded):
        if step == 8:
            raise CrashError
        return Loaded(loaded.batch, [Bad(f"sample {step % 5}")])

    def resumed_job(folder, transform):
        method = build_method("clip", run.parent)
        job = trainer(
            folder, method, 10, batches(method, transform), config(save_every=3, evals=2),
            validate=lambda info: ValidationResult({"val": 1}, 1),
        )  # fmt: skip
        return job.resume(), job

    def no_crash(step, loaded):
        return Loaded(loaded.batch, [Bad(f"sample {step % 5}")])

    with pytest.raises(CrashError):
        resumed_job(run, crash)[1].fit()
    assert len(tiny.rows(run / "metrics.jsonl")) == 9  # 8 steps, one validation
    first_step, job = resumed_job(run, no_crash)
    assert first_step == 6
    assert job.fit().bad_samples == {"truncated image": 5}
    uninterrupted = run.with_name("uninterrupted")
    resumed_job(uninterrupted, no_crash)[1].fit()
    assert_equal_runs(uninterrupted, run)
    assert (run / "bad_samples.jsonl").read_bytes() == (uninterrupted / "bad_samples.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_skipped_with_a_warning(run, capsys):
    trainer(run, total_steps=6, settings=config(save_every=2)).fit()
    path = run / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    job = trainer(run, total_steps=6)
    assert job.resume() == 4
    assert "damaged" in capsys.readouterr().out


# ---------------------------------------------------------------- two processes

STEPS = 5


def _settings():
    return config(evals=1, save_every=2, max_bad_fraction=1.0, optimizer=SGD)


def train_share(world, own_folder, folder):
    """Trains three runs on this rank's share: undisturbed, with a bad sample on rank 1, and with a stop signal on rank 1."""
    rank = world.rank
    for name in ("plain", "bad", "stop"):
        method = build_method("clip", own_folder).float()

        def transform(step, loaded, name=name):
            if name == "bad" and rank == 1 and step == 2:
                loaded.bad.append(Bad("rank 1"))
            if name == "stop" and rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return loaded

        job = trainer(
            folder / name, method, STEPS, batches(method, transform, rank=rank, size=2), _settings(), world,
            validate=lambda info, name=name: ValidationResult({"val": 1}, 1.0),
        )  # fmt: skip
        result = job.fit()
        report = {"step": result.step, "ended": result.ended, "best": result.best_step}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(report))
        torch.save(method.state_dict(), folder / f"{name}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    on_two_processes(train_share, tmp_path, tmp_path)

    def weights(name, rank):
        return torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)

    def report(name, rank):
        return json.loads((tmp_path / f"{name}-{rank}.json").read_text())

    method = build_method("clip", tmp_path).float()
    trainer(tmp_path / "alone", method, STEPS, settings=_settings(), validate=scores(1)).fit()
    assert_equal_weights(weights("plain", 0), weights("plain", 1))
    assert_equal_weights(method.state_dict(), weights("plain", 0), rtol=1e-4, atol=1e-6)
    assert_equal_weights(checkpoint.load(tmp_path / "plain" / "best").model, weights("plain", 0))
    one, two = untimed(tmp_path / "alone"), untimed(tmp_path / "plain")
    assert [row["loss"] for row in one[:STEPS]] == pytest.approx([row["loss"] for row in two[:STEPS]], rel=1e-4)

    assert [row["key"] for row in tiny.rows(tmp_path / "bad" / "bad_samples.jsonl")] == ["rank 1"]
    for rank in range(2):
        assert report("plain", rank) == {"step": STEPS, "ended": "finished", "best": STEPS}
        assert report("stop", rank) == {"step": 3, "ended": "interrupted", "best": None}
    assert checkpoint.load(tmp_path / "stop" / "last").trainer["step"] == 3
    assert_equal_weights(checkpoint.load(tmp_path / "stop" / "last").model, weights("stop", 1))
