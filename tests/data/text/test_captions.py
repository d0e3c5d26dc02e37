from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from coalign.data.sources.tables.table import open_table
from coalign.data.text.captions import MAX_COLLECTION_LENGTH, caption_values, tag_values
from coalign.errors import BadSample

CAPTIONS = ["a red circle", "it's a circle", 'a "red" one, [big]', "nan is nan (x)", "ünïcode\\d"]
NESTED = [CAPTIONS[:2], [CAPTIONS[2:4], CAPTIONS[4]]]
FORMS = {
    "a list": CAPTIONS,
    "a nested list": NESTED,
    "JSON": json.dumps(CAPTIONS),
    "nested JSON": json.dumps(NESTED),
    "JSON with a missing value": json.dumps([None, *CAPTIONS]),
    "indented JSON": "  " + json.dumps(CAPTIONS, indent=2) + "\n",
    "a Python list": str(CAPTIONS),
    "a Python list with missing values": str([None, *CAPTIONS, float("nan")]),
    "a nested Python list": str(NESTED),
    "a Python tuple": str(tuple(CAPTIONS)),
    "NumPy": str(np.array(CAPTIONS)),
    "NumPy in one line": np.array2string(np.array(CAPTIONS, dtype=object), max_line_width=1000),
    "nested NumPy": str(np.array([CAPTIONS[:2], CAPTIONS[2:4]])) + " ",
    "NumPy's repr": repr(np.array(CAPTIONS, dtype=object)),
    "a list of NumPy's strings": f"[{', '.join(f'np.str_({each!r})' for each in CAPTIONS)}]",
    "a deque": f"deque({CAPTIONS})",
    "a list, quoted once more": f'"{CAPTIONS}"',
    "typographic quotation marks": f"[{', '.join(f'“{each}”' for each in CAPTIONS)}]",
    "quotation marks that are not escaped": f"[{', '.join(f'«{each}»' for each in CAPTIONS)}]".translate(
        {171: "'", 187: "'"}
    ),
    "escaped quotation marks": json.dumps(CAPTIONS[:2] + CAPTIONS[3:4]).replace('"', '\\"'),
    "doubled quotation marks": json.dumps(CAPTIONS[:2] + CAPTIONS[3:4]).replace('"', '""'),
    "objects": [{"caption": caption, "id": 7} for caption in CAPTIONS],
    "objects in JSON": json.dumps([{"tokens": ["x"], "raw": caption} for caption in CAPTIONS]),
    "objects in Python": str([{"Text": caption, "score": 0.5} for caption in CAPTIONS]),
    "an object of a list": json.dumps({"captions": CAPTIONS, "ids": [1, 2]}),
    "an object by number": str(dict(enumerate(CAPTIONS))),
    "a conversation": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        *({"from": "gpt", "value": each} for each in CAPTIONS),
    ],
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": [{"type": "text", "text": each} for each in CAPTIONS]},
    ],
    "an object by language": str(dict(zip("abcde", CAPTIONS))),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_lists_of_captions(tmp_path: Path, form: str) -> None:
    expected = CAPTIONS[:4] if form == "nested NumPy" else CAPTIONS
    if form in ("escaped quotation marks", "doubled quotation marks"):
        expected = [*CAPTIONS[:2], CAPTIONS[3]]
    assert [raw.decode() for raw in caption_values(FORMS[form])] == expected
    if isinstance(FORMS[form], str):
        with open(tmp_path / "x.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "caption"], ["a.jpg", FORMS[form]], ["b.jpg", "plain"]])
        assert list(open_table(tmp_path / "x.csv").record(0).captions) == expected
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": FORMS[form]}))
    assert list(open_table(tmp_path / "x.jsonl").record(0).captions) == expected
    if "object" not in form and form not in ("a conversation", "messages"):
        assert list(tag_values(FORMS[form])) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "[red] circle",
        '["red"] circle',
        "(a) a cat and (b) a dog",
        "[red, blue]",
        "[1, 2]",
        "(1, 2)",
        "[]]",
        "['a' + 'b']",
        "[__import__('os').getcwd()]",
        "['open]",
        "('a' said the 'b')",
        "[“a” and “b”]",
        "{x}",
        "{'a', 1}",
        "array(x)",
        "[" * 5000 + "]" * 5000,
        str(["x" * MAX_COLLECTION_LENGTH]),
    ],
)
def test_captions_in_brackets_that_are_no_lists(caption: str) -> None:
    assert caption_values(caption) == [caption.encode()]


def test_values_without_captions() -> None:
    for value in (
        None,
        float("nan"),
        "nan",
        "NULL",
        ["None"],
        [],
        "[]",
        "()",
        [None],
        [[]],
        {},
        {"id": 3},
        [{"caption": None}],
    ):
        assert caption_values(value) == []
    nested = ["a"]
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(BadSample, match="nested too deeply"):
        caption_values(nested)


def test_tags() -> None:
    assert tag_values("a, b;c|d") == ("a", "b", "c", "d")
    assert tag_values("[red, round]") == ("red", "round")
    assert tag_values("['red' 'round']") == ("red", "round")
    assert tag_values({"red": 0.9, "round": 0.1}) == tag_values("{'red': 0.9, 'round': 0.1}") == ("red", "round")
    assert tag_values([{"name": "red", "score": 1}, {"name": "round"}]) == ("red", "round")
    assert tag_values(None) == tag_values("") == tag_values("[]") == ()
