from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coalign.cli import main as cli
from coalign.data.prepare.paraphrase import apertium, back_translate, marian, paraphrase, rejection_reason
from coalign.data.sources.open import open_source
from coalign.errors import UserError

needs_apertium = pytest.mark.skipif(shutil.which("apertium") is None, reason="apertium is not installed")


@pytest.mark.parametrize(
    ("caption", "paraphrased", "reason"),
    [
        ("a small red apple on the table", "a little red apple on the table", None),  # a synonym
        ("two dogs run", "two dogs running", None),  # an inflection
        ("a boat", "a boat.", "same words"),
        ("a boat on the sea", "boat", "too short or too long"),
        ("a boat", "it is a boat that lies there", "too short or too long"),
        ("a red apple on a table", "the lies of gardens in some", "too different"),
        ("a boat", " ", "empty"),
        ("the of", "of the", None),  # only function words, which are not compared
    ],
)
def test_rejection_reasons(caption, paraphrased, reason):
    assert rejection_reason(caption, paraphrased) == reason


def lookup(**translations):
    """A translator with a fixed table of sentences. Returns other sentences unchanged."""
    return lambda sentences: [translations.get(sentence.replace(" ", "_"), sentence) for sentence in sentences]


def test_each_distinct_caption_is_paraphrased_once_per_pivot():
    calls = []

    def to_pivot(sentences):
        calls.append(list(sentences))
        return [sentence.upper() for sentence in sentences]

    first = (to_pivot, lookup(A_RED_CAT="a crimson cat", A_DOG="hot soup"))
    second = (to_pivot, lookup(A_RED_CAT="a crimson cat", A_DOG="a hound"))
    paraphrases = paraphrase(["a red cat", "a dog", "a red cat"], [first, second])
    assert calls == [["a red cat", "a dog"]] * 2
    assert paraphrases.by_caption == {"a red cat": ["a crimson cat"], "a dog": ["a hound"]}
    assert paraphrases.rejected == Counter({"too different": 1, "same as through another pivot": 1})


def test_captions_are_translated_in_batches_in_order():
    captions = [f"caption {number}" for number in range(1200)]
    sizes = []

    def to_pivot(sentences):
        sizes.append(len(sentences))
        return list(sentences)

    assert back_translate(captions, to_pivot, lambda sentences: list(sentences)) == captions
    assert max(sizes) <= 512


@needs_apertium
def test_apertium_translates_each_sentence():
    captions = ["a red apple on the table", "the house is big", "x [^ $ / <b>", ""]
    to_pivot, from_pivot = apertium("eng-spa"), apertium("spa-eng")
    spanish = to_pivot(captions[:2])
    assert "manzana" in spanish[0]
    assert "casa" in spanish[1]
    assert len(back_translate(captions, to_pivot, from_pivot)) == 4  # also with characters of Apertium's markup
    assert back_translate(captions[1:2], to_pivot, from_pivot) == ["The house is big"]


@needs_apertium
def test_missing_language_pair_is_a_user_error():
    with pytest.raises(UserError, match=r"language pair eng-xyz is not installed; available: .*eng-spa"):
        apertium("eng-xyz")


def test_missing_apertium_is_a_user_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"Apertium is not installed; .* install the packages apertium"):
        apertium("eng-spa")


@pytest.fixture(scope="module")
def tiny_marian(tmp_path_factory):
    """Folder of a Marian model with random weights and a vocabulary of seven tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("marian")
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    widths = {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")}
    config = MarianConfig(
        vocab_size=7, d_model=16, pad_token_id=0, eos_token_id=1, forced_eos_token_id=1, decoder_start_token_id=0,
        max_position_embeddings=32, max_length=8, **sizes, **widths,
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_marian_translates_each_sentence(tiny_marian):
    pytest.importorskip("transformers")
    translate = marian(str(tiny_marian))
    translations = translate(["a red cat", "a dog"])
    assert len(translations) == 2
    assert set(" ".join(translations).split()) <= {"a", "red", "cat", "dog", "<unk>"}
    assert translations == translate(["a red cat", "a dog"])  # beam search is deterministic


def test_missing_model_is_a_user_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="could not be loaded"):
        marian(str(tmp_path / "absent"))


@needs_apertium
def test_command_writes_a_dataset_with_paraphrases(tmp_path: Path, capsys):
    rows = [("a red apple on the table", ["fruit"]), ("the house is big", []), (None, ["thing"])]
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "caption": caption, "tags": tags} for n, (caption, tags) in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = ["data", "paraphrase", str(tmp_path / "pairs.jsonl"), "--out", str(out), "--apertium", "spa"]
    assert cli.main(command) == 0
    assert "paraphrases of 2 distinct captions" in capsys.readouterr().out
    source = open_source(str(out))
    assert len(source) == 3
    stored = [source.record(index).facts.get("paraphrases", {}) for index in range(2)]
    assert sum(map(len, stored)) >= 1
    for index, facts in enumerate(stored):
        assert set(facts) <= {rows[index][0]}
    assert (source.record(2).captions, source.record(2).tags) == ((), ("thing",))

    assert cli.main(command) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert cli.main([*command[:3], "--out", str(tmp_path / "new")]) == 2
    assert "No translator is given" in capsys.readouterr().err
