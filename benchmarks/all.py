"""All benchmarks, one after another, and one table of their ratios: what `make bench` runs. A busy machine shows in the spread.

With --out, the table is kept as JSON, with what machine it was; lines of scripts that are not run again stay in it. What needs more than
coalign's development tools is run alone: startup.py, zero_shot.py.

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
from lines import KEPT
from rich.console import Console
from rich.table import Table

from coalign import __version__

HERE = Path(__file__).parent
SCRIPTS = {
    "views_3.py": [],
    "step_clip.py": [],
    "step_overhead.py": [],
    "tiled_losses.py": ["--scale"],
    "gradient_caching.py": [],
    "cost_curves.py": [],
    "data_at_scale.py": [],
    "queue_lookup.py": [],
    "linear_probe.py": [],
}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def show(lines: list[dict[str, Any]]) -> None:
    table = Table("script", "what", "RATIO", "from", "to", "target", "")
    for kept in lines:
        numbers = [f"{kept[name]:.3g}" for name in ("median", "least", "most")]
        verdict = "" if kept["holds"] is None else "holds" if kept["holds"] else "MISSED"
        table.add_row(kept["script"].removesuffix(".py"), kept["what"], *numbers, kept["target"], verdict)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := [name for name in options.scripts if name not in SCRIPTS]:
        parser.error(f"there is no {unknown[0]} among {', '.join(SCRIPTS)}")
    before = []
    if options.out:  # what is wrong with it is seen before an hour of measuring, not after
        if options.out.exists() and options.out.stat().st_size:
            before = json.loads(options.out.read_text())["lines"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.open("a").close()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "lines.jsonl"
        kept.touch()
        for name in options.scripts:
            print(f"{name} {' '.join(SCRIPTS[name])}".rstrip(), flush=True)
            began = time.monotonic()
            command = [sys.executable, str(HERE / name), *SCRIPTS[name]]
            if subprocess.run(command, env=os.environ | {KEPT: str(kept)}, check=False).returncode:
                failed.append(name)
            print(f"({(time.monotonic() - began) / 60:.1f} min)\n", flush=True)
        lines = [json.loads(text) for text in kept.read_text().splitlines()]
    kept_on = [old for old in before if old["script"] in SCRIPTS and old["script"] not in options.scripts]
    lines = sorted([*kept_on, *lines], key=lambda one: list(SCRIPTS).index(one["script"]))
    show(lines)
    if options.out:
        machine = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        text = json.dumps({"version": __version__, **machine, "lines": lines}, indent=1) + "\n"
        options.out.write_text(text)
    missed = [f"{kept['script']}: {kept['what']}" for kept in lines if kept["holds"] is False]
    for what, names in (("failed", failed), ("missed its target", missed)):
        for name in names:
            print(f"{what}: {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
