"""English words, their synonyms and their parts of speech, from compact tables shipped with the package.

The tables are built from WordNet 3.0 and the SCOWL word list (see tables/NOTICE) by scripts/build_tables.py, and are read at first use.
Parts of speech are WordNet's n (noun), v (verb), a (adjective) and r (adverb), and f for function words, which WordNet does not cover.
"""

from __future__ import annotations

import lzma
import re
from functools import cache, lru_cache
from importlib.resources import files

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # letters and inner apostrophes
_TABLES = files("coalign.data") / "tables"
_MAX_SENSES = 100  # per lemma; asserted by scripts/build_tables.py
_RANK = re.compile(r"/\d+$")

# WordNet's detachment rules: ending of the inflected form, ending of the base form.
_ENDINGS = {
    "n": [
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without numbers, punctuation and possessive 's."""
    return [_normalize(word) for word in WORD.findall(text)]


def is_english(word: str) -> bool:
    """Whether a word, in any case and inflection, is in the word list or in WordNet.

    Words of up to three letters must be in the word list, because many of WordNet's abbreviations are words of other languages ("das",
    "sur").
    """
    word = _normalize(word)
    return word in _words() or (len(word) > 3 and bool(base_forms(word)))


@lru_cache(maxsize=100_000)
def synonyms(word: str) -> tuple[str, ...]:
    """Returns the lemmas that share a sense with the word or its base forms, in lower case, those of the most frequent sense first.

    A lemma can consist of several words ("domestic dog"). Function words and unknown words have none. Slurs and obscenities are excluded.
    """
    word = " ".join(word.lower().replace("_", " ").split())
    if word in _function_words():
        return ()
    forms = {word: None} | {base: None for base, _ in base_forms(word)}
    keys = [key for form in forms for key in (form, *(f"{form}/{rank}" for rank in range(_MAX_SENSES)))]
    groups = [_synsets()[key].split("\t") for key in keys if key in _synsets()]
    lemmas = (_RANK.sub("", item) for group in groups for item in group)
    return tuple(dict.fromkeys(lemma for lemma in lemmas if lemma not in forms))


def parts_of_speech(word: str) -> frozenset[str]:
    """Returns all possible parts of speech of a word, as letters of "nvarf". Empty for an unknown word."""
    word = _normalize(word)
    return frozenset(part for _, part in base_forms(word)) | ({"f"} if word in _function_words() else frozenset())


def likely_parts_of_speech(word: str) -> frozenset[str]:
    """Returns the parts of speech that make up at least a tenth of the uses of the base form: "dog" and "dogs" are nouns only.

    Inflections other than -s also have the part of speech of their ending: "dogged" can be a verb. A function word has no other part of
    speech. Empty for an unknown word.
    """
    word = _normalize(word)
    if word in _function_words():
        return frozenset("f")
    forms = base_forms(word)
    inflected = frozenset(part for base, part in forms if base != word and not word.endswith("s"))
    likely = inflected | {part for base, part in forms if part in _parts()[base].partition(".")[0]}
    return likely or frozenset(part for _, part in forms)


@lru_cache(maxsize=100_000)
def base_forms(word: str) -> tuple[tuple[str, str], ...]:
    """Returns (base form, part of speech) pairs of a lower-case word, including the word itself if it is a base form.

    As in WordNet's lookup, irregular forms take precedence over the rules for endings, per part of speech.
    """
    table = _parts()
    pairs = []
    for part, endings in _ENDINGS.items():
        regular = [word[: -len(ending)] + new for ending, new in endings if word.endswith(ending)]
        for form in (word, *(_irregular().get((part, word)) or regular)):
            if part in table.get(form, ""):
                pairs.append((form, part))
    return tuple(dict.fromkeys(pairs))


def _normalize(word: str) -> str:
    return word.lower().replace("’", "'").removesuffix("'s")


def _table(name: str) -> str:
    return lzma.decompress((_TABLES / f"{name}.txt.xz").read_bytes()).decode("utf-8")


@cache
def _function_words() -> frozenset[str]:
    """Determiners, pronouns, prepositions, conjunctions, auxiliaries and the like. This table is written by hand."""
    return frozenset((_TABLES / "function_words.txt").read_text(encoding="utf-8").split())


@cache
def _words() -> frozenset[str]:
    return frozenset(_table("words").split("\n"))


@cache
def _parts() -> dict[str, str]:
    """Word -> parts of speech, such as "na.v": the common ones, a dot, the rare ones."""
    table: dict[str, str] = {}
    for line in _table("parts").split("\n"):
        pattern, *words = line.split(" ")
        table.update(dict.fromkeys(words, pattern))
    return table


@cache
def _irregular() -> dict[tuple[str, str], list[str]]:
    table = {}
    for line in _table("irregular").split("\n"):
        part, form, *bases = line.split()
        table[part, form] = bases
    return table


@cache
def _synsets() -> dict[str, str]:
    """Sense -> its lemmas, tab-separated. The key "lemma" is the lemma's most frequent sense, "lemma/1" the second, and so on."""
    return {item: line for line in _table("synonyms").split("\n") for item in line.split("\t")}
