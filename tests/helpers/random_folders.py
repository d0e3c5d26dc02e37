"""Random folders of images with captions in file names, in files beside them, and in shards; with random damage."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

from helpers.random_images import (
    FORMATS,
    NOT_UTF8,
    UNOPENABLE,
    WORDS,
    Truth,
    damaged_image,
    encoded,
    put,
    put_image,
    random_image,
    sentence,
)


def clutter(rng: random.Random, root: Path, truth: Truth) -> None:
    """Adds files that are no data, and images of types that nothing opens."""
    for name in rng.sample(
        ["README.txt", "notes.md", ".hidden.png", "__MACOSX/a.png", "Thumbs.db", "LICENSE", "old.png~", ".git/x.png"], 2
    ):
        put(root / name, b"not data")
    for number in range(rng.choice([0, 0, 1, 2])):
        put(root / f"vector {number}.{rng.choice(UNOPENABLE)}", b"\x00\x01 none")
        truth.total += 1
    if rng.random() < 0.2:
        os.symlink(root, root / "zz loop")
    if rng.random() < 0.2:
        (root / "empty.png").mkdir()


def names_as_captions(rng: random.Random, root: Path) -> Truth:
    """File names are the captions: words, separators, and a number that is not part of the caption."""
    truth = Truth(str(root))
    folders = rng.choice([[""], ["", "a"], ["train", "val"], ["Ünï", "b c/d"], ["data/train", "data/test/x"]])
    for _ in range(rng.randint(2, 8)):
        words = rng.choices(WORDS, k=rng.randint(2, 5))
        name = rng.choice("_ -+").join(words) + rng.choice(["", "", "_1", "-02", " (3)", ".4"])
        if rng.random() < 0.1:
            words, name = [], f"{rng.randrange(10**6):06d}"
        path = Path(rng.choice(folders), f"{name}.{rng.choice(list(FORMATS))}")
        if not os.path.lexists(root / path):
            truth.add(path.as_posix(), (" ".join(words),) if words else (), put_image(rng, root / path))
    if rng.random() < 0.3:  # an image by its content
        name = f"tall{rng.choice(' _')}tree"
        put(root / name, encoded("PNG", 0))
        truth.add(name, ("tall tree",))
    clutter(rng, root, truth)
    return truth


def encoded_text(rng: random.Random, lines: list[str]) -> bytes:
    text = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))


def caption_file(rng: random.Random, kind: str) -> tuple[str, bytes, tuple[str, ...]]:
    """Returns extension, content and captions of a file beside an image."""
    captions = tuple(sentence(rng) for _ in range(rng.randint(1, 3)))
    if kind == "text":
        padded = [f" {caption}  " for caption in captions] + rng.choice([[], ["", " "]])
        return rng.choice(["txt", "txt", "TXT", "caption", "Captions", "text"]), encoded_text(rng, padded), captions
    if kind == "json":
        value: Any = rng.choice([list(captions), json.dumps(captions)] if len(captions) > 1 else [*captions])
        fields = {"width": 4, rng.choice(["caption", "captions", "text"]): value, "tags": ["a", "b"]}
        return rng.choice(["json", "JSON"]), json.dumps(fields).encode(), captions
    if kind == "partly":
        return "txt", NOT_UTF8 + b"\n" + captions[0].encode(), captions[:1]
    content = {
        "blank": ("txt", b" \n\n"), "nul": ("txt", b"a\0b"), "long": ("txt", b"word " * 3000),
        "empty": ("caption", b""), "not utf-8": ("txt", NOT_UTF8 + b"\n"),
        "broken": ("json", b'{"caption": "a'), "no caption": ("json", b'{"width": 4}'), "list": ("json", b"[1, 2]"),
    }[kind]  # fmt: skip
    return *content, ()


def side_files(rng: random.Random, root: Path) -> Truth:
    """Captions in files beside the images, text and JSON, some of them missing, blank or broken."""
    truth = Truth(str(root))
    kinds = ["text"] * 5 + ["json"] * 4 + ["partly", "blank", "empty", "nul", "long", "not utf-8"]
    kinds += ["broken", "no caption", "list"]
    has_json = False
    for number in range(rng.randint(2, 8)):
        folder, stem = (
            rng.choice(["", "a", "b/c d"]),
            rng.choice([f"{number:04d}", f"my dog.{number}", f"Ünï_{number}"]),
        )
        path = Path(folder, f"{stem}.{rng.choice(list(FORMATS))}")
        usable = put_image(rng, root / path)
        chosen = ["text"] if number == 0 else [] if rng.random() < 0.1 else [rng.choice(kinds)]
        if (chosen == ["text"] and rng.random() < 0.2) or chosen == ["blank"]:
            chosen.append("json")
        captions: tuple[str, ...] = ()
        for kind in chosen:
            extension, content, found = caption_file(rng, kind)
            put(root / f"{path if rng.random() < 0.2 else path.with_suffix('')}.{extension}", content)
            captions, has_json = captions or found, has_json or kind == "json"
        truth.add(path.as_posix(), captions, usable)
    share_side_files(rng, root, truth)
    for number in range(rng.choice([0, 0, 1, 2])):
        extension, content, _ = caption_file(rng, "json" if has_json and rng.random() < 0.5 else "text")
        put(root / f"alone {number}.{extension}", content)
        truth.total += 1
    clutter(rng, root, truth)
    return truth


def share_side_files(rng: random.Random, root: Path, truth: Truth) -> None:
    """Adds images that share a caption file, or whose caption file has a name that differs in case or Unicode form."""
    _, content, captions = caption_file(rng, "text")
    if rng.random() < 0.3:
        for name in ("shared.png", "shared.jpg", "shared.cr2"):
            put(root / name, encoded("PNG", 1))
        put(root / "shared.txt", content)
        truth.add("shared.png", captions)
        truth.add("shared.jpg", captions)
        truth.total += 1
    if rng.random() < 0.3:
        put(root / "c/IMG 7.JPG", encoded("JPEG", 2))
        put(root / "c/img 7.txt", content)
        truth.add("c/IMG 7.JPG", captions)
    if rng.random() < 0.3:
        put(root / "Stra\u00dfe \u00e9t\u00e9.png", encoded("PNG", 3))
        put(root / "Stra\u00dfe e\u0301te\u0301.txt", content)
        truth.add("Stra\u00dfe \u00e9t\u00e9.png", captions)
    if rng.random() < 0.2:
        put(root / "dangling.png", encoded("PNG", 4))
        os.symlink("nowhere.txt", root / "dangling.txt")
        truth.add("dangling.png", ())


# ---------------------------------------------------------------- shards


def tar_entry(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def write_shard(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int) -> list[tarfile.TarInfo]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    with tarfile.open(path) as tar:
        return tar.getmembers()


def shard_sample(rng: random.Random, name: str, truth: Truth, key: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The members of a sample, some of which cannot be used."""
    extension = rng.choice(list(FORMATS))
    kind = rng.choice(["good"] * 8 + ["no caption", "damaged", "no image", "link", "unopenable"])
    side = rng.choice(["text", "text", "json", "partly", "blank", "broken"]) if kind == "good" else "text"
    suffix, content, captions = caption_file(rng, side)
    full = f"{name}.{extension}" if rng.random() < 0.1 and kind == "good" else name
    members = [tar_entry(f"{full}.{suffix}", content)]
    truth.add(key, captions if kind == "good" else ())
    if kind == "no caption":
        members = []
    if kind == "unopenable":
        return [*members, tar_entry(f"{name}.{rng.choice(UNOPENABLE)}", b"none")]
    if kind == "link":
        info = tarfile.TarInfo(f"{name}.{extension}")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return [(info, b""), *members]
    if kind != "no image":
        image = damaged_image(rng, extension) if kind == "damaged" else random_image(rng, extension)
        members.append(tar_entry(f"{name}.{extension}", image))
    if rng.random() < 0.2:
        members.append(tar_entry(f"{name}.cls", b"3"))
    rng.shuffle(members)
    return members


def shards(rng: random.Random, root: Path) -> Truth:
    """One shard or several, with incomplete samples, links and types that nothing opens."""
    count = rng.choice([1, 1, 2, 3])
    truth = Truth(
        str(
            rng.choice(
                [root, root / "part-0.tar"]
                if count == 1
                else [root, root / f"part-{{0..{count - 1}}}.tar", root / "part-*.tar"]
            )
        )
    )
    for number in range(count):
        entries = []
        prefix = rng.choice(["", "./", "a/", "a b/Ü/", "long" * 40 + "/"])
        shown = prefix.removeprefix("./")
        for sample in range(rng.randint(1, 5)):
            stem = f"{sample:04d}" if rng.random() < 0.8 else f"photo {sample}"
            members = shard_sample(rng, prefix + stem, truth, f"part-{number}/{shown}{stem}")
            entries.append(members)
        flat = [member for members in entries for member in members]
        if rng.random() < 0.15:
            rng.shuffle(flat)
        if rng.random() < 0.3:
            folder = tarfile.TarInfo("a")
            folder.type = tarfile.DIRTYPE
            flat.insert(0, (folder, b""))
        path = root / f"part-{number}.tar"
        form = tarfile.USTAR_FORMAT if prefix.isascii() and len(prefix) < 90 else tarfile.GNU_FORMAT
        write_shard(path, flat, rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, form]))
        if rng.random() < 0.1:
            put(path, path.read_bytes() + b"more" * 600)
    if count > 1 and rng.random() < 0.2 and truth.spec == str(root):
        write_shard(root / "part-9.tar", [], tarfile.GNU_FORMAT)
    return truth


def truncated_shard(rng: random.Random, root: Path) -> Truth:
    """A shard that ends early. The sample in which it ends is there, too, but cannot be used, unless it is complete."""
    path = root / "cut.tar"
    truth = Truth(str(path))
    order = rng.choice([["png", "txt"], ["txt", "png"]])
    captions = [sentence(rng) for _ in range(rng.randint(2, 5))]
    entries = [
        tar_entry(f"{number:03d}.{kind}", encoded("PNG", number) if kind == "png" else caption.encode())
        for number, caption in enumerate(captions)
        for kind in order
    ]
    members = write_shard(path, entries, tarfile.GNU_FORMAT)
    last = rng.randrange(2, len(members))
    member = members[last]
    cut = rng.choice(
        [member.offset_data, member.offset_data + 1, member.offset_data + member.size - 1, member.offset_data + 512]
    )
    with open(path, "r+b") as file:
        file.truncate(cut)
    for number, caption in enumerate(captions[: last // 2 + 1]):
        end = members[2 * number + 1].offset_data + members[2 * number + 1].size
        truth.add(f"cut/{number:03d}", (caption,), end <= cut)
    return truth
