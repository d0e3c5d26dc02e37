"""export(): a run's model for another library, written, loaded again by that library, and compared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.data.tokenizer import END, START, load_tokenizer
from coalign.errors import UserError
from coalign.interop.onnx import INFO, from_onnx, session, to_onnx
from coalign.interop.open_clip import to_open_clip
from coalign.interop.transformers import preprocessor, to_tokenizer, to_transformers
from coalign.networks.towers import ImageTower, TextTower, model_config
from coalign.run.card import card
from coalign.run.model import Run, image_size, load

TOLERANCE = 1e-4  # of normalised embeddings, which differ by rounding alone
PROBE_TEXTS = ("a photo of a dog", "two red apples, on a table!", "", "of " * 200)


@dataclass
class Peer:
    """The exported model as the other library loads it."""

    encode_image: Callable[[Tensor], Tensor]  # uint8 pixels [batch, 3, side, side] -> embeds [batch, dim]
    encode_text: Callable[[list[str]], Tensor]


def export(path: str | Path, to: str, out: str | Path, weights: str = "last") -> Path:
    """Writes the run's model into the new folder `out` in the form of open_clip, of transformers, as ONNX graphs, or, of the image tower
    alone, for timm.

    What was written is loaded by that library and must give the run's own embeddings; else nothing is left, and UserError says why.
    """
    if to not in FORMATS:
        raise UserError(f"There is no format {to!r}; --to is {', '.join(FORMATS)}.")
    out = check_new_folder(out)
    run = load(path, weights)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            FORMATS[to](run, whole)
            (whole / "README.md").write_text(card(path, to, weights))
            whole.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The model could not be written to {out}: {error}") from error
    return out


def check_new_folder(out: str | Path) -> Path:
    """UserError for a place where a folder cannot be made, or would replace what is there."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be made: there is no folder {out.absolute().parent}.")
    return out


# ---------------------------------------------------------------- the formats


def _open_clip(run: Run, out: Path) -> None:
    image, text, scale = _towers(run, "open_clip")
    config, state = to_open_clip(model_config(run.config.model), image, text, scale)
    if run.tokenizer.name != "clip":
        config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "lower"}}
        _tokenizer(run).save_pretrained(out)
    write_json(out / "open_clip_config.json", config)
    save_file(state, out / "open_clip_model.safetensors")
    name = f"local-dir:{out}"
    model = _loaded(lambda: open_clip.create_model(name, precision="fp32"), "open_clip").eval()
    words = open_clip.get_tokenizer(name)
    _compare(
        run,
        Peer(lambda pixels: model.encode_image(_normalised(pixels)), lambda t: model.encode_text(words(t))),
        "open_clip",
    )


def _transformers(run: Run, out: Path) -> None:
    try:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import logging
    except ImportError:
        raise UserError('An export to transformers needs the extra "hf": pip install "coalign[hf]".') from None
    logging.disable_progress_bar()
    image, text, scale = _towers(run, "transformers")
    to_transformers(image, text, scale, run.tokenizer.start_id, run.tokenizer.end_id).save_pretrained(out)
    _tokenizer(run).save_pretrained(out)
    write_json(out / "preprocessor_config.json", preprocessor(image.image_size))
    model = _loaded(lambda: CLIPModel.from_pretrained(out), "transformers").eval()
    words = AutoTokenizer.from_pretrained(out)

    def encode_image(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(_normalised(pixels)).pooler_output)

    def encode_text(texts: list[str]) -> Tensor:
        inputs = words(texts, padding=True, truncation=True, return_tensors="pt")
        return model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)

    _compare(run, Peer(encode_image, encode_text), "transformers")


def _timm(run: Run, out: Path) -> None:
    """The image trunk's weights, by timm's names, and what timm.create_model takes."""
    import timm

    image = next((module for module in run.method.modules() if isinstance(module, ImageTower)), None)
    vision = dict(model_config(run.config.model)["vision_cfg"])
    if image is None or "timm_model_name" not in vision:
        raise UserError(
            f"{run.config.model}'s image tower is none of timm's; export the model to open_clip or transformers."
        )
    trunk: Any = getattr(image.trunk, "trunk", image.trunk)  # open_clip's adapter has it within
    options = {"model_name": vision["timm_model_name"], "num_classes": 0, **vision.get("timm_kwargs", {})}
    write_json(out / "timm_model.json", options)
    save_file({k: v.detach().cpu().contiguous() for k, v in trunk.state_dict().items()}, out / "model.safetensors")

    def create() -> nn.Module:
        return timm.create_model(**options, checkpoint_path=str(out / "model.safetensors"))

    model = _loaded(create, "timm").eval()
    pixels = _probe(run)
    with torch.no_grad():
        check_close(run.method.image_features(pixels), model(_normalised(pixels)), "image features", "timm")


def _onnx(run: Run, out: Path) -> None:
    """Graphs of both encoders, and of image and text together where the model takes them as one."""
    method: Any = run.method
    encode: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
        "image": lambda dense: dense.encode_image,
        "text": lambda dense: dense.encode_text,
    }
    ids, _ = run.tokenizer(PROBE_TEXTS, run.config.context_length)
    pixels = _probe(run)
    few = slice(3)  # the comparison below is of another number, so that a graph of a fixed one is found out
    inputs: dict[str, tuple[Tensor, ...]] = {"image": (pixels[few],), "text": (ids[few],)}
    if getattr(method, "has_joint", False):
        encode["joint"], inputs["joint"] = (lambda dense: dense.encode_joint), (pixels[few], ids[few])
    _loaded(lambda: to_onnx(method, encode, inputs, run.tokenizer.end_id, run.config.context_length, out), "ONNX")
    run.tokenizer.save(out / "tokenizer.json")
    info = {
        "image_size": image_size(run.method),
        "context_length": run.config.context_length,
        "start_id": run.tokenizer.start_id,
        "end_id": run.tokenizer.end_id,
        "logit_scale": run.encoder().logit_scale,
    }
    write_json(out / INFO, info)
    peer = from_onnx(out, load_tokenizer(out / "tokenizer.json"))
    _compare(run, Peer(peer.encode_image, peer.encode_text), "ONNX")
    if "joint" in inputs:
        joint = torch.from_numpy(session(out / "joint.onnx")(pixels=pixels.numpy(), input_ids=ids.numpy()))
        with torch.no_grad():
            check_close(
                run.joint_encoder()(pixels, PROBE_TEXTS), joint, "embeddings of image and text together", "ONNX"
            )


FORMATS: dict[str, Callable[[Run, Path], None]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "timm": _timm,
    "onnx": _onnx,
}


# ---------------------------------------------------------------- parts


def _towers(run: Run, library: str) -> tuple[ImageTower, TextTower, Tensor]:
    """The towers and log(1/τ) of a method of two towers, whose embeddings may be linear in the towers' features."""
    image, text = (getattr(run.method, name, None) for name in ("image", "text"))
    scale = run.method.scalars().get("logit_scale")
    if not isinstance(image, ImageTower) or not isinstance(text, TextTower) or scale is None:
        raise UserError(
            f"{library} cannot hold a model of {run.config.method}, which is no pair of towers with linear heads."
        )
    return image, text, scale.detach().log()


def _tokenizer(run: Run) -> Any:
    return to_tokenizer(run.tokenizer.to_str(), START, END, run.config.context_length)


def _loaded(create: Callable[[], Any], library: str) -> Any:
    try:
        return create()
    except UserError:
        raise
    except Exception as error:  # whatever the library says of what does not fit
        raise UserError(f"{library} cannot load this model: {str(error).splitlines()[0]}") from error


def _probe(run: Run) -> Tensor:
    side, generator = image_size(run.method), torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def _compare(run: Run, peer: Peer, library: str) -> None:
    """UserError unless the library gives the run's embeddings of noise and of some texts."""
    own, pixels = run.encoder(), _probe(run)
    check_close(own.encode_image(pixels), peer.encode_image(pixels), "embeddings of images", library)
    check_close(own.encode_text(list(PROBE_TEXTS)), peer.encode_text(list(PROBE_TEXTS)), "embeddings of texts", library)


def check_close(one: Tensor, other: Tensor, what: str, library: str) -> None:
    difference = float((F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{library} cannot hold this model: its {what} would differ by {difference:.1e}. "
            "It holds a linear projection of each tower's features, and no other head."
        )


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 -> what open_clip, transformers and timm take, by CLIP's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (pixels / 255 - mean) / std


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
