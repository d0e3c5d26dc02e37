"""What we rely on in open_clip, in every version that works; `make test-open-clip` runs these tests with another one."""

import json
import runpy
from pathlib import Path

import open_clip.transformer  # noqa: F401
import pytest
from open_clip import CLIPTextCfg, CLIPVisionCfg

from coalign.errors import UserError
from coalign.networks import open_clip_parts
from coalign.networks.open_clip_parts import build_text_transformer, build_visual
from coalign.networks.transformer import is_plain

WEIGHTS = Path(__file__).with_name("open_clip_weights.json")
SMALL = {"width": 32, "image_size": 32, "patch_size": 16, "head_width": 16}


def weights():
    """Returns the name and shape of every weight of open_clip's image and text towers."""
    towers = {
        "vit": build_visual(16, CLIPVisionCfg(layers=1, **SMALL)),
        "resnet": build_visual(16, CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32, head_width=16)),
        "text": build_text_transformer(16, CLIPTextCfg(context_length=8, vocab_size=50, width=16, heads=2, layers=1)),
    }
    return {
        name: {key: list(value.shape) for key, value in tower.state_dict().items()} for name, tower in towers.items()
    }


def test_weights_have_the_same_names_in_every_version():
    """Otherwise runs and exports could not be loaded under another version."""
    assert weights() == json.loads(WEIGHTS.read_text())


@pytest.mark.parametrize("setting", ["qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"])
def test_blocks_with_more_in_their_attention_are_not_plain(setting):
    assert is_plain(build_visual(16, CLIPVisionCfg(layers=1, **SMALL)).transformer)
    assert not is_plain(build_visual(16, CLIPVisionCfg(layers=1, **SMALL, **{setting: True})).transformer)


@pytest.mark.parametrize("name", ["ResidualAttentionBlock", "VisionTransformer._pool"])
def test_a_version_without_a_name_is_rejected(monkeypatch, name):
    monkeypatch.delattr(f"open_clip.transformer.{name}")
    with pytest.raises(
        UserError, match=rf"open_clip is not supported \(.*{name.split('.')[-1]}.*install open_clip_torch"
    ):
        runpy.run_path(open_clip_parts.__file__)
