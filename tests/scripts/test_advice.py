"""The script that tries the advice of a benchmark on other data: the regret, and the pairs that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCORES = {"clip": 0.4, "uniclip": 0.43, "mcd": 0.45}


@pytest.fixture
def advice(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import advice

    return advice


def write_result(folder, recommended):
    folder.mkdir(parents=True)
    groups = [
        {
            "name": name,
            "metrics": {
                f"retrieval_test.{side}.r10": {"value": score + more}
                for side, more in (("image_to_text", -0.1), ("text_to_image", 0.1))
            },
        }
        for name, score in SCORES.items()
    ]
    values = {
        "headline": "R@10, mean of both directions", "recommended": recommended, "advice": "choose it", "leads": [],
        "settings": {"num_train": 900}, "groups": groups,
    }  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(values))


def test_regret(advice, tmp_path):
    names = [*advice.SETS, "scenes"]
    assert len(names) == 6
    for number, name in enumerate(names):
        write_result(tmp_path / name, ("mcd", "clip")[number % 2])
    found = advice.summary(tmp_path)
    assert found["sets"]["diagrams"]["regret"] == pytest.approx(0)
    assert found["sets"]["fontawesome"]["regret"] == pytest.approx(0.05)
    assert found["mean_regret"] == pytest.approx(0.025)
    assert found["sets"]["scenes"]["scores"] == pytest.approx(SCORES)


def test_a_benchmark_without_a_recommendation_is_named(advice, tmp_path):
    write_result(tmp_path / "diagrams", "")
    with pytest.raises(SystemExit, match="diagrams recommends no method: choose it"):
        advice.summary(tmp_path)


def test_pairs_of_a_package(advice, tmp_path, monkeypatch):
    """Transparent drawings of any shape become opaque images, with their names as captions."""
    pictures = tmp_path / "site/resources/aws/compute"
    pictures.mkdir(parents=True)
    Image.fromarray(np.full((100, 50, 4), (255, 0, 0, 128), np.uint8)).save(pictures / "auto-scaling.png")
    (tmp_path / "site/diagrams").mkdir()
    monkeypatch.setattr(advice, "package", lambda name: tmp_path / "site" / name)
    monkeypatch.setattr(advice, "SETS", {"diagrams": advice.diagrams})
    advice.write_data(tmp_path / "data")
    (row,) = map(json.loads, (tmp_path / "data/diagrams/metadata.jsonl").read_text().splitlines())
    assert row["captions"] == ["aws auto scaling", "aws compute auto scaling"]
    image = Image.open(tmp_path / "data/diagrams" / row["image"])
    assert (image.size, image.mode) == ((36, 72), "RGB")
    assert image.getpixel((10, 10)) == pytest.approx((255, 127, 127), abs=1)


def test_a_missing_package_is_named(advice):
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        advice.package("no_such_package")
