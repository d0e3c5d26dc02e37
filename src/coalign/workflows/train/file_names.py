"""Tells captions that are file names, numbers, codes or placeholders from words."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

# what cameras put into file names, in lower case; words in no language
_CAMERAS_TEXT = """
img imgp imag dsc dscn dscf dscs dcim pxl mvimg vid mov pict sdc gopr gopro dji cimg hpim kic mg sdim rimg csc mmexport fullsizerender
微信图片 untitled unnamed
"""
_CAMERAS = frozenset(_CAMERAS_TEXT.split())
# words that cameras, phones, scanners, messengers and image sites put beside a number
_NAMES_TEXT = """
image images video pic picture pictures photo photos foto fotos bild bilder imagen imagem immagine afbeelding фото изображение 图片
圖片 图像 照片 画像 写真 사진 이미지 sam gp scan scanned scanner camscanner frame burst pano portrait original edited edit copy kopie
export hdr bokeh effects collage screenshot screenshots screen shot capture captura pantalla tela ecran écran bildschirmfoto schermata
snimok снимок экрана スクリーンショット 截图 截屏 屏幕截图 whatsapp telegram signal viber facebook fb received snapchat instagram
inshot kakaotalk wechat download file resized thumb thumbnail tmp temp unsplash pexels pixabay shutterstock istock gettyimages
adobestock alamy
"""
_NAMES = frozenset(_NAMES_TEXT.split()) | _CAMERAS
# between the parts of file names; alone, they are no sign of one
_LINKS_TEXT = (
    "at um vom om à de d le la las os ios from alle am pm uhr wa n p e mp t z jpg jpeg png raw arw cr2 nef dng"
)
_LINKS = frozenset(_LINKS_TEXT.split())
# may end with an app's name
_SCREENSHOT = re.compile(r"(?:screen\W?shot|スクリーンショット|截图|截屏).*\d{6}.*", re.IGNORECASE)
_IMAGE_FILE = re.compile(
    r".*\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|hei[cf]|avif|jxl|jp2|svg|raw|arw|cr[23]|nef|dng|raf|orf|rw2)",
    re.IGNORECASE | re.DOTALL,
)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|www\.)\S+", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[\d.,]+(?:e[+-]?\d+)?\s?%?", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_TIME = re.compile(r"(?<=\d)(?=[TZ](?:\d|\b))")  # within 2021-05-01T10:30:00Z
_PREFIXED_NUMBER = re.compile(r"([^\W\d_]+)(\d+)")
_HEX = re.compile(r"[0-9a-f]+")
_ID = re.compile(r"[0-9A-Za-z]{8,}")  # such as the name of a video
_PLACEHOLDERS_TEXT = """
na nan none null nil undefined unavailable notavailable notapplicable nocaption nodescription notext notitle nolabel noalt noalttext
noname tbd todo
"""
_PLACEHOLDERS = frozenset(_PLACEHOLDERS_TEXT.split()) | {""}
_SERIES = 10  # names that differ in their number only, for a series


def meaningless(texts: Sequence[str]) -> list[str]:
    """Returns those captions, or names of classes, that are file names, numbers, codes or placeholders rather than words."""
    series = _series(texts)
    return [text for text in texts if text in series or looks_like_file_name(text) or plain(text) in _PLACEHOLDERS]


def plain(text: str) -> str:
    """Returns the text without case, punctuation and white space; symbols such as emoji remain."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] not in "PZC")


def looks_like_file_name(text: str) -> bool:
    """Returns whether a text is a file's name or path, a URL, a number, a time, a UUID or another code rather than words."""
    text = text.strip()
    if any(pattern.fullmatch(text) for pattern in (_IMAGE_FILE, _URL, _NUMBER, _SCREENSHOT)):
        return True
    words = _WORD.findall(_TIME.sub(" ", text))
    if any(word.lower() in _CAMERAS for word in words) and all(word.lower() in _NAMES | _LINKS for word in words):
        return True  # "IMG", of IMG_0001.jpg
    has_hash = any(len(word) >= 8 and _is_code(word) for word in words)
    parts = [_is_code(word) or (has_hash and _HEX.fullmatch(word.lower()) is not None) for word in words]
    return any(parts) and all(part or word.lower() in _NAMES | _LINKS for part, word in zip(parts, words))


def _is_code(word: str) -> bool:
    """Returns whether a word is a number, letters with a number as of a camera ("DSC0001"), or mixes digits and letters."""
    if word.isdecimal():
        return True
    digits = sum(character.isdecimal() for character in word)
    if match := _PREFIXED_NUMBER.fullmatch(word):
        letters, number = match.groups()
        of_camera = letters.isupper() and len(letters) <= 4 and len(number) >= 4
        known = letters.lower() in _NAMES or (letters.lower() in _LINKS and len(number) >= 2)
        return known or of_camera or len(number) >= 6
    is_hash = len(word) >= 4 and digits >= 2 and _HEX.fullmatch(word.lower()) is not None
    return is_hash or (digits >= 1 and _ID.fullmatch(word) is not None)


def _series(texts: Sequence[str]) -> set[str]:
    """Returns the names without spaces that differ in their number only, such as sample_001, sample_002, …, if nearly all are distinct."""
    series = defaultdict(set)
    for text in texts:
        if not re.search(r"\s", text):
            series[re.sub(r"\d+", "0", text)].add(text)
    if len(set(texts)) < 0.9 * len(texts):
        return set()
    return set().union(*(names for names in series.values() if len(names) > _SERIES))
