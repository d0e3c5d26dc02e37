"""demo(): trains CLIP and MCD on drawings of emoji by one vendor, and compares them, also on another vendor's drawings."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from coalign.cores import num_cores
from coalign.data.prepare.emoji import VENDORS_TABLE, prepare_emoji
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_source
from coalign.devices import best_device, device_line
from coalign.errors import UserError
from coalign.experiments.benchmark.benchmark import benchmark
from coalign.experiments.benchmark.plan import TooShort
from coalign.experiments.benchmark.result import RECOMMENDED, BenchmarkResult
from coalign.experiments.compare.compare import compare
from coalign.experiments.demo.examples import evenly_spaced, examples, is_hit, middle_names, same_emoji, search
from coalign.experiments.tables.trials import FEATURES, Trial, finished, run_trials
from coalign.files import write_json
from coalign.methods import method_class
from coalign.methods.table import Arm, Table
from coalign.progress import waiting
from coalign.report.compare_page import Comparison
from coalign.report.demo_page import DemoSummary, Evaluated, Search, demo_page, sentence_of
from coalign.runs.folder import read_config
from coalign.runs.run import load
from coalign.version import __version__
from coalign.workflows.evaluate.samples import captions_of, open_as_trained, select_split
from coalign.workflows.train.preflight import check_trials

# ---------------------------------------------------------------- settings

# From scratch, 2,000 drawings teach a style: R@1 on the other vendor's is 2 to 5 %. An image encoder that knows photographs, kept as it is,
# bridges the styles. Of eight random views of each drawing, it is computed once.
START = {"text_tower": None, "image_tuning": "locked", "head": "glu", "image_size": 160, "feature_views": 8}
SETTINGS = Table(
    "CLIP and MCD on emoji",
    {name: Arm(name, start=START) for name in ("clip", "mcd")},
    epochs=80,
    batch_size=128,
    val_fraction=0.1,
    evals=8,
    precision="auto",
    test_splits=("test",),
    caption_safe_views=True,  # names tell colors and sides
)
TRAINED_ON, OTHER = "twemoji", "openmoji"  # vendors: the second's drawings are the test split
NAMES = {"twemoji": "Twemoji", "openmoji": "OpenMoji"}
QUERIES = ("red heart", "smiling cat", "flag of Japan")  # of the page's searches, before those that a rule chooses
EXAMPLES = 8  # pairs shown, and queries chosen by the rule

OWN_MINUTES, OWN_SEEDS = 10.0, 2  # for your own pairs
OWN_QUERIES = 12

# ---------------------------------------------------------------- emoji

DATA, PAGE, RESULT = "data", "index.html", "demo.json"
_SIDES = {"text_to_image": "Name → drawing", "image_to_text": "Drawing → name"}


def demo(out: str | Path, epochs: float | None = None, seed: int = 0) -> Path:
    """Trains CLIP and MCD on the same drawings of emoji, and compares them on held-out drawings and on another vendor's.

    Writes the emoji to `out`/data, a folder for each run, index.html and demo.json. If interrupted, call it again to resume.

    Args:
        out: The folder of the results.
        epochs: Train for this many epochs instead of those of `SETTINGS`.
        seed: The seed of both runs.

    Returns:
        The path of the page.

    Raises:
        UserError: The extra "demo" is not installed, the folder holds something else, or a run failed.
    """
    out, console = Path(out), Console(highlight=False, soft_wrap=True)
    folder, data = out / DATA, str(out / DATA / VENDORS_TABLE)
    if not (folder / "summary.json").exists():
        summary = prepare_emoji(folder, (TRAINED_ON, OTHER))
        console.print(f"{folder}: {summary.emoji:,} emoji, drawn by {NAMES[TRAINED_ON]} and by {NAMES[OTHER]}")
    epochs = epochs or SETTINGS.epochs
    arms = {name: replace(arm, start={**arm.start, "epochs": epochs}) for name, arm in SETTINGS.arms.items()}
    sweep = replace(SETTINGS, arms=arms, epochs=epochs)
    trials = {method_class(arm).__name__: Trial(sweep, arm, seed, data, out) for arm in sweep.arms}
    _train(list(trials.values()), console)
    runs = {name: trial.folder for name, trial in trials.items()}
    comparison = compare(list(runs.values()), groups=list(runs))
    source = open_source(data)
    with waiting("Writing the page"):
        page = _emoji_summary(out, source, runs, comparison)
    return _write(out, page, console)


def _train(trials: list[Trial], console: Console) -> None:
    """Trains what is not finished: both at once on two cores, with one thread each."""
    missing = [trial for trial in trials if not finished(trial)]
    if not missing:
        return
    first = missing[0]
    check_trials(first.data, lambda number: first.config(number), console)  # also fills the caches that both use
    jobs = min(len(missing), num_cores())
    how = "at once" if jobs > 1 else "one after the other" if len(missing) > 1 else "alone"
    names = " and ".join(method_class(trial.arm).__name__ for trial in missing)
    console.print(f"Training {names}, {how}; the logs are in {first.out}. If interrupted, run it again to resume.")
    print(device_line(best_device(None)), flush=True)
    if failures := run_trials(missing, jobs):
        raise UserError(f"{'; '.join(failures)}; the logs are in {first.out}.")
    shutil.rmtree(first.out / FEATURES, ignore_errors=True)


def _emoji_summary(out: Path, source: Source, runs: Mapping[str, Path], comparison: Comparison) -> DemoSummary:
    summary = json.loads((out / DATA / "summary.json").read_text())
    saved = {name: read_config(folder) for name, folder in runs.items()}
    side = load(next(iter(runs.values()))).encoder().image_size
    num_train, num_val = next((each.num_train, each.num_val) for each in saved.values())
    test = _test(source)
    names = middle_names(source, test.tolist(), EXAMPLES)
    known, new = NAMES[TRAINED_ON], NAMES[OTHER]
    first, second = runs
    return DemoSummary(
        title=f"{first} and {second} on emoji",
        subtitle=f"coalign {__version__} · {num_train:,} training pairs · {side} × {side} pixels",
        trained=f"Both models were trained on the same {num_train:,} drawings by {known}, each with its name as the caption, such as “red "
        f"heart”. They have never seen a drawing by {new}. Both start from the same image encoder, EfficientNet-Lite0, which was trained "
        "on the photographs of ImageNet and stays as it is. All else, such as the text encoder, starts from random weights.",
        examples_text=f"The same emoji by {known} (left, the style of training) and by {new} (right, only searched): the middle name, in "
        f"alphabetical order, of each of Unicode's {len(names)} largest groups.",
        examples=same_emoji(source, names, (TRAINED_ON, OTHER)),
        comparison=comparison,
        evaluated=[
            _evaluated(
                "retrieval_test", f"{len(test):,} drawings by {new}", "New style", "in a style that neither has seen"
            ),
            _evaluated(
                "retrieval", f"{num_val:,} held-out drawings by {known}", "Held out", "in the style of training"
            ),
        ],
        searches_text=f"The first five of {len(test):,} drawings by {new}, best first. A drawing is a hit (✓, green frame) if its name "
        f"has all words of the query. The first queries are ours; the others are the {len(names)} names above, which were not chosen by "
        "their outcome. “new” marks names that are not in training.",
        searches=emoji_searches(source, runs),
        epochs={name: each.config.epochs for name, each in saved.items()},
        runs={name: str(folder) for name, folder in runs.items()},
        commands_text="Put your images in a folder, each with its caption in a text file of the same name, or use a table. After "
        "`make demo`, run `source .venv/bin/activate` first.",
        commands=_next_commands(),
        licenses=[*summary["notices"].values(), "The drawings were cropped to their visible part and scaled."],
    )


def _evaluated(task: str, what: str, short: str, style: str) -> Evaluated:
    metrics = {f"{task}.{side}.r{k}": f"{words} R@{k}" for side, words in _SIDES.items() for k in (1, 10)}
    mean_recall = f"{task}.mean_recall"
    return Evaluated(
        title=f"{what}, {style}",
        short=short,
        where=f"Among {what}, {style},",
        metrics={**metrics, mean_recall: "Mean recall"},
        drawn=[f"{task}.{side}.r1" for side in _SIDES],
        found="finds the right one first for",
        queries="names",
        mean_recall=mean_recall,
    )


def _test(source: Source) -> np.ndarray:
    assert source.splits is not None
    return source.splits["test"]


def emoji_searches(source: Source, runs: Mapping[str, Path]) -> list[Search]:
    """Searches the other vendor's drawings for QUERIES, if it has such drawings, and for names chosen by a rule."""
    test = _test(source)
    names = {source.record(index).captions[0] for index in test.tolist()}
    chosen = [query for query in QUERIES if is_hit(query, list(names))]
    chosen += middle_names(source, test.tolist(), EXAMPLES)
    run = load(next(iter(runs.values())))
    trained = select_split(source, run.data, run, "train")[1].tolist()
    known = {caption for index in trained for caption in source.record(index).captions}
    return search(runs, source, test, {query: "new" if query in names - known else "" for query in chosen})


def _next_commands(data: str = "photos", run: str = "runs/mcd", query: str = "a red apple") -> list[str]:
    commands = (
        ["data", "check", data],
        ["train", "--recipe", "mcd", "--data", data, "--out", run],
        ["search", run, "--data", data, "--text", query],
    )
    return [shlex.join(["coalign", *command]) for command in commands]


def _train_and_search(result: BenchmarkResult, data: str, out: Path, queries: Sequence[str]) -> list[str]:
    if not (result.command and queries):
        return []
    return [
        result.command,
        shlex.join(["coalign", "search", str(out / RECOMMENDED), "--data", data, "--text", queries[0]]),
    ]


def _write(out: Path, summary: DemoSummary, console: Console) -> Path:
    sentences = [*summary.advice, *filter(None, (sentence_of(summary.comparison, e) for e in summary.evaluated))]
    values: dict[str, Any] = {"version": __version__, "sentences": sentences, **summary.comparison.to_json()}
    write_json(out / RESULT, values, indent=1, default=str)
    demo_page(summary).write(out / PAGE)
    for sentence in sentences:
        console.print(sentence)
    console.print(f"Page: {out / PAGE}")
    return out / PAGE


# ---------------------------------------------------------------- your own pairs


def own_demo(data: str, out: str | Path, minutes: float = OWN_MINUTES) -> Path:
    """Trains CLIP and MCD on your pairs for equal time, as `benchmark` does, and writes the same kind of page to `out`.

    minutes: of both together. If interrupted, call it again to resume.
    Returns the path of the page. Raises UserError as `benchmark` does, and if the pairs are too many for the time.
    """
    out, console = Path(out), Console(highlight=False, soft_wrap=True)
    try:
        result = benchmark(data, out, ("clip", "mcd"), minutes=minutes, seeds=OWN_SEEDS)
    except TooShort as error:
        command = f"coalign benchmark --data {shlex.quote(data)} --out runs/benchmark --methods clip mcd"
        raise UserError(
            f"{data} has too many pairs for {minutes:g} minutes on this machine; run `{command} --minutes {error.minutes}`."
        ) from error
    runs = {group.name: out / f"{group.name}-seed0" for group in result.comparison.groups}
    first = load(next(iter(runs.values())))
    source = open_as_trained(data, first)
    train, held_out = (select_split(source, data, first, split)[1] for split in ("train", "test"))
    captions = captions_of(source)
    queries = evenly_spaced([texts[0] for index in held_out.tolist() if (texts := captions(index))], OWN_QUERIES)
    known = result.comparison.groups[0].metrics
    rates = {name: found.title for name, found in known.items() if found.kind == "rate"}
    name = Path(data).name or data
    with waiting("Writing the page"):
        summary = DemoSummary(
            title=f"CLIP and MCD on {name}",
            subtitle=f"coalign {__version__} · {len(train):,} training pairs",
            trained=f"Both models were trained from random weights on the same {len(train):,} pairs of {name}. Their settings and lengths "
            "were chosen on other pairs, in the same time for both. The test pairs were used by neither.",
            examples_text="Training pairs, evenly spaced in the alphabetical order of their captions.",
            examples=examples(source, train.tolist(), EXAMPLES),
            comparison=result.comparison,
            evaluated=[Evaluated(f"{len(held_out):,} test pairs", "", "", rates, list(rates))],
            searches_text=f"The first five of {len(held_out):,} test images, best first. An image is a hit (✓, green frame) if its "
            "caption has all words of the query. The queries are their captions, evenly spaced in alphabetical order.",
            searches=search(runs, source, held_out, dict.fromkeys(queries, "")),
            epochs={name: read_config(folder).config.epochs for name, folder in runs.items()},
            runs={name: str(folder) for name, folder in runs.items()},
            commands_text="Train the recommended method, search with it, and compare more methods for longer:",
            commands=[
                *_train_and_search(result, data, out, queries),
                f"coalign benchmark --data {shlex.quote(data)} --out runs/benchmark --minutes 60",
            ],
            advice=[result.advice],
        )
    return _write(out, summary, console)
