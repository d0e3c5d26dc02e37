import pytest
import tiny
from PIL import Image

from coalign import cli
from coalign.errors import UserError
from coalign.run.space import space


def test_two_panels_and_their_gaps(trained, tmp_path, capsys):
    tiny.write_pairs(tmp_path / "photos", 24)
    out = tmp_path / "space.png"
    assert cli.main(["space", str(trained), "--data", str(tmp_path / "photos"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("apart") == 2
    assert Image.open(out).size[0] > 1000
    gaps = space(trained, str(tmp_path / "photos"), out)
    assert all(0 <= gap <= 2 for gap in gaps.values())
    assert gaps["before training"] != gaps["after training"]


def test_what_is_wrong_is_said(trained, tmp_path):
    tiny.write_pairs(tmp_path / "few", 4)
    with pytest.raises(UserError, match="too few"):
        space(trained, str(tmp_path / "few"), tmp_path / "space.png")
    with pytest.raises(UserError, match="no picture's name"):
        space(trained, str(tmp_path / "few"), tmp_path / "space.txt")
