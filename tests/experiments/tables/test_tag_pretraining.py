"""The image encoder pretrained on tags: its features predict other scenes' colors better than random features."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from coalign.data.scenes.source import Scenes
from coalign.errors import UserError
from coalign.experiments.tables import tag_pretraining
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec


def area_under_the_curve(image_tower):
    """ROC AUC of a linear probe for "blue", on the second half of other scenes."""
    source = Scenes(600, level="hard", seed=1, size=32, split="train")
    torch.manual_seed(0)
    tower = build_image_tower(TowerSpec("tiny", 100, image_size=32, image_tower=image_tower)).eval()
    pixels = torch.from_numpy(np.stack([source.image(index) for index in range(600)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = tower(pixels).pooled.numpy()
    blue = np.array(["blue" in source.record(index).tags for index in range(600)])
    probe = LogisticRegression(max_iter=2000).fit(features[:300], blue[:300])
    return roc_auc_score(blue[300:], probe.decision_function(features[300:]))


@pytest.mark.slow
def test_pretrained_features_predict_tags(tmp_path, monkeypatch):
    path = tmp_path / "encoder"
    monkeypatch.setattr(tag_pretraining, "EPOCHS", 16)
    tag_pretraining.train(1024, 32, path)
    assert area_under_the_curve(str(path)) > area_under_the_curve(None) + 0.1


def test_an_unwritable_path_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(tag_pretraining, "EPOCHS", 1)
    with pytest.raises(UserError, match="could not be written to"):
        tag_pretraining.train(128, 32, tmp_path / "nowhere" / "encoder")


def test_pretraining_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr(tag_pretraining, "EPOCHS", 1)
    for name in ("first", "second"):
        tag_pretraining.train(256, 32, tmp_path / name)
    once, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(value, again[name]) for name, value in once.items())
