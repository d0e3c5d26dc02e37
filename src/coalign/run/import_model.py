"""import_model(): another library's model in the form from which any method of two towers can start."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from coalign.data.tokenizer import load_tokenizer
from coalign.errors import UserError
from coalign.interop.load_open_clip import CONFIG, WEIGHTS, from_open_clip
from coalign.interop.load_transformers import from_transformers
from coalign.interop.transformers import from_clip_model
from coalign.run.export import PROBE_TEXTS, check_close, check_new_folder, write_json
from coalign.types import DualEncoder


def import_model(model: str, out: str | Path) -> Path:
    """Writes a CLIPModel of transformers, `transformers:NAME`, into the new folder `out` in open_clip's form.

    open_clip loads what was written, and must give the same embeddings; else nothing is left, and UserError says why. open_clip's own
    models need no import: training takes their names and folders.
    """
    kind, _, name = model.partition(":")
    if kind != "transformers" or not name:
        raise UserError(
            f"{model!r} cannot be imported; give transformers:NAME. open_clip's models need no import: coalign train --model NAME "
            "--pretrained WEIGHTS."
        )
    out = check_new_folder(out)
    theirs = from_transformers(name)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            _write(name, theirs, whole)
            whole.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The model could not be written to {out}: {error}") from error
    return out


def _write(name: str, theirs: DualEncoder, out: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model_cfg, state = from_clip_model(CLIPModel.from_pretrained(name, use_safetensors=True))
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not _is_clips(tokenizer):
        tokenizer.save_pretrained(out)
        model_cfg["text_cfg"] |= {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "lower"}}
    processor = AutoImageProcessor.from_pretrained(name)
    normalisation = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    preprocess = {**normalisation, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(out / CONFIG, {"model_cfg": {**model_cfg, "custom_text": True}, "preprocess_cfg": preprocess})
    save_file(state, out / WEIGHTS[0])
    ours = from_open_clip(str(out))
    pixels = torch.randint(
        256, (2, 3, ours.image_size, ours.image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        check_close(theirs.encode_image(pixels), ours.encode_image(pixels), "embeddings of images", "open_clip")
        check_close(theirs.encode_text(PROBE_TEXTS), ours.encode_text(PROBE_TEXTS), "embeddings of texts", "open_clip")


def _is_clips(tokenizer: Any) -> bool:
    """Whether it gives CLIP's token ids, start and end included."""
    own = load_tokenizer("clip")
    return all(tokenizer(text).input_ids == own.encode(text, 77) for text in PROBE_TEXTS[:3])
