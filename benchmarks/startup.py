"""Time from the command to the first training step: `coalign train` compared with open_clip's trainer on the same pairs.

DATA is a folder written by `coalign data openclipart --out DATA`. Both train ViT-B/32 with CLIP's vocabulary, batch 32, one loader process,
float32. The tab-separated file for open_clip is written beforehand; ours also splits off validation pairs, as for any user. The clock
starts with the process. It is read when training is about to start ("ready": our first line, open_clip's "Start epoch 0") and when the
first step is done (our row in metrics.jsonl, open_clip's log line); then the process is killed. The two alternate; a ratio is of
neighboring runs.

Run: python benchmarks/startup.py DATA [--repeats 5]        (open_clip's trainer needs `pip install "open_clip_torch[training]"`)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 900.0  # seconds to the first step
MODEL, BATCH = "ViT-B-32", "32"


class Times(NamedTuple):
    ready: float
    first_step: float


def write_table(data: Path, table: Path) -> int:
    """Writes the pairs in open_clip's format. Returns their number."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        writer.writerows([data.resolve() / row["image"], row["captions"][0]] for row in rows)
    return len(rows)


def peer_command(table: Path, out: Path) -> list[str]:
    options = ["--dataset-type", "csv", "--train-data", str(table), "--model", MODEL, "--batch-size", BATCH]
    options += ["--workers", "1", "--precision", "fp32", "--device", "cpu", "--logs", str(out), "--name", "run"]
    return [sys.executable, "-m", "open_clip_train.main", *options]


def our_command(data: Path, out: Path) -> list[str]:
    options = [
        "--data",
        str(data),
        "--out",
        str(out),
        "--model",
        MODEL,
        "--tokenizer",
        "clip",
        "--context-length",
        "77",
    ]
    options += ["--batch-size", BATCH, "--workers", "1", "--precision", "fp32", "--device", "cpu"]
    return [sys.executable, "-m", "coalign", "train", "--recipe", "clip", *options]


def measure(command: list[str], ready: str, first_step: tuple[Path | None, str]) -> Times:
    """Returns the seconds until the process prints `ready`, and until the text of `first_step` appears in a file or in the output."""
    with tempfile.NamedTemporaryFile() as printed:
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        is_ready = None
        file, text = Path(printed.name) if first_step[0] is None else first_step[0], first_step[1]
        try:
            while (now := time.perf_counter() - start) < TIMEOUT and process.poll() is None:
                if is_ready is None and ready in Path(printed.name).read_text(errors="replace"):
                    is_ready = now
                if is_ready is not None and file.exists() and text in file.read_text(errors="replace"):
                    return Times(is_ready, now)
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output = Path(printed.name).read_text(errors="replace")
    raise SystemExit(f"No first step of `{' '.join(command)}`. Its output:\n{output[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder written by `coalign data openclipart --out DATA`")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # also ends the measured process
    data: Path = options.data
    if not (data / "metadata.jsonl").is_file():
        parser.error(f"{data} has no metadata.jsonl; create it with `coalign data openclipart --download --out {data}`")
    if importlib.util.find_spec("webdataset") is None:
        parser.error('open_clip\'s trainer is incomplete; run `pip install "open_clip_torch[training]"`')
    names = ("open_clip", "coalign")
    times: list[tuple[Times, Times]] = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "pairs.tsv"
        num_pairs = write_table(data, table)
        for run in range(options.repeats + 1):
            theirs, ours = Path(folder) / f"peer-{run}", Path(folder) / f"ours-{run}"
            both = (
                measure(peer_command(table, theirs), "Start epoch 0", (None, "Train Epoch: 0")),
                measure(our_command(data, ours), " pairs, ", (ours / "metrics.jsonl", '"step": 0')),
            )
            if run:  # the first run fills the disk cache
                times.append(both)
                each = ", ".join(f"{n} {t.ready:.1f} s, {t.first_step:.1f} s" for n, t in zip(names, both))
                print(f"run {run}: {each}", flush=True)
    print(f"{num_pairs:,} pairs, {MODEL}, batch {BATCH}, float32; medians of {options.repeats} runs")
    for number, event in enumerate(("ready to train", "first step done")):
        medians = [statistics.median(pair[side][number] for pair in times) for side in range(2)]
        ratios = sorted(theirs[number] / ours[number] for theirs, ours in times)
        seconds = ", ".join(f"{name} {median:.1f} s" for name, median in zip(names, medians))
        print(f"{event}: {seconds}; RATIO {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
