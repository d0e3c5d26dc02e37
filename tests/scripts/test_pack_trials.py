"""Packed trials: the same comparison after unpacking, equal archives, no paths of this machine."""

import json
import tarfile
from pathlib import Path

import pytest
from helpers.run_folders import write_run

from coalign.experiments.compare.compare import compare

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def pack(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import pack_trials

    return pack_trials.pack


def test_unpacked_trials_compare_as_before(pack, tmp_path):
    table = tmp_path / "table"
    for seed in (0, 1):
        write_run(table / f"clip-seed{seed}", 8, seed=seed)
        write_run(table / f"slip-seed{seed}", 14 + seed, seed=seed, method="slip")
    (table / "search").mkdir()
    (table / "search/clip-trial1.json").write_text('{"trial": 1}')
    (table / "search/clip-trial1").mkdir()
    (table / "interrupted-seed0").mkdir()
    assert pack(table, tmp_path / "a.tar.xz") == 1 + 4 * 4
    pack(table, tmp_path / "b.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()

    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    for path in (tmp_path / "unpacked").rglob("*.json*"):
        assert str(tmp_path) not in path.read_text()
    assert (tmp_path / "unpacked/search/clip-trial1.json").read_text() == '{"trial": 1}'
    before, after = (
        compare([folder / name for name in names], groups=["clip", "clip", "slip", "slip"]).to_json()
        for names in [["clip-seed0", "clip-seed1", "slip-seed0", "slip-seed1"]]
        for folder in (table, tmp_path / "unpacked")
    )
    assert json.dumps(after) == json.dumps(before)
