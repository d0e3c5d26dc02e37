import json
from dataclasses import replace

from coalign.config import DataConfig
from coalign.methods import recipe
from coalign.runs.folder import CONFIG, SavedConfig, describe_model, read_config, write_config


def test_runs_from_before_look_alikes_keep_their_split(tmp_path):
    config = replace(recipe("clip")(5000), reading=DataConfig(group_column="product"))
    assert config.group_look_alikes
    write_config(tmp_path, SavedConfig("data", config, 5000, 100))
    assert read_config(tmp_path).config == config
    saved = json.loads((tmp_path / CONFIG).read_text())
    del saved["config"]["group_look_alikes"]
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    assert read_config(tmp_path).config == replace(config, group_look_alikes=False)


def test_a_model_is_described_without_long_paths():
    config = recipe("clip")(1000)
    assert describe_model(config) == "tiny"
    image = replace(config, image_tower="/a/b/lite0-5793.pth")
    assert describe_model(image) == "lite0-5793.pth and the text encoder of tiny"
    assert describe_model(replace(image, text_tower="/a/b/minilm/model")) == "lite0-5793.pth and minilm/model"
    assert describe_model(replace(config, text_tower="hf:org/name")) == "the image encoder of tiny and hf:org/name"
    assert describe_model(replace(image, image_tower="timm:resnet50:/a/w.pth")).startswith("timm:resnet50:w.pth and")
