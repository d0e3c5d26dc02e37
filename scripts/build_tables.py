"""Builds the word tables of coalign.data.text.lexicon from Debian's packages wordnet-base and wamerican.

    python scripts/build_tables.py wordnet-base_*.deb wamerican_*.deb

Each argument is a .deb file, or the folder it was unpacked into (`apt-get download wordnet-base wamerican` downloads
both). The output depends on the input alone. The tables are xz-compressed UTF-8 text, with these lines:

    words.txt.xz       one word, lower case, without possessives
    synonyms.txt.xz    one synset of two or more lemmas, separated by tabs; `lemma/3`: this is the lemma's fourth most
                       frequent sense; `lemma` alone: it is the most frequent one
    parts.txt.xz       `na.v word word …`: the words' parts of speech; those after the dot make up less than a tenth of
                       their uses
    irregular.txt.xz   `v ran run`: part of speech, irregular form, base form
"""

from __future__ import annotations

import argparse
import lzma
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

OUT = Path(__file__).parent.parent / "src" / "coalign" / "data" / "tables"
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSE_TYPES = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
# Usage domains of WordNet whose synsets are excluded, so that they never enter captions or queries.
OFFENSIVE = {"ethnic_slur", "disparagement", "obscenity"}
SMALL_SHARE = 0.1

Sense = tuple[str, str]  # part of speech, offset of the synset


def tagged_counts(folder: Path) -> dict[tuple[str, str, int], int]:
    """Returns (lemma, part of speech, sense number) -> number of occurrences in WordNet's tagged texts."""
    counts = {}
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, number, count = line.split()
        lemma, _, rest = key.partition("%")
        counts[lemma, SENSE_TYPES[rest[0]], int(number)] = int(count)
    return counts


def read_index(folder: Path) -> dict[str, dict[Sense, int]]:
    """Returns lemma -> its senses with their counts, the most frequent first."""
    counts = tagged_counts(folder)
    senses_of: dict[str, list[tuple[int, int, int, Sense]]] = defaultdict(list)
    for order, (part, name) in enumerate(FILES.items()):
        for line in (folder / f"index.{name}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license
                continue
            lemma, _, synsets, *rest = line.split()
            for number, offset in enumerate(rest[-int(synsets) :], start=1):
                senses_of[lemma].append((-counts.get((lemma, part, number), 0), number, order, (part, offset)))
    return {
        lemma: {sense: -negative for negative, _, _, sense in sorted(senses)} for lemma, senses in senses_of.items()
    }


def read_synsets(folder: Path) -> dict[Sense, list[str]]:
    """Returns synset -> its lemmas in WordNet's order, lower case, without synsets marked as offensive."""
    synsets: dict[Sense, list[str]] = {}
    usages: dict[Sense, list[Sense]] = {}
    for part, name in FILES.items():
        for line in (folder / f"data.{name}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            offset, _, _, size, *rest = line.split()
            count = int(size, 16)
            lemmas = [re.sub(r"\((a|p|ip)\)$", "", lemma).lower() for lemma in rest[: 2 * count : 2]]
            synsets[part, offset] = list(dict.fromkeys(lemmas))
            pointers = rest[2 * count + 1 : 2 * count + 1 + 4 * int(rest[2 * count])]
            usages[part, offset] = [
                (pointers[i + 2], pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] == ";u"
            ]
    marks = {sense for sense, lemmas in synsets.items() if OFFENSIVE.intersection(lemmas)}
    return {sense: lemmas for sense, lemmas in synsets.items() if not marks.intersection(usages[sense])}


def synonym_lines(index: dict[str, dict[Sense, int]], synsets: dict[Sense, list[str]]) -> list[str]:
    assert max(map(len, index.values())) < 100, "coalign.data.text.lexicon looks up at most a hundred senses"
    ranks = {lemma: {sense: rank for rank, sense in enumerate(senses)} for lemma, senses in index.items()}
    lines = []
    for sense, lemmas in synsets.items():
        if len(lemmas) < 2:
            continue
        ranked = [(lemma.replace("_", " "), ranks[lemma][sense]) for lemma in lemmas]
        lines.append("\t".join(f"{lemma}/{rank}" if rank or "/" in lemma else lemma for lemma, rank in ranked))
    return lines


def part_lines(index: dict[str, dict[Sense, int]]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for lemma, senses in sorted(index.items()):
        if "_" in lemma:
            continue
        counts = {part: 0 for part in FILES if any(sense[0] == part for sense in senses)}
        for (part, _), count in senses.items():
            counts[part] += count
        total = sum(counts.values())
        likely = [part for part, count in counts.items() if count >= SMALL_SHARE * total]
        groups["".join(likely) + "." + "".join(part for part in counts if part not in likely)].append(lemma)
    return [" ".join([pattern, *lemmas]) for pattern, lemmas in sorted(groups.items())]


def irregular_lines(folder: Path) -> list[str]:
    return [
        f"{part} {line.strip()}"
        for part, name in FILES.items()
        for line in (folder / f"{name}.exc").read_text(encoding="utf-8").splitlines()
        if "_" not in line
    ]


def word_lines(folder: Path) -> list[str]:
    words = (folder / "american-english").read_text(encoding="utf-8").split()
    return sorted({word.lower() for word in words if not word.endswith("'s")})


def notice(wordnet: Path, words: Path) -> str:
    """Returns the licenses that must accompany the tables, copied verbatim from the packages."""
    copyright_file = (wordnet / "usr/share/doc/wordnet-base/copyright").read_text(encoding="utf-8")
    stanza = next(part for part in copyright_file.split("\n\n") if part.startswith("Files: *\n"))
    license = "\n".join("" if line == " ." else line.removeprefix(" ") for line in stanza.splitlines()[1:])
    scowl = (words / "usr/share/doc/wamerican/copyright").read_text(encoding="utf-8")
    return f"""The compressed tables in this folder are derived works, made by scripts/build_tables.py.

synonyms.txt.xz, parts.txt.xz and irregular.txt.xz hold data of WordNet 3.0 in another arrangement; synonyms.txt.xz
leaves out the synsets that WordNet marks as slurs, disparagement or obscenities. words.txt.xz holds the word list
"american-english" made from SCOWL, in lower case and without possessives. Their notices follow, first WordNet's, then
SCOWL's.

{"=" * 100}
{license}

{"=" * 100}
{scowl}"""


def unpacked(path: Path, scratch: Path) -> Path:
    if path.is_dir():
        return path
    target = scratch / path.name
    subprocess.run(["dpkg-deb", "-x", path, target], check=True)
    return target


def build(wordnet: Path, words: Path, out: Path) -> None:
    """Writes the tables and NOTICE from the two unpacked packages."""
    folder = wordnet / "usr/share/wordnet"
    index = read_index(folder)
    tables = {
        "words": word_lines(words / "usr/share/dict"),
        "synonyms": synonym_lines(index, read_synsets(folder)),
        "parts": part_lines(index),
        "irregular": irregular_lines(folder),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        packed = lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
        (out / f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}.txt.xz: {len(lines):,} lines, {len(packed):,} bytes")
    (out / "NOTICE").write_text(notice(wordnet, words), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help=".deb file of wordnet-base, or its unpacked folder")
    parser.add_argument("words", type=Path, help=".deb file of wamerican, or its unpacked folder")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        build(*(unpacked(path, Path(scratch)) for path in (arguments.wordnet, arguments.words)), arguments.out)


if __name__ == "__main__":
    main()
