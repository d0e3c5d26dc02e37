"""An export tokenizes the run's own captions as the run, or is refused."""

import json
import shutil

import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.runs.run import load
from coalign.workflows.models.caption_check import check_captions
from coalign.workflows.models.export import export

VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}
HOSTILE, REPAIRED = "ein schÃ¶ner Hund", "ein schöner Hund"


def write_table(folder, caption):
    rows = [f"a {color} {noun} &amp; a dog" for color in tiny.COLORS for noun in tiny.NOUNS[:8]]
    rows[5] = caption
    images = sorted(tiny.write_pairs(folder, len(rows)).rglob("*.png"))
    lines = [f"{image.relative_to(folder)},{text}" for image, text in zip(images, rows, strict=True)]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    return folder / "pairs.csv"


@pytest.fixture(params=["clip", "captions"])
def run(request, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(VIT))
    options = {"recipe": "clip", "epochs": 1, "evals": 0, "tokenizer": request.param, "context-length": 32}
    table = write_table(tmp_path / "data", HOSTILE)
    assert cli.main(tiny.train_args(table, tmp_path / "run", tmp_path / "model.json", **options)) == 0
    return tmp_path / "run"


def test_captions_that_a_library_tokenizes_otherwise_are_refused(run, tmp_path, capsys):
    """open_clip repairs them always, CLIP's tokenizer in coalign too, and transformers never."""
    repairs = load(run).tokenizer.repairs
    refused, taken = ("transformers", "open_clip") if repairs else ("open_clip", "transformers")
    advice = (
        "use --to open_clip, or repair these captions" if repairs else "use --to transformers or --to onnx, or repair"
    )
    with pytest.raises(
        UserError, match=f"{refused} tokenizes 1 of 32 captions otherwise than the run, such as '{HOSTILE}': .*{advice}"
    ):
        export(run, refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run, refused, tmp_path / "accepted", max_differing=0.05)
    sentence = f"{refused} tokenizes 1 of 32 captions otherwise than the run, such as '{HOSTILE}' of pairs.csv: their embeddings differ."
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "accepted/README.md").read_text()
    export(run, taken, tmp_path / "out")
    sentence = f"{taken} returns the run's token ids for all of 32 captions of pairs.csv."
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "out/README.md").read_text()


def test_repaired_captions_are_accepted_and_missing_ones_said(run, tmp_path, capsys):
    write_table(tmp_path / "data", REPAIRED)
    for library in ("transformers", "open_clip"):
        export(run, library, tmp_path / library)
        assert f"{library} returns the run's token ids for all of 32 captions" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "data")
    assert check_captions(load(run), "ONNX", lambda _: []) == (
        "The captions of pairs.csv were not compared with ONNX, as they could not be read."
    )
    assert str(tmp_path / "data") in capsys.readouterr().out  # on the terminal, but not on the card
