"""held_out.npz: the per-item outcomes of a run's metrics, and the hashes of the items."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny

from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.data.text.prompts import class_prompts
from coalign.evaluation.embed import embed_images
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.runs.outcomes import item_hashes, read_outcomes, write_outcomes
from coalign.types import DualEncoder
from coalign.workflows.evaluate.samples import Samples, captions_of, read_labels


def encoder():
    """An encoder that recognizes colors, with some errors."""
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def encode_text(texts):
        colors = torch.tensor([next((c for n, c in tiny.COLORS.items() if n in text), (9, 9, 9)) for text in texts])
        return colors.float() @ weights.T + torch.tensor([[len(text)] for text in texts])

    return DualEncoder(lambda pixels: pixels.float().mean((2, 3)) @ weights.T, encode_text, 32)


def write(folder, data, indices, classes=("red", "green", "blue", "grey")):
    source = open_source(str(data))
    images = embed_images(encoder(), image_batches(source, indices, 32))
    labels = read_labels([Samples(source, indices)])[0]
    evaluations = {
        "retrieval": retrieve(encoder(), images, captions_of(source)),
        "zeroshot": classify(encoder(), images, labels.class_of, list(classes), class_prompts(classes, ["a {} thing"])),
    }
    metrics = {
        "retrieval": evaluations["retrieval"].result.metrics(),
        "zeroshot": evaluations["zeroshot"].result.metrics,
    }
    items = {task: item_hashes(source, found.images.indices, found.texts) for task, found in evaluations.items()}
    folder.mkdir()
    write_outcomes(folder, metrics, items)
    return metrics, evaluations, *read_outcomes(folder)


def test_metrics_can_be_recomputed_from_outcomes(tmp_path, pairs):
    metrics, evaluations, items, outcomes = write(tmp_path / "run", pairs, np.arange(0, 60, 2))
    assert {f"{task}.{metric.name}" for task, found in metrics.items() for metric in found} == set(outcomes)
    statistics = {"mean": np.mean, "median": np.median}
    for task, found in metrics.items():
        for metric in found:
            outcome = outcomes[f"{task}.{metric.name}"]
            if outcome.statistic == "mean per class":
                classes = np.unique(outcome.groups)
                value = np.mean([outcome.values[outcome.groups == label].mean() for label in classes])
            else:
                value = statistics[outcome.statistic](outcome.values)
            assert value == pytest.approx(metric.value)
    for side in ("image_to_text", "text_to_image"):
        assert outcomes[f"retrieval.{side}.median_rank"].groups.tolist() == list(range(30))
    images, texts = evaluations["retrieval"].images.embeds.numpy(), evaluations["retrieval"].text_embeds.numpy()
    gap = outcomes["retrieval.modality_gap"]
    assert gap.groups is None
    assert gap.values.tolist() == [pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)), rel=1e-5)]
    assert outcomes["zeroshot.acc1"].groups is None
    assert set(items) == {"retrieval", "zeroshot"}
    assert [len(set(hashes.tolist())) for hashes in items.values()] == [30, 30]


def test_item_hashes_depend_on_names_captions_and_classes(tmp_path, pairs):
    indices = np.arange(12)
    items = write(tmp_path / "one", pairs, indices)[2]
    moved = shutil.copytree(pairs, tmp_path / "elsewhere")
    moved_items = write(tmp_path / "two", moved, indices)[2]
    for task in items:
        np.testing.assert_array_equal(items[task], moved_items[task])
    others = write(tmp_path / "three", pairs, indices + 1)[2]
    assert not set(items["retrieval"].tolist()) & set(others["retrieval"].tolist())  # other candidates
    renamed = write(tmp_path / "four", pairs, indices, classes=("red", "green", "blue", "gray"))[2]
    assert renamed["retrieval"].tolist() == items["retrieval"].tolist()
    assert not set(renamed["zeroshot"].tolist()) & set(items["zeroshot"].tolist())


def test_resuming_a_finished_run_writes_a_missing_file(tmp_path, trained, pairs, model_file):
    from coalign.cli import main as cli

    run = shutil.copytree(trained, tmp_path / "run")

    results = json.loads((run / "results.json").read_text())
    (run / "held_out.npz").unlink()
    assert cli.main(tiny.train_args(pairs, run, model_file, resume="auto")) == 0
    with np.load(trained / "held_out.npz") as expected, np.load(run / "held_out.npz") as actual:
        assert set(expected) == set(actual)
        for name in expected.files:
            np.testing.assert_array_equal(expected[name], actual[name])
    assert json.loads((run / "results.json").read_text())["tasks"] == results["tasks"]
