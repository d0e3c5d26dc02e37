"""Hugging Face encoders as text towers, compared with Transformers."""

import json

import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.runs.run import load

WORDS = ["a", "the", "red", "green", "blue", "gray", "thing", "of", "small", "big", "square", ",", "##s"]
SENTENCES = ["A red thing, of the blue", "gray squares", "nothing known"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a BERT with random weights and a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # with BERT's initialization, tokens would hardly differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_file(tmp_path, bert):
    path = tmp_path / "with-bert.json"
    path.write_text(json.dumps({**tiny.MODEL, "text_cfg": {"hf_model_name": str(bert)}}))
    return path


def spec(model_file, bert, **changes):
    tokens = load_tokenizer(f"hf:{bert}").vocab_size
    return TowerSpec(str(model_file), **{"vocab_size": tokens, "context_length": 20, "pretrained": "hf"} | changes)


@pytest.mark.parametrize("pooling", ["start", "mean", "end"])
def test_equals_transformers(bert, model_file, pooling):
    from transformers import AutoModel, AutoTokenizer

    tower = build_text_tower(spec(model_file, bert), "bidirectional", pooling).eval()
    features = tower(*load_tokenizer(f"hf:{bert}")(SENTENCES, 20), with_tokens=True)
    inputs = AutoTokenizer.from_pretrained(bert)(SENTENCES, padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(bert).eval()(**inputs).last_hidden_state
    valid = inputs["attention_mask"][..., None]
    torch.testing.assert_close(features.tokens, states * valid)
    expected = (states * valid).sum(1) / valid.sum(1) if pooling == "mean" else states[:, 0]
    torch.testing.assert_close(features.pooled, expected)
    assert tower.width == 16
    assert tower.projection(features.pooled).shape == (3, tower.embed_dim)


def test_mask_token_is_initialized_from_the_encoders(bert, model_file):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = load_tokenizer(f"hf:{bert}")
    tower = build_text_tower(
        spec(model_file, bert, vocab_size=tokenizer.vocab_size + 1), "bidirectional", "start"
    ).eval()
    ids, lengths = tokenizer(["a red thing"], 20)
    ids[0, 2] = tokenizer.mask_id
    inputs = AutoTokenizer.from_pretrained(bert)(["a [MASK] thing"], return_tensors="pt")
    states = AutoModel.from_pretrained(bert).eval()(**inputs).last_hidden_state
    torch.testing.assert_close(tower(ids, lengths).pooled, states[:, 0])


def test_dropout_is_off_in_training(bert, model_file):
    tower = build_text_tower(spec(model_file, bert)).train()
    inputs = load_tokenizer(f"hf:{bert}")(SENTENCES, 20)
    torch.testing.assert_close(tower(*inputs).pooled, tower(*inputs).pooled)


def test_tokenizer_round_trip(bert, tmp_path):
    tokenizer = load_tokenizer(f"hf:{bert}")
    assert tokenizer.encode("A red thing", 20) == [tokenizer.start_id, 5, 7, 11, tokenizer.end_id]
    assert tokenizer.decode(tokenizer.encode("a red thing", 20)) == "a red thing"
    ids = tokenizer.encode("a <start_of_text> [MASK] thing", 20)
    assert ids.count(tokenizer.start_id) == 1  # special tokens in captions are encoded as plain text
    assert 4 not in ids
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode("A red thing [MASK]", 20) == tokenizer.encode("A red thing [MASK]", 20)


@pytest.mark.parametrize("method", ["mct", "clip", "declip"])
def test_run_starts_from_pretrained_weights_and_loads(bert, model_file, pairs, tmp_path, method):
    out = tmp_path / "run"
    options = {"recipe": method, "pretrained": "hf", "tokenizer": f"hf:{bert}", "micro-batch": 4, "lr": 1e-4}
    assert cli.main(tiny.train_args(pairs, out, model_file, **options)) == 0
    run = load(out)
    trained = run.encoder().encode_text(SENTENCES)
    assert trained.isfinite().all()
    start = build_text_tower(spec(model_file, bert)).encoder.embeddings.position_embeddings.weight
    now = run.method.text.encoder.embeddings.position_embeddings.weight
    assert 0 < (now - start).abs().max() < 0.1
    assert F.cosine_similarity(now.flatten(), start.flatten(), dim=0) > 0.99


def test_unsupported_encoders_are_rejected(bert, model_file, tmp_path):
    for changes, message in (
        ({"vocab_size": 49408}, f"--tokenizer hf:{bert}"),
        ({"context_length": 25}, "has 24 positions"),
        ({"pretrained": "openai"}, "--pretrained hf"),
    ):
        with pytest.raises(UserError, match=message):
            build_text_tower(spec(model_file, bert, **changes))
    absent = tmp_path / "absent.json"
    absent.write_text(json.dumps({**tiny.MODEL, "text_cfg": {"hf_model_name": "nobody/nothing"}}))
    with pytest.raises(UserError, match="nobody/nothing could not be loaded"):
        build_text_tower(TowerSpec(str(absent), 50))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(tiny.MODEL))
    with pytest.raises(UserError, match="no Hugging Face text tower"):
        build_text_tower(TowerSpec(str(plain), 50, pretrained="hf"))
    with pytest.raises(UserError, match="hf:nobody/nothing could not be loaded"):
        load_tokenizer("hf:nobody/nothing")


@pytest.mark.parametrize("pretrained", [None, "hf"])
def test_causal_encoders_are_rejected(bert, tmp_path, pretrained):
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    folder = tmp_path / "gpt"
    config = GPT2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(bert)), n_embd=16, n_layer=1, n_head=2, n_positions=24
    )
    GPT2Model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    path = tmp_path / "with-gpt.json"
    path.write_text(json.dumps({**tiny.MODEL, "text_cfg": {"hf_model_name": str(folder)}}))
    with pytest.raises(UserError, match="uses causal attention, but must be bidirectional"):
        build_text_tower(spec(path, bert, pretrained=pretrained))
