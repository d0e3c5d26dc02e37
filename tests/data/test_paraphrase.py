from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coalign import cli
from coalign.data.paraphrase import apertium, back_translate, fault, marian, paraphrase
from coalign.data.sources import open_source
from coalign.errors import NoCaption, UserError

needs_apertium = pytest.mark.skipif(shutil.which("apertium") is None, reason="apertium is not installed")


@pytest.mark.parametrize(
    ("caption", "other", "reason"),
    [
        ("a small red apple on the table", "a little red apple on the table", None),  # a synonym
        ("two dogs run", "two dogs running", None),  # an inflection
        ("a boat", "a boat.", "the same words"),
        ("a boat on the sea", "boat", "too short or too long"),
        ("a boat", "it is a boat that lies there", "too short or too long"),
        ("a red apple on a table", "the lies of gardens in some", "other words than the caption's"),
        ("a boat", " ", "nothing came back"),
        ("the of", "of the", None),  # nothing but function words: nothing to compare
    ],
)
def test_faults(caption, other, reason):
    assert fault(caption, other) == reason


def table(**words):
    """A translator that knows these sentences, and gives others back as they are."""
    return lambda sentences: [words.get(sentence.replace(" ", "_"), sentence) for sentence in sentences]


def test_every_distinct_caption_goes_by_every_pivot_once():
    calls = []

    def there(sentences):
        calls.append(list(sentences))
        return [sentence.upper() for sentence in sentences]

    one = (there, table(A_RED_CAT="a crimson cat", A_DOG="hot soup"))
    two = (there, table(A_RED_CAT="a crimson cat", A_DOG="a hound"))
    found = paraphrase(["a red cat", "a dog", "a red cat"], [one, two])
    assert calls == [["a red cat", "a dog"]] * 2
    assert found.of_caption == {"a red cat": ["a crimson cat"], "a dog": ["a hound"]}
    assert found.left_out == Counter({"other words than the caption's": 1, "as by another pivot": 1})


def test_long_lists_go_in_parts_and_keep_their_order():
    captions = [f"caption {number}" for number in range(1200)]
    sizes = []

    def there(sentences):
        sizes.append(len(sentences))
        return list(sentences)

    assert back_translate(captions, there, lambda sentences: list(sentences)) == captions
    assert max(sizes) <= 512


@needs_apertium
def test_apertium_translates_line_by_line_there_and_back():
    captions = ["a red apple on the table", "the house is big", "x [^ $ / <b>", ""]
    there, back = apertium("eng-spa"), apertium("spa-eng")
    spanish = there(captions[:2])
    assert "manzana" in spanish[0]
    assert "casa" in spanish[1]
    assert len(back_translate(captions, there, back)) == 4  # marks of Apertium's own format lose no line
    assert back_translate(captions[1:2], there, back) == ["The house is big"]


@needs_apertium
def test_an_unknown_pair_is_named():
    with pytest.raises(UserError, match=r"no pair eng-xyz here; it has .*eng-spa"):
        apertium("eng-xyz")


def test_without_apertium_the_packages_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install the packages apertium"):
        apertium("eng-spa")


@pytest.fixture(scope="module")
def tiny_marian(tmp_path_factory):
    """A Marian model with random weights and a vocabulary of a few words."""
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
def test_marian_gives_a_sentence_for_each(tiny_marian):
    pytest.importorskip("transformers")
    translate = marian(str(tiny_marian))
    found = translate(["a red cat", "a dog"])
    assert len(found) == 2
    assert set(" ".join(found).split()) <= {"a", "red", "cat", "dog", "<unk>"}
    assert found == translate(["a red cat", "a dog"])  # a beam search draws nothing


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="could not be loaded"):
        marian(str(tmp_path / "absent"))


@needs_apertium
def test_the_command_writes_data_that_training_reads(tmp_path: Path, capsys):
    rows = [("a red apple on the table", ["fruit"]), ("the house is big", []), (None, ["thing"])]
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "caption": caption, "tags": tags} for n, (caption, tags) in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = ["data", "paraphrase", str(tmp_path / "pairs.jsonl"), "--out", str(out), "--apertium", "spa"]
    assert cli.main(command) == 0
    assert "paraphrases of 2 different captions" in capsys.readouterr().out
    source = open_source(str(out))
    assert len(source) == 3
    stored = [source.record(index).facts.get("paraphrases", {}) for index in range(2)]
    assert sum(map(len, stored)) >= 1
    for index, facts in enumerate(stored):
        assert set(facts) <= {rows[index][0]}
    with pytest.raises(NoCaption) as caught:
        source.record(2)
    assert caught.value.record.tags == ("thing",)

    assert cli.main(command) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert cli.main([*command[:3], "--out", str(tmp_path / "new")]) == 2
    assert "There is no translator" in capsys.readouterr().err
