"""A tiny dataset on disk, a tiny model, and the commands that train it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}
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
    """Writes noisy images of one color each, in folders by color. Their file names are distinct captions. Returns the folder."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name, color = list(COLORS.items())[number % 4]
        pixels = np.clip(rng.normal(color, 40, (24, 32, 3)), 0, 255).astype(np.uint8)
        noun, verb = NOUNS[number // 4 % 16], "standing" if number < 64 else f"lying{number}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{name}_{noun}_{verb}.png")
    return folder


def write_model(folder):
    """Writes the model's configuration and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.write_text(json.dumps(MODEL))
    return path


def error_line(capsys):
    """The error that a command printed, which is one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def train_args(data, out, model, /, **options):
    """The arguments of `coalign train`; the defaults are 3 epochs of 7 steps on the training pairs of `write_pairs`."""
    settings = {
        "data": data, "out": out, "model": model, "context-length": 12, "batch-size": 8, "epochs": 3, "workers": 0,
        "val-fraction": 0.1, "evals": 2, "lr": 1e-3,
    } | {name.replace("_", "-"): value for name, value in options.items()}  # fmt: skip
    return [
        "train",
        *(arg for name, value in settings.items() if value is not None for arg in (f"--{name}", str(value))),
    ]


def start(args, threads=1, processes=1, **options):
    """Starts the command in a new process, or in several under torchrun."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "coalign", *args],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def rows(path):
    """The rows of a JSON-lines file, [] if it does not exist."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
