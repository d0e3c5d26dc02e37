"""A run on disk, and the models that evaluation can take."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coalign.config import TrainConfig, from_json, to_json
from coalign.data.tokenizer import Tokenizer, load_tokenizer
from coalign.errors import UserError
from coalign.method import Method
from coalign.methods import config_class, method_class
from coalign.methods.oner import OneR
from coalign.networks.positions import resize_positions
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers import ImageTower, TowerSpec, model_config
from coalign.networks.unified import UnifiedTower
from coalign.training import checkpoint
from coalign.types import DualEncoder, JointEncoder

CONFIG, TOKENIZER, MODEL, RESULTS, REPORT, HELD_OUT = (
    "config.json",
    "tokenizer.json",
    "model.json",
    "results.json",
    "report.html",
    "held_out.npz",
)
KEPT = {CONFIG, TOKENIZER, MODEL, RESULTS, REPORT, HELD_OUT, "metrics.jsonl", "bad_samples.jsonl"}  # by a run, for good


@dataclass
class Run:
    """A trained model with what belongs to it."""

    path: Path
    data: str  # what it was trained on
    config: TrainConfig
    tokenizer: Tokenizer
    method: Method
    checkpoint: str  # which one the weights are of, e.g. "last, step 940"

    def encoder(self) -> DualEncoder:
        return dual_encoder(self.method, self.tokenizer, self.config.context_length, self.path.name)

    def joint_encoder(self) -> JointEncoder:
        """Image and text as one input. UserError for a model of two towers."""
        method = self.method
        if not isinstance(method, OneR):
            raise UserError(
                f"{self.path} is a model of two towers, which has no input of image and text together; OneR has."
            )
        device = next(method.parameters()).device

        def encode_joint(pixels: Tensor, texts: Sequence[str]) -> Tensor:
            method.eval()
            ids, lengths = self.tokenizer(list(texts), self.config.context_length)
            return method.encode_joint(pixels.to(device), ids.to(device), lengths.to(device))

        return encode_joint


def dual_encoder(method: Method, tokenizer: Tokenizer, context_length: int, name: str) -> DualEncoder:
    """A method as evaluation sees it: it encodes on the device it lies on, in evaluation mode."""
    device = next(method.parameters()).device

    def encode_image(pixels: Tensor) -> Tensor:
        method.eval()
        return method.encode_image(pixels.to(device))

    def encode_text(texts: Sequence[str]) -> Tensor:
        method.eval()
        ids, lengths = tokenizer(texts, context_length)
        return method.encode_text(ids.to(device), lengths.to(device))

    def image_features(pixels: Tensor) -> Tensor:
        method.eval()
        return method.image_features(pixels.to(device))

    def modules() -> tuple[nn.Module, nn.Module]:
        own = copy.deepcopy(method)
        return _ImageEncoder(own), _TextEncoder(own, tokenizer, context_length)

    scale = method.scalars().get("logit_scale", 100.0)
    return DualEncoder(
        encode_image,
        encode_text,
        image_size(method),
        name,
        float(scale),
        image_features,
        weights=method.state_dict,
        modules=modules,
    )


class _ImageEncoder(nn.Module):
    """A method as a module of its image encoder, head included."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, pixels: Tensor) -> Tensor:
        return self.method.encode_image(pixels)


class _TextEncoder(nn.Module):
    """The same of its text encoder, tokenizer included."""

    def __init__(self, method: Method, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__()
        self.method, self.tokenizer, self.context_length = method, tokenizer, context_length

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids, lengths = self.tokenizer(texts, self.context_length)
        device = next(self.method.parameters()).device
        return self.method.encode_text(ids.to(device), lengths.to(device))


def image_size(method: Method) -> int:
    """Side in pixels of the images that the method's towers take."""
    return next(module.image_size for module in method.modules() if isinstance(module, (ImageTower, UnifiedTower)))


def patch_grid(method: Method) -> tuple[int, int] | None:
    """Rows and columns of the patches that the method masks, if its tower cuts images into patches itself."""
    return next((module.patch_grid for module in method.modules() if isinstance(module, UnifiedTower)), None)


def known_device(name: str | None) -> str | None:
    """The name itself; UserError for a device that is not here."""
    if name is None:
        return None
    try:
        kind = torch.device(name)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UserError(f"There is no device {name!r}; --device is cpu, cuda or cuda:N.")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use another.")
    return name


def build_method(config: TrainConfig, tokenizer: Tokenizer) -> Method:
    """The method with its towers, initialised from the run's seed."""
    torch.manual_seed(config.seed)
    towers = TowerSpec(
        config.model,
        tokenizer.vocab_size,
        config.context_length,
        config.image_size,
        config.pretrained,
        config.batch_norm_group,
    )
    try:
        return method_class(config.method)(config.method_config, towers)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if not config.model.endswith(".json"):
            raise
        reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"No model can be built from {config.model} ({' '.join(reason.split())}).") from error


def initialise(method: Method, config: TrainConfig) -> None:
    """Puts the last weights of the run `config.init_from` into the method: OneR's second stage at a larger resolution, for instance.

    A ViT's learned positions are interpolated; queues start empty. UserError where the rest does not fit.
    """
    folder = Path(config.init_from or "")
    earlier = read_config(folder).config
    for name in ("method", "model"):
        was, wanted = getattr(earlier, name), getattr(config, name)
        if was != wanted:
            raise UserError(
                f"--init-from {folder} is a run with the {name} {was}, but this one has {wanted}; choose the same."
            )
    own, found = method.state_dict(), checkpoint.load(folder / "last").model
    queues = tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, FeatureQueue))
    found |= {name: value for name, value in own.items() if queues and name.startswith(queues)}
    for name in found.keys() & own.keys():
        if name.endswith("trunk.positional_embedding"):
            found[name] = resize_positions(found[name], len(own[name]))
    try:
        method.load_state_dict(found)
    except RuntimeError as error:
        raise UserError(
            f"The weights of --init-from {folder} do not fit these settings: {str(error).splitlines()[-1].strip()}"
        ) from error


def load(path: str | Path, weights: str = "last", device: str | torch.device = "cpu") -> Run:
    """The model of a run directory, in evaluation mode. `weights`: "last" or "best". UserError if it is none."""
    folder = Path(path)
    known_device(str(device))
    saved = read_config(folder)
    found = checkpoint.load(folder / weights)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if not Path(saved.config.model).exists() and (folder / MODEL).is_file():  # the file it was of has gone
        saved = replace(saved, config=replace(saved.config, model=str(folder / MODEL)))
    config = replace(saved.config, pretrained=None)
    method = build_method(config, tokenizer)
    try:
        method.load_state_dict(found.model)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {found.path} do not fit the configuration beside them: {str(error).splitlines()[-1].strip()}"
        ) from error
    step = (found.trainer or {}).get("step")
    label = found.path.name + (f", step {step:,}" if step is not None else "")
    return Run(folder, saved.data, saved.config, tokenizer, method.to(device).eval(), label)


# ---------------------------------------------------------------- config.json


@dataclass(frozen=True)
class SavedConfig:
    """What config.json holds: enough to build the model again and to refuse a resume that would change the run."""

    data: str
    config: TrainConfig
    num_train: int
    num_val: int
    fingerprint: str = ""  # of the training pairs


def trained_on(config: TrainConfig, number: int) -> str:
    """In words, so many training samples of a run."""
    if config.rest_as_texts:
        return f"{number:,} samples ({100 * config.train_fraction:g} % pairs, the others texts alone)"
    return f"{number:,} pairs"


def write_config(folder: Path, saved: SavedConfig) -> None:
    fields: dict[str, Any] = {**vars(saved), "config": to_json(saved.config)}
    write_file(folder / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a disk that was full


def check_output(path: Path) -> None:
    """UserError for a place where figures or a page must not be written: a folder, or what a run keeps."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    if path.name in KEPT and (path.parent / CONFIG).exists():
        raise UserError(f"{path} belongs to the run in {path.parent}; choose another name.")


def read_config(folder: Path) -> SavedConfig:
    path = folder / CONFIG
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"holds no run (there is no {CONFIG} in it)"
        raise UserError(f"{folder} {what}.")
    try:
        saved = json.loads(path.read_text())
        config = saved["config"]
        method_config = from_json(config_class(config["method"]), config.pop("method_config"))
        train_config = replace(from_json(TrainConfig, {**config, "method_config": None}), method_config=method_config)
        return SavedConfig(**{**saved, "config": train_config})
    except (ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(
            f"{path} is not a configuration that this version of coalign can read: {str(error).rstrip('.')}."
        ) from error


def default_tokens(model: str) -> int:
    """The vocabulary size that `--tokenizer captions` trains for a model: its configuration's."""
    return int(model_config(model)["text_cfg"].get("vocab_size", 8192))
