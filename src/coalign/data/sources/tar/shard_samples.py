"""Groups the members of a tar shard into samples by name, and accounts for those that are not used.

Members form a sample if their paths agree up to the extension. A member such as 0001.jpg.txt or 0001.seg.png belongs to sample 0001 if that
has an image, unless the member is an image with a caption of its own (photo.1.jpg with photo.1.txt).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coalign.data.images.formats import IMAGE_EXTENSIONS, UNSUPPORTED, starts_like_image
from coalign.data.sources.base import LeftOut, hash64
from coalign.data.sources.caption_content import folded, json_captions, json_fields, text_captions, without_words
from coalign.data.sources.folders.scan import (
    ARCHIVE_EXTENSIONS,
    TABLE_EXTENSIONS,
    TEXT_EXTENSIONS,
    is_document,
    is_hidden,
    is_list,
    may_be_image,
)
from coalign.data.sources.tar.members import BLOCK, Member, Read
from coalign.data.text.captions import clean_captions, printable
from coalign.errors import BadSample

KINDS = ("image", "caption file", ".json file", ".cls file")  # a .cls file has the class label
IMAGE, TEXT, META, LABEL = range(len(KINDS))
UNREAD = "looks like data, but is not read"  # reason for members such as captions.csv
_MAX_TEXT = 1 << 26  # bytes; larger caption files are not hashed
_PART = 10  # added to the precedence of a member of the sample 0001 that is named 0001.x


@dataclass
class Part:
    """A member of a sample."""

    precedence: int  # lower is preferred; the first of equal ones is used
    start: int  # block of its first header
    hash: int = 0  # of an image
    captions: list[int] | None = None  # hashes of the cleaned captions; None if the file is blank


@dataclass
class Sample:
    parts: dict[int, Part] = field(default_factory=dict)  # by index of `KINDS`
    unusable: str = ""  # why a member with the name of an image cannot be used

    @property
    def has_captions(self) -> bool:
        """Whether there is a file for captions, even a blank one."""
        return TEXT in self.parts or META in self.parts

    def captions(self) -> list[int]:
        """Hashes of the captions: those of the text, else of the .json."""
        found = [part.captions for kind in (TEXT, META) if (part := self.parts.get(kind)) and part.captions is not None]
        return found[0] if found else []


class ShardSamples:
    """The samples of a shard; a sample's members need not be adjacent."""

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.last = ""  # sample of the member added last
        self.notes: dict[str, str] = {}  # reason -> first example, for members that cost no sample

    def note(self, name: str, reason: str) -> None:
        self.notes.setdefault(reason, printable(name))

    def add(self, member: Member, read: Read) -> None:
        name, extension = sample_name(member.name)
        *folders, file = name.split("/")
        if member.kind == "folder" or file.startswith(".") or not file:
            return
        if any(folder not in (".", "..") and is_hidden(folder) for folder in folders):
            return
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self.note(member.name, "path points outside the archive (harmless, nothing is extracted)")
        if member.kind != "file":
            reason = f"{member.kind}, not a file"
            if extension in IMAGE_EXTENSIONS or extension in UNSUPPORTED:
                self._sample(name).unusable = reason
            else:
                self.note(member.name, reason)
        elif extension in IMAGE_EXTENSIONS:
            self._add(name, IMAGE, _image(member, read, 0), member.name)
        elif extension in TEXT_EXTENSIONS:
            self._add(name, TEXT, _text(member, read, TEXT_EXTENSIONS.index(extension)), member.name)
        elif extension == "json":
            self._add(name, META, _meta(member, read), member.name)
        elif extension == "cls":
            self._add(name, LABEL, Part(0, member.start // BLOCK), member.name)
        elif extension in UNSUPPORTED:
            self._sample(name).unusable = f".{extension} files cannot be opened; {UNSUPPORTED[extension]}"
        elif extension in TABLE_EXTENSIONS or extension in ARCHIVE_EXTENSIONS:
            self.note(member.name, UNREAD)
        elif may_be_image(extension) and starts_like_image(read(member.data, min(member.size, 32))):
            self._add(name, IMAGE, _image(member, read, 1), member.name)
        else:
            self.note(member.name, "not an image, caption file or .json file")

    def _sample(self, name: str) -> Sample:
        self.last = name
        return self.samples.setdefault(name, Sample())

    def _add(self, name: str, kind: int, part: Part, member: str) -> None:
        parts = self._sample(name).parts
        if kind in parts:
            self.note(member, f"another {KINDS[kind]} of the same sample is used")
        if kind not in parts or part.precedence < parts[kind].precedence:
            parts[kind] = part

    def finish(self, damage: str | None, truncated: str | None) -> list[LeftOut]:
        """Removes the samples that cannot be used, and returns what is left out, each sample once.

        damage: what ended reading early. truncated: path of the member that the end of the file truncates.
        """
        last = self.last
        last = self._join().get(last, last)
        lost = set()
        if damage is not None and self.samples:
            first = next(iter(self.samples.values()))
            # The last sample may lack members: keep it if it has captions and every kind of member that the first has.
            has = self.samples[last].parts.keys() if last in self.samples else set()
            if not has >= first.parts.keys() or not has - {IMAGE}:
                lost.add(last)
        if truncated is not None:
            name = sample_name(truncated)[0]
            lost.add(next((owner for owner in (name, *_owners(name)) if owner in self.samples), name))
        left_out = [] if damage is None else [LeftOut("", damage, len(lost))]
        reasons: dict[str, list[str]] = {}
        for name, sample in list(self.samples.items()):
            if name not in lost and IMAGE in sample.parts:
                continue
            del self.samples[name]
            if name in lost or (not sample.unusable and is_document(f"{name}.txt")):
                continue
            if not sample.unusable and is_list(f"{name}.txt"):
                self.note(name, UNREAD)
            else:
                reasons.setdefault(sample.unusable or "caption file without an image", []).append(name)
        left_out += [LeftOut(printable(names[0]), reason, len(names)) for reason, names in reasons.items()]
        return left_out + [LeftOut(name, reason, 0) for reason, name in self.notes.items() if reason not in reasons]

    def _join(self) -> dict[str, str]:
        """Adds members such as 0001.seg.png to the sample 0001. Returns the names of such members and of the samples they belong to."""
        with_image = {name for name, sample in self.samples.items() if IMAGE in sample.parts}
        by_folded = {folded(name): name for name in with_image if not self.samples[name].has_captions}
        joined: dict[str, str] = {}
        for name, sample in list(self.samples.items()):
            if name in with_image and sample.captions():
                continue
            owner = next((each for each in _owners(name) if each in with_image), None)
            if owner is None and name not in with_image:
                owner = by_folded.get(folded(name))
            if owner is not None:
                joined[name] = owner
                self._merge(name, owner)
        return joined | self._join_by_word()

    def _join_by_word(self) -> dict[str, str]:
        """Joins 0001.caption.txt, or 0001.txt, with 0001.image.jpg, and with further images of such names, as `_join` does."""
        images: dict[str, list[str]] = {}  # by their names without words
        for name, sample in self.samples.items():
            if IMAGE in sample.parts and not sample.has_captions:
                images.setdefault(without_words(name), []).append(name)
        joined: dict[str, str] = {}
        for name, sample in list(self.samples.items()):
            if sample.parts and IMAGE not in sample.parts and (same := images.get(without_words(name))):
                joined |= dict.fromkeys([name, *same[1:]], same[0])
                for each in (name, *same[1:]):
                    self._merge(each, same[0])
                del same[1:]
        return joined

    def _merge(self, name: str, owner: str) -> None:
        for kind, part in self.samples.pop(name).parts.items():
            part.precedence += _PART
            self._add(owner, kind, part, name)


def sample_name(member: str) -> tuple[str, str]:
    """Splits a member's path into sample name and lower-case extension: "./dir/0001.JPG" -> ("dir/0001", "jpg")."""
    folder, slash, file = member.removeprefix("./").rpartition("/")
    stem, dot, extension = file.rpartition(".")
    return folder + slash + (stem if dot else file), extension.lower() if dot else ""


def _owners(name: str) -> Iterator[str]:
    """Names of the samples that the members of this name may belong to: "a/0001.seg.old" -> "a/0001.seg", "a/0001"."""
    folder, slash, file = name.rpartition("/")
    while "." in file:
        file = file.rpartition(".")[0]
        yield folder + slash + file


def _image(member: Member, read: Read, precedence: int) -> Part:
    return Part(precedence, member.start // BLOCK, hash=hash64(read(member.data, member.size)))


def _text(member: Member, read: Read, precedence: int) -> Part:
    captions: list[int] | None = []
    if member.size <= _MAX_TEXT:
        lines = text_captions(read(member.data, member.size))
        captions = _hashes(lines) if any(map(bytes.strip, lines)) else None
    return Part(precedence, member.start // BLOCK, captions=captions)


def _meta(member: Member, read: Read) -> Part:
    captions: list[int] = []
    if member.size <= _MAX_TEXT:
        try:
            captions = _hashes(json_captions(json_fields(read(member.data, member.size), "")))
        except BadSample:
            captions = []
    return Part(0, member.start // BLOCK, captions=captions)


def _hashes(raws: list[bytes]) -> list[int]:
    try:
        return [hash64(caption.encode()) for caption in clean_captions(raws)]
    except BadSample:
        return []
