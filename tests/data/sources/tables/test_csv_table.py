from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
import random
from pathlib import Path

import pytest
from helpers.data_files import write_images

from coalign.config import DataConfig
from coalign.data.sources.base import LeftOut
from coalign.data.sources.open import open_source
from coalign.data.sources.tables.table import open_table
from coalign.errors import UserError


def samples(path: Path, text: str | bytes, **reading) -> list[tuple]:
    """(key, captions) of each sample of a table, all rows of which are read."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    source = open_source(str(path), reading=DataConfig(**reading))
    assert source.left_out == []
    return [(source.record(i).key, *source.record(i).captions) for i in range(len(source))]


# ---------------------------------------------------------------- quotation marks


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("names", [["image", "caption"], ["caption", "image"], ["id", "caption", "image", "tags"]])
@pytest.mark.parametrize("stray", ['"{}', '{}"', 'a "{}', '{}" b', '"{} "b" c', '""{}', '"'])
def test_a_stray_quotation_mark_never_swallows_a_row(
    tmp_path: Path, separator: str, names: list[str], stray: str
) -> None:
    for rows_with_it in ([7], [39], [0, 1], [3, 20, 21, 38], range(40)):
        lines = [separator.join(names)]
        for row in range(40):
            caption = f"caption {row}" if row % 5 else f'"quoted{separator} {row}"'
            caption = stray.format(f"caption {row}") if row in rows_with_it else caption
            values = {"image": f"{row}.jpg", "caption": caption, "id": str(row), "tags": "t"}
            lines.append(separator.join(values[name] for name in names))
        found = samples(tmp_path / "x.tsv", "\n".join(lines))
        assert [key for key, *_ in found] == [f"{row}.jpg" for row in range(40)]
        for row, (_, caption) in enumerate(found):
            expected = f"caption {row}" if row % 5 else f"quoted{separator} {row}"
            expected = stray.format(f"caption {row}") if row in rows_with_it else expected
            assert caption.replace('"', "") == " ".join(expected.replace('"', "").split()) or stray == '"'


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_random_tables_against_the_csv_module(tmp_path: Path, quoting: int, end: str) -> None:
    generator = random.Random(0)
    pieces = ["a", "red", " ", '"', '""', ",", ";", "\t", "|", end, "#", "'", "[x]", "é"]
    for delimiter, columns in itertools.product(",;\t|", itertools.permutations(["image", "caption", "note"])):
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, columns, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writeheader()
        rows = []
        for number in range(20):
            caption = "x" + "".join(generator.choices(pieces, k=generator.randrange(12))) + "y"
            note = "".join(generator.choices(pieces, k=generator.randrange(6)))
            rows.append({"image": f"{number}.jpg", "caption": caption, "note": note})
        writer.writerows(rows)
        found = samples(tmp_path / "x.csv", stream.getvalue())
        assert found == [(row["image"], " ".join(row["caption"].split())) for row in rows]


@pytest.mark.parametrize(
    ("cell", "caption"),
    [
        (r'"a \"red\", big circle"', 'a "red", big circle'),
        (r'"\"red\""', '"red"'),
        (r'"a \"red\" circle, C:\\x, \\\"y\\\""', r'a "red" circle, C:\x, \"y\"'),
        (r'"a path, C:\"', "a path, C:\\"),
        (r"a \"red\" circle", r"a \"red\" circle"),
        ('"a ""red"", big circle"', 'a "red", big circle'),
        ('  "a red, big circle"  ', "a red, big circle"),
        ('12" wide and 3" high', '12" wide and 3" high'),
        ("'a red circle'", "'a red circle'"),
        ('"one\n\n  two, ""x""\n#three"', 'one two, "x" #three'),
    ],
)
def test_quoted_fields(tmp_path: Path, cell: str, caption: str) -> None:
    table = f"image,caption,tags\na.jpg,before,t\nb.jpg,{cell},t\nc.jpg,after,t\n"
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "before"), ("b.jpg", caption), ("c.jpg", "after")]


def test_a_stray_quotation_mark_before_a_row_of_several_lines(tmp_path: Path) -> None:
    table = 'id,caption,image\n1,"stray,a.jpg\n2,"one\ntwo",b.jpg\n3,three,c.jpg\n'
    expected = [("a.jpg", '"stray'), ("b.jpg", "one two"), ("c.jpg", "three")]
    assert samples(tmp_path / "x.csv", table) == expected
    assert samples(tmp_path / "x.csv", table.replace("2,", '"2",')) == expected


def test_files_without_an_image_extension_are_found_in_swallowed_rows(tmp_path: Path) -> None:
    write_images(tmp_path, "img/1", "img/2")
    table = 'image,caption\nimg/1,"one\nimg/2,two"\n'
    assert samples(tmp_path / "x.csv", table) == [("img/1", '"one'), ("img/2", 'two"')]


def test_rows_that_are_quoted_as_a_whole_and_quoted_image_names(tmp_path: Path) -> None:
    table = '"image,caption"\n"a.jpg,one"\n"b.jpg,""two, x"""\n'
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "one"), ("b.jpg", "two, x")]
    assert samples(tmp_path / "x.csv", 'image,caption\n"a.jpg,one\nb.jpg,two\n') == [("a.jpg", "one"), ("b.jpg", "two")]


# ---------------------------------------------------------------- encodings, line ends, what is no row


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    lines = ["image;caption", "a.jpg;grüner Apfel", "", 'b.jpg;"two', 'lines"', "", "c.jpg;three"]
    found = samples(tmp_path / "x.csv", end.join(lines).encode(encoding))
    assert found == [("a.jpg", "grüner Apfel"), ("b.jpg", "two lines"), ("c.jpg", "three")]


@pytest.mark.parametrize(
    "table",
    [
        "# written by a script; image, caption\n# on Monday\nimage,caption\na.jpg,one\n# a comment, too\nb.jpg,two\n",
        "#image,caption\na.jpg,one\nb.jpg,two\n",
        "sep=,\nimage,caption\na.jpg,one\nb.jpg,two\n",
        '"sep=,"\nimage,caption\na.jpg,one\nb.jpg,two\n',
        "sep=,,\nimage,caption,\na.jpg,one,\nb.jpg,two,\n",
        "image,caption,,\na.jpg,one,,\n,,,\nb.jpg,two\n\n\n",
        "image,caption\na.jpg,one,,\n   \nb.jpg,two,\n",
        "image,caption\na.jpg,one\nimage,caption\nb.jpg,two\n",  # two tables in one file
        '"image","caption"\n"a.jpg","one"\n"b.jpg","two"\n',
        "image, caption\na.jpg, one\nb.jpg,   two\n",
    ],
)
def test_what_is_no_row_and_no_cell(tmp_path: Path, table: str) -> None:
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "one"), ("b.jpg", "two")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_compressed_tables(tmp_path: Path, kind: str, opener) -> None:
    path = tmp_path / f"x.{kind}.{ {gzip.open: 'gz', bz2.open: 'BZ2', lzma.open: 'xz'}[opener] }"
    with opener(path, "wt", encoding="utf-16") as file:
        file.write("image\tcaption\na.jpg\tgrün\n" + "b.jpg\ttwo\n" * 5000)
    source = open_source(str(path))
    assert [source.record(i).captions for i in range(len(source))] == [("grün",), ("two",)]
    content = path.read_bytes()
    for damaged in (content[:-20], content[:30] + b"x" * 40, b"image"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            open_source(str(path))


@pytest.mark.parametrize("names", [["image", "caption"], ["caption", "image"], ["id", "image", "caption", "note"]])
def test_mixed_line_ends(tmp_path: Path, names: list[str]) -> None:
    generator = random.Random(0)
    for ends in itertools.product(["\n", "\r\n", "\r"], repeat=2):
        rows = [dict(zip(names, names))]
        rows += [{"image": f"{i}.jpg", "caption": f"caption {i}", "id": str(i), "note": "a b"} for i in range(40)]
        lines = [",".join(row[name] for name in names) + generator.choice(ends) for row in rows]
        expected = [(f"{i}.jpg", f"caption {i}") for i in range(40)]
        assert samples(tmp_path / "x.csv", "".join(lines)) == expected
    table = "image\tcaption\na.jpg\tone\rtwo\nb.jpg\tthree\n"  # not a row
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "one two"), ("b.jpg", "three")]


# ---------------------------------------------------------------- columns


def test_separators_in_unquoted_captions(tmp_path: Path) -> None:
    table = "image,caption\na.jpg,one, two,three\nb.jpg,x\n"
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "one, two,three"), ("b.jpg", "x")]
    path = tmp_path / "y.csv"
    path.write_text("image,caption,tags\na.jpg,one,t\nb.jpg,one, two,t\nc.jpg\nd.jpg,x\n")
    source = open_table(path)  # elsewhere, and in rows without a caption, one would have to guess
    assert [source.record(i).key for i in range(len(source))] == ["a.jpg", "d.jpg"]
    assert source.left_out == [LeftOut(f"y.csv line {number}", "wrong number of columns") for number in (3, 4)]


def test_columns_of_the_same_name_and_without_one(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",image,caption,caption,note,note\n0,a.jpg,one,two,n,m\n")
    record = open_table(path).record(0)
    assert record.captions == ("one", "two")
    assert record.facts == {"column 1": "0", "note": "n", "note_2": "m"}


@pytest.mark.parametrize("separator", ["|", "| ", " | "])
def test_spaces_after_separators(tmp_path: Path, separator: str) -> None:
    rows = [["image_name", "comment_number", "comment"], ["a.jpg", "0", "one , x ."], ["a.jpg", "1", "two"]]
    table = "\n".join(separator.join(row) for row in rows)
    assert samples(tmp_path / "results.csv", table) == [("a.jpg", "one , x .", "two")]
    given = {"image_column": "IMAGE_NAME", "caption_column": ("comment",), "separator": "|"}
    assert samples(tmp_path / "results.csv", table, **given) == [("a.jpg", "one , x .", "two")]


@pytest.mark.parametrize(
    ("given", "actual"), [("\\t", "\t"), ("tab", "\t"), ("\t", "\t"), ("^", "^"), ("||", "||"), (" ", " ")]
)
def test_given_separators(tmp_path: Path, given: str, actual: str) -> None:
    table = f"image{actual}caption\na.jpg{actual}one{actual}two\n"
    assert samples(tmp_path / "x.csv", table, separator=given) == [("a.jpg", " ".join(f"one{actual}two".split()))]
    for wrong in ("", '"', "\n"):
        with pytest.raises(UserError, match="--separator"):
            open_table(tmp_path / "x.csv", DataConfig(separator=wrong))


def test_names_are_matched_exactly_or_ignoring_case(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("Key,key,Words,KW\na.jpg,b.jpg,one,t\n")
    for name, key in {"Key": "a.jpg", "key": "b.jpg"}.items():
        record = open_table(path, DataConfig(name, ("words",), "kw")).record(0)
        assert (record.key, record.captions, record.tags) == (key, ("one",), ("t",))
    for name in ("KEY", "nope"):  # ambiguous, missing
        with pytest.raises(UserError, match=f"x.csv has no column '{name}'; its columns are: Key, key, Words, KW"):
            open_table(path, DataConfig(name, ("words",)))


# ---------------------------------------------------------------- no header


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".tab", ".psv", ".dat", ".token"])
@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", " "])
def test_tables_without_a_header(tmp_path: Path, suffix: str, separator: str) -> None:
    captions = ["A child in a pink dress .", f"two{separator} three", 'a "girl', "dog"]
    table = "".join(f"{i // 2}.jpg#{i % 2}{separator}{caption}\n" for i, caption in enumerate(captions))
    captions = [" ".join(caption.split()) for caption in captions]
    expected = [("0.jpg", *captions[:2]), ("1.jpg", *captions[2:])]
    assert samples(tmp_path / f"Flickr8k{suffix}", table) == expected


def test_columns_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("1,a.jpg,a red circle,train\n2,b.jpg,a blue circle,val\n")
    source = open_table(path)
    assert source.record(1).captions == ("a blue circle",)
    assert source.record(1).facts == {"column 1": "2", "column 4": "val"}
    path.write_text("a.jpg,a red circle,one red circle\nb.jpg,a blue circle,one blue circle\n")
    assert open_table(path).record(0).captions == ("a red circle", "one red circle")
    with pytest.raises(UserError, match="no column 'x'; its columns are: image, caption_1, caption_2"):
        open_table(path, DataConfig("x"))


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("columns", [["image", "caption"], ["caption", "image"], ["id", "image", "caption", "split"]])
@pytest.mark.parametrize("which", [[0], [1, 2], range(5)])
def test_captions_of_several_lines_without_a_header(
    tmp_path: Path, separator: str, columns: list[str], which: list[int]
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, delimiter=separator, lineterminator="\n")
    captions = [
        f'a "red" circle,\n\nnumber {i}, it is; and |' if i in which else f"plain caption {i}" for i in range(5)
    ]
    for number, caption in enumerate(captions):
        values = {"image": f"{number}.jpg", "caption": caption, "id": str(number), "split": "train"}
        writer.writerow({name: values[name] for name in columns})
    rows = stream.getvalue()
    assert samples(tmp_path / "x.csv", rows) == [(f"{i}.jpg", " ".join(captions[i].split())) for i in range(5)]


def test_names_of_rows_that_have_no_column_name(tmp_path: Path) -> None:
    table = '"image","caption"\n"1","a.jpg","one"\n"2","b.jpg","two"\n'  # R's write.table
    assert samples(tmp_path / "x.csv", table) == [("a.jpg", "one"), ("b.jpg", "two")]
    table = "image,caption\n1,one, two\n2,three, four\n"
    assert samples(tmp_path / "x.csv", table) == [("1", "one, two"), ("2", "three, four")]
    (tmp_path / "x.csv").write_text("caption,image\none, two,a.jpg\nthree, four,b.jpg\n")
    with pytest.raises(UserError, match=r"wrong number of columns \(2\)"):  # not a name "one" and a caption "two"
        open_table(tmp_path / "x.csv")


@pytest.mark.parametrize("names", [["image", "caption"], ["caption", "image"], ["image", "caption", "note"]])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_separators_with_a_backslash(tmp_path: Path, names: list[str], separator: str) -> None:
    stream = io.StringIO(newline="")
    options = {"quoting": csv.QUOTE_NONE, "escapechar": "\\", "lineterminator": "\n"}
    writer = csv.DictWriter(stream, names, delimiter=separator, extrasaction="ignore", **options)
    writer.writeheader()
    captions = ["one", f"two{separator} three", f"four{separator}five{separator}"]
    for number, caption in enumerate(captions):
        writer.writerow({"image": f"{number}.jpg", "caption": f"{caption} x", "note": "n"})
    expected = [(f"{number}.jpg", " ".join(f"{caption} x".split())) for number, caption in enumerate(captions)]
    assert samples(tmp_path / "x.csv", stream.getvalue()) == expected


@pytest.mark.parametrize("name", ["{}", "10{}92795", "COCO_{}", "img/{}"])
@pytest.mark.parametrize("stray", [[0], [3, 20], [39]])
def test_a_stray_quotation_mark_among_image_names_without_an_extension(
    tmp_path: Path, name: str, stray: list[int]
) -> None:
    captions = [f"{chr(34) if row in stray else ''}a red circle {row}" for row in range(40)]
    rows = [(name.format(row), captions[row]) for row in range(40)]
    table = "image_id\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in rows)
    assert samples(tmp_path / "x.tsv", table) == rows
    table = table.replace("circle 5", '"circle\n5, and two"').replace("\ta red", '\t"a red', 1)


def test_text_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a red circle\na blue square\n")
    with pytest.raises(UserError, match=r"Cannot detect the column of x\.txt with the image paths"):
        open_source(str(path))


def test_tags_of_all_rows_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('image,caption,tags\na.jpg,one,"t,u"\na.jpg,two,"u,v"\na.jpg,,[\'w\']\n')
    record = open_table(path).record(0)
    assert (record.captions, record.tags) == (("one", "two"), ("t", "u", "v", "w"))
