"""2,000 texts and 200 images through one model in all four libraries: equal to 1e-5, or of a kind that is named here and counted.

The libraries take images as documented: open_clip, transformers and sentence-transformers an upright RGB image, the example of the ONNX
export the file.
"""

import json
import random
import runpy
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
from helpers import tiny
from helpers.random_image_files import KINDS, random_image
from helpers.random_texts import is_rare, is_repaired, texts
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.images.decode import open_image
from coalign.data.images.views import make_view
from coalign.runs.run import load

SIDE = 32
VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}
LIBRARIES = ("open_clip", "transformers", "sentence-transformers", "onnx")
TEXTS, IMAGES, BATCH = 2000, 200, 50
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["captions", "clip"])
def folder(request, tmp_path_factory, pairs):
    """A run, "run", with its exports, each named by its library. The exporter of ONNX cannot trace the shape checks of these tests."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model.json").write_text(json.dumps(VIT))
    options = {"recipe": "clip", "epochs": 1, "evals": 0, "tokenizer": request.param}
    assert cli.main(tiny.train_args(pairs, folder / "run", folder / "model.json", **options)) == 0
    for library in LIBRARIES:
        process = tiny.start(["export", str(folder / "run"), "--to", library, "--out", str(folder / library)])
        assert process.wait(timeout=600) == 0, process.stderr.read()
    return folder


def routes(folder):
    """Library -> its functions of texts, and of image files with their upright RGB images, to normalized embeddings."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    name = f"local-dir:{folder / 'open_clip'}"
    clip, _, transform = open_clip.create_model_and_transforms(name, precision="fp32")
    words = open_clip.get_tokenizer(name)
    model = AutoModel.from_pretrained(folder / "transformers").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "transformers")
    processor = AutoImageProcessor.from_pretrained(folder / "transformers", backend="pil")
    sentences = SentenceTransformer(str(folder / "sentence-transformers"), device="cpu", local_files_only=True)
    example = runpy.run_path(str(folder / "onnx/example.py"))

    def transformers_texts(batch):
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        return model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)

    def transformers_images(_, upright):
        pixels = processor(upright, return_tensors="pt").pixel_values
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    return {
        "open_clip": (
            lambda batch: clip.eval().encode_text(words(batch)),
            lambda _, upright: clip.eval().encode_image(torch.stack([transform(each) for each in upright])),
        ),
        "transformers": (transformers_texts, transformers_images),
        "sentence-transformers": (
            lambda batch: torch.as_tensor(sentences.encode(batch)),
            lambda _, upright: torch.as_tensor(sentences.encode(upright)),
        ),
        "onnx": (
            lambda batch: torch.tensor(np.concatenate([example["embed_text"](text) for text in batch])),
            lambda files, _: torch.tensor(np.concatenate([example["embed_image"](file) for file in files])),
        ),
    }


def differences(ours, theirs):
    return (F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)).abs().amax(1).tolist()


@torch.no_grad()
def test_all_routes_embed_any_text_alike(folder):
    """Texts that differ are repaired by open_clip alone or, with CLIP's tokenizer, by open_clip and the run."""
    found = []

    @settings(
        max_examples=TEXTS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(texts())
    def collect(text):
        found.append(text)

    collect()
    assert len(found) >= 0.95 * TEXTS
    run, libraries = load(folder / "run"), routes(folder)
    repairs, unequal = run.tokenizer.repairs, Counter()
    for first in range(0, len(found), BATCH):
        batch = found[first : first + BATCH]
        ours = run.encoder().encode_text(batch)
        for library, (encode, _) in libraries.items():
            for text, difference in zip(batch, differences(ours, encode(batch)), strict=True):
                if difference > 1e-5:
                    assert is_rare(text) if repairs else is_repaired(text), (library, text)
                    unequal[library] += 1
    print(f"{len(found)} texts, unequal: {dict(unequal)}")
    assert set(unequal) == (set(LIBRARIES) - {"open_clip"} if repairs else {"open_clip"})
    assert max(unequal.values()) < 0.5 * len(found)


def crops_beside(size):
    """Whether half of what is cut off is not a whole number and rounds up: transformers always rounds down."""
    margins = [SIDE * side // min(size) - SIDE for side in size]
    return any(round(margin / 2) != margin // 2 for margin in margins)


@torch.no_grad()
def test_all_routes_embed_any_image_alike(folder, tmp_path):
    run, libraries, rng = load(folder / "run"), routes(folder), random.Random(0)
    unequal, kinds, exact = {library: Counter() for library in libraries}, Counter(), Counter()
    for number in range(IMAGES):
        data, kind = random_image(rng)
        (tmp_path / str(number)).write_bytes(data)
        upright = Image.fromarray(open_image(data).decode())
        ours = run.encoder().encode_image(make_view(data, SIDE)[0][None])
        kinds[kind] += 1
        for library, (_, encode) in libraries.items():
            (difference,) = differences(ours, encode([tmp_path / str(number)], [upright]))
            reasons = {
                "16-bit": library == "onnx" and kind == "16-bit",
                "long": max(upright.size) > 64 * min(upright.size),
                "crops beside": "transformers" in library and crops_beside(upright.size),
            }
            if difference > 1e-5:
                assert any(reasons.values()), (library, kind, upright.size, difference)
                unequal[library][next(name for name, holds in reasons.items() if holds)] += 1
            exact[library] += difference <= 1e-5
    print(f"{IMAGES} images, unequal: {unequal}")
    assert set(kinds) == set(KINDS)
    assert unequal["transformers"]["crops beside"] == unequal["sentence-transformers"]["crops beside"] > 0
    assert all(count > IMAGES / 2 for count in exact.values())
