"""export(): writes a run's model for another library, and verifies that the library computes the same embeddings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from coalign.errors import UserError
from coalign.files import save_tensors, write_json
from coalign.interop.onnx.example import EXAMPLE, example_script
from coalign.interop.onnx.export import to_onnx, write_tokenizer
from coalign.interop.onnx.load import INFO, TOKENIZER, from_onnx, read_tokenizer, session, to_embeds, token_ids
from coalign.interop.onnx.quantize import KINDS
from coalign.interop.open_clip.export import to_open_clip
from coalign.interop.sentence_transformers import from_sentence_transformers, to_sentence_transformers
from coalign.interop.timm import from_timm, to_timm
from coalign.interop.tokenizer_export import to_transformers_tokenizer
from coalign.interop.transformers.dual_encoder import to_dual_encoder
from coalign.interop.transformers.export import preprocessor, to_transformers
from coalign.networks.towers.hugging_face import HuggingFaceTextTower
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.text import TextTower
from coalign.networks.two_towers import TwoTowers
from coalign.runs.card import card
from coalign.runs.folder import read_config, write_exported
from coalign.runs.run import Run, context_length, image_size, load, preprocess
from coalign.workflows.models.caption_check import TokenIds, check_captions
from coalign.workflows.models.export_check import PROBE_TEXTS, Peer, check_close, compare, random_pixels
from coalign.workflows.models.quantize import quantize_folder

Checked = tuple[list[str], Peer | None]  # sentences on what was compared, and the loaded export if it embeds texts


def export(
    path: str | Path,
    to: str,
    out: str | Path,
    weights: str = "last",
    similarity: str | None = None,
    quantize: str | None = None,
    max_differing: float = 0.0,
) -> Path:
    """Writes the run's model to the new folder `out` for a library of FORMATS; for timm, its image tower alone.

    similarity: of a run whose method has several, as in `load`. quantize: int8 or fp16, for ONNX; the loss in retrieval is measured.
    max_differing: the fraction of the captions of the run's data that the library may tokenize otherwise.
    The library loads the written model and must compute the run's embeddings. Otherwise nothing is left on disk, and UserError is raised.
    """
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}, but must be one of {', '.join(FORMATS)}.")
    if quantize is not None and (to != "onnx" or quantize not in KINDS):
        raise UserError(
            f"--quantize is {quantize!r} and --to {to}, but only ONNX can be quantized: to {' or '.join(KINDS)}."
        )
    out = check_new_folder(out)
    run = load(path, weights, similarity=similarity)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            notes, peer = FORMATS[to](run, folder)
            if peer is not None:
                notes = [*notes, check_captions(run, peer.library, peer.token_ids, max_differing)]
            write_exported(folder, read_config(Path(path)))
            if quantize is not None:
                notes = [*notes, quantize_folder(run, folder, quantize)]
            (folder / "README.md").write_text(
                card(path, to, weights, similarity, run.encoder().compares_cosines, out.resolve().name, notes)
            )
            folder.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The model could not be written to {out}: {error}") from error
    print(*notes, sep="\n", end="\n" if notes else "")
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


def _open_clip(run: Run, out: Path) -> Checked:
    image, text, scale = _towers(run, "open_clip")
    config, state = to_open_clip(run.model_config, image, text, scale)
    # open_clip repairs all texts, and lowercasing them before the tokenizer does would not be equal for Greek
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"clean": "whitespace"}}
    _tokenizer(run, repaired=True).save_pretrained(out)
    write_json(out / "open_clip_config.json", config)
    save_tensors(out / "open_clip_model.safetensors", state)
    name = f"local-dir:{out}"
    model, _, transform = _load(lambda: open_clip.create_model_and_transforms(name, precision="fp32"), "open_clip")
    model.eval()
    tokenize = open_clip.get_tokenizer(name)
    peer = Peer(
        "open_clip",
        encode_image=lambda pixels: model.encode_image(image.normalize(pixels)),
        encode_text=lambda texts: model.encode_text(tokenize(texts)),
        token_ids=lambda texts: tokenize(texts).tolist(),
        encode_files=lambda files: model.encode_image(torch.stack([transform(each) for each in files])),
    )
    return compare(run, peer), peer


def _write_transformers(run: Run, out: Path) -> ImageTower:
    """Writes a folder of transformers. Returns the image tower."""
    try:
        import transformers
    except ImportError:
        raise UserError('An export to transformers needs the extra "hf": pip install "coalign[hf]".') from None
    transformers.utils.logging.disable_progress_bar()
    image, text, scale = _towers(run, "transformers")
    around, vision = (run.tokenizer.start_id, run.tokenizer.end_id), run.model_config["vision_cfg"]
    if "timm_model_name" in vision:
        to_dual_encoder(vision, image, text, scale, *around).save_pretrained(out)
    else:
        to_transformers(image, text, scale, *around).save_pretrained(out)
    _tokenizer(run).save_pretrained(out)
    write_json(out / "preprocessor_config.json", preprocessor(image.image_size, image.preprocess))
    return image


def _transformers(run: Run, out: Path) -> Checked:
    image = _write_transformers(run, out)
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = _load(lambda: AutoModel.from_pretrained(out), "transformers").eval()
    tokenize, processor = AutoTokenizer.from_pretrained(out), AutoImageProcessor.from_pretrained(out, backend="pil")

    def encode_image(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(image.normalize(pixels)).pooler_output)

    def encode_text(texts: list[str]) -> Tensor:
        inputs = tokenize(texts, padding=True, truncation=True, return_tensors="pt")
        return model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)

    def encode_files(files: list[Image.Image]) -> Tensor:
        pixels = processor(files, return_tensors="pt").pixel_values
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    peer = Peer("transformers", encode_image, encode_text, _token_ids(out), encode_files=encode_files)
    return compare(run, peer), peer


def _sentence_transformers(run: Run, out: Path) -> Checked:
    with tempfile.TemporaryDirectory() as temporary:
        _write_transformers(run, Path(temporary))
        to_sentence_transformers(Path(temporary), out)
    model = _load(lambda: from_sentence_transformers(out), "sentence-transformers")

    def encode(inputs: Any) -> Tensor:
        return model.encode(inputs, convert_to_tensor=True, show_progress_bar=False)

    def encode_image(pixels: Tensor) -> Tensor:
        return encode([Image.fromarray(each.numpy()) for each in pixels.permute(0, 2, 3, 1)])

    peer = Peer("sentence-transformers", encode_image, encode, _token_ids(out), encode_files=encode)
    return compare(run, peer), peer


def _token_ids(folder: Path) -> TokenIds:
    """Returns the tokenizer of a folder of transformers as a function of texts."""
    from transformers import AutoTokenizer

    tokenize = AutoTokenizer.from_pretrained(folder)
    return lambda texts: tokenize(texts, truncation=True).input_ids


def _timm(run: Run, out: Path) -> Checked:
    if not isinstance(run.method, TwoTowers):
        raise UserError(
            f"A timm export needs the pooled features of an image tower, which {run.config.method} does not train."
        )
    image = run.method.image
    to_timm(run.config.model, run.model_config["vision_cfg"], image, out)
    model = _load(lambda: from_timm(out), "timm").eval()
    pixels = random_pixels(run)
    with torch.no_grad():
        check_close(run.method.image_features(pixels), model(image.normalize(pixels)), "image features", "timm")
    return [], None


def _onnx(run: Run, out: Path) -> Checked:
    """Writes graphs of both encoders, and of the joint encoder and the similarity if the model has its own."""
    method: Any = run.method
    encode: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "image": lambda dense: dense.encode_image,
        "text": lambda dense: dense.encode_text,
    }
    ids, _ = run.tokenizer(PROBE_TEXTS, context_length(method))
    pixels = random_pixels(run)
    example = slice(3)  # smaller than the batch compared below, which a graph of fixed batch size would reject
    inputs: dict[str, tuple[Tensor, ...]] = {"image": (pixels[example],), "text": (ids[example],)}
    if method.has_joint:
        encode["joint"], inputs["joint"] = (lambda dense: dense.encode_joint), (pixels[example], ids[example])
    length, end_id = context_length(method), run.tokenizer.end_id
    graphs = _load(lambda: to_onnx(method, encode, inputs, end_id, length, out, _print_graph), "ONNX")
    side, settings, encoder = image_size(method), preprocess(method), run.encoder()
    info = {
        "image_size": side,
        "interpolation": settings.interpolation,
        "resize_mode": settings.resize_mode,
        **write_tokenizer(run.tokenizer, length, out / TOKENIZER),
        "logit_scale": encoder.logit_scale,
        **graphs,
    }
    write_json(out / INFO, info)
    words = read_tokenizer(out / TOKENIZER)
    (out / EXAMPLE).write_text(
        example_script(side, settings, encoder.compares_cosines, bool(words.get_added_tokens_decoder()))
    )
    model = from_onnx(out)

    def ids_of(texts: list[str]) -> Sequence[Sequence[int]]:
        return token_ids(words, texts).tolist()

    peer = Peer("ONNX", model.encode_image, model.encode_text, ids_of, model.similarity)
    notes = compare(run, peer)
    if "joint" in inputs:
        joint = to_embeds(session(out / "joint.onnx")(pixels=pixels.numpy(), input_ids=ids.numpy()))
        with torch.no_grad():
            check_close(
                run.joint_encoder()(pixels, PROBE_TEXTS), joint, "joint embeddings", "ONNX", encoder.compares_cosines
            )
    return notes, peer


def _print_graph(file: str) -> None:
    print(f"Tracing {file}", flush=True)


FORMATS: dict[str, Callable[[Run, Path], Checked]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
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
    if run.tokenizer.hugging_face:
        raise UserError(
            f"{library} cannot hold the tokenizer {run.config.tokenizer} with CLIP's text encoder, which needs an end token with the "
            "largest id; use --to onnx."
        )
    if not isinstance(method, TwoTowers) or not isinstance(method.text, TextTower) or scale is None:
        raise UserError(
            f"{library} cannot represent a model of {run.config.method}, which is not a pair of towers with linear heads."
        )
    return method.image, method.text, scale.detach().log()


def _tokenizer(run: Run, repaired: bool = False) -> Any:
    return to_transformers_tokenizer(run.tokenizer, context_length(run.method), repaired)


def _load(create: Callable[[], Any], library: str) -> Any:
    """Calls `create`, with any error of the library as UserError."""
    try:
        return create()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{library} cannot load this model: {str(error).splitlines()[0]}") from error
