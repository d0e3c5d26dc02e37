"""The search of a table: trials with drawn settings on all pairs, of which the better half is extended to the next length, and so on.

An arm on a fraction of the pairs takes the settings chosen on all pairs; one trial chooses its length. The weights of a trial are deleted
once it is not to be extended; its scores are in search/ARM-trialN.json, and those of all in search.json. Scores are of the held-out pairs;
test splits are not evaluated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coalign.config import TrainConfig, fields_marked, to_json
from coalign.errors import NotFinite, UserError
from coalign.experiments.tables.launch_script import arm_name
from coalign.experiments.tables.trials import Trial, run_trials
from coalign.files import write_json
from coalign.methods.search import Choice, Search, best_of, crops_matter, halved
from coalign.methods.table import Table
from coalign.runs.folder import data_name, public, read_config, read_results
from coalign.training.trainer import TrainResult
from coalign.workflows.train.train import train

FOLDER, RESULT = "search", "search.json"
SEED = 1000  # of the first trial of a search; the seeds of the table's own trials are below


@dataclass(frozen=True)
class SearchTrial(Trial):
    """One trial of the search of an arm.

    Attributes:
        number: Its number, from 0.
        lengths: The lengths in epochs to train it to now, ascending.
    """

    number: int = 0
    lengths: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.arm}, trial {self.number + 1}"

    @property
    def folder(self) -> Path:
        return self.out / FOLDER / f"{arm_name(self.arm)}-trial{self.number + 1}"

    @property
    def record(self) -> Path:
        """The file of its scores."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def config(self, num_pairs: int) -> TrainConfig:
        # only the held-out pairs are evaluated, and only at the end of each length
        return replace(super().config(num_pairs), test_splits=(), classes=None, probe=False, evals=0)

    def train(self, threads: int) -> TrainResult | None:
        """Trains the lengths that are not scored yet. The score of each is stored as soon as it is known."""
        values = self.read()
        for epochs in self.lengths:
            if f"{epochs:g}" in values["lengths"]:
                continue
            try:
                result = train(self.data, self.folder, self.of_length(epochs).config_fn(threads), resume="auto")
            except NotFinite as error:  # such settings are a result, too: the worst
                write_json(self.record, values | self._described() | {"diverged": str(error)}, indent=1)
                break
            if result is None or result.ended == "interrupted":
                return result
            values["lengths"][f"{epochs:g}"] = {
                "score": score(self.folder),
                "samples_seen": result.step * read_config(self.folder).config.batch_size,
            }
            write_json(self.record, values | self._described(), indent=1)
        return None

    def score(self, epochs: float) -> float | None:
        """Returns the score of a length, or None if it was not trained to it."""
        found = self.read()["lengths"].get(f"{epochs:g}")
        return None if found is None else float(found["score"])

    def read(self) -> dict[str, Any]:
        """Returns the contents of its record. Raises UserError if it is of another table or of other settings."""
        if not self.record.exists():
            return {"trial": self.number + 1, "lengths": {}}
        try:
            values: dict[str, Any] = json.loads(self.record.read_text())
            expected = self._identity(values["num_train"])
            saved = {name: values["config"][name] for name in expected}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.record} cannot be read; delete it to train this trial again.") from error
        if changed := [name for name, value in expected.items() if saved[name] != value]:
            raise UserError(
                f"{self.record} holds a trial whose {changed[0]} differs from this table's; choose another --out."
            )
        return values

    def is_complete(self) -> bool:
        values = self.read()
        return "diverged" in values or all(f"{epochs:g}" in values["lengths"] for epochs in self.lengths)

    def of_length(self, epochs: float) -> SearchTrial:
        assert self.choice is not None
        return replace(self, choice=replace(self.choice, epochs=epochs))

    def _described(self) -> dict[str, Any]:
        """The trial's settings, and what identifies it."""
        assert self.choice is not None
        num_train = read_config(self.folder).num_train
        config = self.config(num_train)
        settings = asdict(self.choice.settings) | {"weight_decay": config.optimizer.weight_decay}
        if not crops_matter(config):
            del settings["crop"]
        return {"settings": settings, "num_train": num_train, "config": self._identity(num_train)}

    def _identity(self, num_train: int) -> dict[str, Any]:
        names = (*fields_marked(TrainConfig, "identifies_trial"), "optimizer")
        config = to_json(self.of_length(_search(self.sweep).epochs[0]).config(num_train))
        found = {"data": data_name(self.data), **{name: config[name] for name in names}}
        return dict(json.loads(json.dumps(public(found))))


def score(folder: Path) -> float:
    """Returns the mean recall on the held-out pairs; if the captions are class labels, the zero-shot accuracy."""
    tasks = read_results(folder)["tasks"]
    task, name = ("zeroshot", "acc1") if "zeroshot" in tasks else ("retrieval", "mean_recall")
    metrics = tasks.get(task, {"metrics": {}})["metrics"]
    if name not in metrics:
        raise UserError("Too few pairs are held out to choose settings by them; use more data.")
    return float(metrics[name]["value"])


@dataclass
class ArmSearch:
    """The complete search of an arm.

    Attributes:
        trials: The trials as stored.
        best: The position of the trial that is chosen.
        choice: Its settings and the best length; on a fraction of the pairs, the settings are those chosen on all pairs.
    """

    trials: list[dict[str, Any]]
    best: int
    choice: Choice

    def to_json(self) -> dict[str, Any]:
        """Returns the trials, the choice, and the expected best score of k of the trials at the shortest length, for k = 1 to all."""
        trials = [{name: value for name, value in trial.items() if name != "config"} for trial in self.trials]
        scores = [next((each["score"] for each in trial["lengths"].values()), 0.0) for trial in trials]
        # the settings as they were trained: with the arm's weight decay if it was kept, without what has no effect
        chosen = asdict(self.choice) | {"settings": trials[self.best]["settings"]}
        return {"chosen": chosen, "best_of": best_of(scores), "trials": trials}


def run_search(sweep: Table, arms: Sequence[str], data: str, out: Path, jobs: int) -> list[str]:
    """Runs the trials that the searches of the arms lack, and writes search.json.

    Returns what failed, with the reasons: trials, and arms of which all trials diverged.
    """
    (out / FOLDER).mkdir(exist_ok=True)
    failures: list[str] = []
    tried: list[SearchTrial] = []
    while trials := [trial for trial in missing_trials(sweep, arms, data, out) if trial not in tried]:
        tried += trials
        failures += run_trials(trials, jobs)
    values = {arm: found.to_json() for arm, found in searches(sweep, data, out).items()}
    write_json(out / RESULT, {"search": asdict(_search(sweep)), "arms": values}, indent=1)
    return failures + [f"{arm} ({reason})" for arm, reason in diverged(sweep, arms, data, out).items()]


def missing_trials(sweep: Table, arms: Sequence[str], data: str, out: Path) -> list[SearchTrial]:
    """Returns the trials to run now for the searches of the arms: of every arm, those of the shortest length that is not complete.

    Removes the weights of the trials that are not extended.
    """
    found = searches(sweep, data, out)
    missing: list[SearchTrial] = []
    for arm in _searched(sweep, arms):
        drawn = _drawn(sweep, arm, data, out, found)
        current = _current(drawn)
        if all(trial.is_complete() for trial in current):
            current = []
        for trial in drawn:
            if trial.number not in [each.number for each in current]:
                shutil.rmtree(trial.folder, ignore_errors=True)
        missing += [trial for trial in current if not trial.is_complete()]
    return sorted(missing, key=lambda trial: trial.number)


def searches(sweep: Table, data: str, out: Path) -> dict[str, ArmSearch]:
    """Returns the search of every arm whose trials are complete and have not all diverged, in the order of the arms."""
    found: dict[str, ArmSearch] = {}
    for arm in sorted(sweep.arms, key=lambda name: sweep.whole(name) != name):
        trials = _drawn(sweep, arm, data, out, found)
        complete = all(trial.is_complete() for trial in _current(trials))
        if complete and (best := _best(trials)) is not None:
            assert best.choice is not None
            found[arm] = ArmSearch([trial.read() for trial in trials], best.number, best.choice)
    return {arm: found[arm] for arm in sweep.arms if arm in found}


def diverged(sweep: Table, arms: Sequence[str], data: str, out: Path) -> dict[str, str]:
    """Returns those of the arms for which nothing can be chosen, as all trials of their search diverged, with this reason."""
    found = searches(sweep, data, out)
    trials = {arm: _drawn(sweep, arm, data, out, found) for arm in _searched(sweep, arms) if arm not in found}
    return {
        arm: "all trials of its search diverged"
        for arm, of_arm in trials.items()
        if of_arm and all(trial.is_complete() for trial in _current(of_arm))
    }


def _searched(sweep: Table, arms: Sequence[str]) -> list[str]:
    """The arms whose searches choose the settings and the lengths of the given ones."""
    arms = [sweep.arms[arm].weights_of or arm for arm in arms]
    return list(dict.fromkeys([*map(sweep.whole, arms), *arms]))


def _drawn(sweep: Table, arm: str, data: str, out: Path, found: Mapping[str, ArmSearch]) -> list[SearchTrial]:
    """The trials of an arm's search. None, if it evaluates another arm's weights, or if the settings on all pairs are not chosen yet."""
    search, whole = _search(sweep), sweep.whole(arm)
    if sweep.arms[arm].weights_of or (whole != arm and whole not in found):
        return []
    drawn = search.draws() if whole == arm else [found[whole].choice.settings]
    shortest = search.epochs[0]
    return [
        SearchTrial(sweep, arm, SEED + number, data, out, Choice(settings, shortest, shortest), number=number)
        for number, settings in enumerate(drawn)
    ]


def _current(trials: Sequence[SearchTrial]) -> list[SearchTrial]:
    """Of all trials of an arm, those that are trained to the shortest length that is not complete, or else to the longest length."""
    current = list(trials)
    epochs = _search(current[0].sweep).epochs if current else ()
    for number, length in enumerate(epochs):
        if (kept := halved(len(trials), number)) < len(current):
            if not all(trial.is_complete() for trial in current):
                break
            current.sort(key=lambda trial: (-(trial.score(epochs[number - 1]) or -1.0), trial.number))
            del current[kept:]
        current = [replace(trial, lengths=(*trial.lengths, length)) for trial in current]
    return current


def _search(sweep: Table) -> Search:
    assert sweep.search is not None
    return sweep.search


def _best(trials: Sequence[SearchTrial]) -> SearchTrial | None:
    """The trial and its length with the highest score; of equal ones, the shortest of the first trial. None: no trial has a score."""
    scored = [
        (value, -epochs, -trial.number, trial.of_length(epochs))
        for trial in trials
        for epochs in _search(trial.sweep).epochs
        if (value := trial.score(epochs)) is not None
    ]
    return max(scored, key=lambda each: each[:3])[3] if scored else None
