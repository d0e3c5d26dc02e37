"""Captions, queries and prompts that are longer than the context are reported on the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.models.export import export

LONG = " ".join(f"word{i}" for i in range(60))  # two or more tokens each


def data_with_long_captions(folder: Path, num_long: int, count: int = 32) -> Path:
    tiny.write_pairs(folder, count)
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"{LONG} {number}" if number < num_long else f"a {number}")
    return folder


@pytest.mark.parametrize("num_long", [0, 3, 5])
def test_train_and_check(tmp_path, capsys, model_file, num_long):
    """More than a tenth of cut captions stop the run, unless it skips the checks; fewer are reported."""
    data = data_with_long_captions(tmp_path / "pairs", num_long)
    arguments = tiny.train_args(data, tmp_path / "run", model_file, val_fraction=0)
    share = {3: "9.4 %", 5: "15.6 %"}.get(num_long)
    stopped = num_long == 5
    assert cli.main([*arguments, "--dry-run"]) == (2 if stopped else 0)
    printed = capsys.readouterr().err if stopped else capsys.readouterr().out
    assert ("--skip-data-checks trains anyway" in printed) == stopped
    found = re.search(rf"(\d+) of 32 sampled captions \({share}\).*--context-length (\d+) keeps them whole", printed)
    assert (found is None) == (num_long == 0)
    if found:
        assert found[1] == str(num_long)
        longer = [*arguments, "--dry-run", "--context-length", found[2]]
        assert cli.main(longer) == 0
        assert "sampled captions" not in capsys.readouterr().out
        longer[-1] = str(int(found[2]) - 1)
        assert cli.main([*longer, "--skip-data-checks"]) == 0
        assert "sampled captions" in capsys.readouterr().out
    assert cli.main(["data", "check", str(data)]) == 0
    assert (f"{num_long} of 32 captions ({share}) are longer" in capsys.readouterr().out) == (num_long > 0)


@pytest.mark.parametrize("library", ["coalign", "open_clip", "transformers", "onnx"])
def test_queries(trained, pairs, tmp_path, capsys, library):
    model = trained
    if library != "coalign":
        pytest.importorskip(library if library != "onnx" else "onnxruntime")
        model = tmp_path / "model"
        export(trained, library, model)
    encoder = open_eval_model(model).encoder
    limit = encoder.context_length
    words = next(n for n in range(1, 200) if encoder.num_tokens("a " * n) > limit) - 1  # fit exactly
    for text, cut in (("a red thing", False), ("a " * words, False), ("a " * (words + 1), True), (LONG, True)):
        assert cli.main(["search", str(model), "--data", str(pairs), "--text", text]) == 0
        assert (f"but the context of the model has {limit}: its end is cut." in capsys.readouterr().out) == cut


def test_localized_texts(trained, tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    texts = ["a red thing", LONG]
    command = ["localize", str(trained), "--image", str(tmp_path / "image.png"), "--text", *texts]
    assert cli.main([*command, "--out", str(tmp_path / "map.png")]) == 0
    assert capsys.readouterr().out.count("its end is cut") == 1


def test_evaluated_captions(trained, tmp_path, capsys):
    data = data_with_long_captions(tmp_path / "pairs", 4)
    out = tmp_path / "results.json"
    assert cli.main(["eval", str(trained), "--tasks", f"retrieval:{data}", "--split", "all", "--json", str(out)]) == 0
    distinct = len({path.read_text() for path in data.rglob("*.txt")})
    sentence = f"4 of {distinct} texts"
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert any(sentence in note for note in next(iter(json.loads(out.read_text()).values()))["notes"])
