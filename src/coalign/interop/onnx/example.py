"""The script that an ONNX export brings along: it embeds a text and an image without coalign."""

from __future__ import annotations

from coalign.types import Preprocess

EXAMPLE = "example.py"

_SCRIPT = '''"""Embeds an image and a text, and compares them: python example.py photo.jpg "a red flower"

Needs onnxruntime, tokenizers, numpy and Pillow. The embeddings are those of the trained model for images of 8 bits per channel, at most
16 megapixels, and sides that differ at most 64-fold. coalign maps the range of deeper ones and reduces larger ones first.
"""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FOLDER, SIDE = Path(__file__).parent, {side}
{names} = (InferenceSession(FOLDER / f"{{name}}.onnx") for name in ({files}))
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))  # cleans, truncates and pads
{special}

def embed_image(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{view}
    return images.run(None, {{"pixels": np.asarray(image).transpose(2, 0, 1)[None]}}){result}


def embed_text(text):
    return texts.run(None, {{"input_ids": np.array([tokenizer.encode(text).ids])}}){result}


{similarity}if __name__ == "__main__":
    print({compared})
'''
_SPECIAL = "tokenizer.encode_special_tokens = True  # encodes [MASK] in a text as ordinary text\n"
_SIMILARITY = """def similarity(images, texts):  # outputs of the two functions -> [1, 1]
    names = [each.name for each in comparison.get_inputs()]
    return comparison.run(None, dict(zip(names, [*images, *texts])))[0]


"""
_COSINE = "embed_image(sys.argv[1]) @ embed_text(sys.argv[2]).T"  # of normalized embeddings
_VIEWS = {  # the arithmetic of `evaluation_view`
    "squash": "    image = image.resize((SIDE, SIDE), {resample})",
    "shortest": """    width, height = (SIDE * side // min(image.size) for side in image.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    image = image.resize((width, height), {resample}).crop((left, top, left + SIDE, top + SIDE))""",
    "longest": """    inner = image.resize([max(1, round(SIDE * side / max(image.size))) for side in image.size], {resample})
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste(inner, ((SIDE - inner.width) // 2, (SIDE - inner.height) // 2))""",
}


def example_script(side: int, preprocess: Preprocess, compares_cosines: bool, special_tokens: bool) -> str:
    """Returns the content of EXAMPLE. Embeddings are normalized arrays [1, dim] or, for a method's own similarity, lists of arrays.

    special_tokens: whether the tokenizer would encode special tokens in a text as such.
    """
    resample = f"Image.Resampling.{preprocess.interpolation.upper()}"
    return _SCRIPT.format(
        side=side,
        names="images, texts" if compares_cosines else "images, texts, comparison",
        files='"image", "text"' if compares_cosines else '"image", "text", "similarity"',
        special=_SPECIAL if special_tokens else "",
        view=_VIEWS[preprocess.resize_mode].format(resample=resample),
        result="[0]" if compares_cosines else "",
        similarity="" if compares_cosines else _SIMILARITY,
        compared=_COSINE if compares_cosines else "similarity(embed_image(sys.argv[1]), embed_text(sys.argv[2]))",
    )
