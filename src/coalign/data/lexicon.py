"""English words, their synonyms and their parts of speech, from compact tables shipped with the package.

The tables are WordNet 3.0 and the SCOWL word list (tables/NOTICE), built by scripts/build_tables.py. A table is read
when it is first needed. Parts of speech are WordNet's n (noun), v (verb), a (adjective), r (adverb), and f for the
closed classes, which WordNet leaves out.
"""

from __future__ import annotations

import lzma
import re
from functools import cache, lru_cache
from importlib.resources import files

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # letters, with apostrophes inside
_TABLES = files("coalign.data") / "tables"
_MAX_SENSES = 100  # of one lemma; scripts/build_tables.py asserts it
_RANK = re.compile(r"/\d+$")

# WordNet's detachment rules: an ending and what stands in its place in the base form.
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
    """The words of a text in lower case, without numbers and punctuation; a possessive 's is left out."""
    return [_normal(word) for word in WORD.findall(text)]


def is_english(word: str) -> bool:
    """Whether the word, in any case and inflection, is in the word list or in WordNet.

    Of up to three letters the word list alone decides: WordNet's many abbreviations are words of other languages
    ("das", "sur").
    """
    word = _normal(word)
    return word in _words() or (len(word) > 3 and bool(base_forms(word)))


@lru_cache(maxsize=100_000)
def synonyms(word: str) -> tuple[str, ...]:
    """Lemmas that share a meaning with the word (or with its base forms), those of its most frequent meaning first;
    lower case.

    May hold several words ("domestic dog"). Empty for function words and unknown words. WordNet's slurs and
    obscenities are left out.
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
    """Every part of speech the word may have: letters of "nvarf"; empty for an unknown word."""
    word = _normal(word)
    return frozenset(part for _, part in base_forms(word)) | ({"f"} if word in _function_words() else frozenset())


def likely_parts_of_speech(word: str) -> frozenset[str]:
    """The parts of speech without those that make up less than a tenth of the base form's uses: "dog" and "dogs" are
    hardly ever verbs. But "dogged", like all inflections other than -s, is what its ending says. A function word is
    that alone. Empty for an unknown word.
    """
    word = _normal(word)
    if word in _function_words():
        return frozenset("f")
    forms = base_forms(word)
    inflected = frozenset(part for base, part in forms if base != word and not word.endswith("s"))
    likely = inflected | {part for base, part in forms if part in _parts()[base].partition(".")[0]}
    return likely or frozenset(part for _, part in forms)


@lru_cache(maxsize=100_000)
def base_forms(word: str) -> tuple[tuple[str, str], ...]:
    """(base form, part of speech) pairs for a lower-case word, the word itself included where it is a base form.

    As WordNet's own look-up does: a part of speech's list of irregular forms first, else its rules for endings.
    """
    table = _parts()
    found = []
    for part, endings in _ENDINGS.items():
        regular = [word[: -len(ending)] + new for ending, new in endings if word.endswith(ending)]
        for form in (word, *(_irregular().get((part, word)) or regular)):
            if part in table.get(form, ""):
                found.append((form, part))
    return tuple(dict.fromkeys(found))


def _normal(word: str) -> str:
    return word.lower().replace("’", "'").removesuffix("'s")


def _table(name: str) -> str:
    return lzma.decompress((_TABLES / f"{name}.txt.xz").read_bytes()).decode("utf-8")


@cache
def _function_words() -> frozenset[str]:
    """Determiners, pronouns, prepositions, conjunctions, auxiliaries and the like; the one table that is written by
    hand."""
    return frozenset((_TABLES / "function_words.txt").read_text(encoding="utf-8").split())


@cache
def _words() -> frozenset[str]:
    return frozenset(_table("words").split("\n"))


@cache
def _parts() -> dict[str, str]:
    """word -> its parts of speech, "na.v": likely ones, a dot, rare ones."""
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
    """A lemma's most frequent sense by the lemma, its second most frequent by "lemma/1" …: a tab-separated line of
    that sense's lemmas."""
    return {item: line for line in _table("synonyms").split("\n") for item in line.split("\t")}
