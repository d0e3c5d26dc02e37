"""reproduce(): a table of experiments, trial by trial, and its comparison."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from scipy.stats import spearmanr

from coalign import __version__
from coalign.config import TrainConfig
from coalign.data.sources import open_source
from coalign.errors import UserError
from coalign.recipes.sweep import Table
from coalign.recipes.tables import table
from coalign.report.compare_page import Comparison, Figure, title, value_text
from coalign.run import tag_tower
from coalign.run.compare import compare
from coalign.run.efficiency import efficiencies, efficiency_words, fraction_scores
from coalign.run.launch import run_name, write_launch
from coalign.run.model import RESULTS, read_config, write_file
from coalign.run.train import train

CLASSES, LAUNCH, TAG_TOWER = "classes.txt", "launch.sh", "tag_tower.safetensors"
COMPARED = (  # a run with others of these is not this table's
    "method", "method_config", "epochs", "batch_size", "model", "image_size", "pretrained",
    "train_fraction", "rest_as_texts", "test_splits",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    sweep: Table
    arm: str
    seed: int
    data: str
    out: Path  # the table's folder

    @property
    def folder(self) -> Path:
        return self.out / run_name(self.arm, self.seed)

    def config(self, num_pairs: int) -> TrainConfig:
        config = self.sweep.config(self.arm, self.seed, num_pairs)
        if not self.sweep.tag_scenes:
            return config
        return replace(config, model=tag_tower.MODEL, pretrained=str((self.out / TAG_TOWER).resolve()))


def reproduce(
    name: str,
    data: str,
    out: str | Path,
    *,
    scale: Literal["cpu", "paper"] = "cpu",
    seeds: int = 3,
    jobs: int = 1,
    arms: Sequence[str] = (),
) -> Comparison | None:
    """Trains every arm of a table with seeds 0 … seeds - 1 in the folder `out`, then compares them: out/table.json, out/table.html.

    What is finished stays; what was stopped goes on. `jobs` trials run at once, each on its share of the cores. `arms` are those to
    train (default: all); the comparison is of what is there, and None where that is less than two runs. A trial that fails stops no
    other; UserError at the end names it.

    At the scale "paper" nothing is trained: out/launch.sh gets the commands that train the arms by the paper's own recipe.
    """
    sweep, out = table(name), Path(out)
    if unknown := [arm for arm in arms if arm not in sweep.arms]:
        raise UserError(f"The table {name} has no arm {unknown[0]!r}; there are {', '.join(map(repr, sweep.arms))}.")
    if seeds < 1 or jobs < 1:
        raise UserError(f"--seeds is {seeds} and --jobs {jobs}, but both must be at least 1.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if sweep.classes and scale == "cpu":
            (out / CLASSES).write_text("\n".join(sweep.classes) + "\n")
    except OSError as error:
        raise UserError(f"The table cannot be written to {out}: {error.strerror}; choose another --out.") from error
    console = Console(highlight=False, soft_wrap=True)
    if scale == "paper":
        left_out = write_launch(out / LAUNCH, name, sweep, list(arms or sweep.arms), data, seeds)
        console.print(f"{out / LAUNCH}: the commands. Nothing was trained.")
        if left_out:
            console.print(f"Left out, for they have no recipe of that scale: {', '.join(left_out)}")
        return None
    trials = [Trial(sweep, arm, seed, data, out) for seed in range(seeds) for arm in arms or sweep.arms]
    missing = [trial for trial in trials if not finished(trial)]
    if missing and sweep.tag_scenes and not (out / TAG_TOWER).exists():
        open_source(data)  # says what is wrong with it before the minutes that this takes
        console.print(
            f"The image tower in which every arm starts learns the tags of {sweep.tag_scenes:,} other scenes …"
        )
        tag_tower.train(sweep.tag_scenes, sweep.image_size or 64, out / TAG_TOWER)
    failures = run_trials(missing, jobs, console)
    done = [Trial(sweep, arm, seed, data, out) for arm in sweep.arms for seed in range(seeds)]
    done = [trial for trial in done if finished(trial)]
    comparison = _compare(name, sweep, done, console) if len(done) > 1 else None
    if failures:
        raise UserError(
            f"{len(failures)} of {len(trials)} trials failed: {'; '.join(failures)}. Their logs are beside them in {out}."
        )
    return comparison


def finished(trial: Trial) -> bool:
    """Whether the trial is done. UserError if what is there is another table's, or this one's as it was once."""
    if not (trial.folder / RESULTS).exists():
        return False
    saved = read_config(trial.folder)
    wanted = trial.config(saved.num_train)
    if changed := [name for name in COMPARED if _bare(getattr(saved.config, name)) != _bare(getattr(wanted, name))]:
        raise UserError(
            f"{trial.folder} holds a run with another {changed[0]} than this table's; choose another --out."
        )
    return True


def _bare(value: Any) -> Any:
    """A file's name without its folder, which may have been moved."""
    return Path(value).name if isinstance(value, str) else value


def run_trials(trials: Sequence[Trial], jobs: int, console: Console) -> list[str]:
    """Runs the trials in processes of their own; what failed, and why."""
    failures: list[str] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with _environment("OMP_NUM_THREADS", str(threads)):  # read when a process starts
        # not a pool of processes, which hands a trial out before the one ahead of it is done, and cannot take it back
        pool = ThreadPoolExecutor(jobs)
        try:
            running = {pool.submit(_in_a_process, trial, threads): trial for trial in trials}
            for number, future in enumerate(as_completed(running), 1):
                trial, error = running[future], future.result()
                if error is not None:
                    failures.append(f"{trial.folder.name} ({error})")
                what = "done" if error is None else f"failed: {error}"
                console.print(f"{number} of {len(trials)}: {trial.arm}, seed {trial.seed}: {what}")
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, which those that run have heard as well, no other starts
    return failures


def _in_a_process(trial: Trial, threads: int) -> str | None:
    """Runs one trial to its end. What went wrong, if anything did."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(trial, threads, os.getpid(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}"
    finally:
        process.join()


def _report(trial: Trial, threads: int, parent: int, sender: Connection) -> None:
    """In the trial's process: trains, and tells what went wrong."""
    Thread(target=_stop_with, args=(parent,), daemon=True).start()
    said: str | None = None
    try:
        _train(trial, threads)
    except (Exception, KeyboardInterrupt) as error:
        said = str(error) or type(error).__name__
    with contextlib.suppress(BrokenPipeError):  # there is nobody to be told
        sender.send(said)


def _stop_with(parent: int) -> None:
    """Stops this process as SIGTERM does, with a checkpoint, when its parent is gone: a next call goes on, and finds nobody at work."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _train(trial: Trial, threads: int) -> None:
    """One trial, in a process of its own; what it prints goes into a file beside its folder."""
    sweep = trial.sweep

    def settle(num_pairs: int) -> TrainConfig:
        config = trial.config(num_pairs)
        classes = trial.out / CLASSES if sweep.classes else None
        # with a core to itself a trial loads its own data: another process would only take turns with it
        return replace(config, classes=classes, workers=0 if threads == 1 else None)

    log = trial.folder.with_name(f"{trial.folder.name}.log")
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            result = train(trial.data, trial.folder, settle, resume="auto")
        except Exception as error:
            print(error) if isinstance(error, UserError) else traceback.print_exc()
            raise
    if result is not None and result.ended == "interrupted":
        raise UserError("stopped; call it again to go on")


def _compare(name: str, sweep: Table, trials: Sequence[Trial], console: Console) -> Comparison:
    out = trials[0].out
    comparison = compare([trial.folder for trial in trials], out / "table.html", [trial.arm for trial in trials])
    trained = {trial.arm for trial in trials}
    steps = [(lower, higher) for lower, higher in sweep.claims if {lower, higher} <= trained]
    differences = {step: _differences(step, trials) for step in steps}
    tasks = dict.fromkeys(figure.split(".")[0] for figure in sweep.headlines if figure.startswith("retrieval"))
    by_fraction = {task: found for task in tasks if (found := fraction_scores(trials, task))}
    efficiency = {task: factors for task, found in by_fraction.items() if (factors := efficiencies(found))}
    values: dict[str, Any] = {
        "table": name,
        "title": sweep.title,
        "version": __version__,
        "arms": {label: asdict(arm) for label, arm in sweep.arms.items()},
        "paper": sweep.paper,
        "rank_correlation": {figure: rank_correlation(sweep, comparison, figure) for figure in sweep.headlines},
        "efficiency": {
            task: {name: asdict(one) for name, one in of_task.items()} for task, of_task in efficiency.items()
        },
        "by_fraction": by_fraction,
        "claims": [
            _claim(name, pair, figures[name]) for name in sweep.headlines for pair, figures in differences.items()
        ],
        **comparison.to_json(),
    }
    text = json.dumps(values, indent=1, default=str) + "\n"
    write_file(out / "table.json", lambda path: path.write_text(text))
    if sweep.paper:
        print_against_paper(comparison, values, console)
    for task, factors in efficiency.items():
        split = task.removeprefix("retrieval").removeprefix("_") or "pairs held out"
        console.print(
            f"By R@10 of {split}, the mean of both directions:", *efficiency_words(factors), sep="\n", markup=False
        )
    return comparison


def rank_correlation(sweep: Table, comparison: Comparison, figure: str) -> float | None:
    """Spearman's, of our mean figures with the paper's, over the arms that have both; None with less than three."""
    pairs = [
        (group.figures[figure].value, paper)
        for group in comparison.groups
        if (paper := sweep.arms[group.name].paper) is not None
    ]
    ours, papers = zip(*pairs) if pairs else ((), ())
    if len(set(ours)) < 3 or len(set(papers)) < 3:
        return None
    return float(spearmanr(ours, papers).statistic)


def print_against_paper(comparison: Comparison, values: Mapping[str, Any], console: Console) -> None:
    """The paper's column beside ours, the rank correlation of both, and a verdict on each claim."""
    table = RichTable(box=None, padding=(0, 2, 0, 0))
    for column in ("", "the paper", *(title(figure) for figure in values["rank_correlation"])):
        table.add_column(column, justify="right" if column else "left")
    for group in comparison.groups:
        paper = values["arms"][group.name]["paper"]
        ours = [value_text(group.figures[figure]) for figure in values["rank_correlation"]]
        table.add_row(escape(group.name), "" if paper is None else f"{paper:g}", *ours)
    known = [
        "-" if found is None else f"{found:.2f}".replace("-", "−") for found in values["rank_correlation"].values()
    ]
    table.add_row("rank correlation with the paper", "", *known)
    console.print(f"The paper: {values['paper']}", markup=False)
    console.print(table)
    for claim in values["claims"]:
        console.print(f"{claim['claim']}, by {title(claim['figure'])}: {claim['verdict']}", markup=False)


def _differences(arms: tuple[str, str], trials: Sequence[Trial]) -> Mapping[str, Figure]:
    """All figures of the second arm, with their differences to the first's."""
    chosen = [trial for arm in arms for trial in trials if trial.arm == arm]
    return compare([t.folder for t in chosen], groups=[t.arm for t in chosen]).groups[1].figures


def _claim(name: str, arms: tuple[str, str], figure: Figure) -> dict[str, Any]:
    """Whether the second arm is better: it is, or it is not, where the intervals over items and over seeds both say so."""
    intervals = [figure.difference_over_items, figure.difference_over_seeds]
    known = [interval for interval in intervals if interval is not None]
    verdict = "undecided"
    if len(known) == len(intervals):
        verdict = "holds" if all(low > 0 for low, _ in known) else verdict
        verdict = "does not hold" if all(high < 0 for _, high in known) else verdict
    return {
        "claim": f"{arms[1]} is better than {arms[0]}",
        "figure": name,
        "difference": figure.difference,
        "over_items": figure.difference_over_items,
        "over_seeds": figure.difference_over_seeds,
        "verdict": verdict,
    }
