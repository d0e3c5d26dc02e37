"""Inputs that people reported for other tools, through the command line: which captions are read, and what is said of the rest."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.data_files import write_tar
from PIL import Image, ImageCms, PngImagePlugin

import coalign
from coalign.cli import main as cli
from coalign.data.images.decode import open_image
from coalign.data.images.formats import UNSUPPORTED
from coalign.evaluation.retrieval import retrieval

THINGS = [f"{color} {noun}" for noun in ("circle", "boat", "tree", "lamp") for color in ("red", "green", "blue")]


def pixels(number: int, side: int = 16) -> Image.Image:
    """A noisy image of its own."""
    noise = np.random.default_rng(number).normal(
        np.random.default_rng(-number % 997).uniform(40, 215, 3), 25, (side, side, 3)
    )
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))


def encode(number: int, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    pixels(number).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


class Account:
    """What `coalign data check DATA --json FILE` writes and prints."""

    def __init__(self, data: Path | str, folder: Path, capsys, *options: str) -> None:
        file = folder / "account.json"
        file.unlink(missing_ok=True)
        args = ["data", "check", str(data), "--json", str(file), "--samples", "2000", *options]
        capsys.readouterr()
        assert cli.main(args) == 0, capsys.readouterr().err
        self.printed = capsys.readouterr().out
        content = json.loads(file.read_text())
        self.used, self.left_out, self.unread = content["used"], content["left_out"], content["unread"]
        self.captions = {sample["key"]: sample["captions"] for sample in content["samples"]}
        self.splits = {sample["key"]: sample["split"] for sample in content["samples"]}
        assert self.used == len(content["samples"]) == len(self.captions)

    @property
    def total(self) -> int:
        return self.used + sum(self.left_out.values())


@pytest.fixture
def check(tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("account")
    return lambda data, *options: Account(data, folder, capsys, *options)


def refusal(capsys, *args: str | Path) -> str:
    """The line that a command prints when it refuses its input."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coalign: ")
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------- 1: metadata tables in the folders of splits


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ({"train": "train", "dev": "val", "test": "test"}, ("file_name", "text")),
        ({"data/train": "train", "data/validation": "val", "data/test": "test"}, ("file_name", "caption")),
        ({"Train": "train", "val": "val", "testing": "test"}, ("image", "captions")),
    ],
)
@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl", "metadata.tsv", "METADATA.CSV", "metadata.json"])
def test_the_metadata_of_each_split_has_the_captions(tmp_path, check, folders, names, file):
    expected, splits = {}, {}
    for position, (folder, split) in enumerate(folders.items()):
        rows = [
            (f"1000268{position}{i}_693b08cb0e.jpg", f"{thing}, seen {position} times")
            for i, thing in enumerate(THINGS[:4])
        ]
        for i, (name, caption) in enumerate(rows):
            write(tmp_path / folder / name, encode(10 * position + i, "JPEG"))
            expected[f"{folder}/{name}"], splits[f"{folder}/{name}"] = [caption], split
        kind = file.lower().rpartition(".")[2]
        if kind in ("csv", "tsv"):
            separator = "," if kind == "csv" else "\t"
            lines = [separator.join(names), *(f'{name}{separator}"{caption}"' for name, caption in rows)]
        else:
            lines = [json.dumps(dict(zip(names, row))) for row in rows]
        write(tmp_path / folder / file, "\n".join(lines) if kind != "json" else f"[{', '.join(lines)}]")
    found = check(tmp_path)
    assert found.captions == expected
    assert found.splits == splits
    assert found.left_out == {}
    assert not any(Path(each).name == file for each in found.unread)


# ---------------------------------------------------------------- 2: class folders with camera file names


@pytest.mark.parametrize(
    "name", ["IMG_{:04d}.jpg", "DSC{:05d}.JPG", "{:06d}.png", "img ({}).jpeg", "PXL_20240101_{:09d}.jpg"]
)
def test_camera_file_names_are_no_captions(tmp_path, capsys, check, model_file, name):
    data = tmp_path / "data"
    classes = ["red_circle", "blue_square", "green_boat"]
    for number in range(12):
        kind = "PNG" if name.endswith("png") else "JPEG"
        write(data / classes[number % 3] / name.format(number + 1), encode(number, kind))
    error = refusal(capsys, *tiny.train_args(data, tmp_path / "run", model_file, val_fraction=0.25))
    assert "--captions-from folder" in error
    assert any(f"/{name.format(number + 1)}" in error for number in range(12))  # what was found
    assert not (tmp_path / "run" / "results.json").exists()
    assert "--captions-from folder" in check(data).printed
    found = check(data, "--captions-from", "folder")
    assert found.used == 12
    for key, (caption, *_) in found.captions.items():
        assert key.split("/")[0].replace("_", " ") in caption


def test_captions_from_folders_train(tmp_path, capsys, model_file, without_run_reports):
    for number in range(24):
        write(tmp_path / "data" / ("red_circle", "blue_square")[number % 2] / f"IMG_{number:04d}.png", encode(number))
    args = tiny.train_args(tmp_path / "data", tmp_path / "run", model_file, epochs=1, batch_size=4, evals=1)
    assert cli.main([*args, "--captions-from", "folder"]) == 0
    assert "zeroshot" in json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]


# ---------------------------------------------------------------- 3: extensions of caption files in any case


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("DSC{:04d}.JPG", "DSC{:04d}.TXT"),
        ("DSC{:04d}.jpg", "DSC{:04d}.Txt"),
        ("DSC{:04d}.JPG", "dsc{:04d}.txt"),
        ("a/b c/DSC{:04d}.jpeg", "a/b c/DSC{:04d}.CAPTION"),
        ("DSC{:04d}.Jpg", "DSC{:04d}.Jpg.TXT"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_caption_files_with_extensions_in_any_case(tmp_path, check, image, text, encoding):
    for number, thing in enumerate(THINGS):
        write(tmp_path / image.format(number), encode(number, "JPEG"))
        write(tmp_path / text.format(number), f"a {thing} in the café\r\n", encoding)
    found = check(tmp_path)
    assert found.captions == {image.format(i): [f"a {thing} in the café"] for i, thing in enumerate(THINGS)}
    assert (found.left_out, found.unread) == ({}, [])


# ---------------------------------------------------------------- 4: image types


OPENED = {
    "jpg": "JPEG",
    "avif": "AVIF",
    "jfif": "JPEG",
    "webp": "WEBP",
    "JPE": "JPEG",
    "tiff": "TIFF",
    "JP2": "JPEG2000",
}


def of_many_types(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The files of images of many types with captions, and the captions of those that can be opened, by name."""
    files, captions = {}, {}
    for number in range(24):
        kind = [*OPENED, "heic", "svg"][number % 9]
        if kind in OPENED:
            files[f"{number:02d}.{kind}"] = encode(number, OPENED[kind])
            captions[f"{number:02d}.{kind}"] = f"a thing that is number{number}"
        else:
            files[f"{number:02d}.{kind}"] = b"\0\0\0\x18ftypheic" if kind == "heic" else b"<svg></svg>"
        files[f"{number:02d}.txt"] = f"a thing that is number{number}".encode()
    return files, captions


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_every_type_that_opens_is_used_and_the_others_are_named(
    tmp_path, capsys, check, model_file, layout, without_run_reports
):
    files, expected = of_many_types(tmp_path)
    lost = 24 - len(expected)
    data = tmp_path / "data"
    if layout == "tar":
        data = write_tar(tmp_path / "data" / "all.tar", list(files.items()))
        expected = {f"all/{Path(name).stem}": caption for name, caption in expected.items()}
    else:
        for name, content in files.items():
            write(data / name, content)
    found = check(data)
    assert found.captions == {name: [caption] for name, caption in expected.items()}
    assert found.total == 24
    if "heic" in UNSUPPORTED:
        assert f"Left out {lost} of 24" in found.printed
        assert "pip install pillow-heif" in found.printed
    assert "vector graphics" in found.printed
    args = tiny.train_args(data, tmp_path / "run", model_file, epochs=1, batch_size=4, evals=1, val_fraction=0.2)
    assert cli.main(args) == 0
    assert "Left out" in (printed := capsys.readouterr().out)
    assert "vector graphics" in printed
    assert cli.main(["search", str(tmp_path / "run"), "--data", str(data), "--text", "a thing"]) == 0
    assert "vector graphics" in capsys.readouterr().out


# ---------------------------------------------------------------- 5, 6, 13: tables as text


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("strays", [[7], [39], [0, 1], [3, 30]])
@pytest.mark.parametrize("columns", [("image", "caption"), ("caption", "image"), ("id", "image", "caption", "source")])
def test_a_stray_quotation_mark_costs_no_row(tmp_path, check, separator, strays, columns):
    lines, expected = [separator.join(columns)], {}
    for number in range(40):
        write(tmp_path / f"img/{number}.png", encode(number))
        caption = f"{chr(34) if number in strays else ''}a {THINGS[number % 12]} number {number}"
        values = {"id": str(number), "image": f"img/{number}.png", "caption": caption, "source": "web"}
        lines.append(separator.join(values[column] for column in columns))
        expected[f"img/{number}.png"] = caption.removeprefix('"')
    found = check(write(tmp_path / "pairs.tsv", "\n".join(lines)))
    assert {key: caption.strip('"') for key, (caption,) in found.captions.items()} == expected
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("""['a red circle', "it's a circle"]""", ["a red circle", "it's a circle"]),
        ("""["a red circle", "it's a circle"]""", ["a red circle", "it's a circle"]),
        ("""('a red circle', 'one, or two')""", ["a red circle", "one, or two"]),
        ("""['a red circle' 'a circle']""", ["a red circle", "a circle"]),
        ("""array(['a red circle', 'a circle'], dtype=object)""", ["a red circle", "a circle"]),
        ("""[{"caption": "a red circle"}, {"caption": "a circle"}]""", ["a red circle", "a circle"]),
        ("""[a sign] on a door""", ["[a sign] on a door"]),
        ("""[__import__('os').abort()]""", ["[__import__('os').abort()]"]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "folder"])
def test_a_list_in_a_cell_is_several_captions(tmp_path, check, cell, captions, kind):
    write(tmp_path / "1.png", encode(1))
    write(tmp_path / "2.png", encode(2))
    quoted = '"' + cell.replace('"', '""') + '"'
    separator = "\t" if kind == "tsv" else ","
    table = f"image{separator}caption\n1.png{separator}{quoted}\n2.png{separator}plain text here\n"
    if kind == "jsonl":
        table = json.dumps({"image": "1.png", "caption": cell}) + '\n{"image": "2.png", "caption": "plain text here"}\n'
    path = write(tmp_path / ("metadata.csv" if kind == "folder" else f"pairs.{kind}"), table)
    assert check(tmp_path if kind == "folder" else path).captions == {"1.png": captions, "2.png": ["plain text here"]}


@pytest.mark.parametrize("separator", ["| ", "|", ";", "\t", "^"])
@pytest.mark.parametrize("given", [False, True])
def test_columns_and_the_separator_can_be_given(tmp_path, capsys, check, separator, given):
    header = ["bild", "nummer", "satz", "worte"] if given else ["image_name", "comment_number", "comment", "tags"]
    rows, expected = [separator.join(header)], {}
    for number, thing in enumerate(THINGS[:4]):
        write(tmp_path / f"{number}.png", encode(number))
        for i in range(5):
            rows.append(separator.join([f"{number}.png", str(i), f"{thing}, seen {i} times .", "a,b"]))
        expected[f"{number}.png"] = [f"{thing}, seen {i} times ." for i in range(5)]
    path = write(tmp_path / "results.csv", "\n".join(rows))
    options = ["--image-column", "bild", "--caption-column", "satz", "--tag-column", "worte"] if given else []
    if given:
        assert "--image-column" in refusal(
            capsys, "data", "check", path, *(["--separator", "^"] if separator == "^" else [])
        )
    if separator == "^" or given:
        options += ["--separator", separator.strip(" ") if separator != "\t" else "tab"]
    found = check(path, *options)
    assert found.captions == expected
    assert found.left_out == {}


# ---------------------------------------------------------------- 7: captions that are class labels


@pytest.mark.parametrize(("classes", "images"), [(8, 15), (20, 5)])
@pytest.mark.parametrize("layout", ["csv", "folder", "jsonl", "tar"])
def test_every_class_is_on_both_sides(tmp_path, check, classes, images, layout):
    names = [f"class {'abcdefghijklmnopqrst'[number]}{number}x" for number in range(classes)]
    labels = [names[number % classes] for number in range(classes * images)]
    contents = {f"{number:04d}": encode(number) for number in range(len(labels))}
    data = tmp_path / "data"
    if layout == "tar":
        entries = [
            e
            for (key, content), label in zip(contents.items(), labels)
            for e in ((f"{key}.png", content), (f"{key}.txt", label.encode()))
        ]
        data = write_tar(data / "all.tar", entries)
    else:
        for (key, content), label in zip(contents.items(), labels):
            write(data / f"{key}.png", content)
            if layout == "folder":
                write(data / f"{key}.txt", label)
    if layout == "csv":
        data = write(
            data / "pairs.csv",
            "image,caption\n" + "".join(f"{key}.png,{label}\n" for key, label in zip(contents, labels)),
        )
    if layout == "jsonl":
        data = write(
            data / "pairs.jsonl",
            "\n".join(json.dumps({"image": f"{key}.png", "text": label}) for key, label in zip(contents, labels)),
        )
    found = check(data)
    sides: dict[str, set[str]] = {}
    for key, (label,) in found.captions.items():
        sides.setdefault(label, set()).add(found.splits[key])
    assert sides == {name: {"train", "val"} for name in names}
    assert found.used == classes * images


# ---------------------------------------------------------------- 10: large metadata


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with further chunks after its header."""
    content = encode(0)
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:33] + packed + content[33:]


TEXT = b"text " * 400_000
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.png", lambda: png_with((b"tEXt", b"parameters\0" + TEXT))),
        ("itxt.png", lambda: png_with((b"iTXt", b"workflow\0\0\0\0\0" + TEXT))),
        ("ztxt.png", lambda: png_with((b"zTXt", b"prompt\0\0" + zlib.compress(TEXT)))),
        ("many.png", lambda: png_with(*[(b"tEXt", b"key\0" + TEXT[: 1 << 19])] * 150)),
        ("icc.png", lambda: png_with((b"iCCP", b"big\0\0" + zlib.compress(PROFILE + bytes(3 << 20))))),
        ("exif.png", lambda: png_with((b"eXIf", b"II*\0" + bytes(2 << 20)))),
        ("icc.jpg", lambda: encode(0, "JPEG", quality=100, subsampling=0, icc_profile=PROFILE + bytes(1 << 20))),
        ("xmp.webp", lambda: encode(0, "WEBP", lossless=True, xmp=TEXT)),
    ],
)  # fmt: skip
def test_large_metadata_costs_no_image(tmp_path, check, name, content):
    write(tmp_path / f"a_big_{name}", content())
    write(tmp_path / "a small one.png", encode(1))
    found = check(tmp_path)
    assert (found.used, found.left_out) == (2, {})
    source = coalign.open_data(str(tmp_path))
    (index,) = [i for i in range(2) if "big" in source.record(i).key]
    difference = np.abs(open_image(source.image(index)).decode().astype(int) - np.asarray(pixels(0)).astype(int))
    assert difference.max() <= (12 if name.endswith("jpg") else 0)


def test_a_png_file_of_text_by_pillow(tmp_path, check):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", TEXT.decode())
    write(tmp_path / "a red circle.png", encode(0, pnginfo=info))
    assert check(tmp_path).captions == {"a red circle.png": ["a red circle"]}


# ---------------------------------------------------------------- 11, 12: img2dataset


def image_cells(form: str, folder: Path) -> tuple[str, list]:
    contents = [encode(number, "JPEG") for number in range(6)]
    if form == "jpg":
        return "jpg", contents
    if form == "struct":
        return "image", [{"bytes": content, "path": f"{number}.jpg"} for number, content in enumerate(contents)]
    for number, content in enumerate(contents):
        write(folder / f"images/{number}.jpg", content)
    return "image", [f"../images/{number}.jpg" for number in range(6)]


@pytest.mark.parametrize("form", ["jpg", "struct", "path"])
@pytest.mark.parametrize("how", ["file", "folder", "hf:"])
def test_img2dataset_parquet(tmp_path, check, form, how):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    column, cells = image_cells(form, tmp_path)
    status = ["success", "failed_to_download", "success", "success", "failed_to_resize", "success"]
    if form != "path":
        cells = [cell if state == "success" else None for cell, state in zip(cells, status)]
    captions = [f"a {thing} from the web" for thing in THINGS[:6]]
    columns = {
        "url": [f"https://x.example/{number}.jpg" for number in range(6)], "key": [f"{number:09d}" for number in range(6)],
        "status": status, "error_message": [None] * 6, "width": [16] * 6, "caption": captions, column: cells,
    }  # fmt: skip
    path = tmp_path / "tables" / "00000.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.table(columns), path)
    found = check({"file": str(path), "folder": str(path.parent), "hf:": f"hf:{path}"}[how])
    kept = [caption for caption, state in zip(captions, status) if state == "success"]
    assert sorted(caption for (caption,) in found.captions.values()) == sorted(kept)
    assert found.total == 6
    assert {reason for reason in found.left_out if "failed to" in reason} == set(found.left_out)
    assert len(found.left_out) == 2


@pytest.mark.parametrize("field", ["caption", "captions", "text"])
@pytest.mark.parametrize("nesting", ["", "00000/", "data/00000/"])
@pytest.mark.parametrize("statistics", [False, True])
def test_captions_in_json_files_beside_the_images(tmp_path, check, field, nesting, statistics):
    expected = {}
    for number, thing in enumerate(THINGS):
        caption = f"a {thing} – “nice”"
        write(tmp_path / f"{nesting}{number:09d}.jpg", encode(number, "JPEG"))
        fields = {
            field: [caption, "second"] if field == "captions" else caption,
            "url": "https://x.example",
            "status": "success",
        }
        write(tmp_path / f"{nesting}{number:09d}.json", json.dumps(fields, ensure_ascii=number % 2 == 0))
        expected[f"{nesting}{number:09d}.jpg"] = [caption, "second"] if field == "captions" else [caption]
    if statistics:
        write(tmp_path / "00000_stats.json", '{"count": 12, "successes": 12}')
    found = check(tmp_path)
    assert found.captions == expected
    assert (found.left_out, found.unread) == ({}, [])


# ---------------------------------------------------------------- 14: long captions


def test_the_terminal_says_that_captions_are_cut(tmp_path, capsys, check, model_file, without_run_reports):
    for number, thing in enumerate(THINGS * 2):
        write(tmp_path / f"data/{number}.png", encode(number))
        write(tmp_path / f"data/{number}.txt", " ".join([f"a {thing}"] * 50) + f" {number}")
    assert "24 of 24 captions (100" in (printed := check(tmp_path / "data").printed)
    assert "are longer than the context of 77 tokens" in printed
    args = tiny.train_args(
        tmp_path / "data", tmp_path / "run", model_file, epochs=1, batch_size=4, evals=1, val_fraction=0.2
    )
    for options, code in ([], 2), (["--skip-data-checks"], 0):
        assert cli.main([*args, *options]) == code
        printed = " ".join("".join(capsys.readouterr()).split())
        assert "sampled captions (100" in printed
        assert "lose their end" in printed
    search = ["search", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--text"]
    for text, cut in [("red", False), (" ".join(["a red boat"] * 50), True)]:
        assert cli.main([*search, text]) == 0
        assert ("its end is cut" in capsys.readouterr().out) == cut


# ---------------------------------------------------------------- captions that are lost beside others


@pytest.mark.parametrize("kind", ["folder", "shards", "table"])
def test_captions_that_are_not_utf8_are_counted_although_their_image_has_others(
    kind, tmp_path, capsys, check, model_file, without_run_reports
):
    texts = {f"{n}": f"a {thing} on a table".encode() for n, thing in enumerate(THINGS * 2)}
    texts["3"] += b"\nein gr\xfcner Tisch"
    images = {f"{n}.png": encode(int(n)) for n in texts}
    data = tmp_path / "data"
    if kind == "table":
        rows = [b'%s.png,"%s","%s"' % (n.encode(), *text.partition(b"\n")[::2]) for n, text in texts.items()]
        write(data / "pairs.csv", b"\n".join([b"image,caption_1,caption_2", *rows]))
    files = images | ({} if kind == "table" else {f"{n}.txt": text for n, text in texts.items()})
    if kind == "shards":
        write_tar(data / "0.tar", sorted(files.items()))
    else:
        for name, content in files.items():
            write(data / name, content)
    spec = data / "pairs.csv" if kind == "table" else data
    found = check(spec)
    assert found.used == len(texts)
    assert found.left_out == {}
    assert (
        "Captions that are not used, beside others of their image: 1 (caption is not UTF-8), such as of"
        in found.printed
    )
    args = tiny.train_args(spec, tmp_path / "run", model_file, epochs=1, batch_size=4, evals=1, val_fraction=0.2)
    assert cli.main(args) == 0
    assert "sampled pairs are not used, beside others of their image (caption is not UTF-8)" in capsys.readouterr().out


# ---------------------------------------------------------------- 17: ties


@pytest.mark.parametrize(("images", "captions_each"), [(25, 1), (25, 5), (12, 2)])
@pytest.mark.parametrize("ties", ["all", "images", "texts"])
def test_constant_embeddings_are_at_chance(images, captions_each, ties):
    generator = torch.Generator().manual_seed(0)
    texts = images * captions_each

    def vectors(count, constant):
        found = torch.ones(count, 8) if constant else torch.randn(count, 8, generator=generator)
        return torch.nn.functional.normalize(found, dim=1)

    result = retrieval(
        vectors(images, ties != "texts"), vectors(texts, ties != "images"), torch.arange(texts) // captions_each
    )
    for direction in (result.image_to_text, result.text_to_image):
        # only constant candidates tie for a query
        if ties == "all" or (ties == "images") == (direction is result.text_to_image):
            for metric in direction.metrics():
                assert metric.value == pytest.approx(metric.chance), metric.key
            assert direction.median_rank.value > 1


# ---------------------------------------------------------------- 18: batch size 1


def test_a_batch_of_one_pair_is_refused_with_what_allows_which_size(tmp_path, capsys, pairs, model_file):
    for options in ({}, {"model": "timm:resnet18"}):
        args = tiny.train_args(pairs, tmp_path / "run", options.get("model", model_file), batch_size=1)
        error = refusal(capsys, *args)
        assert "Batch size 1 is too small" in error
        assert "--batch-size 2 or more" in error
        assert "encoders with BatchNorm" in error
    assert cli.main([*tiny.train_args(pairs, tmp_path / "run", model_file, batch_size=2), "--dry-run"]) == 0
