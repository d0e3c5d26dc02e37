import json
from dataclasses import replace

from coalign.config import DataConfig
from coalign.methods import recipe
from coalign.runs.folder import CONFIG, SavedConfig, read_config, write_config


def test_runs_from_before_look_alikes_keep_their_split(tmp_path):
    config = replace(recipe("clip")(5000), reading=DataConfig(group_column="product"))
    assert config.group_look_alikes
    write_config(tmp_path, SavedConfig("data", config, 5000, 100))
    assert read_config(tmp_path).config == config
    saved = json.loads((tmp_path / CONFIG).read_text())
    del saved["config"]["group_look_alikes"]
    (tmp_path / CONFIG).write_text(json.dumps(saved))
    assert read_config(tmp_path).config == replace(config, group_look_alikes=False)
