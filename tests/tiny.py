"""A tiny data set on disk, a tiny model, and the commands that train it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
NOUNS = [
    "apple",
    "boat",
    "chair",
    "door",
    "engine",
    "flower",
    "guitar",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "onion",
    "pencil",
]
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1},
}


def write_pairs(folder, count=64, seed=0):
    """Noisy pictures of one colour, in a folder of that colour, named by a caption that no other has."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 4]
        pixels = np.clip(rng.normal(colour, 40, (24, 32, 3)), 0, 255).astype(np.uint8)
        noun, verb = NOUNS[number // 4 % 16], "standing" if number < 64 else f"lying{number}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{name}_{noun}_{verb}.png")
    return folder


def write_model(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.write_text(json.dumps(MODEL))
    return path


def train_args(data, out, model, /, **options):
    """The words of `coalign train`: 3 epochs of 7 steps on the 60 or so training pairs of `write_pairs`."""
    given = {
        "data": data, "out": out, "model": model, "context-length": 12, "batch-size": 8, "epochs": 3, "workers": 0,
        "val-fraction": 0.1, "evals": 2, "lr": 1e-3,
    } | {name.replace("_", "-"): value for name, value in options.items()}  # fmt: skip
    return [
        "train",
        *(word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))),
    ]


def start(args, threads=1, processes=1, **options):
    """A real process of the command, or several under torchrun."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "coalign.cli", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def rows(path):
    """The rows of a JSON-lines file, none if it is absent."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
