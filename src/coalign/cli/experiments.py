"""Commands on several runs: `coalign demo`, `coalign compare`, `coalign benchmark` and `coalign reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from coalign.cli.parse import Reading
from coalign.config import DETECT
from coalign.errors import UserError


def demo_command(data: str | None = None, out: Path | None = None) -> None:
    """Train CLIP and MCD in a few minutes, and write a page that compares them.

    Without --data, on drawings of emoji, with a pretrained image encoder, which all come with Python packages: pip install "coalign[demo]".
    Both methods are also compared on another vendor's drawings. If interrupted, run it again to resume.

    Example: coalign demo

    Args:
        data: your own pairs instead: anything that `coalign train --data` accepts
        out: the folder for the data, the runs and index.html; None: runs/demo, or runs/demo-own with --data
    """
    from coalign.experiments.demo.demo import demo, own_demo

    if data is None:
        demo(out or Path("runs/demo"))
    else:
        own_demo(data, out or Path("runs/demo-own"))


def compare_command(runs: Positional[tuple[str, ...]], report: Path | None = None, json: Path | None = None) -> None:
    """Compare finished runs on their held-out pairs, with confidence intervals and paired differences.

    Runs that differ only in their seed are averaged. To train methods on your data and compare them, use `coalign benchmark`.

    Example: coalign compare runs/clip runs/slip --report compare.html

    Args:
        runs: the folders of two or more finished runs
        report: write a report with figures to this HTML file
        json: write the results to this JSON file
    """
    from coalign.experiments.compare.compare import compare_and_write

    compare_and_write(runs, report, json)


def benchmark_command(
    data: str,
    out: Path,
    methods: tuple[str, ...] = ("clip", "uniclip", "mcd"),
    minutes: float = 60.0,
    epochs: float | None = None,
    fractions: tuple[float, ...] = (1.0,),
    seeds: int = 3,
    jobs: int | None = None,
    report: Path | None = None,
    json: Path | None = None,
    image_tower: str | None = None,
    text_tower: str | None = None,
    context_length: int | None = None,
    skip_data_checks: bool = False,
    reading: Reading = DETECT,
) -> None:
    """Find out which method is best for your data: choose settings for each on validation pairs, and compare them on test pairs.

    Every method gets equal time.
    Add --fractions 0.25 0.5 1 to also measure data efficiency relative to CLIP. If interrupted, run it again to resume.

    Example: coalign benchmark --data pairs.csv --out runs/benchmark --minutes 60

    Args:
        data: anything that `coalign train --data` accepts
        out: the folder for the runs, benchmark.html and benchmark.json
        methods: the methods to train, or clip-strong; clip is always included
        minutes: wall-clock minutes in all, with equal time per method; the number of trials and their lengths follow from it
        epochs: epochs of the longest trials of every method, for equal samples seen instead of equal time
        fractions: fractions of the pairs to train on, at equal samples seen
        seeds: number of seeds (0 to N-1) per method, of the runs that are tested
        jobs: number of trials to run in parallel, each on its share of the cores; None: one per core
        report: write the report to this HTML file instead of benchmark.html
        json: also write the results to this JSON file
        image_tower: a pretrained image encoder, as in `coalign train`; adds the method locked: new heads on encoders that are not trained
        text_tower: a pretrained text encoder, likewise
        context_length: maximum number of tokens per caption; None: the default of `coalign train`
        skip_data_checks: train even if a check of the data finds a problem; see `coalign train`
    """
    from coalign.experiments.benchmark.benchmark import benchmark_and_write

    options = {"methods": methods, "minutes": minutes, "epochs": epochs, "fractions": fractions, "seeds": seeds}
    options |= {"image_tower": image_tower, "text_tower": text_tower, "context_length": context_length}
    options |= {"reading": reading, "skip_data_checks": skip_data_checks}
    benchmark_and_write(data, out, report, json, jobs=jobs, **options)


def reproduce_command(
    table: Positional[str | None] = None,
    data: str | None = None,
    out: Path | None = None,
    scale: Literal["cpu", "paper"] = "cpu",
    seeds: int = 3,
    jobs: int = 1,
    arms: tuple[str, ...] = (),
    track: tuple[str, ...] = (),
    skip_data_checks: bool = False,
    reading: Reading = DETECT,
) -> None:
    """Train every arm of a table of experiments with several seeds, and compare them.

    If the table has a search, first choose the settings and the length of each arm on the held-out pairs. If interrupted, run it again to
    resume.

    Example: coalign reproduce scenes --data scenes:8192:simple --out runs/scenes --jobs 2

    Args:
        table: the table's name; None: list all tables
        data: anything that `coalign train --data` accepts
        out: the folder for the runs, table.json and table.html
        scale: cpu trains small models in hours; paper only writes launch.sh, with the commands of the paper's recipes
        seeds: number of seeds (0 to N-1) per arm
        jobs: number of trials to run in parallel, each on its share of the cores
        arms: train only these arms, and the arms whose weights or settings they take; empty: all
        track: one or more tasks of `coalign eval`, such as zeroshot:birds, to evaluate each trial on, but not those of a search
        skip_data_checks: train even if a check of the data finds a problem; see `coalign train`
    """
    from coalign.experiments.tables import registry

    if table is None:
        print("".join(f"{name}\n    {entry.title}\n" for name, entry in registry.TABLES.items()), end="")
        return
    registry.table(table)  # report an unknown name before missing options
    if data is None or out is None:
        raise UserError(f"The table {table} needs --data and --out; see `coalign reproduce --help`.")
    from coalign.experiments.compare.terminal import print_comparison
    from coalign.experiments.tables.reproduce import reproduce

    options: Any = {"scale": scale, "seeds": seeds, "jobs": jobs, "arms": arms, "track": track}
    options["skip_data_checks"] = skip_data_checks
    comparison = reproduce(table, data, out, reading=reading, **options)
    if comparison is not None:
        print_comparison(comparison)
        print(f"Report: {out / 'table.html'}")
