"""Exports compute the run's embeddings of any text and image; where a library cleans or resizes otherwise, it is only that."""

import io
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.random_image_files import random_image
from helpers.random_texts import is_rare, is_repaired, texts
from hypothesis import given, settings
from PIL import Image, ImageOps
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.images.decode import open_image
from coalign.data.images.views import make_view
from coalign.interop.tokenizer_export import exported_tokenizer
from coalign.runs.run import load
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.models.export import export
from coalign.workflows.models.export_check import CHECK_TEXTS, REPAIRED_TEXTS

SIDE = 32
VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}
EXAMPLES = [200, pytest.param(2000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, pairs):
    """(tokenizer, library) -> folder of an export; (tokenizer, "run") -> the run's."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "model.json").write_text(json.dumps(VIT))
    folders = {}
    for tokenizer in ("captions", "clip"):
        run = folders[tokenizer, "run"] = folder / tokenizer
        options = {"recipe": "clip", "epochs": 1, "evals": 0, "tokenizer": tokenizer}
        assert cli.main(tiny.train_args(pairs, run, folder / "model.json", **options)) == 0
        for library in ("open_clip", "transformers"):
            folders[tokenizer, library] = export(run, library, folder / f"{tokenizer}-{library}")
    return folders


def tokenize(library, folder):
    """Returns the library's own tokenizer as a function of one text."""
    if library == "open_clip":
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        return lambda text: tokenizer([text])[0].tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, truncation=True).input_ids


def embed_alike(ours, theirs, text):
    one, other = (F.normalize(model.encode_text([text]).float(), dim=-1) for model in (ours, theirs))
    return float((one - other).abs().max().detach()) < 1e-5


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize(
    ("tokenizer", "library", "is_exact"),
    [("captions", "transformers", True), ("clip", "open_clip", True), ("captions", "open_clip", False), ("clip", "transformers", False)],
)  # fmt: skip
def test_any_text_has_equal_embeddings(exports, tokenizer, library, is_exact, count):
    """open_clip repairs texts whatever the tokenizer: then repaired texts may differ, but no others. transformers resolves common entities
    as CLIP's tokenizer does, so that only rare ones and wrongly decoded texts may differ."""
    run, folder = load(exports[tokenizer, "run"]), exports[tokenizer, library]
    ours, theirs, their_ids = run.encoder(), open_eval_model(folder).encoder, tokenize(library, folder)

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(texts())
    def check(text):
        ids = run.tokenizer.encode(text, 12)
        is_equal = their_ids(text)[: len(ids)] == ids
        if is_equal:
            assert embed_alike(ours, theirs, text)
        else:
            assert not is_exact
            assert is_repaired(text) if tokenizer == "captions" else is_rare(text)

    check()
    for text in CHECK_TEXTS:
        assert embed_alike(ours, theirs, text), text
    alike = {kind for kind, found in REPAIRED_TEXTS.items() if all(embed_alike(ours, theirs, text) for text in found)}
    without_semicolon = "HTML entities without a semicolon"
    assert alike == (set(REPAIRED_TEXTS) if is_exact else {without_semicolon} if tokenizer == "clip" else set())


@pytest.mark.parametrize("count", EXAMPLES)
def test_any_text_has_equal_ids_without_truncation(exports, count):
    """As the `tokenizers` library reads the file: in ONNX exports, and from other languages."""
    tokenizers = {name: load(exports[name, "run"]).tokenizer for name in ("captions", "clip")}
    exported = {name: exported_tokenizer(each) for name, each in tokenizers.items()}

    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(texts())
    def check(text):
        for name, tokenizer in tokenizers.items():
            is_equal = exported[name].encode(text).ids == tokenizer.encode(text, 10**6)
            assert is_equal or (name == "clip" and is_rare(text))

    check()


def test_the_terminal_and_the_card_say_what_differs(exports, tmp_path, capsys):
    for (tokenizer, library), differs in {
        ("captions", "transformers"): [],
        ("captions", "open_clip"): list(REPAIRED_TEXTS),
        ("clip", "transformers"): ["wrongly decoded text", "rare HTML entities"],
        ("clip", "open_clip"): [],
    }.items():
        written = (exports[tokenizer, library] / "README.md").read_text()
        assert f"Checked in {library}: {len(CHECK_TEXTS)} texts" in written
        kinds = re.search(r"embeds them differently: (.*)\.", written)
        found = re.sub(r" \(\d of \d texts\)", "", kinds[1]).split(", ") if kinds else []
        assert found == differs
    capsys.readouterr()
    export(exports["clip", "run"], "transformers", tmp_path / "out")
    expected = (
        r"Checked in transformers.*",
        "transformers cleans these otherwise.*",
        "Embeddings of images that transformers resizes itself are equal.",
        "If an odd number of pixels is cut off, transformers may crop one pixel beside.*",
        "transformers returns the run's token ids for all of 64 captions of .*",
    )
    assert re.search("\n".join(expected), capsys.readouterr().out)


# ---------------------------------------------------------------- images


def test_any_image_has_equal_pixels(exports):
    """open_clip makes the run's pixels, also of the file as RGB, unless it is to be turned upright or put on white. transformers makes
    them by Pillow, and up to rounding by torchvision, unless it crops one pixel beside."""
    from transformers import AutoImageProcessor, CLIPImageProcessor

    rng = random.Random(0)
    run = load(exports["captions", "run"])
    transform = open_clip.create_model_and_transforms(f"local-dir:{exports['captions', 'open_clip']}")[2]
    folder = exports["captions", "transformers"]
    processor, by_pillow = (
        CLIPImageProcessor.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    tower, encoder = run.method.image, run.encoder()
    unequal, rounding = Counter(), []
    for _ in range(200):
        data, kind = random_image(rng)
        pixels = make_view(data, SIDE)[0][None]
        expected = tower.normalize(pixels)[0]
        upright = Image.fromarray(open_image(data).decode())
        if max(upright.size) > 64 * min(upright.size):  # the run resizes only the part that is shown
            continue
        torch.testing.assert_close(transform(upright), expected, rtol=0, atol=1e-5)
        as_rgb = Image.open(io.BytesIO(data)).convert("RGB")
        unequal[kind] += not torch.allclose(transform(as_rgb), expected, atol=1e-5)
        theirs = processor(upright, return_tensors="pt").pixel_values
        shortest = min(upright.size)
        margins = [abs(int(SIDE * side / shortest) - SIDE) for side in upright.size]
        if all(round(margin / 2) == margin // 2 for margin in margins):
            exact = by_pillow(upright, return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(exact, expected, rtol=0, atol=1e-5)
            step = 1 / 255 / tower.preprocess.std[0]
            assert float((theirs - expected).abs().max()) < 2.1 * step
            with torch.no_grad():
                features = [F.normalize(tower.projection(tower.trunk(x)), dim=-1) for x in (expected[None], theirs)]
            rounding.append(float((features[0] - features[1]).abs().max()))
    assert set(+unequal) == {"rotated", "alpha", "gray alpha", "transparent palette", "16-bit"}
    assert max(rounding) < 2e-3
    assert encoder.image_size == SIDE
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert turned.size == upright.size


# ---------------------------------------------------------------- evaluation


def test_an_export_is_evaluated_on_the_held_out_pairs_of_its_run(exports, pairs, tmp_path):
    """It knows the data by its name and the number of held-out pairs, without a path."""
    from coalign.workflows.evaluate.evaluate import evaluate

    expected = evaluate(exports["captions", "run"], [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
    for library in ("open_clip", "transformers"):
        folder = exports["captions", library]
        result = evaluate(folder, [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
        assert (result["split"], result["samples"]) == ("val", expected["samples"]) == ("val", 5)
        assert result["metrics"]["image_to_text.r1"]["value"] == expected["metrics"]["image_to_text.r1"]["value"]
        written = (folder / "coalign_run.json").read_text() + (folder / "README.md").read_text()
        assert str(Path(pairs).parent) not in written
        assert str(tmp_path.parents[1]) not in written
    other = tiny.write_pairs(tmp_path / Path(pairs).name, 12)
    result = evaluate(exports["captions", "open_clip"], [f"retrieval:{other}"])[f"retrieval:{other}"]
    assert (result["split"], result["samples"]) == ("all", 12)
    assert os.path.basename(other) == os.path.basename(pairs)
