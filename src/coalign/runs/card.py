"""Model cards of runs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coalign.config import TrainConfig, fields_marked, flatten, to_json
from coalign.methods import method_class
from coalign.metric import metrics_from_json
from coalign.runs.folder import (
    RESULTS,
    SavedConfig,
    data_name,
    describe_model,
    describe_samples,
    public,
    read_config,
    read_results,
)
from coalign.version import __version__

_LOAD = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
images = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")  # resizes as in training""",
    "sentence-transformers": """from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
text_embeds = model.encode(["a photo of a dog"])
image_embeds = model.encode([Image.open("photo.jpg")])
similarities = model.similarity(image_embeds, text_embeds)  # [image, text]""",
    "timm": """import json, timm

options = json.load(open("FOLDER/timm_model.json"))
trunk = timm.create_model(**options, checkpoint_path="FOLDER/model.safetensors").eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(trunk))""",
    "onnx": """import json, numpy as np, onnxruntime
from tokenizers import Tokenizer

info = json.load(open("FOLDER/onnx_model.json"))
words = Tokenizer.from_file("FOLDER/tokenizer.json")
words.encode_special_tokens = True
images, texts = (onnxruntime.InferenceSession(f"FOLDER/{name}.onnx") for name in ("image", "text"))


def embed_text(text):
    return texts.run(None, {"input_ids": np.array([words.encode(text).ids])})[0]


def embed_images(pixels):  # uint8 [batch, 3, size, size]; info has image_size, interpolation, resize_mode
    return images.run(None, {"pixels": pixels})[0]""",
    "coalign": """import coalign

encoder = coalign.load("FOLDER").encoder()
text_embeds = encoder.encode_text(["a photo of a dog"])
image_embeds = encoder.encode_image(coalign.load_images(["photo.jpg"], encoder))
similarities = encoder.similarity(image_embeds, text_embeds)  # [image, text]""",
}
_COMPARE = """
similarity = onnxruntime.InferenceSession("FOLDER/similarity.onnx")


def compare(images, texts):  # outputs of embed_images and embed_text -> similarity [image, text]
    names = [each.name for each in similarity.get_inputs()]
    return similarity.run(None, dict(zip(names, [*images, *texts])))[0]"""
_LIMITS = """The model was evaluated only on held-out pairs of its own dataset; expect lower accuracy on other data. It inherits the gaps
and biases of its training data. It has no factual knowledge and does not read text in images reliably. Do not use it to identify people or
to make decisions about them."""


def card(
    path: str | Path,
    library: str = "coalign",
    weights: str = "last",
    similarity: str | None = None,
    compares_cosines: bool = True,
    export: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Returns the model card of a run in Markdown: method, data, settings, results with intervals, limits, how to load it.

    library: the library whose loading code to show. weights: the checkpoint that the card is for. The results are always those of the
    last weights and the configured similarity; the card says so if `weights` or `similarity` differ. compares_cosines: whether an export
    has one vector per sample. export: the name of the exported folder; None: the run's. notes: sentences on what the export
    was checked for, and what differs. Raises UserError if `path` is not a run.
    """
    folder = Path(path)
    saved = read_config(folder)
    config, data = saved.config, data_name(saved.data)
    # the docstring of a method's module starts with the paper's citation
    paper = (sys.modules[method_class(config.method).__module__].__doc__ or "").splitlines()[0]
    lines = [
        f"# {config.method} on {data}",
        "",
        f"A `{_model(config)}` model that embeds images and texts in a shared space, trained by coalign {__version__} with {paper}",
        "",
        "## Data",
        "",
        f"{data}: {describe_samples(saved.config, saved.num_train)} for training, {saved.num_val:,} held out.",
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in _settings(folder, saved).items()),
        "",
        "## Results",
        "",
        *(_results(folder) or ["Not evaluated: no pairs were held out, or the run is not finished."]),
        *_differences(weights, similarity),
        "",
        "## Limits",
        "",
        _LIMITS,
        "",
        *(line for note in notes for line in (note, "")),
        "## Use",
        "",
        "```python",
        _code(library, compares_cosines, export or folder.resolve().name),
        "```",
        "",
        *([] if export else _exports(folder.resolve().name, compares_cosines)),
    ]
    return "\n".join(lines)


def _exports(run: str, compares_cosines: bool) -> list[str]:
    """Returns how to export a run to each library, and how to load it there."""
    lines = ["`coalign export` writes the model for other libraries, or says why one cannot represent it.", ""]
    for library in _LOAD:
        if library != "coalign":
            code = _code(library, compares_cosines, f"{run}-{library}")
            command = shlex.join(["coalign", "export", run, "--to", library, "--out", f"{run}-{library}"])
            lines += [f"### {library}", "", "```bash", command, "```", "", "```python", code, "```", ""]
    return lines


def _code(library: str, compares_cosines: bool, folder: str) -> str:
    """Returns the code that loads the model in the library. A folder name that is not valid inside its strings stays a placeholder."""
    code = _LOAD[library]
    if library == "onnx" and not compares_cosines:  # the encoders have several outputs
        code = code.replace("})[0]", "})") + "\n" + _COMPARE
    return code.replace("FOLDER", folder) if re.fullmatch(r"[\w .+-]+", folder) else code


def _differences(weights: str, similarity: str | None) -> list[str]:
    """Returns what differs between this model and the one whose results are given."""
    lines = []
    if weights != "last":
        lines += ["", f"These results are those of the last weights; this model has the {weights} weights."]
    if similarity is not None:
        lines += ["", f"This model compares by the similarity {similarity}; these results are by the configured one."]
    return lines


def _model(config: TrainConfig) -> str:
    names = {name: public(getattr(config, name)) for name in ("model", "image_tower", "text_tower")}
    return describe_model(replace(config, **names))


def _settings(folder: Path, saved: SavedConfig) -> dict[str, Any]:
    """Returns the settings to list by name. The precision of a finished run is the one that "auto" was resolved to."""
    flat, listed = flatten(to_json(saved.config)), fields_marked(TrainConfig, "on_card")
    shared = {name: public(flat[name]) for name in listed if flat.get(name) is not None}
    shared |= {"epochs": saved.describe_epochs()} if saved.extended_from else {}
    shared |= {"weights": saved.interpolated} if saved.interpolated else {}
    if (folder / RESULTS).exists():
        shared["precision"] = read_results(folder)["run"].get("precision", shared["precision"])
    return shared | {
        name.removeprefix("method_config."): v for name, v in flat.items() if name.startswith("method_config.")
    }


def _results(folder: Path) -> list[str]:
    """Returns a sentence and a Markdown table of the held-out metrics with their intervals, or [] if there are none."""
    if not (folder / RESULTS).exists():
        return []
    tasks = read_results(folder)["tasks"]
    metrics = [metric for result in tasks.values() for metric in metrics_from_json(result["metrics"])]
    if not metrics:
        return []
    sentence = f"Evaluated on {tasks['retrieval']['images']:,} held-out pairs; intervals are 95 % bootstrap intervals over items."
    table = [sentence, "", "| metric | value | 95 % interval | chance |", "| --- | --- | --- | --- |"]
    return table + [f"| {m.title} | {m.text()} | {m.interval_text()} | {m.chance_text()} |" for m in metrics]
