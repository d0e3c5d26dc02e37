"""The folder of a run that starts, is resumed, or is extended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coalign.config import TrainConfig, fields_marked, flatten, to_json
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import UserError
from coalign.files import write_atomically, write_json
from coalign.runs.folder import (
    CONFIG,
    HELD_OUT,
    MODEL,
    REPORT,
    RESULTS,
    TOKENIZER,
    SavedConfig,
    read_config,
    read_results,
    write_config,
)
from coalign.runs.run import saved_model
from coalign.training.distributed import World
from coalign.training.trainer import Trainer
from coalign.workflows.train.setup import num_steps


def check_folder(out: Path, resume: str) -> None:
    """Raises UserError if `out` cannot be the folder of this run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"The output {out} is a file; choose a folder with --out.")
    if resume == "no" and (out / CONFIG).exists():
        raise UserError(
            f"{out} already contains a run; resume it with --resume auto, or choose another folder with --out."
        )
    if (out / CONFIG).exists() and (made := read_config(out).interpolated):
        raise UserError(
            f"The weights in {out} were interpolated ({made}), so there is no training to resume; start another run with --init-from {out}."
        )
    if not (out / CONFIG).exists() and out.is_dir() and any(out.glob("*.safetensors")):
        raise UserError(f"{out} contains other files; choose an empty folder with --out.")


def prepare_folder(out: Path, saved: SavedConfig, tokenizer: Tokenizer, world: World) -> float | None:
    """Writes tokenizer, model file and configuration of a new run, and the new length of a finished run that is extended.

    Returns the epochs before the extension, None for any other run. Raises UserError if settings or data of a resumed run differ.
    """
    original = read_config(out) if (out / CONFIG).exists() else None
    epochs = None if original is None else _check_original(out, original, saved)
    world.barrier()  # all ranks have checked before the first one writes
    if not world.is_first:
        return epochs
    if original is None:
        write_atomically(out / TOKENIZER, tokenizer.save)
        if model := saved_model(saved.config):
            write_json(out / MODEL, model)
        write_config(out, saved)
    elif epochs is not None:
        write_config(out, replace(saved, extended_from=(*original.extended_from, epochs)))
        for name in (RESULTS, HELD_OUT, REPORT):  # of the shorter run; they are made anew
            (out / name).unlink(missing_ok=True)
    return epochs


def _check_original(out: Path, original: SavedConfig, saved: SavedConfig) -> float | None:
    """Raises UserError if a resumed run has other settings or data. Returns the epochs of a finished run that has more of them now."""
    old, new = (flatten(to_json(each.config)) for each in (original, saved))
    may_change = fields_marked(TrainConfig, "may_change_on_resume")
    changes = {
        name: f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in {**old, **new}
        if name.partition(".")[0] not in may_change and old.get(name) != new.get(name)
    }
    if original.num_train != saved.num_train:
        changes["data"] = f"the data had {original.num_train:,} training pairs, now {saved.num_train:,}"
    elif original.fingerprint and original.fingerprint != saved.fingerprint:
        changes["data"] = f"the data was {original.data}, and {saved.data} has different pairs"
    if set(changes) == {"epochs"}:
        _check_length(out, original.config.epochs, saved.config.epochs)
        return original.config.epochs
    if changes:
        raise UserError(
            f"The run in {out} was started with different settings: {'; '.join(changes.values())}. Resume it with the original settings, "
            "or choose another folder with --out."
        )
    return None


def _check_length(out: Path, before: float, epochs: float) -> None:
    if epochs < before:
        raise UserError(
            f"The run in {out} has {before:g} epochs, and a run cannot be shortened to {epochs:g}; give more --epochs to extend it, or "
            "choose another folder with --out."
        )
    if not (out / RESULTS).exists() or read_results(out)["run"].get("ended") != "finished":
        raise UserError(
            f"The run in {out} has not finished; resume it with --epochs {before:g}, and then extend it to {epochs:g}."
        )


def extension_lines(trainer: Trainer, before: float, num_pairs: int) -> list[str]:
    """Returns what to print about a finished run that is extended from `before` epochs."""
    config, step, total = trainer.config, trainer.progress.step, trainer.total_steps
    old_total = num_steps(replace(config, epochs=before), num_pairs)
    last, rate = (
        next(iter(trainer.optimizers.set_lr(*at).values())) for at in ((old_total - 1, old_total), (step, total))
    )
    lines = [
        f"Extending the run from {before:g} to {config.epochs:g} epochs; its results and report will be made anew."
    ]
    if config.optimizer.schedule == "constant":
        lines.append(
            f"Training continues at step {step:,}, before the cool-down, whose {old_total - step:,} steps are left out, at learning rate "
            f"{rate:.2e}."
        )
    else:
        lines.append(
            f"Training continues along the longer cosine: the learning rate goes from {last:.2e} to {rate:.2e}. Runs with --schedule "
            "constant can be extended as if they had been longer from the beginning."
        )
    if trainer.method.length_dependent:
        lines.append(
            f"Of the method, these follow the new length from here on: {', '.join(trainer.method.length_dependent)}."
        )
    return lines
