"""What is evaluated: a run of ours, another library's model, or two callables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coalign.data.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.interop.load_open_clip import CONFIG as OPEN_CLIP_CONFIG
from coalign.interop.load_open_clip import from_open_clip, open_clip_preprocess
from coalign.interop.load_transformers import from_transformers, is_transformers_folder
from coalign.interop.onnx import INFO as ONNX_INFO
from coalign.interop.onnx import from_onnx
from coalign.methods.oner import OneR
from coalign.run.model import Run, known_device, load
from coalign.types import DualEncoder, JointEncoder, Localizer

FORMS = "a run's folder, an exported folder, open_clip:NAME:WEIGHTS or transformers:NAME"


@dataclass
class Subject:
    """A model that is asked."""

    encoder: DualEncoder
    run: Run | None = None  # where it is ours
    library: str = "coalign"  # whose it is, and whose preprocessing it has

    @property
    def name(self) -> str:
        return self.encoder.name if self.run is None else f"{self.run.path.name}, {self.run.checkpoint}"

    @property
    def has_joint(self) -> bool:
        """Whether it takes an image and a text as one input."""
        return self.run is not None and isinstance(self.run.method, OneR) and self.run.method.has_joint

    def ours(self, what: str) -> Run:
        """The run; UserError for a model of another library, which cannot be asked for `what`."""
        if self.run is None:
            raise UserError(f"{self.encoder.name} is no run of coalign's, which alone can be asked for {what}.")
        return self.run

    def joint_encoder(self) -> JointEncoder:
        return self.ours("image and text as one input").joint_encoder()

    def localizer(self) -> tuple[Localizer, str]:
        from coalign.run.localize import localizer

        return localizer(self.ours("maps"))


def open_subject(
    model: str | Path | Run | DualEncoder, weights: str = "last", device: str = "cpu", preprocess: str | None = None
) -> Subject:
    """A run or its folder, a folder that `coalign export` wrote for open_clip, transformers or as ONNX, `open_clip:…`, `transformers:…`, or
    two callables. `preprocess`: how pictures become squares, in place of the model's own way: "coalign", "open_clip" or "transformers".
    UserError for what is none of these."""
    subject = _open(model, weights, known_device(device) or "cpu")
    if preprocess is not None:
        if preprocess not in PREPROCESSES:
            raise UserError(f"There is no preprocessing {preprocess!r}; --preprocess is {', '.join(PREPROCESSES)}.")
        if preprocess != subject.library:  # else the model has its own settings of it
            size = subject.encoder.image_size
            subject.encoder = replace(subject.encoder, preprocess=PREPROCESSES[preprocess](size))
    return subject


def _open(model: str | Path | Run | DualEncoder, weights: str, device: str) -> Subject:
    if isinstance(model, DualEncoder):
        return Subject(model)
    if not isinstance(model, (str, Path)):
        return Subject(model.encoder(), model)
    kind, _, rest = str(model).partition(":")
    if kind in LIBRARIES and rest:
        return Subject(LIBRARIES[kind](rest, device), library=kind)
    folder = Path(model)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return Subject(from_open_clip(str(folder), device), library="open_clip")
    if is_transformers_folder(folder):
        return Subject(from_transformers(str(folder), device), library="transformers")
    if (folder / ONNX_INFO).is_file():
        return Subject(from_onnx(folder, load_tokenizer(folder / "tokenizer.json")), library="onnx")
    if not folder.exists():
        raise UserError(f"{model} does not exist; a model is {FORMS}.")
    run = load(folder, weights, device)
    return Subject(run.encoder(), run)


LIBRARIES: dict[str, Callable[[str, str | torch.device], DualEncoder]] = {
    "open_clip": from_open_clip,
    "transformers": from_transformers,
}


def _open_clip(size: int) -> Callable:
    from open_clip.transform import PreprocessCfg

    return open_clip_preprocess(PreprocessCfg(size=size))


def _transformers(size: int) -> Callable:
    try:
        from transformers import CLIPImageProcessor
    except ImportError:
        raise UserError('The preprocessing of transformers needs the extra "hf": pip install "coalign[hf]".') from None
    from coalign.interop.load_transformers import TransformersPreprocess
    from coalign.interop.transformers import preprocessor

    return TransformersPreprocess(CLIPImageProcessor(**preprocessor(size)))


PREPROCESSES: dict[str, Callable[[int], Callable | None]] = {
    "coalign": lambda size: None,
    "open_clip": _open_clip,
    "transformers": _transformers,
}
