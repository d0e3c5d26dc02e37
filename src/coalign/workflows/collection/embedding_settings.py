"""What embeddings are made of: the manifest of new ones, and how it differs from a folder's."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F

from coalign.config import DataConfig, from_json, to_json
from coalign.data.sources.base import Source
from coalign.errors import UserError
from coalign.evaluation.encoder_wrappers import MIN_COSINE, embed_samples, weights_checksum
from coalign.types import Preprocess
from coalign.workflows.collection.embedding_files import PRECISIONS, VERSION
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.samples import same_data

_SETTINGS = ("precision", "texts", "images", "similarity")


@dataclass(frozen=True)
class Settings:
    """What a caller chooses, besides model and data. Raises UserError for an invalid value."""

    split: str = "all"
    precision: str = "float16"
    chunk: int = 4096
    texts: bool = True
    images: bool = True
    similarity: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision is {self.precision!r}, but must be {' or '.join(PRECISIONS)}.")
        if self.chunk < 1:
            raise UserError(f"--chunk is {self.chunk}, but must be at least 1.")
        if not (self.texts or self.images):
            raise UserError("There is nothing to embed without images and without texts; omit one of the options.")

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> Settings:
        names = ("chunk", *_SETTINGS)
        return Settings(manifest["data"]["split"], **{name: manifest[name] for name in names})


def new_manifest(
    model: EvalModel, data: str, source: Source, reading: DataConfig, settings: Settings
) -> dict[str, Any]:
    """Returns the manifest of embeddings that are not written yet."""
    described, dim = _describe(model)
    stamp = source.stamp()
    return {
        "version": VERSION,
        "complete": False,
        "model": described,
        "data": {
            "name": data,
            "split": settings.split,
            "reading": json.loads(json.dumps(to_json(reading))),  # as it is read back
            "stamp": None if stamp is None else f"{stamp:016x}",  # None: there is no fast one
        },
        "precision": settings.precision,
        "chunk": settings.chunk,
        "texts": settings.texts,
        "images": settings.images,
        "similarity": settings.similarity,
        "dim": dim,
        "counts": {},
        "skipped": {},
        "state": "",
    }


def reading_in(manifest: Mapping[str, Any]) -> DataConfig:
    """Returns how the data was read."""
    return from_json(DataConfig, manifest["data"]["reading"])


def _describe(model: EvalModel) -> tuple[dict[str, Any], int]:
    """Returns what identifies a model, and the size of its embeddings."""
    encoder = model.encoder
    samples = embed_samples(encoder)
    probes = F.normalize(samples["image"][:1]).numpy(), F.normalize(samples["text"][1:2]).numpy()
    preprocess = getattr(encoder.preprocess, "settings", encoder.preprocess)  # of another library's transform
    described = {
        "name": model.name,
        "library": model.library,
        "weights": None if encoder.weights is None else weights_checksum(encoder.weights()),
        "image_size": encoder.image_size,
        "preprocess": preprocess.to_json() if isinstance(preprocess, Preprocess) else type(preprocess).__name__,
        # embeddings of an image and a text, which also tell apart models with equal weights
        "probe": base64.b64encode(np.concatenate(probes).astype(np.float16).tobytes()).decode(),
    }
    return described, int(samples["image"].shape[1])


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Returns what embeddings are made of or with, "of another model (clip, not oner)", unless it is what they would be made of now."""
    names = [each["model"]["name"] for each in (old, new)]
    if not _same_model(old["model"], new["model"]):
        other = (
            f"another model ({names[0]}, not {names[1]})"
            if names[0] != names[1]
            else f"{names[0]} with other weights or settings"
        )
        return f"of {other}"
    theirs, ours = old["data"], new["data"]
    if not same_data(theirs["name"], ours["name"]):
        return f"of other data ({theirs['name']}, not {ours['name']})"
    before = {"split": theirs["split"], **theirs["reading"], **{name: old[name] for name in _SETTINGS}}
    now = {"split": ours["split"], **ours["reading"], **{name: new[name] for name in _SETTINGS}}
    changed = [name for name in now if before.get(name) != now[name]]
    return f"with another --{changed[0].replace('_', '-')} ({_shown(before.get(changed[0]))})" if changed else None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _same_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if any(old[name] != new[name] for name in ("weights", "image_size", "preprocess")):
        return False
    probes = [np.frombuffer(base64.b64decode(each["probe"]), np.float16).astype(np.float32) for each in (old, new)]
    if len(probes[0]) != len(probes[1]):
        return False
    cosines = (probes[0] * probes[1]).reshape(2, -1).sum(1)
    return bool((cosines >= MIN_COSINE).all())


def is_of_model(manifest: Mapping[str, Any], model: EvalModel) -> bool:
    """Whether embeddings are those of the model as it is now."""
    return _same_model(manifest["model"], _describe(model)[0])
