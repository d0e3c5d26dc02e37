"""export(): writes a run's model for another library, and verifies that the library computes the same embeddings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from coalign.data.text.tokenizer import END, START, load_tokenizer
from coalign.embeds import fields
from coalign.errors import UserError
from coalign.files import save_tensors, write_json
from coalign.interop.onnx import INFO, from_onnx, session, to_embeds, to_onnx
from coalign.interop.open_clip.export import to_open_clip
from coalign.interop.timm import from_timm, to_timm
from coalign.interop.transformers.export import preprocessor, to_tokenizer, to_transformers
from coalign.networks.towers.hugging_face import HuggingFaceTextTower
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.text import TextTower
from coalign.networks.two_towers import TwoTowers
from coalign.runs.card import card
from coalign.runs.run import Run, context_length, image_size, load, preprocess
from coalign.types import Embeds, Similarity, dot_product

TOLERANCE = 1e-4  # between normalized embeddings, which should differ by rounding only
PROBE_TEXTS = ("a photo of a dog", "two red apples, on a table!", "", "of " * 200)


@dataclass
class Peer:
    """The exported model, loaded by the other library."""

    encode_image: Callable[[Tensor], Any]  # uint8 pixels [batch, 3, side, side] -> embeds
    encode_text: Callable[[list[str]], Any]
    similarity: Similarity = dot_product


def export(path: str | Path, to: str, out: str | Path, weights: str = "last", similarity: str | None = None) -> Path:
    """Writes the run's model to the new folder `out` for open_clip, transformers or ONNX, or its image tower for timm.

    similarity: of a run whose method has several, as in `load`.
    The library loads the written model and must compute the run's embeddings. Otherwise nothing is left on disk, and UserError is raised.
    """
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}, but must be one of {', '.join(FORMATS)}.")
    out = check_new_folder(out)
    run = load(path, weights, similarity=similarity)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            FORMATS[to](run, folder)
            (folder / "README.md").write_text(
                card(path, to, weights, similarity, run.encoder().compares_cosines, out.resolve().name)
            )
            folder.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The model could not be written to {out}: {error}") from error
    return out


def check_new_folder(out: str | Path) -> Path:
    """Returns `out` as a path. Raises UserError if it is not empty, or its parent does not exist."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose another --out.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be created: the folder {out.absolute().parent} does not exist.")
    return out


# ---------------------------------------------------------------- formats


def _open_clip(run: Run, out: Path) -> None:
    image, text, scale = _towers(run, "open_clip")
    config, state = to_open_clip(run.model_config, image, text, scale)
    if run.tokenizer.name != "clip":
        config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "lower"}}
        _tokenizer(run).save_pretrained(out)
    write_json(out / "open_clip_config.json", config)
    save_tensors(out / "open_clip_model.safetensors", state)
    name = f"local-dir:{out}"
    model = _load(lambda: open_clip.create_model(name, precision="fp32"), "open_clip").eval()
    tokenize = open_clip.get_tokenizer(name)
    peer = Peer(
        encode_image=lambda pixels: model.encode_image(image.normalize(pixels)),
        encode_text=lambda texts: model.encode_text(tokenize(texts)),
    )
    _compare(run, peer, "open_clip")


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
    write_json(out / "preprocessor_config.json", preprocessor(image.image_size, image.preprocess))
    model = _load(lambda: CLIPModel.from_pretrained(out), "transformers").eval()
    tokenize = AutoTokenizer.from_pretrained(out)

    def encode_image(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(image.normalize(pixels)).pooler_output)

    def encode_text(texts: list[str]) -> Tensor:
        inputs = tokenize(texts, padding=True, truncation=True, return_tensors="pt")
        return model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)

    _compare(run, Peer(encode_image, encode_text), "transformers")


def _timm(run: Run, out: Path) -> None:
    if not isinstance(run.method, TwoTowers):
        raise UserError(
            f"A timm export needs the pooled features of an image tower, which {run.config.method} does not train."
        )
    image = run.method.image
    to_timm(run.config.model, run.model_config["vision_cfg"], image, out)
    model = _load(lambda: from_timm(out), "timm").eval()
    pixels = _random_pixels(run)
    with torch.no_grad():
        check_close(run.method.image_features(pixels), model(image.normalize(pixels)), "image features", "timm")


def _onnx(run: Run, out: Path) -> None:
    """Writes graphs of both encoders, and of the joint encoder and the similarity if the model has its own."""
    method: Any = run.method
    encode: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "image": lambda dense: dense.encode_image,
        "text": lambda dense: dense.encode_text,
    }
    ids, _ = run.tokenizer(PROBE_TEXTS, context_length(run.method))
    pixels = _random_pixels(run)
    example = slice(3)  # smaller than the batch compared below, which a graph of fixed batch size would reject
    inputs: dict[str, tuple[Tensor, ...]] = {"image": (pixels[example],), "text": (ids[example],)}
    if method.has_joint:
        encode["joint"], inputs["joint"] = (lambda dense: dense.encode_joint), (pixels[example], ids[example])
    graphs = _load(
        lambda: to_onnx(method, encode, inputs, run.tokenizer.end_id, context_length(run.method), out), "ONNX"
    )
    run.tokenizer.save(out / "tokenizer.json")
    info = {
        "image_size": image_size(run.method),
        "interpolation": preprocess(run.method).interpolation,
        "resize_mode": preprocess(run.method).resize_mode,
        "context_length": context_length(run.method),
        "start_id": run.tokenizer.start_id,
        "end_id": run.tokenizer.end_id,
        "logit_scale": run.encoder().logit_scale,
        **graphs,
    }
    write_json(out / INFO, info)
    peer = from_onnx(out, load_tokenizer(out / "tokenizer.json"))
    _compare(run, Peer(peer.encode_image, peer.encode_text, peer.similarity), "ONNX")
    encoder = run.encoder()
    if "joint" in inputs:
        joint = to_embeds(session(out / "joint.onnx")(pixels=pixels.numpy(), input_ids=ids.numpy()))
        with torch.no_grad():
            check_close(
                run.joint_encoder()(pixels, PROBE_TEXTS), joint, "joint embeddings", "ONNX", encoder.compares_cosines
            )


FORMATS: dict[str, Callable[[Run, Path], None]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "timm": _timm,
    "onnx": _onnx,
}


# ---------------------------------------------------------------- helpers


def _towers(run: Run, library: str) -> tuple[ImageTower, TextTower, Tensor]:
    """Returns the towers and log(1/τ) of a two-tower model; whether its heads are linear shows in the comparison."""
    if not run.encoder().compares_cosines:
        raise UserError(
            f"{library} compares one vector per sample by its cosine, but {run.config.method} has its own similarity; use --to onnx."
        )
    if run.config.head != "linear":
        raise UserError(
            f"{library} holds linear projections only, but this model has --head {run.config.head}; use --to onnx, or --to timm for the "
            "image encoder alone."
        )
    method, scale = run.method, run.method.scalars().get("logit_scale")
    if isinstance(method, TwoTowers) and isinstance(method.text, HuggingFaceTextTower):
        raise UserError(
            f"{library} cannot hold the text encoder of this run, a {type(method.text.encoder).__name__} of Hugging Face; use --to onnx."
        )
    if not run.tokenizer.cleans:
        raise UserError(
            f"{library} cannot hold the tokenizer {run.config.tokenizer} with CLIP's text encoder, which needs an end token with the "
            "largest id; use --to onnx."
        )
    if not isinstance(method, TwoTowers) or not isinstance(method.text, TextTower) or scale is None:
        raise UserError(
            f"{library} cannot represent a model of {run.config.method}, which is not a pair of towers with linear heads."
        )
    return method.image, method.text, scale.detach().log()


def _tokenizer(run: Run) -> Any:
    return to_tokenizer(run.tokenizer.to_str(), START, END, context_length(run.method))


def _load(create: Callable[[], Any], library: str) -> Any:
    """Calls `create`, with any error of the library as UserError."""
    try:
        return create()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{library} cannot load this model: {str(error).splitlines()[0]}") from error


def _random_pixels(run: Run) -> Tensor:
    side, generator = image_size(run.method), torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def _compare(run: Run, peer: Peer, library: str) -> None:
    """Raises UserError unless both models embed and compare random images and PROBE_TEXTS alike."""
    encoder, pixels, texts = run.encoder(), _random_pixels(run), list(PROBE_TEXTS)
    ours, theirs = ((m.encode_image(pixels), m.encode_text(texts)) for m in (encoder, peer))
    cosines = encoder.compares_cosines
    check_close(ours[0], theirs[0], "image embeddings", library, cosines)
    check_close(ours[1], theirs[1], "text embeddings", library, cosines)
    if not cosines:
        check_close(encoder.similarity(*ours), peer.similarity(*theirs), "similarities", library, False)


def check_close(expected: Embeds, actual: Embeds, what: str, library: str, cosines: bool = True) -> None:
    """Raises UserError if the tensors differ by more than rounding.

    Vectors that are compared by cosines may differ in length; other tensors differ relative to their largest value.
    """

    def differences() -> Iterator[float]:
        for one, other in zip(fields(expected).values(), fields(actual).values()):
            a, b = (F.normalize(x.float(), dim=-1) if cosines else x.float() for x in (one, other))
            yield float((a - b).abs().max() / (1.0 if cosines else a.abs().max().clamp(min=1e-6)))

    difference = max(differences())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{library} cannot represent this model: its {what} would differ by {difference:.1e}. "
            "It only supports a linear projection of each tower's features, no other heads."
        )
