from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from coalign.data.text.cleaning import caption_normalizer, clean_text
from coalign.data.text.tokenizer import END, START, Tokenizer, load_tokenizer, train_bpe
from coalign.errors import UserError

ORACLES = Path(__file__).parents[2] / "oracles" / "text.npz"
CORPUS = [
    "",
    " ",
    "a photo of a cat.",
    "A  Photo\tof\na CAT!!!",
    "it's we're I'd you'll they've I'm don't 'S 'RE '",
    "12345 3.14 1,000 ½ ² Ⅷ ٣ 第3章",
    "&amp; &lt;b&gt; &amp;amp; &eacute;t&eacute; &#39;x&#39; &AMP; & &nosuch;",
    "café naïve Zürich Straße İstanbul ſ K ﬁ",
    "schön mis-decoded: schÃ¶n, â€œquotesâ€\x9d",
    "狗在雪地里跑 漢字 かな カナ 한국어 ไทย हिन्दी العربية עברית",
    "😀 👍🏽 👩‍👩‍👧 🇩🇪 ❤️",
    "“curly” ‘quotes’ — dash … \u200b\ufeff\xa0\x85\x1f",
    "http://example.org/a_b?c=d&e=f #tag @name a_b__c",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "</w> <w> \\ \x00 \x07 \ud800",
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return load_tokenizer("clip")


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> Any:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(["A red dog runs", "the blue dog", "a red ball, the red sun", "naïve dogs"] * 3, 320)


def assert_same_ids(clip: Tokenizer, reference: Any, texts: list[str]) -> None:
    for text in texts:
        assert clip.encode(text, 10**6)[1:-1] == reference.encode(text), text


def test_ids_match_open_clip_on_a_corpus(clip: Tokenizer, open_clip_tokenizer: Any) -> None:
    assert_same_ids(clip, open_clip_tokenizer, CORPUS)


def test_ids_match_open_clip_on_random_strings(clip: Tokenizer, open_clip_tokenizer: Any) -> None:
    pools = [
        "abcdefgh'stremvld ",
        "0123456789 .,!?#@-_",
        "éüñßİıſ’“”—…",
        "漢字かな한국",
        "😀👍🏽🇩🇪\u200d♂️",
        "&amp;&lt;&#39;&eacute; \t\n\x85\xa0",
    ]
    rng = random.Random(0)
    texts = ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(30))) for _ in range(2000)]
    assert_same_ids(clip, open_clip_tokenizer, texts)


def test_ids_match_open_clip_on_characters_of_all_scripts(clip: Tokenizer, open_clip_tokenizer: Any) -> None:
    # Without unassigned code points, whose category depends on the Unicode version of each library.
    codes = [*range(0, 0x3000, 3), *range(0x3000, 0x20000, 61)]
    assigned = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    assert_same_ids(clip, open_clip_tokenizer, [f"a1{character}b{character}2!{character}" for character in assigned])


def test_batches_match_open_clip_up_to_padding(clip: Tokenizer, open_clip_tokenizer: Any) -> None:
    texts = ["a photo of a cat", "word " * 100, "x", ""]
    ids, lengths = clip(texts, 12)
    assert ids.tolist() == open_clip_tokenizer(texts, context_length=12).tolist()
    assert lengths.tolist() == [7, 12, 3, 2]
    short, _ = clip(["a", "a b c"], 77)
    assert short.shape == (2, 5)
    assert short[0].tolist() == [*clip.encode("a", 77), 0, 0]
    assert clip([], 77)[0].shape == (0, 0)


def test_decoding_matches_open_clip_up_to_outer_whitespace(clip: Tokenizer, open_clip_tokenizer: Any) -> None:
    for text in CORPUS:
        ids = clip.encode(text, 10**6)
        assert clip.decode(ids) == open_clip_tokenizer.decode(ids[1:-1]).strip()


def test_slip_oracle(clip: Tokenizer) -> None:
    """Unlike ours, SLIP's truncation drops the end token. Everything else is equal."""
    with np.load(ORACLES, allow_pickle=False) as oracles:
        texts, expected = oracles["slip_tokens.in.texts"], oracles["slip_tokens.out.tokens"].copy()
    ids, lengths = clip(texts.tolist(), 77)
    assert expected[3, 76] == clip.encode("word", 77)[1]
    expected[3, 76] = clip.end_id
    assert ids.tolist() == expected.tolist()
    assert lengths[3] == 77


def test_declip_oracle(clip: Tokenizer) -> None:
    """In DeCLIP's vocabulary, the mask token comes before the start and end tokens."""
    with np.load(ORACLES, allow_pickle=False) as oracles:
        texts, expected = oracles["declip_tokens.in.texts"], oracles["declip_tokens.out.tokens"]
        theirs = [int(oracles[f"declip_tokens.par.{name}"]) for name in ("sot", "eot", "mask")]
    mapped = np.select([expected == id_ for id_ in theirs], [clip.start_id, clip.end_id, clip.mask_id], expected)
    assert clip(texts.tolist(), 77)[0].tolist() == mapped.tolist()


def test_special_ids(clip: Tokenizer, small: Tokenizer) -> None:
    assert (clip.vocab_size, clip.start_id, clip.end_id, clip.mask_id) == (49408, 49406, 49407, 49408)
    for tokenizer in (clip, small):
        assert (tokenizer.start_id, tokenizer.end_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
        assert tokenizer.mask_id == tokenizer.vocab_size
        # open_clip reads these as special tokens; a caption must not be able to contain them
        ids = tokenizer.encode(f"x {START} y {END} [MASK] <|mask|>", 1000)
        assert max(ids[1:-1]) < tokenizer.start_id
        assert (
            tokenizer.decode([*tokenizer.encode("red", 9), tokenizer.mask_id, *tokenizer.encode("sun", 9)])
            == "red [MASK] sun"
        )


def test_truncation_keeps_start_and_end_tokens(clip: Tokenizer, small: Tokenizer) -> None:
    for tokenizer in (clip, small):
        full = tokenizer.encode("a red dog runs after the blue ball", 100)
        for context_length in range(2, len(full) + 2):
            ids = tokenizer.encode("a red dog runs after the blue ball", context_length)
            assert ids == (full if context_length >= len(full) else [*full[: context_length - 1], tokenizer.end_id])
        with pytest.raises(ValueError, match="context_length is 1, but must be at least 2"):
            tokenizer.encode("a", 1)


def test_pickling_and_saving_preserve_ids(clip: Tokenizer, small: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (clip, small):
        tokenizer.save(tmp_path / "mine.json")
        copies = [
            pickle.loads(pickle.dumps(tokenizer)),
            load_tokenizer(tmp_path / "mine.json"),
            load_tokenizer(str(tmp_path / "mine.json")),
        ]
        assert [copy.name for copy in copies] == [tokenizer.name, "mine", "mine"]
        for copy in copies:
            assert copy.vocab_size == tokenizer.vocab_size
            assert [copy.encode(text, 77) for text in CORPUS] == [tokenizer.encode(text, 77) for text in CORPUS]
            assert [copy.decode(copy.encode(text, 77)) for text in CORPUS] == [
                tokenizer.decode(tokenizer.encode(text, 77)) for text in CORPUS
            ]


def test_a_file_that_truncates_and_pads_is_read_without(small: Tokenizer, tmp_path: Path) -> None:
    """As an ONNX export's does; a run has a context length of its own."""
    backend = Backend.from_str(small.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "exported.json"))
    loaded = load_tokenizer(tmp_path / "exported.json")
    for text in ("a", "a photo of a small dog in the deep snow"):
        assert loaded.encode(text, 77) == small.encode(text, 77)
    loaded.save(tmp_path / "again.json")
    again = Backend.from_file(str(tmp_path / "again.json"))
    assert again.truncation is None
    assert again.padding is None


def test_normalizers_lowercase_a_final_sigma_as_python_does() -> None:
    for text in ("ΟΔΟΣ ΤΗΣ", "Σ", "ΑΣΑ", "Α.Σ", "dog\u200b\u0301Σ", "ΑΣ.", "ΑΣ.Α", "1Σ"):
        assert caption_normalizer().normalize_str(text).replace("\u0301", "") == text.lower().replace("\u0301", "")


@pytest.mark.parametrize("lowercases", [False, True])
def test_files_of_older_versions_clean_in_python(small: Tokenizer, tmp_path: Path, lowercases: bool) -> None:
    """As when they were trained: those of runs have no normalizer, and those of exports only join white space and lowercase."""
    backend = Backend.from_str(small.to_str())
    joined = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(joined) if lowercases else None
    backend.save(str(tmp_path / "old.json"))
    older = load_tokenizer(tmp_path / "old.json")
    assert older.repairs
    assert not small.repairs
    bare = Backend.from_str(backend.to_str())
    bare.normalizer = None
    for text in CORPUS:
        expected = bare.encode(clean_text(text), add_special_tokens=False).ids
        assert older.encode(text, 10**6)[1:-1] == expected
        assert pickle.loads(pickle.dumps(older)).encode(text, 10**6)[1:-1] == expected


def test_invalid_tokenizers_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.json").write_text("not a tokenizer")
    (tmp_path / "other.json").write_text(
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    )
    for spec, message in [
        ("absent.json", "tokenizer absent.json does not exist"),
        (tmp_path, "cannot be read"),
        (tmp_path / "bytes.json", "cannot be read"),
        (tmp_path / "text.json", "is not a tokenizer file"),
        (tmp_path / "other.json", "tokenizer other does not add a start and an end token"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(spec)


def naive_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
    """Reference byte-pair merges: the most frequent adjacent pair, ties broken by the age of its tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    words = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(clean_text(caption)))
    pieces = {word: list(word) for word in words}
    age = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age.setdefault("".join(best), len(age))
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def test_training_matches_the_reference_merges() -> None:
    captions = [
        "A red dog runs",
        "the blue dog",
        "a red ball, the red sun",
        "naïve dogs ran",
        "Red red RED",
        "the other ball",
    ]
    tokenizer = train_bpe(captions, 258 + 30)
    merges = json.loads(tokenizer._backend.to_str())["model"]["merges"]
    assert [tuple(pair) for pair in merges] == naive_merges(captions, 30)


def test_training_is_deterministic_and_lossless(small: Tokenizer) -> None:
    captions = [
        f"{a} {b} {c}"
        for a in ("a red", "The blue")
        for b in ("dog", "ball", "sun")
        for c in ("runs", "shines", "at noon")
    ]
    shuffled = random.Random(0).sample(captions, len(captions))
    first, second = train_bpe(captions, 280), train_bpe(iter(shuffled), 280)
    assert first.vocab_size == 280
    assert first._backend.to_str() == second._backend.to_str()
    assert len(first.encode("The red dog runs", 77)) < len("the red dog runs")
    assert first.encode("the red dog", 77) == first.encode("THE  RED dog ", 77)
    for text in CORPUS:
        cleaned = caption_normalizer().normalize_str(text.encode("utf-8", "replace").decode())
        assert small.decode(small.encode(text, 10**6)) == cleaned


def test_training_without_captions_or_with_a_tiny_vocabulary_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no captions"):
        train_bpe(["", "  "], 300)
    with pytest.raises(UserError, match="vocabulary size is 257, but must be at least 258"):
        train_bpe(["a"], 257)


def test_loading_clip_imports_neither_torch_nor_open_clip() -> None:
    code = "import sys; from coalign.data.text.tokenizer import load_tokenizer; load_tokenizer('clip')"
    code += ".encode('caf\\u00e9 &amp;', 9);"
    code += "print([name for name in ('torch', 'open_clip', 'numpy') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
