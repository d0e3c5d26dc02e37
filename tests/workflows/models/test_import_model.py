"""Import of CLIPModels of transformers: the same embeddings in open_clip's format, from which training starts."""

import json

import pytest
import torch
from helpers import tiny

from coalign.cli import main as cli
from coalign.data.text.tokenizer import load_tokenizer
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.runs.run import load
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.models.export import export
from coalign.workflows.models.import_model import import_model


@pytest.fixture(scope="module")
def run_with_clip_tokenizer(tmp_path_factory, pairs):
    """A run of one epoch with CLIP's vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.write_model(folder)
    options = {"tokenizer": "clip", "epochs": 1, "evals": 0}
    assert cli.main(tiny.train_args(pairs, folder / "run", model, **options)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def imported(run_with_clip_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    export(run_with_clip_tokenizer, "transformers", folder / "theirs")
    import_model(f"transformers:{folder / 'theirs'}", folder / "ours")
    return folder


def test_import_has_the_same_metrics(imported, run_with_clip_tokenizer, pairs):
    task = f"retrieval:{pairs}"
    expected = evaluate(str(run_with_clip_tokenizer), [task], EvalConfig(split="all"))[task]
    result = evaluate(str(imported / "ours"), [task], EvalConfig(preprocess="coalign", split="all"))[task]
    for results in (result, expected):
        del results["metrics"]["modality_gap"]  # differs by rounding
    assert result == expected
    assert not (imported / "ours" / "tokenizer.json").exists()  # CLIP's tokenizer needs none


def test_training_starts_from_an_import(imported, run_with_clip_tokenizer, pairs, tmp_path):
    """All weights of both towers are the model's, even for a method with another text pooling."""
    folder = str(imported / "ours")
    tokenizer = load_tokenizer("clip")
    spec = TowerSpec(folder, tokenizer.vocab_size, 12, pretrained=folder)
    original = load(run_with_clip_tokenizer).method
    for built, source in (
        (build_image_tower(spec), original.image),
        (build_text_tower(spec, "bidirectional", "start"), original.text),
    ):
        expected = source.state_dict()
        assert built.state_dict().keys() == expected.keys()
        for name, value in built.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    options = {"recipe": "uniclip", "epochs": 1, "evals": 0, "tokenizer": "clip", "pretrained": folder}
    assert cli.main(tiny.train_args(pairs, tmp_path / "run", folder, **options)) == 0
    assert load(tmp_path / "run").config.model == folder


def test_custom_tokenizer_is_imported(trained, pairs, tmp_path):
    export(trained, "transformers", tmp_path / "theirs")
    assert cli.main(["import", f"transformers:{tmp_path / 'theirs'}", "--out", str(tmp_path / "ours")]) == 0
    task = f"retrieval:{pairs}"
    expected, result = (
        evaluate(str(model), [task], EvalConfig(preprocess="coalign", split="all"))[task]
        for model in (trained, tmp_path / "ours")
    )
    for results in (result, expected):
        del results["metrics"]["modality_gap"]  # differs by rounding
    assert result == expected


def test_invalid_imports_raise(imported, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    theirs = imported / "theirs"
    other = tmp_path / "other"
    other.mkdir()
    for path in theirs.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_act"] = "relu"
    (other / "config.json").write_text(json.dumps(config))
    for model, out, message in (
        ("open_clip:ViT-B-32", "new", "open_clip's models need no import"),
        ("transformers:nowhere/nothing", "new", "transformers cannot load nowhere/nothing"),
        (f"transformers:{theirs}", "full", "is not an empty folder"),
        (f"transformers:{theirs}", "absent/new", "absent does not exist"),
        (f"transformers:{other}", "new", "open_clip cannot represent this CLIPModel"),
    ):
        assert cli.main(["import", model, "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "new").exists()
