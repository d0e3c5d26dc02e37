"""The Open Clip Art dataset: real, noisy image-text pairs from the Debian packages openclipart-png and openclipart-svg."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coalign.cores import num_cores
from coalign.data.images.decode import open_image
from coalign.data.loading.workers import fetch_all
from coalign.data.look_alikes import NO_HASH, have_look_alike, look_hash
from coalign.data.prepare.openclipart_text import Metadata, captions_of, read_metadata, style_of, tags_of
from coalign.data.prepare.writing import new_folder
from coalign.errors import BadSample, UserError
from coalign.progress import track, waiting

PACKAGES = ("openclipart-png", "openclipart-svg")
STYLE_SHIFT = "style-shift.jsonl"
TRAIN_STYLES = ("flat", "nicu buculei")  # the icon theme and the author that share most concepts with other styles
MIN_PARALLEL = 200  # files; below, starting worker processes takes longer than the preparation


@dataclass(frozen=True)
class Summary:
    """Counts of a prepared dataset: `pngs` = `samples` + the sum of `skipped`."""

    pngs: int
    samples: int
    skipped: dict[str, int]  # reason -> files, which are listed in skipped.jsonl
    metadata_problems: dict[str, int]  # reason -> samples with the file name as caption
    captions_from: dict[str, int]  # "title", "file name", "description" -> captions
    styles: int
    tags: int


@dataclass
class _Item:
    """The result for one PNG file."""

    file: str  # path below the png folder
    metadata: Metadata = field(default_factory=Metadata)
    metadata_problem: str = ""  # reason
    skipped: str = ""  # reason; empty if the file is used
    detail: str = ""
    look: int = NO_HASH  # of the written image


def prepare_openclipart(
    out: Path,
    installed: Path | None = None,
    download: bool = False,
    max_side: int = 256,
) -> Summary:
    """Writes the Open Clip Art dataset to the folder `out` and returns its counts.

    The clip art is read from `installed`: a root folder with the packages installed, such as / (the default), or a folder into which they
    were unpacked. With `download`, the packages are downloaded from Debian with apt-get, which does not need root privileges. Images are
    converted to RGB PNG files with a longer side of at most `max_side` pixels, on a white background.

    `out` contains images/, metadata.jsonl with the columns image, captions, tags, style (icon theme or author), category (folder) and
    source (path in the package), style-shift.jsonl with the rows of `style_shift`, skipped.jsonl and metadata_problems.jsonl with file,
    reason and detail, and summary.json with the counts. It is created when it is complete. Raises
    UserError if `out` is not empty or the packages are not available.
    """
    if max_side < 1:
        raise UserError(f"--max-side is {max_side}, but must be at least 1.")
    if download and installed is not None:
        raise UserError(f"Use either --download or --from {installed}, not both.")
    with new_folder(out, "Open Clip Art") as folder:
        art = _find_art(_download(folder.parent) if download else Path(installed or "/"))
        summary = _write(folder, list(_prepare_all(art, folder, max_side)))
    return summary


# ---------------------------------------------------------------- packages


def _find_art(root: Path) -> Path:
    """Returns the folder with png/ and svg/."""
    for folder in (root / "usr/share/openclipart", root):
        missing = [name for name in ("png", "svg") if not (folder / name).is_dir()]
        if not missing:
            return folder
        if len(missing) == 1:
            raise UserError(f"{folder} has no folder {missing[0]}; install the package openclipart-{missing[0]}, too.")
    raise UserError(
        f"There is no Open Clip Art in {root} (no usr/share/openclipart with png and svg); use --download, "
        f"or unpack {' and '.join(PACKAGES)} and pass the folder with --from."
    )


def _download(work: Path) -> Path:
    """Downloads the packages and unpacks them in `work`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--download requires {tool}, which is not installed; unpack {' and '.join(PACKAGES)} and use --from."
            )
    folder, root = work / "download", work / "unpacked"
    folder.mkdir()
    root.mkdir()
    with waiting("Downloading Open Clip Art"):
        _run_command(["apt-get", "download", *PACKAGES], folder)
    for package in PACKAGES:
        archives = list(folder.glob(f"{package}_*.deb"))
        if not archives:
            raise UserError(
                f"apt-get did not download {package}; download the package manually, unpack it and use --from."
            )
        with waiting(f"Unpacking {package}"):
            _run_command(["dpkg-deb", "-x", str(archives[0]), str(root)], folder)
        archives[0].unlink()
    return root


def _run_command(command: Sequence[str], folder: Path) -> None:
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
    )
    if process.returncode == 0:
        return
    if re.search("Unable to locate|No packages found|no (installation )?candidate|find a source", process.stderr):
        raise UserError(f"apt-get cannot find {' and '.join(PACKAGES)} (Debian main); run `apt-get update` first.")
    last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"`{' '.join(command[:2])}` failed: {last_line}")


# ---------------------------------------------------------------- files


def _prepare_all(art: Path, staging: Path, max_side: int) -> Iterator[_Item]:
    files = sorted(_find_pngs(art / "png"))
    if not files:
        raise UserError(f"{art / 'png'} has no PNG files; unpack the package openclipart-png again.")
    workers = num_cores() if len(files) >= MIN_PARALLEL else 0
    prepare = partial(_prepare_file, art, staging, files, max_side)
    yield from track(fetch_all(prepare, range(len(files)), workers, ahead=64), "Reading images", len(files))


def _find_pngs(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            if name.lower().endswith(".png"):
                yield os.path.relpath(os.path.join(folder, name), root)


def _prepare_file(art: Path, staging: Path, files: Sequence[str], max_side: int, number: int) -> _Item:
    """Writes the resized image of a PNG file and reads the metadata of its SVG file."""
    file = files[number]
    item = _Item(file)
    try:
        item.look = look_hash(_write_image(art / "png" / file, staging / "images" / file, max_side))
    except BadSample as bad:
        item.skipped, item.detail = bad.reason, bad.detail
        return item
    try:
        item.metadata = read_metadata((art / "svg" / file).with_suffix(".svg"))
    except BadSample as bad:
        item.metadata_problem, item.detail = bad.reason, bad.detail
    return item


def _write_image(source: Path, target: Path, max_side: int) -> np.ndarray:
    """Writes the resized image and returns its pixels, uint8 [height, width, 3]. Raises BadSample."""
    if source.is_symlink():
        raise BadSample("link to another file" if source.exists() else "broken link", os.readlink(source))
    try:
        str(target).encode("utf-8")
    except UnicodeEncodeError:
        raise BadSample("file name is not UTF-8") from None
    try:
        data = source.read_bytes()
    except OSError as error:
        raise BadSample("unreadable file", error.strerror or "") from None
    opened = open_image(data)
    width, height = opened.size
    scale = min(1.0, max_side / max(width, height))
    pixels = Image.fromarray(opened.decode(min_scale=scale))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels.save(target, format="PNG")
    return np.asarray(pixels)


# ---------------------------------------------------------------- output


def _write(folder: Path, items: Sequence[_Item]) -> Summary:
    kept = [item for item in items if not item.skipped]
    titles = Counter(item.metadata.title for item in kept)
    descriptions = Counter(item.metadata.description for item in kept)
    rows: list[dict[str, Any]] = []
    origins: Counter[str] = Counter()
    for item in kept:
        captions = captions_of(item.file, item.metadata, titles, descriptions)
        origins.update(origin for origin, _ in captions)
        rows.append(
            {
                "image": f"images/{item.file}",
                "captions": [caption for _, caption in captions],
                "tags": tags_of(item.metadata),
                "style": style_of(item.file, item.metadata, titles),
                "category": os.path.dirname(item.file),
                "source": item.file,
            }
        )
    skipped = [{"file": i.file, "reason": i.skipped, "detail": i.detail} for i in items if i.skipped]
    problems = [{"file": i.file, "reason": i.metadata_problem, "detail": i.detail} for i in kept if i.metadata_problem]
    summary = Summary(
        pngs=len(items),
        samples=len(rows),
        skipped=dict(Counter(row["reason"] for row in skipped).most_common()),
        metadata_problems=dict(Counter(row["reason"] for row in problems).most_common()),
        captions_from=dict(origins.most_common()),
        styles=len({row["style"] for row in rows} - {""}),
        tags=len({tag for row in rows for tag in row["tags"]}),
    )
    assert summary.pngs == summary.samples + sum(summary.skipped.values()), "files are missing from the summary"
    if not rows:
        reason = next(iter(summary.skipped))
        raise UserError(f"None of the {len(items)} PNG files can be used ({reason}); unpack the packages again.")
    _write_lines(folder / "metadata.jsonl", rows)
    _write_lines(folder / STYLE_SHIFT, style_shift(rows, np.array([item.look for item in kept], dtype=np.uint64)))
    _write_lines(folder / "skipped.jsonl", skipped)
    _write_lines(folder / "metadata_problems.jsonl", problems)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def style_shift(rows: Sequence[Mapping[str, Any]], looks: np.ndarray) -> list[dict[str, Any]]:
    """Splits the rows by style: `train` has the styles in `TRAIN_STYLES`, `test` the same concepts in other styles.

    A concept is the letters and digits of the first caption ("edit copy" is "editcopy"). `test` rows keep only that caption. Other concepts
    in other styles are excluded, and so are images that look like one of `train`, by their hashes `looks`, uint64 [row].
    """
    concept = lambda caption: "".join(re.findall(r"[^\W_]+", caption.lower()))  # noqa: E731
    in_train = np.array([row["style"] in TRAIN_STYLES for row in rows], dtype=bool)
    known = have_look_alike(looks, looks[in_train])
    train = [{**row, "split": "train"} for row in rows if row["style"] in TRAIN_STYLES]
    concepts = {concept(row["captions"][0]) for row in train} - {""}
    test = [
        row
        for row, excluded in zip(rows, in_train | known, strict=True)
        if not excluded and concept(row["captions"][0]) in concepts
    ]
    return train + [{**row, "captions": row["captions"][:1], "split": "test"} for row in test]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # Bytes of file names that are not UTF-8 are written as JSON escapes.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
