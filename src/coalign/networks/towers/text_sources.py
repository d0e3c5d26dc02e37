"""Pretrained text towers: encoders of Hugging Face and text towers of open_clip, by name or from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coalign.errors import UserError, first_line
from coalign.networks.positions import stretch_positions
from coalign.networks.towers.hugging_face import (
    HuggingFaceTextTower,
    copy_encoder,
    default_context,
    hugging_face_config,
    import_transformers,
    new_encoder,
    num_positions,
    stretched_note,
)
from coalign.networks.towers.sources import OPEN_CLIP_WEIGHTS, TowerSource, first_file, open_clip_weights
from coalign.networks.towers.spec import OPEN_CLIP_CONFIG, model_config
from coalign.networks.towers.weight_files import fit_weights

_FORMS = "hf:NAME, open_clip:NAME:TAG, or a folder of Hugging Face, sentence-transformers or open_clip"
_POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
}  # of sentence-transformers -> ours
_LAYERS = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers, which we reproduce


def text_source(name: str) -> TowerSource:
    """Returns the text tower that `--text-tower` names. Raises UserError if there is none, or it is not supported."""
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return _hugging_face(name, rest)
    if kind == "open_clip" and rest:
        return _open_clip(name, *rest.partition(":")[::2])
    folder = Path(name)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _open_clip(name, name, str(first_file(folder, OPEN_CLIP_WEIGHTS)))
    if (folder / "config.json").is_file():
        return _hugging_face(name, name)
    if folder.is_dir():
        raise UserError(f"The folder {name} is not a text tower: it has no {OPEN_CLIP_CONFIG} and no config.json.")
    if folder.is_file():
        raise UserError(
            f"The text tower {name} is a file, which does not say how it is built; use its folder, or {_FORMS}."
        )
    raise UserError(f"The text tower {name} does not exist; use {_FORMS}.")


# ---------------------------------------------------------------- Hugging Face


def _hugging_face(description: str, name: str) -> TowerSource:
    transformers = import_transformers()
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"The folder {name} of --text-tower does not exist.")
    try:
        raw = transformers.PretrainedConfig.get_config_dict(name)[0]
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(f"The text tower {description} could not be loaded: {first_line(error)}") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UserError(
            f"The text tower {description} is not an encoder of Hugging Face: its config.json has no model_type; "
            "export a run with `coalign export` first."
        )
    if "vision_config" in raw:
        raise UserError(
            f"The text tower {description} is a {raw.get('model_type')} model of images and texts; convert it with `coalign import "
            f"transformers:{name}`, and use the new folder."
        )
    values = {key: value for key, value in raw.items() if not key.startswith("_") and key != "auto_map"}
    config = hugging_face_config(values)
    with torch.device("meta"):
        own = num_positions(new_encoder(config))
    cfg = {"hf_config": values, "hf_pooling": _pooling(description, name), "context_length": default_context(own)}

    def load(tower: Any) -> None:
        note = copy_encoder(_encoder(description, name, config), tower)
        tower.starts = {**tower.starts, "trunk": description + note}

    return TowerSource(description, cfg, None, load, f"hf:{name}")


def _encoder(description: str, name: str, config: Any) -> Any:
    """Returns the pretrained encoder. Files of PyTorch are read as tensors alone."""
    transformers = import_transformers()
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of layers that we do not use
    try:
        with torch.random.fork_rng(devices=()):
            encoder, info = transformers.AutoModel.from_pretrained(
                name, config=config, weights_only=True, output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"The weights of {description} could not be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    parts = {part for part, _ in encoder.named_children()} - {"pooler"}
    unfit = {"missing": info["missing_keys"], "not a part of it": info["unexpected_keys"]}
    for problem, keys in unfit.items():
        keys = (key.removeprefix(f"{encoder.base_model_prefix}.") for key in keys if not key.endswith("position_ids"))
        if found := sorted(key for key in keys if key.partition(".")[0] in parts):
            raise UserError(
                f"The weights of {description} are not those of the model in its config.json: {found[0]} is {problem}."
            )
    return encoder.float()


def _pooling(description: str, name: str) -> str | None:
    """Returns how sentence-transformers pools the encoder; None if the files do not say."""
    modules = _read(name, "modules.json") or []
    layers = {str(module.get("type", "")).rpartition(".")[2]: module.get("path", "") for module in modules}
    if others := [layer for layer in layers if layer not in _LAYERS]:
        raise UserError(
            f"The sentence encoder {description} has a layer {others[0]} after its encoder, which is not supported; use one with only "
            "a pooling and a normalization."
        )
    settings = (
        _read(name, f"{layers.get('Pooling', '1_Pooling')}/config.json") if modules or Path(name).is_dir() else None
    )
    if settings is None:
        return None
    modes = settings.get("pooling_mode")
    modes = [modes] if isinstance(modes, str) else modes
    chosen = modes or [
        key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True and "mode" in key
    ]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise UserError(
            f"The sentence encoder {description} pools its tokens by {' and '.join(chosen) or 'nothing'}, which is not supported; use one "
            "that pools by cls or mean."
        )
    return _POOLINGS[chosen[0]]


def _read(name: str, file: str) -> Any:
    """Returns the JSON of a file in a folder or on the hub; None if there is none."""
    path = Path(name) / file
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{file} of {name}, which says how a sentence encoder is pooled, could not be downloaded; download the whole model, and "
                "pass its folder."
            ) from error
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


# ---------------------------------------------------------------- open_clip


def _open_clip(description: str, model: str, weights: str) -> TowerSource:
    """model: a name of open_clip, or a folder of its format. weights: one of its tags, or a file."""
    config = model_config(model)
    cfg = {"quick_gelu": bool(config.get("quick_gelu", False)), "embed_dim": config["embed_dim"], **config["text_cfg"]}
    check_text_cfg(description, cfg)
    state, tag = open_clip_weights(model, weights)
    if tag is not None:
        cfg["quick_gelu"] = bool(tag.get("quick_gelu", False))

    def load(tower: Any) -> None:
        load_open_clip_text(tower, state(), description)

    return TowerSource(description, cfg, config["embed_dim"], load, open_clip_tokenizer(model))


def load_open_clip_text(tower: Any, state: Mapping[str, Tensor], description: str) -> None:
    """Copies the text tower of an open_clip model, with its positions stretched or cut, and its projection if the dimensions are equal.

    A mask token that the tower has beyond the weights keeps its random embedding. Raises UserError if the weights do not fit.
    """
    names = ("text.",) if any(name.startswith("text.") for name in state) else ("",)
    text = {
        k.removeprefix(names[0]): v.float()
        for k, v in state.items()
        if k.startswith(names[0]) and not k.startswith("visual.")
    }
    text = {name: value for name, value in text.items() if name not in ("logit_scale", "logit_bias", "attn_mask")}
    problem = f"The weights {description} do not fit the text tower"
    if isinstance(tower, HuggingFaceTextTower) or not {"token_embedding.weight", "positional_embedding"} <= set(text):
        raise UserError(f"{problem}: they are not of a text tower of open_clip.")
    expected, projection = tower.transformer.state_dict(), text.pop("text_projection", None)
    vocabulary, own = len(text["token_embedding.weight"]), len(text["positional_embedding"])
    if not 0 <= len(expected["token_embedding.weight"]) - vocabulary <= 1:
        raise UserError(
            f"{problem}: they have a vocabulary of {vocabulary:,} tokens, but the tokenizer has "
            f"{len(expected['token_embedding.weight']):,}; omit --tokenizer."
        )
    try:
        mask = expected["token_embedding.weight"][vocabulary:]
        text["token_embedding.weight"] = torch.cat([text["token_embedding.weight"], mask])
        text["positional_embedding"] = stretch_positions(text["positional_embedding"], tower.context_length)
        tower.transformer.load_state_dict(fit_weights(text, expected))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{problem}: {str(error).splitlines()[-1].strip()}.") from error
    is_linear = isinstance(tower.projection, nn.Linear)
    if projection is not None and is_linear and projection.shape == (tower.width, tower.embed_dim):
        with torch.no_grad():
            tower.projection.weight.copy_(projection.T)
    if tower.context_length > own:
        tower.starts = {**tower.starts, "trunk": description + stretched_note(own, tower.context_length)}


def check_text_cfg(name: str, text: Mapping[str, Any]) -> None:
    """Raises UserError if the text tower of an open_clip configuration is not CLIP's: pooled at the end token, causal, and with a linear
    projection."""
    if "hf_model_name" in text:
        raise UserError(
            f"The text tower of {name} is the Hugging Face encoder {text['hf_model_name']}; use --text-tower hf:{text['hf_model_name']}."
        )
    is_clip = (
        not text.get("no_causal_mask") and not text.get("embed_cls") and text.get("pool_type", "argmax") == "argmax"
    )
    if not is_clip or text.get("proj_type", "linear") != "linear" or text.get("proj_bias"):
        raise UserError(
            f"The text tower of {name} is pooled or projected otherwise than CLIP's, which is not supported; use the weights of a model "
            "with CLIP's text tower."
        )


def open_clip_tokenizer(model: str) -> str | None:
    """Returns the value of `--tokenizer` that fits a model of open_clip, or a folder of its format; None if it is not known."""
    text = model_config(model)["text_cfg"]
    file = Path(model) / "tokenizer.json"
    if file.is_file():
        return str(file)
    if name := text.get("hf_tokenizer_name"):
        return None if Path(model).exists() else f"hf:{name}"
    return "clip" if text.get("vocab_size", 49408) == 49408 else None


def pretrained_tokenizer(model: str, pretrained: str) -> str | None:
    """Returns the value of `--tokenizer` that fits the weights of a whole open_clip model; None if it is not known."""
    for folder in (Path(pretrained), Path(pretrained).parent):
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return open_clip_tokenizer(str(folder))
    return open_clip_tokenizer(model)
