import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.workflows.explore.space import space


def test_figure_and_modality_gaps(trained, tmp_path, capsys):
    tiny.write_pairs(tmp_path / "photos", 24)
    out = tmp_path / "space.png"
    assert cli.main(["space", str(trained), "--data", str(tmp_path / "photos"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("modality gap") == 2
    assert Image.open(out).size[0] > 1000
    gaps = space(trained, str(tmp_path / "photos"), out)
    assert all(0 <= gap <= 2 for gap in gaps.values())
    assert gaps["before training"] != gaps["after training"]


def test_invalid_arguments_raise(trained, tmp_path):
    tiny.write_pairs(tmp_path / "few", 4)
    with pytest.raises(UserError, match="too few"):
        space(trained, str(tmp_path / "few"), tmp_path / "space.png")
    with pytest.raises(UserError, match="is not an image file name"):
        space(trained, str(tmp_path / "few"), tmp_path / "space.txt")


def test_one_vector_per_sample_is_needed(oner, tmp_path):
    out = tmp_path / "space.png"
    with pytest.raises(UserError, match="pass --similarity projector"):
        space(oner, "scenes:32,size=32", out)
    assert not out.exists()
    assert space(oner, "scenes:32,size=32", out, similarity="projector").keys() == {"before training", "after training"}
