import json
from dataclasses import replace

from coalign.config import DataConfig
from coalign.methods import recipe
from coalign.runs.folder import CONFIG, SavedConfig, data_name, describe_model, public, read_config, write_config


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


def test_what_is_published_names_no_local_folders_and_hosts():
    names = {
        "/home/me/photos": "photos",
        "~/photos": "photos",
        "../photos": "photos",
        "data/../../me/photos": "photos",
        "data/photos": "data/photos",
        "hf:owner/name": "hf:owner/name",
        "timm:resnet50:/home/me/w.pt": "timm:resnet50:w.pt",
        "coco:/home/me/captions.json:/home/me/images": "coco:captions.json:images",
        "data/photos + /home/me/web": "data/photos + web",
        "photos.csv + 0.5*/home/me/web/{00..10}.tar + 2 * ~/more": "photos.csv + 0.5*{00..10}.tar + 2 * more",
        "https://host/x.tar": "x.tar",
        "https://me:secret@host:8080/private/{000..010}.tar?key=a/b": "{000..010}.tar",
        "simplecache::s3://bucket/my photos/x.tar": "x.tar",
        "s3://bucket": "s3",
        "a/pairs.csv + 0.5*gs://bucket/web/{a/00,b/00}.tar + hf:me/x": "a/pairs.csv + 0.5*{a/00,b/00}.tar + hf:me/x",
        "hf:/home/me/saved": "hf:saved",
        "/home/me/{train,val}/{00..10}.tar": "{00..10}.tar",
        "/home/me/{a,b/c}/": "{a,b/c}",
        "0.75 × /home/me/a + 0.25 × runs/b (WiSE-FT)": "0.75 × a + 0.25 × runs/b (WiSE-FT)",
        "a 3*4 grid": "a 3*4 grid",
    }
    assert {name: public(name) for name in names} == names
    assert public({"a": ["/home/me/x", 3, None]}) == {"a": ["x", 3, None]}


def test_the_name_of_data_has_no_folder():
    assert data_name("/home/me/photos") == data_name("data/photos/") == "photos"
    assert data_name("scenes:8192") == "scenes:8192"
    assert data_name("a/photos.csv + 0.5*/home/me/web") == "photos.csv + 0.5*web"
    assert data_name("https://me:secret@host/a/{00..10}.tar?key=b/c") == "{00..10}.tar"
    assert data_name("s3://bucket/a/x.tar + web/{a/00,b/00}.tar") == "x.tar + {a/00,b/00}.tar"
