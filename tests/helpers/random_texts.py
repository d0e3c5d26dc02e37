"""Texts of every kind that hypothesis can think of, for fuzz tests of tokenizers and exports."""

from __future__ import annotations

import html
import re
import unicodedata
from html.entities import codepoint2name, html5

import ftfy
from hypothesis import strategies as st
from tokenizers import normalizers

_RANGES = (
    (0x20, 0x7E), (0xA0, 0x17F), (0x180, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F),
    (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xC00, 0xC7F), (0xE00, 0xE7F), (0xF00, 0xFFF),
    (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1200, 0x137F), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
    (0x2070, 0x218F), (0x2190, 0x2BFF), (0x3000, 0x30FF), (0x3130, 0x318F), (0x4E00, 0x9FFF), (0xA640, 0xA69F), (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE70, 0xFEFF), (0xFF00, 0xFFEF), (0x10330, 0x1034F), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF),
    (0x00, 0x9F),
)  # fmt: skip
_PIECES = (
    "a photo of a dog", "THE Red Dog", "it's we're", " ", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u200b", "\u200d", "\ufeff",
    "\u202e", "\u2067", "\u200f",
    "&amp;", "&lt;", "&quot;", "&#39;", "&#x27;", "&eacute;", "&nbsp;", "&amp;amp;", "&", "&;", "👩‍👩‍👧", "🇩🇪", "❤️", "1️⃣", "👍🏽",
    "“”‘’", "ﬁ", "ＡＢ，", "e\u0301",
    "ΟΔΟΣ", "İ", "ß", "ſ", "\x1b[31m", "\x85", "\x92", "Σ", "½²①", "가각", "ﾊﾟ", "word " * 100, "<b>", "</w>", "[MASK]",
)  # fmt: skip


_COMMON = {*range(0x180), *codepoint2name}
_ENTITIES = (
    *(f"&{name}" for name, value in html5.items() if set(map(ord, value)) <= _COMMON),
    *(form for code in sorted(_COMMON) for form in (f"&#{code};", f"&#x{code:X};")),
    *("&EACUTE;", "&Jscr;", "&NotEqual;", "&#9731;", "&#x1F600;", "schÃ¶n", "â€œ"),
)


def texts() -> st.SearchStrategy[str]:
    """Pieces of captions, characters of one script, and any characters, joined. Unassigned ones differ by versions of Unicode."""
    assigned = st.characters(exclude_categories=("Cs", "Cn", "Co"))
    scripts = st.sampled_from(_RANGES).flatmap(
        lambda bounds: st.text(
            st.characters(min_codepoint=bounds[0], max_codepoint=bounds[1], exclude_categories=("Cs", "Cn", "Co")),
            max_size=12,
        )
    )
    pieces = (st.sampled_from(_PIECES), scripts, st.text(assigned, max_size=4), st.sampled_from(_ENTITIES))
    return st.lists(st.one_of(*pieces), max_size=6).map("".join)


def is_repaired(text: str) -> bool:
    """Whether CLIP's cleaning repairs it in a way that depends on more than single characters: wrongly decoded text and HTML entities.

    Or whether it has recent combining marks.
    """
    if has_recent_marks(text):
        return True
    plain = ftfy.fix_text(text, fix_encoding=False, unescape_html=False)
    return html.unescape(ftfy.fix_text(text)) != plain


def has_recent_marks(text: str) -> bool:
    """Whether `tokenizers` orders combining marks otherwise than Python, as its tables of Unicode are older."""
    text = _resolved(text)
    return normalizers.NFC().normalize_str(text) != unicodedata.normalize("NFC", text)


def _resolved(text: str) -> str:
    return html.unescape(html.unescape(text))


def is_rare(text: str) -> bool:
    """Whether only Python cleans it so: wrongly decoded text, recent combining marks, and entities of other than Latin characters and
    HTML 4's symbols.

    In texts with a "<", ftfy resolves no entities. There, entities of curly quotes stay curly, and three escapes are too many.
    """
    if has_recent_marks(text) or ftfy.fix_text(text) != ftfy.fix_text(text, fix_encoding=False):
        return True
    cleaned = _resolved(ftfy.fix_text(text))
    straight = ftfy.fix_text(_resolved(text), unescape_html=False)
    if "<" in text and not cleaned == straight == html.unescape(cleaned):
        return True
    return any(not set(map(ord, html.unescape(entity))) <= _COMMON for entity in re.findall("&[#0-9A-Za-z]+;?", text))
