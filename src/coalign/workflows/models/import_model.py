"""import_model(): converts a model of transformers to open_clip's format, from which any two-tower method can start training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.files import save_tensors, write_json
from coalign.interop.open_clip.load import CONFIG, WEIGHTS, from_open_clip
from coalign.interop.transformers.export import from_clip_model, read_preprocessor
from coalign.interop.transformers.load import from_transformers
from coalign.types import DualEncoder
from coalign.workflows.models.export import check_new_folder
from coalign.workflows.models.export_check import PROBE_TEXTS, check_close


def import_model(model: str, out: str | Path) -> Path:
    """Writes a CLIPModel of transformers, `transformers:NAME`, to the new folder `out` in open_clip's format.

    open_clip loads the written model and must compute the same embeddings. Otherwise nothing is left on disk, and UserError is raised.
    open_clip's own models need no import: training accepts their names and folders.
    """
    kind, _, name = model.partition(":")
    if kind != "transformers" or not name:
        raise UserError(
            f"{model!r} cannot be imported; give transformers:NAME. open_clip's models need no import: use coalign train --model NAME "
            "--pretrained WEIGHTS."
        )
    out = check_new_folder(out)
    original = from_transformers(name)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            folder = Path(temporary) / "import"
            folder.mkdir()
            _write(name, original, folder)
            folder.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The model could not be written to {out}: {error}") from error
    return out


def _write(name: str, original: DualEncoder, out: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

    model = AutoModel.from_pretrained(name, use_safetensors=True)
    if not isinstance(model, CLIPModel):
        raise UserError(f"{name} is a {type(model).__name__}; only CLIPModels of transformers can be imported.")
    model_cfg, state = from_clip_model(model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not _is_clip_tokenizer(tokenizer):
        tokenizer.save_pretrained(out)
        model_cfg["text_cfg"] |= {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "whitespace"}}
    processor = AutoImageProcessor.from_pretrained(name)
    preprocess = read_preprocessor(processor).to_json()
    write_json(out / CONFIG, {"model_cfg": {**model_cfg, "custom_text": True}, "preprocess_cfg": preprocess})
    save_tensors(out / WEIGHTS[0], state)
    converted = from_open_clip(str(out))
    side, generator = converted.image_size, torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        image_embeds = converted.encode_image(pixels)
        check_close(original.encode_image(pixels), image_embeds, "image embeddings", "open_clip")
        text_embeds = converted.encode_text(PROBE_TEXTS)
        check_close(original.encode_text(PROBE_TEXTS), text_embeds, "text embeddings", "open_clip")


def _is_clip_tokenizer(tokenizer: Any) -> bool:
    """Whether the tokenizer returns CLIP's token ids, start and end included."""
    clip = load_tokenizer("clip")
    return all(tokenizer(text).input_ids == clip.encode(text, 77) for text in PROBE_TEXTS[:3])
