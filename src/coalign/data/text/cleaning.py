"""Cleaning of texts before they are split into tokens: in Python, as CLIP does, and as normalizers of the `tokenizers` library.

Normalizers are part of a tokenizer's file, so that every library that reads the file cleans alike. They resolve HTML entities, map
characters to plain ones, remove control characters, join white space and lowercase. They cannot repair wrongly decoded Unicode. As each
character takes a pass over the text, they resolve the entities of common characters only.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from functools import cache
from html.entities import codepoint2name, html5

from tokenizers import Regex, normalizers

# what Python splits text at, without control characters
_SPACE = r"[\t\n\f\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"
_CONTROL = r"[\x{00}-\x{08}\x{0b}\x{0e}-\x{1f}\x{7f}\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
_TERMINAL_ESCAPE = r"\x{1b}\[[\d;]*[a-zA-Z]"
_LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
_FULL_AND_HALF_WIDTH = range(0xFF01, 0xFFF0)
_FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)Σ(?!\p{Case_Ignorable}*\p{Cased})"


def is_plain(text: str) -> bool:
    """Whether cleaning only joins spaces and lowercases: printable ASCII without an ampersand. True for most captions."""
    return text.isascii() and text.isprintable() and "&" not in text


def clean_text(text: str) -> str:
    """Cleans text as CLIP does: fixes wrongly decoded Unicode, resolves HTML entities, collapses whitespace, lowercases."""
    if not is_plain(text):  # importing and calling ftfy takes most of the time
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def caption_normalizer() -> normalizers.Normalizer:
    """Returns the cleaning of tokenizers that are trained on captions, with Unicode's compatibility mapping: "ﬁ" is "fi", "½" is "1⁄2"."""
    return normalizers.Sequence([*_repairs(), normalizers.NFKC(), *_entities(), *_plain_text()])


@cache
def clip_normalizer() -> normalizers.Normalizer:
    """Returns what normalizers can express of `clean_text`."""
    mapped = {one: unicodedata.normalize("NFKC", one) for one in [*map(chr, _FULL_AND_HALF_WIDTH), *_LIGATURES]}
    mapped["ﬅ"] = "ſt"  # as ftfy does
    plain = [normalizers.Replace(one, other) for one, other in mapped.items() if one != other]
    return normalizers.Sequence(
        [*_repairs(), *plain, *_clip_entities(mapped), normalizers.NFC(), *_short_entities(), *_plain_text()]
    )


def _repairs() -> list[normalizers.Normalizer]:
    """Removes terminal escapes and control characters. C1 control characters are read as Windows-1252, as browsers do."""
    controls = [(chr(code), html.unescape(f"&#{code};")) for code in range(0x80, 0xA0)]
    return [
        normalizers.Replace(Regex(_TERMINAL_ESCAPE), ""),
        normalizers.Replace(Regex(_CONTROL), ""),
        *(normalizers.Replace(control, character) for control, character in controls if control != character),
    ]


def _entities() -> list[normalizers.Normalizer]:
    """Resolves the entities of HTML 4 by name and number, also escaped repeatedly: &amp;amp;eacute; is é."""
    names = {code: re.escape(name) for code, name in codepoint2name.items() if name != "amp"} | {ord("'"): "apos"}
    numbers = {code: rf"#0*{code}|#[xX]0*(?i:{code:x})" for code in names}
    return [
        normalizers.Replace(Regex(r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+"), "&"),
        *(normalizers.Replace(Regex(f"&(?:{name}|{numbers[code]});"), chr(code)) for code, name in names.items()),
    ]


def _clip_entities(mapped: dict[str, str]) -> list[normalizers.Normalizer]:
    """Resolves the entities of ASCII, of Latin letters and of HTML 4's symbols, by all their names and numbers, with repeated escapes.

    As in `html.unescape`, numbers need no semicolon; as in ftfy, "&EACUTE;" is É. All names of HTML 5 would take
    1,100 more passes, and more than double the time to tokenize a caption; all numbers would take one pass per character of Unicode.
    mapped: what single characters are mapped to afterwards.
    """
    from ftfy.chardata import HTML_ENTITIES

    codes = {*range(0x180), *codepoint2name} - {ord("&")}
    patterns = defaultdict(list)
    for name, value in ({name[1:]: value for name, value in HTML_ENTITIES.items()} | html5).items():
        if name.endswith(";") and codes.issuperset(map(ord, value)):
            patterns[value].append(name)
    for code in codes:
        patterns[html.unescape(f"&#{code};")].append(_number(code))
    return [
        normalizers.Replace(Regex(f"&(?:(?:amp|AMP);?|{_number(ord('&'))})+"), "&"),
        *(
            normalizers.Replace(Regex(f"&(?:{'|'.join(alternatives)})"), mapped.get(value, value))
            for value, alternatives in patterns.items()
        ),
    ]


def _short_entities() -> list[normalizers.Normalizer]:
    """Resolves the names of HTML 2 without a semicolon, the longest first. ftfy leaves them to `html.unescape`, which comes later."""
    names = sorted((name for name in html5 if not name.endswith(";") and html5[name] != "&"), key=len, reverse=True)
    return [normalizers.Replace(f"&{name}", html5[name]) for name in names]


def _number(code: int) -> str:
    """Returns a pattern of the decimal and the hexadecimal reference to a character, after the ampersand."""
    return rf"#0*{code}(?![0-9]);?|#[xX]0*(?i:{code:x})(?![0-9a-fA-F]);?"


def _plain_text() -> list[normalizers.Normalizer]:
    return [
        normalizers.Replace(Regex("[ʼ‘-‛]"), "'"),
        normalizers.Replace(Regex("[“-‟]"), '"'),
        normalizers.Replace(Regex(_SPACE), " "),
        normalizers.Strip(),
        lowercase(),
    ]


def lowercase() -> normalizers.Normalizer:
    """Returns Python's `lower`, which tells a final sigma from others."""
    return normalizers.Sequence([normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()])
