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
from coalign.devices import best_device
from coalign.embeds import on_device
from coalign.errors import UserError
from coalign.method import Method
from coalign.methods import method_class
from coalign.networks.positions import resize_positions
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers.composition import compose
from coalign.networks.towers.pretrained import check_pretrained
from coalign.networks.towers.spec import Tower, TowerSpec, find_towers, model_config
from coalign.networks.towers.text_sources import pretrained_tokenizer
from coalign.runs.folder import MODEL, TOKENIZER, read_config
from coalign.training import checkpoint
from coalign.types import DualEncoder, JointEncoder, Preprocess


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

    @property
    def model_config(self) -> dict[str, Any]:
        """The configuration of its towers in open_clip's format, with what coalign adds."""
        saved = self.path / MODEL
        return model_config(str(saved) if saved.is_file() else self.config.model)

    def encoder(self) -> DualEncoder:
        """Returns the functions that embed images and texts. They run without gradient, on the model's device."""
        return dual_encoder(self.method, self.tokenizer, self.path.name)

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
            ids, lengths = self.tokenizer(list(texts), context_length(method))
            return encode(pixels.to(device), ids.to(device), lengths.to(device))

        return encode_joint


def dual_encoder(method: Method, tokenizer: Tokenizer, name: str) -> DualEncoder:
    """Wraps a method for evaluation. It encodes and compares on the method's device, in evaluation mode and without gradient."""
    device, context = next(method.parameters()).device, context_length(method)

    @torch.no_grad()
    def encode_image(pixels: Tensor) -> Any:
        method.eval()
        return method.encode_image(pixels.to(device))

    @torch.no_grad()
    def encode_text(texts: Sequence[str]) -> Any:
        method.eval()
        ids, lengths = tokenizer(texts, context)
        return method.encode_text(ids.to(device), lengths.to(device))

    @torch.no_grad()
    def image_features(pixels: Tensor) -> Tensor:
        method.eval()
        return method.image_features(pixels.to(device))

    def modules() -> tuple[nn.Module, nn.Module]:
        trainable = copy.deepcopy(method)
        return _ImageEncoder(trainable), _TextEncoder(trainable, tokenizer, context)

    scale = method.scalars().get("logit_scale", 100.0)
    return DualEncoder(
        encode_image,
        encode_text,
        image_size(method),
        name,
        float(scale),
        image_features,
        preprocess(method),
        weights=method.state_dict,
        modules=modules,
        similarity=on_device(method.similarity, device),
        num_tokens=tokenizer.num_tokens,
        context_length=context,
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


def context_length(method: Method) -> int:
    """Returns the maximum number of tokens of the method's texts."""
    return next(tower.context_length for tower in find_towers(method) if tower.context_length is not None)


def preprocess(method: Method) -> Preprocess:
    """Returns how the method's images are preprocessed."""
    return next(tower.preprocess for tower in find_towers(method) if tower.image_size is not None)


def patch_grid(method: Method) -> tuple[int, int] | None:
    """Returns the rows and columns of the patches that the method masks, or None if it does not mask patches."""
    return next((tower.patch_grid for tower in find_towers(method) if tower.patch_grid), None)


def build_method(config: TrainConfig, tokenizer: Tokenizer, run: Path | None = None) -> Method:
    """Builds the method and its towers, initialized from the configuration's seed. Raises UserError if a model file is invalid.

    run: a run of this model, whose weights are loaded afterwards. The towers are then built without their pretrained weights.
    """
    torch.manual_seed(config.seed)
    config = _of_run(config, run)
    starts = None if run is None else model_config(config.model).get("starts")
    towers = replace(_tower_spec(config, tokenizer.vocab_size), starts=starts)
    try:
        return method_class(config.method)(config.method_config, towers)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        sources = config.model, config.image_tower, config.text_tower
        files = [name for name in sources if name and Path(name).exists()]
        if not files:
            raise
        reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__}: {error}"
        raise UserError(f"The model {' and '.join(files)} cannot be built ({' '.join(reason.split())}).") from error


def _of_run(config: TrainConfig, run: Path | None) -> TrainConfig:
    """Returns a configuration of the run's model without the weights that it started from."""
    if run is None:
        return config
    model = str(run / MODEL) if (run / MODEL).is_file() else config.model
    return replace(config, model=model, pretrained=None, image_tower=None, text_tower=None)


def text_context(config: TrainConfig, run: Path | None = None) -> int:
    """Returns the maximum number of tokens per text, as of the method that `build_method` builds."""
    if config.context_length is not None:
        return config.context_length
    text = compose(_tower_spec(_of_run(config, run), 0)).config["text_cfg"]
    return int(text.get("context_length", 77)) if isinstance(text, dict) else 77


def text_weights(config: TrainConfig) -> tuple[str | None, str | None]:
    """Returns the pretrained weights of the text encoder, and the tokenizer they were trained with, None if it is not known. (None, None):
    the encoder starts from random weights."""
    if config.text_tower:
        source = compose(_tower_spec(config, 0)).text
        return config.text_tower, source.tokenizer if source else None
    if config.pretrained:
        check_pretrained(config.model, config.pretrained)
        return config.pretrained, pretrained_tokenizer(config.model, config.pretrained)
    return None, None


def saved_model(config: TrainConfig) -> dict[str, Any] | None:
    """Returns the content of a new run's model.json, from which its towers can be built without the files and downloads that they come
    from. None for a plain model name."""
    if config.init_from:
        folder = Path(config.init_from)
        return model_config(str(folder / MODEL)) if (folder / MODEL).is_file() else None
    if not (Path(config.model).exists() or config.pretrained or config.image_tower or config.text_tower):
        return None
    return compose(_tower_spec(config, 0)).to_json()


def _tower_spec(config: TrainConfig, vocab_size: int) -> TowerSpec:
    return TowerSpec(
        name=config.model,
        vocab_size=vocab_size,
        context_length=config.context_length,
        image_size=config.image_size,
        pretrained=config.pretrained,
        image_tower=config.image_tower,
        text_tower=config.text_tower,
        batch_norm_group=config.batch_norm_group or config.batch_size,
        head=config.head,
    )


def init_from_run(method: Method, config: TrainConfig) -> None:
    """Loads the last weights of the run `config.init_from`, for example for OneR's second stage at a higher resolution.

    Position embeddings of a ViT are interpolated, and queues start empty. Raises UserError if other weights do not fit.
    """
    folder = Path(config.init_from or "")
    source_config = read_config(folder).config
    for name in ("method", "model", "head"):
        theirs, ours = getattr(source_config, name), getattr(config, name)
        if theirs != ours:
            remedy = "use the same method" if name == "method" else f"add --{name} {theirs}"
            raise UserError(
                f"The run {folder} of --init-from has the {name} {theirs}, but this run has {ours}; {remedy}."
            )
    for name in ("pretrained", "image_tower", "text_tower"):
        if getattr(config, name) not in (None, getattr(source_config, name)):
            raise UserError(f"The weights come from --init-from {folder}; omit --{name.replace('_', '-')}.")
    initial, weights = method.state_dict(), checkpoint.load(folder / "last").model
    weights |= {name: value for name, value in initial.items() if name.startswith(queue_names(method))}
    for name in weights.keys() & initial.keys():
        if name.endswith("trunk.positional_embedding"):
            weights[name] = resize_positions(weights[name], len(initial[name]))
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights of --init-from {folder} do not fit the settings of this run: {str(error).splitlines()[-1].strip()}"
        ) from error


def start_from_run(method: Method, folder: Path) -> None:
    """Notes that all parts of the towers start from the weights of a run, and what those started from, if they were pretrained."""
    for tower in find_towers(method):
        pretrained = tower.starts
        tower.starts = {
            part: f"{folder} ({pretrained[part]})" if part in pretrained else str(folder)
            for part in ("trunk", "projection")
        }


def initial_weights(method: Method, config: TrainConfig) -> dict[str, Tensor]:
    """Returns those weights of the untrained method that do not start from random values: all but queues after `config.init_from`, else
    the parts of its towers that were loaded."""
    weights = method.state_dict()
    if config.init_from:
        return {name: value for name, value in weights.items() if not name.startswith(queue_names(method))}
    loaded: list[str] = []
    for name, tower in method.named_modules():
        if isinstance(tower, Tower) and tower.starts:
            projection = f"{name}.projection."
            own = [each for each in weights if each.startswith(f"{name}.")]
            loaded += [
                each for each in own if ("projection" if each.startswith(projection) else "trunk") in tower.starts
            ]
    names = {parameter: name for name, parameter in method.named_parameters()}
    for role, module in method.projections().items():  # UniCLIP's is in its head
        if "projection" in getattr(method, role).starts:
            loaded += [names[parameter] for parameter in module.parameters()]
    return {name: weights[name] for name in dict.fromkeys(loaded)}


def queue_names(method: Method) -> tuple[str, ...]:
    """Returns the prefixes of the names of queues in the method's state. They hold features, not weights."""
    return tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, FeatureQueue))


def load(
    path: str | Path, weights: str = "last", device: str | torch.device = "cpu", similarity: str | None = None
) -> Run:
    """Loads the trained model of a run, in evaluation mode.

    Args:
        path: The folder of the run.
        weights: "last", or "best" for the checkpoint with the best validation score.
        device: The device of the model: "cpu", "cuda", "cuda:N" or "mps".
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
    best_device(str(device))
    saved = read_config(folder)
    if similarity is not None:
        saved = replace(saved, config=_with_similarity(saved.config, similarity))
    loaded = checkpoint.load(folder / weights)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    method = build_method(saved.config, tokenizer, folder)
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
