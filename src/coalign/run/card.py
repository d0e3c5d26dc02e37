"""card(): what a model is, in the form of a model card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from coalign import __version__
from coalign.config import flatten, to_json
from coalign.methods import method_class
from coalign.run.model import RESULTS, SavedConfig, read_config, trained_on

_LOAD = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

model = CLIPModel.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
images = CLIPImageProcessor.from_pretrained("FOLDER")""",
    "timm": """import json, timm

options = json.load(open("FOLDER/timm_model.json"))
trunk = timm.create_model(**options, checkpoint_path="FOLDER/model.safetensors")  # CLIP's mean and deviation""",
    "onnx": """import json, numpy as np, onnxruntime
from tokenizers import Tokenizer

info = json.load(open("FOLDER/onnx_model.json"))
words = Tokenizer.from_file("FOLDER/tokenizer.json")
images, texts = (onnxruntime.InferenceSession(f"FOLDER/{name}.onnx") for name in ("image", "text"))


def embed_text(text):
    ids = words.encode(text.lower(), add_special_tokens=False).ids[: info["context_length"] - 2]
    return texts.run(None, {"input_ids": np.array([[info["start_id"], *ids, info["end_id"]]])})[0]


def embed_images(pixels):  # uint8 [batch, 3, side, side], side = info["image_size"]: the central square, resized bicubically
    return images.run(None, {"pixels": pixels})[0]""",
    "coalign": """from coalign.run.model import load

encoder = load("FOLDER").encoder()""",
}
_LIMITS = """It was measured on held-out pairs of its own data alone: on other data it will do worse. What its data lack or misrepresent, it
does not know. It knows no facts, reads no text in images reliably, and must not be used to identify people or to decide about them."""
_SHOWN = (
    "image_size",
    "context_length",
    "tokenizer",
    "batch_size",
    "epochs",
    "seed",
    "precision",
    "pretrained",
    "init_from",
)


def card(path: str | Path, library: str = "coalign", weights: str = "last") -> str:
    """The model card of a run in Markdown: method, data, settings, figures with intervals, limits, how to load. The figures are of the last
    weights, which is said if the card is for others. UserError for no run."""
    folder = Path(path)
    saved = read_config(folder)
    config, data = saved.config, Path(saved.data).name or saved.data
    paper = (sys.modules[method_class(config.method).__module__].__doc__ or "").splitlines()[
        0
    ]  # a method's file begins with it
    lines = [
        f"# {config.method} on {data}",
        "",
        f"A `{_name(config.model)}` model that puts images and texts in one space, trained by coalign {__version__} with {paper}",
        "",
        "## Data",
        "",
        f"Images and captions, {trained_on(saved.config, saved.num_train)} for training, {saved.num_val:,} held out: {data}.",
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in _settings(saved).items()),
        "",
        "## Results",
        "",
        *(_figures(folder) or ["Not measured: nothing was held out, or the run is not finished."]),
        "",
        *(
            ["", f"These are the figures of the last weights; the model is of the {weights} ones."]
            if weights != "last"
            else []
        ),
        "",
        "## Limits",
        "",
        _LIMITS,
        "",
        "## Use",
        "",
        "```python",
        _LOAD[library],
        "```",
        "",
    ]
    return "\n".join(lines)


def _name(value: Any) -> Any:
    """Where a file lies is nobody else's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _settings(saved: SavedConfig) -> dict[str, Any]:
    flat = flatten(to_json(saved.config))
    chosen = {name: _name(flat[name]) for name in _SHOWN if flat.get(name) is not None}
    return chosen | {
        name.removeprefix("method_config."): v for name, v in flat.items() if name.startswith("method_config.")
    }


def _figures(folder: Path) -> list[str]:
    """A table of the held-out figures with their intervals."""
    if not (folder / RESULTS).exists():
        return []
    results = json.loads((folder / RESULTS).read_text())
    rows: list[tuple[str, dict[str, Any], float | None]] = []
    for task in (task for task in results if task.startswith("retrieval")):
        where = f"{task.removeprefix('retrieval_')}: " if task != "retrieval" else ""
        for side, name in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            for key, entry in results[task][side].items():
                if key.startswith("r"):
                    rows.append((f"{where}{name} R@{key[1:]}", entry, entry["chance"]))
    for task, name in (("zero_shot", "zero-shot"), ("probe", "linear probe")):
        if task in results:
            rows.append((f"{name} top-1", results[task]["intervals"]["acc1"], results[task]["chance"]))
    if not rows:
        return []
    table = ["| held out | value | 95 % interval | chance |", "| --- | --- | --- | --- |"]
    for name, entry, chance in rows:
        low, high = (f"{100 * entry[edge]:.1f}" for edge in ("low", "high"))
        table.append(f"| {name} | {100 * entry['value']:.1f} % | {low}–{high} | {100 * (chance or 0):.2g} % |")
    return table
