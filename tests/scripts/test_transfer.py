"""The script that measures transfer, on a finished table of two tiny runs, and its page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clip_art(tmp_path):
    """Drawings of a color per tag; some have no class, one has two."""
    random = np.random.default_rng(0)
    rows = []
    (tmp_path / "art").mkdir()
    for number in range(90):
        tag = ("flag", "sports", "beverage")[number % 3]
        color = np.roll([230, 40, 40], number % 3) + random.integers(0, 20, 3)
        Image.fromarray(np.full((24, 24, 3), color, np.uint8)).save(tmp_path / f"art/{number}.png")
        tags = ["red", *(["flag", "sports"] if number == 0 else [] if number % 10 == 9 else [tag])]
        rows.append({"image": f"{number}.png", "captions": [f"a {tag}"], "tags": tags})
    (tmp_path / "art/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "art"


def test_encoders_on_other_data(tmp_path, clip_art, monkeypatch):
    runs = tmp_path / "runs"
    model = tiny.write_model(tmp_path)
    for seed in (0, 1):
        data = tiny.write_pairs(tmp_path / "pairs", 40) if not seed else tmp_path / "pairs"
        args = [*tiny.train_args(data, runs / f"clip-seed{seed}", model), "--seed", str(seed)]
        assert cli.main(args) == 0
    groups = [
        {"name": "clip", "runs": ["clip-seed0", "clip-seed1"], "seeds": [0, 1]},
        {"name": "clip, 50 %", "runs": ["gone"], "seeds": [0]},
        {"name": "mcd", "runs": ["gone"], "seeds": [0]},
    ]
    arms = {name: {"train_fraction": fraction} for name, fraction in (("clip", 1.0), ("clip, 50 %", 0.5), ("mcd", 1.0))}
    (runs / "table.json").write_text(json.dumps({"table": "headline-emoji-concepts", "groups": groups, "arms": arms}))
    out = tmp_path / "transfer-emoji.json"
    command = [sys.executable, ROOT / "scripts/transfer.py", runs, "--data", f"openclipart={clip_art}", "--out", out]
    wrong, done = (
        subprocess.run([str(word) for word in [*command, "--arms", arm]], capture_output=True, text=True)
        for arm in ("slip", "clip")
    )
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == f"{runs} has no finished runs of slip on all pairs."
    assert done.returncode == 0, done.stderr
    values = json.loads(out.read_text())
    assert list(values["arms"]) == ["clip", "untrained"]
    assert set(values["tasks"]) == {
        f"{task}:{data}" for task in ("zeroshot", "probe", "knn") for data in ("digits", "openclipart")
    }
    # 90 drawings without the nine that have no class; every other one is evaluated
    assert values["tasks"]["probe:openclipart"] == {"samples": 40, "chance": pytest.approx(1 / 3)}
    for arm in values["arms"].values():
        assert arm["seeds"] == [0, 1]
        colors = arm["accuracies"]["probe:openclipart"]
        assert colors["mean"] == pytest.approx(np.mean(colors["values"]))
        assert colors["mean"] > 0.9  # one color per class
        low, high = colors["over_seeds"]
        assert low <= colors["mean"] <= high
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from evidence.other_pages import transfer_page

    text = transfer_page([{"name": "transfer-emoji", **values}])
    assert "| Untrained |" in text
    assert "| Chance | 10.0 | 33.3 |  |" in text
    assert str(tmp_path) not in out.read_text()
