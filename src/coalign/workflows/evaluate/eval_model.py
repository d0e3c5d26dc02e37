"""The model to evaluate: a run, another library's model, or two callables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coalign.devices import best_device
from coalign.errors import UserError
from coalign.interop.onnx.load import INFO as ONNX_INFO
from coalign.interop.onnx.load import from_onnx
from coalign.interop.open_clip.load import CONFIG as OPEN_CLIP_CONFIG
from coalign.interop.open_clip.load import OpenClipPreprocess, from_open_clip
from coalign.interop.transformers.load import from_transformers, is_transformers_folder
from coalign.runs.folder import EXPORTED, SavedConfig, read_config
from coalign.runs.run import Run, load
from coalign.types import CLIP_PREPROCESS, DualEncoder, JointEncoder, Localizer, Preprocess

FORMS = "a run's folder, an exported folder, open_clip:NAME:WEIGHTS or transformers:NAME"


@dataclass
class EvalModel:
    """A model to evaluate, with the run it comes from, if any."""

    encoder: DualEncoder
    run: Run | None = None  # None for models of other libraries, and for two callables
    library: str = "coalign"  # the library of the model and of its preprocessing
    exported: SavedConfig | None = None  # of an export of coalign: the run that it was made from

    @property
    def name(self) -> str:
        return self.encoder.name if self.run is None else f"{self.run.path.name}, {self.run.checkpoint}"

    @property
    def origin(self) -> Run | SavedConfig | None:
        """The run, or what an export knows of it: its data, and its settings."""
        return self.run or self.exported

    @property
    def has_joint(self) -> bool:
        """Whether the model takes an image and a text as one input."""
        return self.run is not None and self.run.method.has_joint

    def require_run(self, feature: str) -> Run:
        """Returns the run. Raises UserError for any other model, as only runs support `feature`."""
        if self.run is None:
            raise UserError(f"{self.encoder.name} is not a coalign run; only runs support {feature}.")
        return self.run

    def joint_encoder(self) -> JointEncoder:
        return self.require_run("joint embeddings of image and text").joint_encoder()

    def localizer(self) -> tuple[Localizer, str]:
        """Returns a function that computes localization maps, and the name of its technique."""
        from coalign.workflows.explore.localize import localizer

        return localizer(self.require_run("localization maps"))


def open_eval_model(
    model: str | Path | Run | DualEncoder,
    weights: str = "last",
    device: str | None = None,
    preprocess: str | None = None,
    similarity: str | None = None,
) -> EvalModel:
    """Opens a model for evaluation.

    model: a run or its folder, a folder that `coalign export` wrote for open_clip, transformers or as ONNX, `open_clip:…`,
    `transformers:…`, or a DualEncoder. preprocess: the library that resizes and crops images, instead of the model's own:
    "coalign", "open_clip" or "transformers". similarity: of a run whose method has several, as in `load`. Raises UserError if the model
    cannot be opened.
    """
    eval_model = _open(model, weights, best_device(device), similarity)
    if similarity is not None and eval_model.run is None:
        raise UserError(f"{eval_model.encoder.name} has a single similarity; omit --similarity.")
    if preprocess is not None:
        if preprocess not in PREPROCESSES:
            raise UserError(f"--preprocess is {preprocess!r}, but must be one of {', '.join(PREPROCESSES)}.")
        if preprocess != eval_model.library:  # otherwise keep the model's own settings
            encoder = eval_model.encoder
            settings = getattr(encoder.preprocess, "settings", encoder.preprocess)  # of another library's transform
            settings = settings if isinstance(settings, Preprocess) else CLIP_PREPROCESS
            eval_model.encoder = replace(encoder, preprocess=PREPROCESSES[preprocess](encoder.image_size, settings))
    return eval_model


def device_for(model: str | Path, device: str | None) -> str:
    """Returns the device that a model computes on: as in `best_device`, but the CPU for an ONNX export."""
    return "cpu" if (Path(model) / ONNX_INFO).is_file() else best_device(device)


def _open(model: str | Path | Run | DualEncoder, weights: str, device: str, similarity: str | None) -> EvalModel:
    if isinstance(model, DualEncoder):
        return EvalModel(model)
    if not isinstance(model, (str, Path)):
        if similarity is not None:
            raise UserError(f"{model.path} is already loaded; pass the similarity to load() instead.")
        return EvalModel(model.encoder(), model)
    kind, _, name = str(model).partition(":")
    if kind in LIBRARIES and name:
        return EvalModel(LIBRARIES[kind](name, device), library=kind)
    folder = Path(model)
    exported = read_config(folder, EXPORTED) if (folder / EXPORTED).is_file() else None
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return EvalModel(from_open_clip(str(folder), device), library="open_clip", exported=exported)
    if is_transformers_folder(folder):
        return EvalModel(from_transformers(str(folder), device), library="transformers", exported=exported)
    if (folder / ONNX_INFO).is_file():
        return EvalModel(from_onnx(folder), library="onnx", exported=exported)
    if not folder.exists():
        raise UserError(f"{model} does not exist; the model must be {FORMS}.")
    run = load(folder, weights, device, similarity)
    return EvalModel(run.encoder(), run)


LIBRARIES: dict[str, Callable[[str, str | torch.device], DualEncoder]] = {
    "open_clip": from_open_clip,
    "transformers": from_transformers,
}


def _transformers(size: int, settings: Preprocess) -> Callable:
    try:
        from transformers import CLIPImageProcessor
    except ImportError:
        raise UserError('The preprocessing of transformers needs the extra "hf": pip install "coalign[hf]".') from None
    from coalign.interop.transformers.export import preprocessor
    from coalign.interop.transformers.load import TransformersPreprocess

    return TransformersPreprocess(CLIPImageProcessor(**preprocessor(size, settings)))


PREPROCESSES: dict[str, Callable[[int, Preprocess], Preprocess | Callable]] = {
    "coalign": lambda size, settings: settings,
    "open_clip": OpenClipPreprocess,
    "transformers": _transformers,
}
