"""CLIP_benchmark's command line computes exactly our accuracy of an export, with open_clip's preprocessing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.models.export import export

# CLIP_benchmark 1.6.2 converts one-element arrays with float(), which numpy 2.4 no longer supports
COMMAND = """
import sys
from clip_benchmark.cli import main
from clip_benchmark.metrics import zeroshot_classification
zeroshot_classification.float = lambda array: array.item()
sys.argv[0] = "clip_benchmark"
main()
"""
CLASSES = (*tiny.COLORS, *tiny.NOUNS[:4])


def write_textures(root):
    """DTD's layout with eight classes named by words of the training captions; images of the nouns reuse the colors."""
    rng = np.random.default_rng(0)
    (root / "dtd" / "dtd" / "labels").mkdir(parents=True)
    for split, count in (("train", 2), ("val", 2), ("test", 12)):
        lines = []
        for label, name in enumerate(CLASSES):
            folder = root / "dtd" / "dtd" / "images" / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                color = list(tiny.COLORS.values())[label % 4]
                coarse = np.clip(rng.normal(color, 60, (2 + label, 3 + label, 3)), 0, 255).astype(np.uint8)
                size = tuple(rng.integers(30, 90, 2).tolist())
                path = folder / f"{name}_{split}{number}.jpg"
                Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(path)
                lines.append(f"{name}/{path.name}\n")
        (root / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("".join(lines))
    return root


@pytest.mark.slow
def test_accuracy_equals_clip_benchmark(pairs, model_file, tmp_path):
    trained = tmp_path / "run"
    assert cli.main(tiny.train_args(pairs, trained, model_file, epochs=40, evals=0, context_length=64)) == 0
    root, folder = write_textures(tmp_path / "sets"), tmp_path / "exported"
    export(trained, "open_clip", folder)
    arguments = ["--dataset", "dtd", "--dataset_root", str(root), "--model", f"local-dir:{folder}", "--pretrained", ""]
    options = ["--no_amp", "--num_workers", "0", "--output", str(tmp_path / "theirs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COMMAND, "eval", *arguments, *options]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    theirs = json.loads((tmp_path / "theirs.json").read_text())["metrics"]
    config = EvalConfig(data_root=root, preprocess="open_clip")
    results = [evaluate(str(model), ["zeroshot:dtd"], config)["zeroshot:dtd"] for model in (trained, folder)]
    assert 1 / 8 < theirs["acc1"] < 1
    for values in results:
        ours = {name: metric["value"] for name, metric in values["metrics"].items()}
        assert ours["acc1"] == theirs["acc1"]
        assert ours["acc5"] == theirs["acc5"]
        assert ours["mean_per_class_recall"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-12)
