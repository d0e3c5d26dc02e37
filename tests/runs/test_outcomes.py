"""held_out.npz: the per-item outcomes of a run's metrics, and the hashes of the items."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny

from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.evaluation.embed import embed_images
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.runs.outcomes import read_outcomes, write_outcomes
from coalign.types import DualEncoder
from coalign.workflows.evaluate.samples import captions_of, read_labels


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
    labels = read_labels(source, indices)
    evaluations = {
        "retrieval": retrieve(encoder(), images, captions_of(source)),
        "zero_shot": classify(encoder(), images, labels.class_of, list(classes), ["a {} thing"]),
    }
    folder.mkdir()
    write_outcomes(folder, evaluations, dict.fromkeys(evaluations, source))
    return evaluations, *read_outcomes(folder)


def test_metrics_can_be_recomputed_from_outcomes(tmp_path, pairs):
    evaluations, items, outcomes = write(tmp_path / "run", pairs, np.arange(0, 60, 2))
    retrieval, zero_shot = evaluations["retrieval"].result, evaluations["zero_shot"].result
    for name, side in (("image_to_text", retrieval.image_to_text), ("text_to_image", retrieval.text_to_image)):
        for k, metric in side.recall.items():
            assert outcomes[f"retrieval.{name}.r{k}"].values.mean() == pytest.approx(metric.value)
        ranks = outcomes[f"retrieval.{name}.median_rank"]
        assert (ranks.kind, np.median(ranks.values)) == ("rank", side.median_rank.value)
        assert ranks.clusters.tolist() == list(range(30))
    images, texts = evaluations["retrieval"].images.embeds.numpy(), evaluations["retrieval"].text_embeds.numpy()
    gap = outcomes["retrieval.modality_gap"]
    assert (gap.kind, gap.clusters) == ("distance", None)
    assert gap.values.tolist() == [pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)), rel=1e-5)]
    accuracy = outcomes["zero_shot.acc1"]
    assert (accuracy.kind, accuracy.clusters) == ("rate", None)
    assert accuracy.values.mean() == pytest.approx(zero_shot.top1.value)
    recall = outcomes["zero_shot.mean_per_class_recall"]
    assert recall.kind == "class rate"
    by_class = [recall.values[recall.clusters == label].mean() for label in range(4)]
    assert by_class == pytest.approx(zero_shot.per_class)
    assert set(items) == {"retrieval", "zero_shot"}
    assert [len(set(hashes.tolist())) for hashes in items.values()] == [30, 30]


def test_item_hashes_depend_on_names_captions_and_classes(tmp_path, pairs):
    indices = np.arange(12)
    items = write(tmp_path / "one", pairs, indices)[1]
    moved = shutil.copytree(pairs, tmp_path / "elsewhere")
    moved_items = write(tmp_path / "two", moved, indices)[1]
    for task in items:
        np.testing.assert_array_equal(items[task], moved_items[task])
    others = write(tmp_path / "three", pairs, indices + 1)[1]
    assert items["retrieval"][1:].tolist() == others["retrieval"][:-1].tolist()
    assert items["retrieval"][0] != others["retrieval"][0]
    renamed = write(tmp_path / "four", pairs, indices, classes=("red", "green", "blue", "gray"))[1]
    assert renamed["retrieval"].tolist() == items["retrieval"].tolist()
    assert not set(renamed["zero_shot"].tolist()) & set(items["zero_shot"].tolist())


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
    assert json.loads((run / "results.json").read_text())["retrieval"] == results["retrieval"]
