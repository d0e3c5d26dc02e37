"""Which columns of a table hold images, captions, tags and splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coalign.config import DataConfig
from coalign.data.images.formats import IMAGE_EXTENSIONS
from coalign.data.sources.base import FOLDER, is_image_name
from coalign.data.text.captions import printable
from coalign.errors import UserError

# Names by precedence, without underscores
_IMAGE_NAMES = (
    "image images imagepath img imgpath filepath filename filenames file path paths imagename imgname imagefile imgfile "
    "imagefilename imgfilename fname photo picture pic"
)
_CAPTION_NAMES = "caption captions text texts title sentence sentences description alttext raw"
# captions only if there is no column of the above
_OTHER_CAPTION_NAMES = "comment comments alt prompt prompts report conversations messages"
_TAG_NAMES = "tags tag keywords keyword labels"  # not "label", the class in zero-shot evaluation
_LABEL_NAMES = "label labelname class classname category"
_URL_NAMES = "url imageurl imgurl urls imagelink"
_IMAGE_COLUMNS, _CAPTION_COLUMNS, _OTHER_CAPTION_COLUMNS, _TAG_COLUMNS, _LABEL_COLUMNS, _URL_COLUMNS = (
    tuple(names.split())
    for names in (_IMAGE_NAMES, _CAPTION_NAMES, _OTHER_CAPTION_NAMES, _TAG_NAMES, _LABEL_NAMES, _URL_NAMES)
)
_IMAGE_IDS = ("imageid", "imgid")  # read only if there is no other, and no URL
# columns of encoded images, in addition: img2dataset names them after the format
_EMBEDDED_COLUMNS = (*_IMAGE_COLUMNS, "imagebytes", "imgbytes", "bytes", *sorted(IMAGE_EXTENSIONS))
# If there is no column of captions, names with one of these words, such as "caption_en", unless another word says that it is something else
_CAPTION_WORD_NAMES = "caption captions comment comments description descriptions sentence sentences text"
_OTHER_WORD_NAMES = (
    "id ids number num no index idx count length len size score similarity source url lang language path file filename type "
    "has is date time author user hash token tokens embedding embeddings embeds emb feature features vector mask prob"
)
_CAPTION_WORDS, _NO_CAPTION_WORDS = (frozenset(words.split()) for words in (_CAPTION_WORD_NAMES, _OTHER_WORD_NAMES))
URL = ("http://", "https://")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `open_text` makes of bytes that are not UTF-8
_CAPTION_NUMBER = re.compile(r"#\d+$")  # "a.jpg#0": in Flickr8k's token file, the image and the number of its caption


@dataclass(frozen=True)
class Columns:
    """Names of the columns with a role. All other columns are facts."""

    image: str
    captions: tuple[str, ...]
    tags: str | None = None
    split: str | None = None


def choose_columns(table: str, names: Sequence[str], reading: DataConfig, embedded: Sequence[str] = ()) -> Columns:
    """Assigns roles to the columns `names`: those given by `reading`, the others by name.

    `embedded` are the columns whose type may hold encoded images, which are preferred to paths. Given names match exactly, else ignoring
    case. The column of `reading.captions_from` stays a fact, of which `LabeledSource` makes the captions.

    Raises UserError, listing the columns, if a given column is missing or no image or caption column is detected.
    """
    listed = f"its columns are: {', '.join(map(printable, names)) or 'none'}"
    if any(_NOT_UTF8.search(name) for name in names):
        listed += "; they are not UTF-8, so save the table as UTF-8"

    def given(name: str) -> str:
        if name in names:
            return name
        matches = [each for each in names if each.strip().lower() == name.strip().lower()]
        if len(matches) != 1:
            raise UserError(f"{table} has no column {name!r}; {listed}")
        return matches[0]

    image = given(reading.image_column) if reading.image_column is not None else _detect_image(names, embedded)
    if image is None and any(_squeezed(name) in _URL_COLUMNS or name.startswith(URL) for name in names):
        raise url_error(table, names)
    if image is None:
        raise UserError(
            f"Cannot detect the column of {table} with the image paths; rename it to 'image' or give --image-column; {listed}"
        )
    labels = given(reading.captions_from) if reading.captions_from not in (None, FOLDER) else None
    captions: tuple[str, ...] = ()
    if reading.captions_from is None:
        captions = tuple(map(given, reading.caption_column)) or _detect_captions(
            [name for name in names if name != image]
        )
        if not captions:
            raise UserError(
                f"Cannot detect the column of {table} with the captions; rename it to 'caption' or give --caption-column"
                f"{_hint_at_labels(names)}; {listed}"
            )
    free = [name for name in names if name not in (image, labels, *captions)]
    if reading.tag_column is not None:
        tags: str | None = given(reading.tag_column)
    else:
        tags = next(iter(_detect(free, _TAG_COLUMNS)), None)
    return Columns(image, captions, tags, next((name for name in free if base_name(name) == "split"), None))


def _hint_at_labels(names: Sequence[str]) -> str:
    labels = next((name for name in names if _squeezed(name) in _LABEL_COLUMNS), None)
    return f", or make captions of class names with --captions-from {labels}" if labels else ""


def url_error(table: str, names: Sequence[str] = ()) -> UserError:
    """The error for a table whose images are on the web. `names` are its columns, one of which may have files."""
    listed = f"; its columns are: {', '.join(map(printable, names))}" if names else ""
    return UserError(
        f"{table} contains image URLs instead of files; download the images first, for example with img2dataset{listed}"
    )


def _detect_image(names: Sequence[str], embedded: Sequence[str]) -> str | None:
    encoded = _detect(embedded, _EMBEDDED_COLUMNS) or (list(embedded) if len(embedded) == 1 else [])
    if found := encoded or _detect(names, _IMAGE_COLUMNS):
        return found[0]
    has_urls = any(_squeezed(name) in _URL_COLUMNS for name in names)
    return None if has_urls else next(iter(_detect(names, _IMAGE_IDS)), None)


def _detect_captions(names: Sequence[str]) -> tuple[str, ...]:
    for known in (_CAPTION_COLUMNS, _OTHER_CAPTION_COLUMNS):
        if found := tuple(name for name in names if _squeezed(name) in known):
            return found
    return tuple(name for name in names if _has_caption_word(name))


def _has_caption_word(name: str) -> bool:
    words = set(base_name(name).split("_"))
    return len(words) <= 3 and bool(words & _CAPTION_WORDS) and not words & _NO_CAPTION_WORDS


def base_name(name: str) -> str:
    """Normalizes a column name: lower case, underscores, no quotation marks, no trailing number ("'altText 1'" -> "alt_text")."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip("\"' \t"))
    return re.sub(r"_?\d+$", "", re.sub(r"[\s_.-]+", "_", words.lower()))


def _squeezed(name: str) -> str:
    return base_name(name).replace("_", "")


def _detect(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return sorted((name for name in names if _squeezed(name) in known), key=lambda name: known.index(_squeezed(name)))


def numbered_alike(column: str, names: Iterable[str]) -> list[str]:
    """The columns of the same name but for their number, such as "image_2" for "image_1"."""
    return [name for name in names if name != column and name[-1:].isdigit() and base_name(name) == base_name(column)]


def num_known(names: Sequence[str], reading: DataConfig) -> int:
    """Returns how many of `names` are names of image or caption columns, or are given by `reading`."""
    roles = (reading.image_column, *reading.caption_column, reading.tag_column, reading.captions_from)
    given = {name.strip().lower() for name in roles if name}
    known = {*_IMAGE_COLUMNS, *_CAPTION_COLUMNS, *_OTHER_CAPTION_COLUMNS, *_URL_COLUMNS}
    return sum(_squeezed(name) in known or _has_caption_word(name) or name.strip().lower() in given for name in names)


def image_name(cell: str) -> str:
    """The image path in a cell, without spaces and quotation marks around it, and without a caption number ("a.jpg#0" -> "a.jpg")."""
    name = cell.strip().strip('"').strip()
    if name[:1] == name[-1:] == "'":
        name = name[1:-1].strip()
    stripped = _CAPTION_NUMBER.sub("", name)
    return stripped if stripped != name and looks_like_image(stripped) else name


def looks_like_image(name: str) -> bool:
    """Whether a string ends with the extension of an image file, or with one and a caption number."""
    stripped = _CAPTION_NUMBER.sub("", name.strip())
    return "." in stripped.lstrip(".") and "\n" not in stripped and is_image_name(stripped)
