"""Runs the benchmarks one after another and prints one table of their ratios (`make bench`). Load on the machine widens the spread.

With --out, the table is written as JSON, with the machine; lines of scripts that are not run again are kept. startup.py and zero_shot.py
need packages beyond coalign's development tools and are run separately.

Run: python benchmarks/all.py [SCRIPT …] [--out results/benchmarks.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lines import LINES_FILE
from rich.console import Console
from rich.table import Table

from coalign.version import __version__

HERE = Path(__file__).parent
SCRIPTS = {
    "views_3.py": [],
    "step_clip.py": [],
    "small_models.py": ["--epochs", "2", "--repeats", "2"],
    "step_overhead.py": [],
    "tiled_losses.py": ["--scale"],
    "gradient_caching.py": [],
    "cost_curves.py": [],
    "data_at_scale.py": [],
    "queue_lookup.py": [],
    "linear_probe.py": [],
    "feature_cache.py": [],
    "quantized.py": [],
}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def print_table(lines: list[dict[str, Any]]) -> None:
    table = Table("script", "measurement", "RATIO", "min", "max", "target", "")
    for line in lines:
        numbers = [f"{line[name]:.3g}" for name in ("median", "least", "most")]
        verdict = "" if line["holds"] is None else "met" if line["holds"] else "MISSED"
        table.add_row(line["script"].removesuffix(".py"), line["what"], *numbers, line["target"], verdict)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := [name for name in options.scripts if name not in SCRIPTS]:
        parser.error(f"unknown script {unknown[0]}; available scripts: {', '.join(SCRIPTS)}")
    previous = []
    if options.out:  # fail before an hour of measuring, not after
        if options.out.exists() and options.out.stat().st_size:
            previous = json.loads(options.out.read_text())["lines"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("a").close()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        lines_file = Path(folder) / "lines.jsonl"
        lines_file.touch()
        for name in options.scripts:
            print(f"{name} {' '.join(SCRIPTS[name])}".rstrip(), flush=True)
            start = time.monotonic()
            command = [sys.executable, str(HERE / name), *SCRIPTS[name]]
            if subprocess.run(command, env=os.environ | {LINES_FILE: str(lines_file)}, check=False).returncode:
                failed.append(name)
            print(f"({(time.monotonic() - start) / 60:.1f} min)\n", flush=True)
        lines = [json.loads(text) for text in lines_file.read_text().splitlines()]
    kept = [line for line in previous if line["script"] in SCRIPTS and line["script"] not in options.scripts]
    lines = sorted([*kept, *lines], key=lambda line: list(SCRIPTS).index(line["script"]))
    print_table(lines)
    if options.out:
        machine = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        text = json.dumps({"version": __version__, **machine, "lines": lines}, indent=1) + "\n"
        options.out.write_text(text)
    missed = [f"{line['script']}: {line['what']}" for line in lines if line["holds"] is False]
    for outcome, names in (("failed", failed), ("missed its target", missed)):
        for name in names:
            print(f"{outcome}: {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
