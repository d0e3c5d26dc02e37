"""The default small model, trained on a few hundred small images: CLIP compared with open_clip's trainer, and the share of a step that is
outside the towers.

Each side trains whole epochs in its own process, with data loading, on a single thread; the measure is CPU time, so that other programs
hardly affect it. The first two epochs do not count: in the second, we still decode the images that the first left out in its incomplete
batch, and build kernels for numbers of tokens that are new. Both sides alternate; a ratio is of neighboring runs. Image size 48, batch 128.

- open_clip's side (`peer_training.py`) has the same towers, its own data loader, transforms, tokenizer, loss, AdamW and `train_one_epoch`,
  in the same precision. Ours (`timed_training.py`) is `coalign train` with the defaults of this dataset size.
- The share outside the towers is of the run's CPU time, data loading included: what the training thread does not spend in the towers'
  forward and backward. Towers in isolation, again and again on one batch, take less time than in a run: their weights and activations are
  still in the processor's caches, and kernels for this number of tokens exist. The share by that time is printed too.
- UniCLIP's and MCD's steps are compared with CLIP's, over the ratio of their passes through towers: the numbers of images and texts,
  trained or teacher, weighted by the isolated time per sample of CLIP's towers.
- With --before, the same training with the defaults of an earlier revision of this repository.
- Two cores compared with one, and a machine with two busy processes compared with a quiet one, are wall-clock times of the default number
  of threads and loader workers. The most that two cores can reach is what two trainings reach at once, on a core each. All need an idle
  machine: they are measured if its load is below 0.3, or with --wall.

Run: python benchmarks/small_models.py [--data FOLDER] [--before REVISION] [--wall] [--epochs 3] [--repeats 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lines import line
from PIL import Image

from coalign.data.scenes.source import Scenes

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
WARM_UP = 2  # epochs that are not timed
PAIRS, SIDE = 576, 72  # of the drawn pairs
SIZE, BATCH = 48, 128
IDLE = 0.3  # load average below which wall-clock times are measured
BUSY = 2  # number of busy processes
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


Result = dict[str, Any]  # what `timed_training.py` and `peer_training.py` print


def draw_pairs(folder: Path) -> None:
    """Writes a folder of pictures of scenes with captions."""
    source, rows = Scenes(PAIRS, size=SIDE), []
    for index in source.splits["train"].tolist():
        name = f"{index:04d}.png"
        Image.fromarray(source.image(index)).save(folder / name)
        rows.append({"image": name, "captions": source.record(index).captions[:1], "split": "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(data: Path, table: Path) -> None:
    """Writes the training pairs in open_clip's format."""
    rows = [json.loads(text) for text in (data / "metadata.jsonl").read_text().splitlines()]
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        train = (row for row in rows if row.get("split", "train") == "train")
        writer.writerows([(data / row["image"]).resolve(), row["captions"][0]] for row in train)


# ---------------------------------------------------------------- the two sides


def run(script: str, options: Sequence[object], environment: Mapping[str, str]) -> Result:
    """Runs a script and returns the values that it prints last, as JSON."""
    command = [sys.executable, str(HERE / script), *map(str, options)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Training:
    """Training on one folder of pairs, by `coalign train` or by open_clip's trainer."""

    def __init__(self, data: Path, table: Path, epochs: int) -> None:
        self.data, self.table, self.epochs = data, table, WARM_UP + epochs
        self.one_thread = {**os.environ, **dict.fromkeys(THREADS, "1")}
        self.all_threads = {name: value for name, value in os.environ.items() if name not in THREADS}

    def ours(self, recipe: str = "clip", source: Path = ROOT / "src", towers: bool = False) -> Result:
        """Trains on one thread, without loader workers."""
        options = [*self._options(recipe), "--workers", "0", *(["--towers"] if towers else [])]
        return run("timed_training.py", options, self.one_thread | {"PYTHONPATH": str(source)})

    def ours_on(self, cores: Sequence[int]) -> Result:
        """Trains with the default number of threads and loader workers, on these cores."""
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # of this thread; the process that it starts inherits it
        try:
            return run("timed_training.py", self._options("clip"), self.all_threads | {"PYTHONPATH": str(ROOT / "src")})
        finally:
            os.sched_setaffinity(0, everywhere)

    def peer(self, ours: Result) -> Result:
        """Trains open_clip's model with the towers of our run."""
        names = ("model", "context_length", "vocab_size", "precision")
        options = [part for name in names for part in (f"--{name.replace('_', '-')}", ours[name])]
        options += ["--image-size", SIZE, "--batch-size", BATCH, "--epochs", self.epochs]
        theirs = run("peer_training.py", [self.table, *options], self.one_thread | {"PYTHONPATH": str(ROOT / "src")})
        assert theirs["parameters"] == ours["parameters"], "the towers differ"
        return theirs

    def _options(self, recipe: str) -> list[object]:
        return [
            *("--epochs", self.epochs, "--data", self.data, "--recipe", recipe, "--device", "cpu"),
            *("--batch-size", BATCH, "--image-size", SIZE),
        ]


def per_pair(result: Result, clock: str = "cpu") -> float:
    """Returns the seconds per pair after the warm-up."""
    return statistics.fmean(result[clock][WARM_UP:]) / result["pairs"]


# ---------------------------------------------------------------- rows


def compare_with_peer(training: Training, repeats: int) -> list[Result]:
    """Prints the speed compared with open_clip's trainer, and the share of a step outside the towers. Returns our runs."""
    runs, ratios = [], []
    for _ in range(repeats):
        runs.append(training.ours(towers=True))
        ratios.append(per_pair(training.peer(runs[-1])) / per_pair(runs[-1]))
    first = runs[0]
    print(
        f"{first['model']}, {first['parameters'] / 1e6:.2f} M parameters, {first['precision']}, {first['pairs']} pairs"
    )
    line("CLIP, open_clip's time over ours", ratios, at_least=4)
    shares = [1 - per_pair(run, "in_towers") / per_pair(run) for run in runs]
    isolated = [1 - sum(each["seconds"] for each in run["passes"]) / (BATCH * per_pair(run)) for run in runs]
    more = f"{statistics.median(isolated):.2g} by towers in isolation"
    line("CLIP, share of a step outside the towers", shares, at_most=0.25, more=more)
    return runs


def compare_methods(training: Training, clip: Sequence[Result]) -> None:
    """Prints the cost of other methods' steps relative to CLIP's, over the ratio of their passes through towers."""
    for recipe in ("uniclip", "mcd"):
        ratios, passes = [], 0.0
        for reference in clip:
            other = training.ours(recipe, towers=True)
            passes = weighted_passes(other, reference) / weighted_passes(reference, reference)
            ratios.append(per_pair(other) / per_pair(reference) / passes)
        name = {"uniclip": "UniCLIP", "mcd": "MCD"}[recipe]
        line(
            f"{name}, step over CLIP's, over the ratio of their tower passes",
            ratios,
            at_most=1.15,
            more=f"passes × {passes:.2f}",
        )


def weighted_passes(result: Result, clip: Result) -> float:
    """Returns the passes of a step in seconds of CLIP's towers. A teacher's pass is a third of a trained one: it has no backward."""
    cost = {each["kind"]: each["seconds"] / each["count"] for each in clip["passes"]}
    return sum(cost[each["kind"]] * each["count"] * (1 if each["trained"] else 1 / 3) for each in result["passes"])


def compare_with_revision(training: Training, revision: str, repeats: int) -> None:
    """Prints the speed compared with an earlier revision."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", f"{folder}/before", revision], check=True, capture_output=True)
        try:
            source = Path(folder) / "before/src"
            ratios = [per_pair(training.ours(source=source)) / per_pair(training.ours()) for _ in range(repeats)]
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/before"], check=True)
    line(f"CLIP, time of {revision} over ours", ratios, at_least=2)


def compare_cores(training: Training, repeats: int) -> None:
    """Prints the speed-up by a second core, and the speed beside busy processes, by wall-clock time."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    scaling, limits, kept = [], [], []
    for _ in range(repeats):
        two = per_pair(training.ours_on(cores), "wall")
        if len(cores) == 2:
            one = per_pair(training.ours_on(cores[:1]), "wall")
            scaling.append(one / two)
            with ThreadPoolExecutor() as pool:
                at_once = list(pool.map(lambda core: per_pair(training.ours_on([core]), "wall"), cores))
            limits.append(2 * one / statistics.fmean(at_once))
        with busy_processes(cores):
            kept.append(two / per_pair(training.ours_on(cores), "wall"))
    if scaling:
        more = f"two trainings at once, on a core each: {statistics.median(limits):.3g}"
        line("CLIP, speed on two cores over one", scaling, at_least=1.8, more=more)
    line(f"CLIP, speed on {len(cores)} cores beside {BUSY} busy processes over alone", kept, at_least=0.5)


@contextmanager
def busy_processes(cores: Sequence[int]) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, cores)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder written by `coalign data emoji` (default: drawn scenes)")
    parser.add_argument("--before", metavar="REVISION", help="compare with an earlier git revision")
    parser.add_argument("--wall", action="store_true", help="measure wall-clock times although the machine is not idle")
    parser.add_argument("--epochs", type=int, default=3, help="number of timed epochs")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder) / "pairs"
            data.mkdir()
            draw_pairs(data)
        table = Path(folder) / "pairs.tsv"
        write_table(data, table)
        training = Training(data, table, options.epochs)
        load = os.getloadavg()[0]
        if options.wall or load < IDLE:  # first, before this script raises the load
            compare_cores(training, options.repeats)
        else:
            print(
                f"The load average is {load:.2f}: not idle, so cores and busy processes are not compared (see --wall)."
            )
        compare_methods(training, compare_with_peer(training, options.repeats))
        if options.before:
            compare_with_revision(training, options.before, options.repeats)


if __name__ == "__main__":
    main()
