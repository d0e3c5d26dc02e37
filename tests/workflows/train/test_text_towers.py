"""Runs with a pretrained text encoder: the tokenizer follows the weights, and the run needs neither their folder nor a hub afterwards."""

import json
import re
import shutil

import pytest
import torch
from helpers import tiny
from helpers.encoders import SENTENCES, add_pooling, write_bert, write_offset
from safetensors.torch import save_file

from coalign.cli import main as cli
from coalign.data.text.tokenizer import load_tokenizer, train_bpe
from coalign.methods import METHODS, recipe
from coalign.runs.card import card
from coalign.runs.folder import read_config
from coalign.runs.run import load

pytest.importorskip("transformers")
WORDS = [*tiny.COLORS, *tiny.NOUNS, "standing"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return add_pooling(write_bert(tmp_path_factory.mktemp("bert") / "my-bert", WORDS))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory, pairs, model_file):
    """An exported run with a vocabulary of its captions."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(tiny.train_args(pairs, folder / "run", model_file, epochs=1, evals=0)) == 0
    assert cli.main(["export", str(folder / "run"), "--to", "open_clip", "--out", str(folder / "export")]) == 0
    return folder / "export"


def train(pairs, out, model_file, **options):
    small = {"epochs": 1, "evals": 0, "lr": 1e-5, "context-length": None, "batch-size": 28, "batch-norm-group": 4}
    return cli.main(tiny.train_args(pairs, out, model_file, **small | options))


def error(capsys, *args, **options):
    assert train(*args, **options) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_an_encoder(bert, pairs, model_file, tmp_path, capsys, method):
    if method == "oner":
        assert "omit --text-tower" in error(capsys, pairs, tmp_path, model_file, recipe=method, text_tower=bert)
        return
    out = tmp_path / "run"
    assert train(pairs, out, model_file, recipe=method, text_tower=f"hf:{bert}", micro_batch=4) == 0
    run = load(out)
    start = load_tokenizer(f"hf:{bert}")
    assert [run.tokenizer.encode(text, 24) for text in SENTENCES] == [start.encode(text, 24) for text in SENTENCES]
    assert run.encoder().context_length == 24
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(bert).state_dict()
    for name, value in run.method.text.encoder.state_dict().items():
        assert (value - theirs[name]).abs().max() < 1e-3  # a few steps at a low rate


def test_the_run_needs_no_folder_afterwards(bert, pairs, model_file, tmp_path, capsys):
    folder, out = shutil.copytree(bert, tmp_path / "my-bert"), tmp_path / "run"
    options = {"recipe": "mcd", "text_tower": f"hf:{folder}", "epochs": 2, "evals": 2}
    assert train(pairs, out, model_file, **options) == 0
    before = load(out).encoder().encode_text(SENTENCES)
    saved = json.loads((out / "model.json").read_text())["text_cfg"]
    assert (saved["hf_config"]["model_type"], saved["hf_pooling"]) == ("bert", "mean")
    assert read_config(out).config.tokenizer == f"hf:{folder}"
    shutil.rmtree(folder)
    assert torch.equal(load(out).encoder().encode_text(SENTENCES), before)
    assert cli.main(["eval", str(out), "--tasks", f"retrieval:{pairs}"]) == 0
    for file in ("results.json", "report.html"):
        (out / file).unlink()
    assert train(pairs, out, model_file, resume="auto", **options) == 0
    text = card(out)
    assert "- text_tower: hf:my-bert" in text
    assert str(tmp_path) not in text
    assert cli.main(["export", str(out), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0, capsys.readouterr().err
    code = re.search("```python\n(.*?)```", (tmp_path / "onnx" / "README.md").read_text(), re.DOTALL)[1]
    assert "text.lower()" not in code
    for library in ("open_clip", "transformers"):
        assert cli.main(["export", str(out), "--to", library, "--out", str(tmp_path / library)]) == 2
        message = f"{library} cannot hold the text encoder of this run, a BertModel of Hugging Face; use --to onnx."
        assert message in capsys.readouterr().err


def test_masked_words_are_the_encoders_mask_token(bert):
    from coalign.data.text.views import mask_tokens
    from coalign.types import NOT_MASKED

    tokenizer = load_tokenizer(f"hf:{bert}")
    ids, lengths = (x.numpy() for x in tokenizer(["red apple", "a blue boat standing"] * 500, 24))
    draws = torch.rand(3, *ids.shape, dtype=torch.float64).numpy()
    masked, labels = mask_tokens(ids, lengths, 0.5, draws, tokenizer)
    chosen = labels != NOT_MASKED
    assert not set(labels[chosen]) & set(tokenizer.special_ids)
    replaced = masked[chosen]
    assert 0.7 < (replaced == 4).mean() < 0.9  # [MASK]
    assert not set(replaced) & {0, 1, 2, 3}
    assert (masked[~chosen] == ids[~chosen]).all()


def test_a_tokenizer_without_a_mask_token_is_rejected_for_masked_words(pairs, model_file, tmp_path, capsys):
    folder = write_offset("roberta", tmp_path / "roberta", WORDS)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<mask>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    message = error(capsys, pairs, tmp_path / "run", model_file, recipe="mcd", text_tower=folder)
    assert "mcd masks words, but the tokenizer roberta has no mask token" in message
    assert train(pairs, tmp_path / "run", model_file, text_tower=folder) == 0


@pytest.mark.parametrize("option", ["pretrained", "text_tower"])
def test_the_tokenizer_of_an_open_clip_folder_is_the_default(open_clip_folder, pairs, tmp_path, capsys, option):
    options = {option: open_clip_folder, "model": open_clip_folder}
    out = tmp_path / "run"
    assert train(pairs, out, open_clip_folder, **options) == 0
    ours, theirs = load(out).tokenizer, load_tokenizer(open_clip_folder / "tokenizer.json")
    assert ours.equals(theirs)
    words = sorted(f"{noun} {color}" for noun in tiny.NOUNS for color in ("violet", "orange", "white"))
    other = tmp_path / "other.json"
    train_bpe(words, theirs.vocab_size).save(other)
    if load_tokenizer(other).vocab_size == theirs.vocab_size:  # another vocabulary of equal size
        message = error(capsys, pairs, tmp_path / "x", open_clip_folder, tokenizer=other, **options)
        assert "does not fit the text encoder" in message
        assert "omit --tokenizer" in message
    message = error(capsys, pairs, tmp_path / "x", open_clip_folder, tokenizer="captions", **options)
    assert "--tokenizer captions trains a new vocabulary, which does not fit" in message
    message = error(capsys, pairs, tmp_path / "x", open_clip_folder, tokenizer="clip", **options)
    assert "The tokenizer clip does not fit" in message


def test_weights_of_an_unknown_vocabulary_need_a_tokenizer(open_clip_folder, pairs, tmp_path, capsys):
    folder = shutil.copytree(open_clip_folder, tmp_path / "copy")
    (folder / "tokenizer.json").rename(tmp_path / "words.json")
    message = error(capsys, pairs, tmp_path / "run", folder, pretrained=folder)
    assert f"The tokenizer of the text encoder {folder} is not known; give it with --tokenizer." in message
    assert train(pairs, tmp_path / "run", folder, pretrained=folder, tokenizer=tmp_path / "words.json") == 0


def test_an_encoder_without_a_tokenizer_takes_another(bert, pairs, model_file, tmp_path, capsys):
    folder = shutil.copytree(bert, tmp_path / "copy")
    for file in ("vocab.txt", "tokenizer.json"):
        (folder / file).unlink(missing_ok=True)
    message = error(capsys, pairs, tmp_path / "run", model_file, text_tower=folder)
    assert f"The folder {folder} has no tokenizer; give the one of its model with --tokenizer." in message
    assert train(pairs, tmp_path / "run", model_file, text_tower=folder, tokenizer=f"hf:{bert}") == 0


def test_defaults_from_scratch():
    for num_pairs in (100, 50_000, 200_000):
        config = recipe("clip")(num_pairs)
        assert (config.tokenizer, config.context_length) == (None, None)


def test_init_from_keeps_tokenizer_and_context(bert, pairs, model_file, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(pairs, first, model_file, text_tower=bert, context_length=30) == 0
    assert train(pairs, second, model_file, init_from=first) == 0
    assert load(second).encoder().context_length == 30
    assert load(second).tokenizer.equals(load(first).tokenizer)
    message = error(capsys, pairs, tmp_path / "x", model_file, init_from=first, tokenizer="clip")
    assert f"--init-from keeps the tokenizer of {first}" in message


def test_wrong_weights_in_the_folder(bert, pairs, model_file, tmp_path, capsys):
    folder = shutil.copytree(bert, tmp_path / "copy")
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    message = error(capsys, pairs, tmp_path / "run", model_file, text_tower=folder)
    assert "are not those of the model in its config.json" in message
