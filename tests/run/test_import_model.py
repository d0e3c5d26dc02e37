"""CLIPModels of transformers, imported: the same embeddings in open_clip's form, from which training starts."""

import json

import pytest
import tiny
import torch

from coalign import cli
from coalign.data.tokenizer import load_tokenizer
from coalign.networks.towers import TowerSpec, build_image_tower, build_text_tower
from coalign.run.evaluate import evaluate
from coalign.run.export import export
from coalign.run.import_model import import_model
from coalign.run.model import load


@pytest.fixture(scope="module")
def run_with_clips_words(tmp_path_factory, pairs):
    """A run of one epoch with CLIP's vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.write_model(folder)
    options = {"tokenizer": "clip", "epochs": 1, "evals": 0}
    assert cli.main(tiny.train_args(pairs, folder / "run", model, **options)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def imported(run_with_clips_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    export(run_with_clips_words, "transformers", folder / "theirs")
    import_model(f"transformers:{folder / 'theirs'}", folder / "ours")
    return folder


def test_an_import_has_the_models_figures(imported, run_with_clips_words, pairs):
    task = f"retrieval:{pairs}"
    expected = evaluate(str(run_with_clips_words), [task], split="all")[task]
    found = evaluate(str(imported / "ours"), [task], preprocess="coalign", split="all")[task]
    for side in ("image_to_text", "text_to_image"):
        assert found[side] == expected[side]
    assert not (imported / "ours" / "tokenizer.json").exists()  # it is CLIP's own


def test_a_method_starts_from_an_import(imported, run_with_clips_words, pairs, tmp_path):
    """Every weight of both towers is the model's, also for a method that reads captions elsewhere."""
    folder = str(imported / "ours")
    tokenizer = load_tokenizer("clip")
    spec = TowerSpec(folder, tokenizer.vocab_size, 12, pretrained=folder)
    earlier = load(run_with_clips_words).method
    for built, was in (
        (build_image_tower(spec), earlier.image),
        (build_text_tower(spec, "bidirectional", "start"), earlier.text),
    ):
        expected = was.state_dict()
        assert built.state_dict().keys() == expected.keys()
        for name, value in built.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    options = {"recipe": "uniclip", "epochs": 1, "evals": 0, "tokenizer": "clip", "pretrained": folder}
    assert cli.main(tiny.train_args(pairs, tmp_path / "run", folder, **options)) == 0
    assert load(tmp_path / "run").config.model == folder


def test_a_vocabulary_of_its_own_travels_along(trained, pairs, tmp_path):
    export(trained, "transformers", tmp_path / "theirs")
    assert cli.main(["import", f"transformers:{tmp_path / 'theirs'}", "--out", str(tmp_path / "ours")]) == 0
    task = f"retrieval:{pairs}"
    expected, found = (
        evaluate(str(model), [task], preprocess="coalign", split="all")[task] for model in (trained, tmp_path / "ours")
    )
    assert found["image_to_text"] == expected["image_to_text"]
    assert found["text_to_image"] == expected["text_to_image"]


def test_what_cannot_be_imported(imported, tmp_path, capsys):
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
    for model, out, words in (
        ("open_clip:ViT-B-32", "new", "open_clip's models need no import"),
        ("transformers:nowhere/nothing", "new", "transformers cannot load nowhere/nothing"),
        (f"transformers:{theirs}", "full", "is not an empty folder"),
        (f"transformers:{theirs}", "absent/new", "there is no folder"),
        (f"transformers:{other}", "new", "open_clip cannot hold this CLIPModel"),
    ):
        assert cli.main(["import", model, "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not (tmp_path / "new").exists()
