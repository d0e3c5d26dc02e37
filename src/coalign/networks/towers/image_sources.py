"""Pretrained image towers: timm's and open_clip's, by name, or from a folder or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from coalign.errors import UserError, first_line
from coalign.networks.open_clip_parts import VisionTransformer
from coalign.networks.positions import resize_positions
from coalign.networks.towers.pretrained import timm_part
from coalign.networks.towers.sources import OPEN_CLIP_WEIGHTS, TowerSource, first_file, open_clip_weights
from coalign.networks.towers.spec import OPEN_CLIP_CONFIG, check_timm_name, model_config
from coalign.networks.towers.weight_files import SUFFIXES, fit_weights, read_weights
from coalign.types import Preprocess

TIMM_EXPORT = "timm_model.json"  # identifies a folder that `coalign export --to timm` wrote
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FORMS = "timm:NAME, timm:NAME:FILE, open_clip:NAME:TAG, a folder of open_clip or timm, or a weights file"
CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}  # our resize_mode -> timm's crop_mode


def image_source(name: str) -> TowerSource:
    """Returns the image tower that `--image-tower` names. Raises UserError if there is none, or it is not known which model it is."""
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        model, _, file = rest.partition(":")
        check_timm_name(model)
        return _timm(name, model, {}, file or None)
    if kind == "open_clip" and rest:
        return _open_clip(name, *rest.partition(":")[::2])
    path = Path(name)
    if path.is_dir():
        return _folder(name, path)
    if path.is_file() or path.suffix in SUFFIXES:
        return _file(name, path, path.stat().st_mtime_ns if path.is_file() else 0)
    hint = f"did you mean timm:{name}?" if timm.is_model(name) else f"use {_FORMS}."
    raise UserError(f"The image tower {name} does not exist; {hint}")


def _folder(name: str, folder: Path) -> TowerSource:
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _open_clip(name, name, str(first_file(folder, OPEN_CLIP_WEIGHTS)))
    if (folder / TIMM_EXPORT).is_file():
        options = _read_json(folder / TIMM_EXPORT)
        model, own = str(options.pop("model_name", "")), options.pop("pretrained_cfg_overlay", {})
    elif (folder / "config.json").is_file() and "architecture" in (options := _read_json(folder / "config.json")):
        model, own = str(options["architecture"]), options.get("pretrained_cfg", {})
        options = dict(options.get("model_args") or {})
    else:
        raise UserError(
            f"The folder {name} is not an image tower: it has no {OPEN_CLIP_CONFIG}, {TIMM_EXPORT}, or config.json of timm; export "
            "a run with `coalign export` first."
        )
    check_timm_name(model)
    options = {key: value for key, value in options.items() if key not in ("num_classes", "in_chans")}
    return _timm(name, model, options, str(first_file(folder, _TIMM_WEIGHTS)), own)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


@lru_cache(maxsize=1)  # both towers compose the model
def _file(name: str, path: Path, modified: int) -> TowerSource:
    """Finds out from the tensors, the file's name and the files beside it which model a file of weights belongs to."""
    weights = read_weights(path)
    if any(key.startswith("visual.") for key in weights):
        if (path.parent / OPEN_CLIP_CONFIG).is_file():
            return _open_clip(name, str(path.parent), str(path))
        raise UserError(f"The weights file {name} is from an open_clip model; name the model: open_clip:NAME:{name}.")
    if (path.parent / TIMM_EXPORT).is_file():
        return _folder(name, path.parent)
    letters = re.sub("[^a-z0-9]", "", path.name.lower())
    names = sorted({*timm.list_models(), *timm.list_pretrained()}, key=lambda model: (-len(model), model))
    unfit = ""
    for model in names:
        if re.sub("[^a-z0-9]", "", model) in letters:
            expected, classifiers = _timm_state(model, {})
            try:
                fit_weights(weights, expected, classifiers)
            except ValueError as error:
                unfit = unfit or f" (it does not fit {model}: {error})"
                continue
            return _timm(name, model, {}, str(path))
    raise UserError(
        f"The weights file {name} does not show which model of timm it belongs to{unfit}; name the model: timm:NAME:{name}."
    )


# ---------------------------------------------------------------- timm


def _timm(
    description: str, model: str, options: dict[str, Any], file: str | None, own_cfg: Mapping[str, Any] | None = None
) -> TowerSource:
    """options: further arguments of timm.create_model. file: of the weights; None: timm's own. own_cfg: replaces values of timm's
    `pretrained_cfg`, such as the mean."""
    known: Any = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
    if file is None and not known.has_weights:
        raise UserError(
            f"timm has no weights of {model}; use a model of `timm.list_pretrained()`, or timm:{model}:FILE."
        )
    if file is not None and not Path(file).is_file():
        raise UserError(f"The weights file {file} does not exist.")
    cfg: dict[str, Any] = {**known.to_dict(), **(own_cfg or {})}
    modes = {theirs: ours for ours, theirs in CROP_MODES.items()}
    try:
        preprocess = Preprocess.from_json({**cfg, "resize_mode": modes.get(cfg.get("crop_mode", ""), "shortest")})
    except (ValueError, TypeError) as error:
        raise UserError(f"The preprocessing of {description} is not supported: {error}.") from error
    vision = {
        "timm_model_name": model.partition(".")[0],
        "timm_kwargs": {key: value for key, value in options.items() if key != "img_size"},
        "image_size": options.get("img_size") or cfg["input_size"][-1],
        "preprocess": preprocess.to_json(),
    }

    def load(tower: Any) -> None:
        trunk = timm_part(tower.trunk)
        with torch.random.fork_rng(devices=()):
            pretrained: Any = (
                _pretrained_timm(model, options) if file is None else _timm_from_file(description, model, options, file)
            )
            if hasattr(pretrained, "set_input_size"):
                pretrained.set_input_size(img_size=tower.image_size)
        try:
            trunk.load_state_dict(pretrained.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(
                f"The image tower {description} does not fit images of {tower.image_size} pixels: {reason}"
            ) from error

    return TowerSource(description, vision, None, load)


def _pretrained_timm(model: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(model, pretrained=True, num_classes=0, **options)
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(f"The weights of timm:{model} could not be downloaded: {first_line(error)}") from error


def _timm_from_file(description: str, model: str, options: Mapping[str, Any], file: str) -> nn.Module:
    expected, classifiers = _timm_state(model, options)
    try:
        weights = fit_weights(read_weights(file), expected, classifiers)
    except ValueError as error:
        raise UserError(
            f"The weights {description} do not fit timm's {model}: {error}; name the model that they belong to."
        ) from error
    source = timm.create_model(model, num_classes=0, **options)
    own = source.state_dict()
    source.load_state_dict({name: own[name] if value.is_meta else value for name, value in weights.items()})
    return source


def _timm_state(model: str, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the names and shapes of a model's weights without its classifiers, and the prefixes of those."""
    try:
        with torch.device("meta"):
            empty: Any = timm.create_model(model, num_classes=0, **options)
    except TypeError as error:
        raise UserError(f"timm cannot create {model} with {dict(options)}: {error}.") from error
    classifiers = empty.pretrained_cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    return empty.state_dict(), tuple(f"{name}." for name in names)


# ---------------------------------------------------------------- open_clip


def _open_clip(description: str, model: str, weights: str) -> TowerSource:
    """model: a name of open_clip, or a folder or file of its format. weights: one of its tags, or a file."""
    config = model_config(model)
    vision = {
        "quick_gelu": bool(config.get("quick_gelu", False)),
        "embed_dim": config["embed_dim"],
        **config["vision_cfg"],
    }
    state, tag = open_clip_weights(model, weights)
    if tag is not None:
        vision |= {"quick_gelu": bool(tag.get("quick_gelu", False)), "preprocess": Preprocess.from_json(tag).to_json()}

    def load(tower: Any) -> None:
        visual = {key.removeprefix("visual."): v for key, v in state().items() if key.startswith("visual.")}
        if not visual:
            raise UserError(f"The weights {description} contain no image tower of open_clip.")
        _load_open_clip(tower, visual, f"The weights {description} do not fit the image tower of {model}")

    return TowerSource(description, vision, config["embed_dim"], load)


def _load_open_clip(tower: Any, visual: dict[str, Tensor], problem: str) -> None:
    """Copies the weights of an open_clip image tower. Its projection is not copied if it has another dimension than `tower.embed_dim`."""
    trunk, expected = tower.trunk, tower.trunk.state_dict()
    is_vit = isinstance(trunk, VisionTransformer)
    projection = visual.pop("proj", None) if is_vit else visual.pop("head.proj.weight", None)
    if (positions := visual.get("positional_embedding")) is not None and is_vit:
        visual["positional_embedding"] = resize_positions(positions, len(expected["positional_embedding"]))
    own, positions = expected.get("trunk.pos_embed"), visual.get("trunk.pos_embed")
    if own is not None and positions is not None and own.shape != positions.shape:
        vit, grid = trunk.trunk, list(trunk.trunk.patch_embed.grid_size)
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        visual["trunk.pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    try:
        trunk.load_state_dict(fit_weights(visual, expected))
        if projection is not None:
            projection = projection.T if is_vit else projection
            if isinstance(tower.projection, nn.Linear) and len(projection) == tower.embed_dim:
                with torch.no_grad():
                    tower.projection.weight.copy_(projection)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{problem}: {str(error).splitlines()[-1].strip()}.") from error
