"""Open Clip Art as real, noisy pairs: Debian's packages openclipart-png and openclipart-svg as images and captions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from coalign.data.images import open_image
from coalign.data.openclipart_text import Metadata, captions_of, read_metadata, style_of, tags_of
from coalign.data.workers import fetch_all
from coalign.errors import BadSample, UserError

PACKAGES = ("openclipart-png", "openclipart-svg")
STYLE_SHIFT = "style-shift.jsonl"
STYLES = ("flat", "nicu buculei")  # the theme and the author that share most concepts with others
POOL_FROM = 200  # fewer files are done faster than worker processes start


@dataclass(frozen=True)
class Summary:
    """What became of the PNG files: `pngs` = `samples` + the sum of `skipped`."""

    pngs: int
    samples: int
    skipped: dict[str, int]  # reason -> files, each listed in skipped.jsonl
    metadata_problems: dict[str, int]  # reason -> samples whose caption fell back to the file's name
    captions_from: dict[str, int]  # "title", "file name", "description" -> captions
    styles: int
    tags: int


@dataclass
class _Item:
    """One PNG, by its path below the png folder, on its way through the preparation."""

    file: str
    metadata: Metadata = field(default_factory=Metadata)
    metadata_problem: str = ""
    skipped: str = ""  # the reason, empty for a sample
    detail: str = ""


def prepare_openclipart(
    out: Path,
    installed: Path | None = None,
    download: bool = False,
    max_side: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write Open Clip Art into the folder `out`: images/…, metadata.jsonl, and what was left out, by reason.

    The art comes from an `installed` copy: a root such as / (also when None), or a folder into which the two packages
    were unpacked; or, with `download`, from Debian's archive through apt-get, without root. Every image becomes an RGB
    PNG whose longest side is at most `max_side`, with white where it was transparent. metadata.jsonl has the columns
    image, captions, tags, style (icon theme or author), category (folder) and source (path in the package);
    style-shift.jsonl has those rows that `style_shift` divides into train and test; skipped.jsonl and
    metadata_problems.jsonl list file, reason and detail; summary.json is the Summary.

    `progress(done, total)` is called as files are done. `out` appears complete or not at all. Raises UserError if
    `out` is not empty or the packages cannot be had.
    """
    if max_side < 1:
        raise UserError(f"The longest side of the images must be at least 1 pixel, not {max_side}.")
    if download and installed is not None:
        raise UserError(f"Take Open Clip Art either from {installed} or by download, not both.")
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another one or empty it first.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            art = _find_art(_download(Path(work)) if download else Path(installed or "/"))
            made = Path(work) / "made"  # the temporary folder itself is private to its owner, this one is not
            made.mkdir()
            summary = _write(made, list(_run(art, made, max_side, progress)))
            os.replace(made, out)
    except OSError as error:
        raise UserError(f"Open Clip Art cannot be written to {out}: {error.strerror or error}.") from error
    return summary


# ---------------------------------------------------------------- where the art is


def _find_art(root: Path) -> Path:
    """The folder that has png/ and svg/."""
    for folder in (root / "usr/share/openclipart", root):
        missing = [name for name in ("png", "svg") if not (folder / name).is_dir()]
        if not missing:
            return folder
        if len(missing) == 1:
            raise UserError(f"{folder} has no folder {missing[0]}; the package openclipart-{missing[0]} is needed too.")
    raise UserError(
        f"There is no Open Clip Art below {root} (no usr/share/openclipart with png and svg); use --download, "
        f"or --from with a folder into which {' and '.join(PACKAGES)} are unpacked."
    )


def _download(work: Path) -> Path:
    """Fetch and unpack the two packages into `work`, as any user."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--download needs {tool}, which is not here; unpack {' and '.join(PACKAGES)} and use --from."
            )
    folder, root = work / "download", work / "unpacked"
    folder.mkdir()
    root.mkdir()
    _call(["apt-get", "download", *PACKAGES], folder)
    for package in PACKAGES:
        archives = list(folder.glob(f"{package}_*.deb"))
        if not archives:
            raise UserError(
                f"apt-get left no {package}_….deb behind; fetch the package by hand, unpack it and use --from."
            )
        _call(["dpkg-deb", "-x", str(archives[0]), str(root)], folder)
        archives[0].unlink()
    return root


def _call(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if re.search("Unable to locate|No packages found|no (installation )?candidate|find a source", done.stderr):
        raise UserError(f"apt-get does not know {' and '.join(PACKAGES)} (Debian main); run `apt-get update` first.")
    raise UserError(f"`{' '.join(command[:2])}` failed: {last}")


# ---------------------------------------------------------------- the files


def _run(art: Path, made: Path, max_side: int, progress: Callable[[int, int], None] | None) -> Iterator[_Item]:
    files = sorted(_pngs(art / "png"))
    if not files:
        raise UserError(f"{art / 'png'} has no PNG files; unpack the package openclipart-png again.")
    workers = (os.cpu_count() or 1) if len(files) >= POOL_FROM else 0
    prepare = partial(_prepare_one, art, made, files, max_side)
    for done, item in enumerate(fetch_all(prepare, range(len(files)), workers, ahead=64), 1):
        if progress is not None:
            progress(done, len(files))
        yield item


def _pngs(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            if name.lower().endswith(".png"):
                yield os.path.relpath(os.path.join(folder, name), root)


def _prepare_one(art: Path, made: Path, files: Sequence[str], max_side: int, number: int) -> _Item:
    """Read one PNG and its SVG's metadata, write the small image."""
    file = files[number]
    item = _Item(file)
    try:
        _write_image(art / "png" / file, made / "images" / file, max_side)
    except BadSample as bad:
        item.skipped, item.detail = bad.reason, bad.detail
        return item
    try:
        item.metadata = read_metadata((art / "svg" / file).with_suffix(".svg"))
    except BadSample as bad:
        item.metadata_problem, item.detail = bad.reason, bad.detail
    return item


def _write_image(source: Path, target: Path, max_side: int) -> None:
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
    small = max(1, round(width * scale)), max(1, round(height * scale))
    if pixels.size != small:
        pixels = pixels.resize(small, Image.Resampling.LANCZOS, reducing_gap=3.0)
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels.save(target, format="PNG")


# ---------------------------------------------------------------- what is written


def _write(made: Path, items: Sequence[_Item]) -> Summary:
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
    assert summary.pngs == summary.samples + sum(summary.skipped.values()), "a file vanished unreported"
    if not rows:
        reason = next(iter(summary.skipped))
        raise UserError(f"None of the {len(items)} PNG files can be used ({reason}); unpack the packages again.")
    _write_lines(made / "metadata.jsonl", rows)
    _write_lines(made / STYLE_SHIFT, style_shift(rows))
    _write_lines(made / "skipped.jsonl", skipped)
    _write_lines(made / "metadata_problems.jsonl", problems)
    (made / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def style_shift(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A split in which concepts stay and the drawing changes: `train` is what `STYLES` drew, `test` what others drew of the same.

    A concept is the letters and digits of the first caption ("edit copy" is "editcopy"). `test` keeps the captions that are
    concepts of `train`. Rows that are neither are left out.
    """
    concept = lambda caption: "".join(re.findall(r"[^\W_]+", caption.lower()))  # noqa: E731
    train = [{**row, "split": "train"} for row in rows if row["style"] in STYLES]
    known = {concept(row["captions"][0]) for row in train} - {""}
    others = [row for row in rows if row["style"] not in STYLES and concept(row["captions"][0]) in known]
    return train + [{**row, "captions": row["captions"][:1], "split": "test"} for row in others]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # A file name that is no UTF-8 becomes JSON's own escapes.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
