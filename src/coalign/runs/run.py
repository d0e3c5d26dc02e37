"""Loads runs, and builds and initializes their models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coalign.config import TrainConfig
from coalign.data.text.tokenizer import Tokenizer, load_tokenizer
from coalign.embeds import on_device
from coalign.errors import UserError
from coalign.method import Method
from coalign.methods import method_class
from coalign.networks.positions import resize_positions
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers.spec import TowerSpec, find_towers, model_config
from coalign.runs.folder import MODEL, TOKENIZER, read_config
from coalign.training import checkpoint
from coalign.types import DualEncoder, JointEncoder


@dataclass
class Run:
    """A trained model with its configuration and tokenizer.

    Attributes:
        path: The folder of the run.
        data: The training data, as given to `train`.
        config: All settings of the run.
        tokenizer: Called with a list of texts and the context length, returns token ids [batch, token] and lengths [batch].
        method: The model, a `torch.nn.Module`.
        checkpoint: The checkpoint of the weights, such as "last, step 940".
    """

    path: Path
    data: str
    config: TrainConfig
    tokenizer: Tokenizer
    method: Method
    checkpoint: str

    def encoder(self) -> DualEncoder:
        """Returns the functions that embed images and texts. They run without gradient, on the model's device."""
        return dual_encoder(self.method, self.tokenizer, self.config.context_length, self.path.name)

    def joint_encoder(self) -> JointEncoder:
        """Returns a function that embeds images with one text each as one input (OneR).

        It takes uint8 pixels [batch, 3, size, size] and as many texts, and runs without gradient.

        Raises:
            UserError: The model has two towers.
        """
        method, encode = self.method, self.method.encode_joint
        if encode is None:
            raise UserError(
                f"{self.path} is a two-tower model, which cannot encode an image and a text jointly; OneR models can."
            )
        device = next(method.parameters()).device

        @torch.no_grad()
        def encode_joint(pixels: Tensor, texts: Sequence[str]) -> Any:
            method.eval()
            ids, lengths = self.tokenizer(list(texts), self.config.context_length)
            return encode(pixels.to(device), ids.to(device), lengths.to(device))

        return encode_joint


def dual_encoder(method: Method, tokenizer: Tokenizer, context_length: int, name: str) -> DualEncoder:
    """Wraps a method for evaluation. It encodes and compares on the method's device, in evaluation mode and without gradient."""
    device = next(method.parameters()).device

    @torch.no_grad()
    def encode_image(pixels: Tensor) -> Any:
        method.eval()
        return method.encode_image(pixels.to(device))

    @torch.no_grad()
    def encode_text(texts: Sequence[str]) -> Any:
        method.eval()
        ids, lengths = tokenizer(texts, context_length)
        return method.encode_text(ids.to(device), lengths.to(device))

    @torch.no_grad()
    def image_features(pixels: Tensor) -> Tensor:
        method.eval()
        return method.image_features(pixels.to(device))

    def modules() -> tuple[nn.Module, nn.Module]:
        trainable = copy.deepcopy(method)
        return _ImageEncoder(trainable), _TextEncoder(trainable, tokenizer, context_length)

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
        similarity=on_device(method.similarity, device),
        num_tokens=tokenizer.num_tokens,
        context_length=context_length,
    )


class _ImageEncoder(nn.Module):
    """A method's image encoder as a module, projection included."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, pixels: Tensor) -> Any:
        return self.method.encode_image(pixels)


class _TextEncoder(nn.Module):
    """A method's text encoder as a module of strings, tokenizer included."""

    def __init__(self, method: Method, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__()
        self.method, self.tokenizer, self.context_length = method, tokenizer, context_length

    def forward(self, texts: Sequence[str]) -> Any:
        ids, lengths = self.tokenizer(texts, self.context_length)
        device = next(self.method.parameters()).device
        return self.method.encode_text(ids.to(device), lengths.to(device))


def image_size(method: Method) -> int:
    """Returns the side of the method's input images in pixels."""
    return next(tower.image_size for tower in find_towers(method) if tower.image_size is not None)


def patch_grid(method: Method) -> tuple[int, int] | None:
    """Returns the rows and columns of the patches that the method masks, or None if it does not mask patches."""
    return next((tower.patch_grid for tower in find_towers(method) if tower.patch_grid), None)


def check_device(name: str | None) -> str | None:
    """Returns the name of the device. Raises UserError if this machine does not have it."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"There is no device {name!r}; --device must be cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"There is no device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; choose another --device."
        )
    return name


def build_method(config: TrainConfig, tokenizer: Tokenizer) -> Method:
    """Builds the method and its towers, initialized from the configuration's seed. Raises UserError if a model file is invalid."""
    torch.manual_seed(config.seed)
    towers = TowerSpec(
        config.model,
        tokenizer.vocab_size,
        config.context_length,
        config.image_size,
        config.pretrained,
        config.batch_norm_group or config.batch_size,
    )
    try:
        return method_class(config.method)(config.method_config, towers)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if not config.model.endswith(".json"):
            raise
        reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"The model {config.model} cannot be built ({' '.join(reason.split())}).") from error


def init_from_run(method: Method, config: TrainConfig) -> None:
    """Loads the last weights of the run `config.init_from`, for example for OneR's second stage at a higher resolution.

    Position embeddings of a ViT are interpolated, and queues start empty. Raises UserError if other weights do not fit.
    """
    folder = Path(config.init_from or "")
    source_config = read_config(folder).config
    for name in ("method", "model"):
        theirs, ours = getattr(source_config, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"The run {folder} of --init-from has the {name} {theirs}, but this run has {ours}; use the same {name}."
            )
    initial, weights = method.state_dict(), checkpoint.load(folder / "last").model
    queues = tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, FeatureQueue))
    weights |= {name: value for name, value in initial.items() if queues and name.startswith(queues)}
    for name in weights.keys() & initial.keys():
        if name.endswith("trunk.positional_embedding"):
            weights[name] = resize_positions(weights[name], len(initial[name]))
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights of --init-from {folder} do not fit the settings of this run: {str(error).splitlines()[-1].strip()}"
        ) from error


def load(
    path: str | Path, weights: str = "last", device: str | torch.device = "cpu", similarity: str | None = None
) -> Run:
    """Loads the trained model of a run, in evaluation mode.

    Args:
        path: The folder of the run.
        weights: "last", or "best" for the checkpoint with the best validation score.
        device: The device of the model.
        similarity: The similarity of the model, if its method has several (OneR: "trained" or "projector"). None: as configured.

    Returns:
        The model with its configuration and tokenizer. `Run.encoder` embeds images and texts.

    Raises:
        UserError: `path` is not a run, it has no such checkpoint, or there is no such device.

    Example:
        ```python
        encoder = coalign.load("runs/clip").encoder()
        text_embeds = encoder.encode_text(["a red chair", "a blue boat"])  # [2, dim]
        ```
    """
    folder = Path(path)
    check_device(str(device))
    saved = read_config(folder)
    if similarity is not None:
        saved = replace(saved, config=_with_similarity(saved.config, similarity))
    loaded = checkpoint.load(folder / weights)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if not Path(saved.config.model).exists() and (folder / MODEL).is_file():  # the original model file is gone
        saved = replace(saved, config=replace(saved.config, model=str(folder / MODEL)))
    config = replace(saved.config, pretrained=None)
    method = build_method(config, tokenizer)
    try:
        method.load_state_dict(loaded.model)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {loaded.path} do not fit the run's configuration: {str(error).splitlines()[-1].strip()}"
        ) from error
    step = (loaded.trainer or {}).get("step")
    label = loaded.path.name + (f", step {step:,}" if step is not None else "")
    return Run(folder, saved.data, saved.config, tokenizer, method.to(device).eval(), label)


def _with_similarity(config: TrainConfig, similarity: str) -> TrainConfig:
    if not hasattr(config.method_config, "similarity"):
        raise UserError(f"{config.method} has a single similarity; omit --similarity.")
    return replace(config, method_config=replace(config.method_config, similarity=similarity))


def default_vocab_size(model: str) -> int:
    """Returns the vocabulary size of a model's configuration, which `--tokenizer captions` trains for."""
    return int(model_config(model)["text_cfg"].get("vocab_size", 8192))
