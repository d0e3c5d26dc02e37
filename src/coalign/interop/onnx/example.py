"""The script that an ONNX export brings along: it embeds a text and an image without coalign."""

from __future__ import annotations

from coalign.types import Preprocess

EXAMPLE = "example.py"

_SCRIPT = '''"""Embeds an image and a text, and compares them: python example.py photo.jpg "a red flower"

Needs onnxruntime, tokenizers, numpy and Pillow. For images of 8 bits per channel and at most 16 megapixels.
"""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent
SIDE = {side}
images, texts = (InferenceSession(FOLDER / f"{{name}}.onnx") for name in ("image", "text"))
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))  # truncates and pads
tokenizer.encode_special_tokens = True  # encodes special tokens in a text as ordinary text


def embed_image(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image, transparent = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        image.paste(transparent, mask=transparent)
    image = image.convert("RGB")
{view}
    return images.run(None, {{"pixels": np.asarray(image).transpose(2, 0, 1)[None]}}){result}


def embed_text(text):
    return texts.run(None, {{"input_ids": np.array([tokenizer.encode(text).ids])}}){result}


{compare}

if __name__ == "__main__":
    print(similarity(embed_image(sys.argv[1]), embed_text(sys.argv[2])))  # [image, text]
'''
_VIEWS = {  # the arithmetic of `evaluation_view`
    "squash": "    image = image.resize((SIDE, SIDE), {resample})",
    "shortest": """    shortest = min(image.size)
    width, height = (SIDE if side == shortest else SIDE * side // shortest for side in image.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    image = image.resize((width, height), {resample}).crop((left, top, left + SIDE, top + SIDE))""",
    "longest": """    inner = image.resize([max(1, round(SIDE * side / max(image.size))) for side in image.size], {resample})
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste(inner, ((SIDE - inner.width) // 2, (SIDE - inner.height) // 2))""",
}
_COSINE = """def similarity(images, texts):
    return images @ texts.T  # cosines, as embeddings are normalized
"""
_OWN = """comparison = InferenceSession(FOLDER / "similarity.onnx")


def similarity(images, texts):
    names = [each.name for each in comparison.get_inputs()]
    return comparison.run(None, dict(zip(names, [*images, *texts])))[0]
"""


def example_script(side: int, preprocess: Preprocess, compares_cosines: bool) -> str:
    """Returns the content of EXAMPLE. Embeddings are arrays [1, dim] or, for a method's own similarity, lists of arrays."""
    resample = f"Image.Resampling.{preprocess.interpolation.upper()}"
    return _SCRIPT.format(
        side=side,
        view=_VIEWS[preprocess.resize_mode].format(resample=resample),
        result="[0]" if compares_cosines else "",
        compare=_COSINE if compares_cosines else _OWN,
    )
