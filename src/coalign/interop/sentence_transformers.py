"""Models in the format of Sentence Transformers: a CLIPModel of transformers, whose embeddings are normalized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.files import write_json

_MODULE = "sentence_bert_config.json"  # the library's name of the settings of its first module


def to_sentence_transformers(model: Path, folder: Path) -> None:
    """Writes the model of a transformers folder into `folder`, with its tokenizer and image processor.

    Images are resized by Pillow, as in training: by default, transformers uses torchvision, whose pixels differ slightly.
    """
    library = _import()
    from sentence_transformers.base.modules import Normalize, Transformer

    modules = [Transformer(str(model)), Normalize()]
    library.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    settings = json.loads((folder / _MODULE).read_text())
    write_json(folder / _MODULE, {**settings, "processor_kwargs": {"backend": "pil"}})


def from_sentence_transformers(folder: Path) -> Any:
    """Loads a written folder as a SentenceTransformer on the CPU."""
    return _import().SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def _import() -> Any:
    try:
        import sentence_transformers
        from sentence_transformers.base import modules  # noqa: F401  since version 5.4
    except ImportError:
        raise UserError(
            'An export to sentence-transformers needs that library: pip install "sentence-transformers>=5.4".'
        ) from None
    return sentence_transformers
