from __future__ import annotations

import importlib.util
import lzma
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from coalign.data.text import lexicon
from coalign.data.text.lexicon import (
    base_forms,
    is_english,
    likely_parts_of_speech,
    parts_of_speech,
    synonyms,
    words_of,
)

ROOT = Path(__file__).parents[3]
TABLES = ROOT / "src" / "coalign" / "data" / "tables"


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("car", ("auto", "automobile", "machine", "motorcar", "railcar")),  # WordNet: car#1, then car#2
        ("Dog", ("domestic dog", "canis familiaris")),
        ("polar_bear", ("ice bear", "ursus maritimus", "thalarctos maritimus")),
        ("polar  bear", ("ice bear", "ursus maritimus", "thalarctos maritimus")),
        ("quickly", ("rapidly", "speedily")),
        ("automobiles", ("car", "auto", "machine", "motorcar")),
    ],
)
def test_synonyms_are_ordered_by_frequency_of_the_sense(word: str, first: tuple[str, ...]) -> None:
    assert synonyms(word)[: len(first)] == first


def test_synonyms_are_mutual_and_never_the_word_itself() -> None:
    sample = sorted(word for word in lexicon._parts() if word.isalpha())[::101]
    with_synonyms = [word for word in sample if synonyms(word)]
    assert len(with_synonyms) > 200
    for word in with_synonyms:
        lemmas = synonyms(word)
        assert len(lemmas) == len(set(lemmas))
        assert word not in lemmas
        forms = {word, *(base for base, _ in base_forms(word))}
        for other in set(lemmas) - lexicon._function_words():
            # the lemma "clutches" is also a form of "clutch"
            inflected = forms & {base for base, _ in base_forms(other)}
            assert inflected or forms & set(synonyms(other)), (word, other)


def test_function_and_unknown_words_have_no_synonyms() -> None:
    assert [synonyms(word) for word in ("a", "the", "in", "can", "It", "gramastar", "", "漢字", "/")] == [()] * 9


def test_offensive_senses_are_excluded_from_synonyms() -> None:
    lemmas = {item for line in lexicon._table("synonyms").split("\n") for item in line.split("\t")}
    assert not {"nigger", "coolie", "redskin", "darkie", "kike"} & lemmas


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dog", {("dog", "n"), ("dog", "v")}),
        ("dogs", {("dog", "n"), ("dog", "v")}),
        ("ponies", {("pony", "n")}),
        ("churches", {("church", "n"), ("church", "v")}),
        ("wolves", {("wolf", "n")}),
        ("firemen", {("fireman", "n")}),
        ("geese", {("goose", "n")}),
        ("ran", {("run", "v")}),
        ("jumping", {("jump", "v"), ("jumping", "n")}),
        ("baked", {("bake", "v"), ("baked", "a")}),
        ("larger", {("large", "a"), ("larger", "a")}),
        ("happiest", {("happy", "a")}),
        ("quickly", {("quickly", "r")}),
        ("gramastar", set()),
    ],
)
def test_base_forms(word: str, expected: set[tuple[str, str]]) -> None:
    assert set(base_forms(word)) == expected
    assert parts_of_speech(word) == {part for _, part in expected}


def test_parts_of_speech() -> None:
    assert parts_of_speech("RED") == {"n", "a"}
    assert parts_of_speech("dog's") == {"n", "v"}
    assert likely_parts_of_speech("dog") == {"n"}
    assert likely_parts_of_speech("tall") == {"a"}
    assert likely_parts_of_speech("dogs") == {"n"}
    assert likely_parts_of_speech("fishing") >= {"n", "v"}  # although the base form "fish" is a noun only
    assert likely_parts_of_speech("light") == {"n", "v", "a"}
    assert likely_parts_of_speech("the") == parts_of_speech("the") == {"f"}
    assert parts_of_speech("in") > {"f", "n"}
    assert likely_parts_of_speech("in") == {"f"}
    assert parts_of_speech("漢字") == likely_parts_of_speech("") == frozenset()
    sample = sorted(lexicon._words())[::97]
    assert all(likely_parts_of_speech(word) <= parts_of_speech(word) for word in sample)
    assert [word for word in sample if parts_of_speech(word) and not likely_parts_of_speech(word)] == []


def test_is_english() -> None:
    english = "the Cat's cats running Munich color colors colored gray "
    english += "colour colours coloured grey don't don’t I'll guesthouse vintage TV whales"
    assert [word for word in english.split() if not is_english(word)] == []
    foreign = "maison fleur haus und weiß niña playa das sur der avec jpg img dsc gramastar qwzx 漢字 ёлка 123 ..."
    assert [word for word in foreign.split() if is_english(word)] == []


def test_words_of() -> None:
    text = "The dog's 2 red-hot BALLS, don’t_run: O'Brien's, rock 'n' roll 500ml été"
    assert words_of(text) == (
        ["the", "dog", "red", "hot", "balls", "don't", "run", "o'brien", "rock", "n", "roll", "ml", "été"]
    )


def test_tables_are_small_and_include_their_licenses() -> None:
    assert sum(path.stat().st_size for path in TABLES.iterdir()) < 1_500_000
    notice = (TABLES / "NOTICE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
    assert "Copyright 2000-2011 by Kevin Atkinson" in notice
    assert "Copyright (c) J Ross Beresford 1993-1999. All Rights Reserved." in notice


def test_tables_are_loaded_lazily() -> None:
    code = "import sys; from coalign.data.text import lexicon; lexicon.words_of('a');"
    code += (
        "print(lexicon._words.cache_info().currsize, lexicon._synsets.cache_info().currsize, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0 0 False\n"


# ---------------------------------------------------------------- scripts/build_tables.py


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tables", ROOT / "scripts" / "build_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, Path]:
    """A WordNet with seven synsets and a word list with five words, in the folders and formats of the Debian packages."""
    wordnet, words = tmp_path / "wordnet", tmp_path / "words"
    folder = wordnet / "usr/share/wordnet"
    head = "  1 This software and database is being provided to you  \n"
    contents = {
        "index.noun": "and/or n 1 0 1 0 00000050  \nauto n 1 0 1 0 00000010  \ncar n 2 0 2 2 00000010 00000020  \n"
        "ethnic_slur n 1 0 1 0 00000030  \npolar_bear n 1 0 1 0 00000050  \nrailcar n 1 0 1 0 00000020  \n"
        "slur n 1 0 1 0 00000030  \nspade n 2 0 2 0 00000040 00000060  \n",
        "index.verb": "car v 1 0 1 1 00000070  \ndrive v 1 0 1 1 00000070  \n",
        "index.adj": "",
        "index.adv": "",
        "data.noun": "00000010 06 n 02 car 0 Auto 0 001 @ 00000001 n 0000 | a motor vehicle; with ;u in its gloss  \n"
        "00000020 06 n 02 car 1 railcar 0 000 | a wheeled vehicle  \n"
        "00000030 10 n 02 slur 0 ethnic_slur 0 000 | a slur  \n"
        "00000040 18 n 02 spade 0 offence 0 002 @ 00000001 n 0000 ;u 00000030 n 0000 | offensive  \n"
        "00000050 05 n 02 polar_bear 0 and/or 0 000 | a bear  \n"
        "00000060 05 n 01 spade 0 000 | a tool  \n",
        "data.verb": "00000070 38 v 02 drive 0 car(p) 0 000 01 + 01 00 | to drive  \n",
        "data.adj": "",
        "data.adv": "",
        "cntlist.rev": "car%1:06:00:: 1 50\ncar%1:06:01:: 2 3\ncar%2:38:00:: 1 4\ndrive%2:38:00:: 1 9\n",
        "noun.exc": "men man\nmen_at_arms man_at_arms\n",
        "verb.exc": "drove drive\n",
        "adj.exc": "",
        "adv.exc": "",
    }
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_text((head if name.startswith(("index", "data")) else "") + content)
    for package, text in [
        (
            "wordnet/usr/share/doc/wordnet-base",
            "Format: x\n\nFiles: *\nCopyright: A\nLicense: W\n Line one\n .\n  kept\n\nFiles: debian/*\nB\n",
        ),
        ("words/usr/share/doc/wamerican", "The whole\n\ntext.\n"),
    ]:
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "copyright").write_text(text)
    (words / "usr/share/dict").mkdir(parents=True)
    (words / "usr/share/dict/american-english").write_text("zebra\nMunich\nMunich's\ncan't\nélan\n")
    return wordnet, words


def table(folder: Path, name: str) -> list[str]:
    return lzma.decompress((folder / f"{name}.txt.xz").read_bytes()).decode().split("\n")


def test_build(script: ModuleType, packages: tuple[Path, Path], tmp_path: Path) -> None:
    script.build(*packages, tmp_path / "out")
    # counts of car: 50 for the first noun, 4 for the verb, 3 for the second noun; its synset of drive is listed as "car(p)"
    assert table(tmp_path / "out", "synonyms") == [
        "car\tauto",
        "car/2\trailcar",
        "slur\tethnic slur",
        "polar bear\tand/or/0",
        "drive\tcar/1",
    ]
    assert table(tmp_path / "out", "parts") == ["n. and/or auto railcar slur spade", "n.v car", "v. drive"]
    assert table(tmp_path / "out", "irregular") == ["n men man", "v drove drive"]
    assert table(tmp_path / "out", "words") == ["can't", "munich", "zebra", "élan"]
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert "Copyright: A\nLicense: W\nLine one\n\n kept\n\n====" in notice
    assert notice.endswith("The whole\n\ntext.\n")
    assert "debian" not in notice


def test_lexicon_reads_the_built_tables(
    script: ModuleType, packages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.build(*packages, tmp_path / "out")
    (tmp_path / "out" / "function_words.txt").write_text("the\n")
    caches = [value for value in vars(lexicon).values() if hasattr(value, "cache_clear")]
    monkeypatch.setattr(lexicon, "_TABLES", tmp_path / "out")
    for cache in caches:
        cache.cache_clear()
    try:
        assert synonyms("car") == ("auto", "drive", "railcar")
        assert synonyms("and/or") == ("polar bear",)
        assert synonyms("spade") == ()
        assert likely_parts_of_speech("cars") == {"n"}
        assert parts_of_speech("cars") == {"n", "v"}
    finally:
        for cache in caches:
            cache.cache_clear()
