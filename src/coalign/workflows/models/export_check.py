"""Compares an exported model, loaded by the other library, with the run that it was made from, on texts and images of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from coalign.data.images.evaluation_view import evaluation_view
from coalign.embeds import fields
from coalign.errors import UserError
from coalign.runs.run import Run, image_size, preprocess
from coalign.types import DualEncoder, Embeds, Similarity, dot_product
from coalign.workflows.models.caption_check import TokenIds, differing_texts

TOLERANCE = 1e-5  # between normalized embeddings, which should differ by rounding only
PREPROCESSING_TOLERANCE = (
    0.02  # between embeddings of images that two libraries resize, as they round pixels differently
)

PROBE_TEXTS = ("a photo of a dog", "two red apples, on a table!", "", "of " * 200)
CHECK_TEXTS = (
    *PROBE_TEXTS,
    # scripts
    "Ein Hund läuft über die Straße", "un été à l’île, çà et là", "İstanbul'da bir kedi", "tiếng Việt: một con chó", "ΟΔΟΣ ΤΗΣ ΑΘΗΝΑΣ",
    "Рыжая собака на снегу", "կարմիր խնձոր", "כלב רץ בשלג", "كلب يركض في الثلج", "سگی در برف", "लाल सेब मेज पर", "লাল আপেল", "சிவப்பு ஆப்பிள்",
    "ఎరుపు ఆపిల్", "ಕೆಂಪು ಸೇಬು", "ചുവന്ന ആപ്പിൾ", "රතු ඇපල්", "หมาแดงวิ่ง", "ໝາແດງ", "ཁྱི་དམར་པོ།", "ခွေးနီ", "წითელი ვაშლი", "ቀይ ፖም", "ឆ្កែក្រហម",
    "улаан нохой ᠨᠣᠬᠠᠢ", "빨간 사과 두 개", "赤いリンゴが２つ、机の上に。", "狗在雪地里跑，两只红苹果。", "ᏣᎳᎩ ᎩᏟ", "𝒜 𝕓𝕠𝕝𝕕 𐍈 𒀀",
    # spaces and characters that do not print
    "  two\tred\r\napples\u00a0 on\u2003a\u3000table\u2028\u2029 ", "zero\u200bwidth\u200djoin\ufeffmark\u00ad",
    "bell\x07 null\x1f escape\x1b[31m red",
    "\x85\x91quoted\x92 in C1", "\u202bשלום\u202c \u200fmarks\u200e \u2066isolated\u2069", "\n\n",
    # forms of characters
    "“curly” ‘quotes’ — dash…", "ｆｕｌｌ　ｗｉｄｔｈ！，ﾊﾝｶｸ", "ﬁne oﬃce ĳs ﬅ", "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab",
    "½ ² ① Ⅷ ™ ㎏ ﷺ",
    "&amp; &lt;b&gt; &quot;x&quot; &eacute;t&eacute; &#39;x&#39; &#x27; &nbsp; &rsquo; &amp;amp;", "AT&T, R & D; fish&chips",
    # emoji, numbers, addresses, long words
    "😀 👍🏽 👩‍👩‍👧 🇩🇪 ❤️ 1️⃣", "12345 3.14 1,000 ٣ 第3章", "http://example.org/a_b?c=d #tag @name", "supercalifragilistic" * 20,
    "!?!?... --- ///", "a <end_of_text> b <start_of_text>",
)  # fmt: skip
# texts that some libraries clean as nobody else does
REPAIRED_TEXTS = {
    "wrongly decoded text": ("schÃ¶n", "â€œquotesâ€\x9d and caf\u00c3\u00a9", "Ñ\u0081Ð¾Ð±Ð°ÐºÐ°"),
    "rare HTML entities": ("&Jscr; &NotEqual;", "&#9731; and &#x1F600;"),
    "HTML entities without a semicolon": ("fish &amp chips", "&copy 2024"),
}


@dataclass
class Peer:
    """The exported model, loaded by the other library.

    token_ids: as `check_captions` takes them. encode_files: upright RGB images to embeds, by the library's own preprocessing.
    """

    library: str
    encode_image: Callable[[Tensor], Any]  # uint8 pixels [batch, 3, side, side] -> embeds
    encode_text: Callable[[list[str]], Any]
    token_ids: TokenIds
    similarity: Similarity = dot_product
    encode_files: Callable[[list[Image.Image]], Tensor] | None = None


@torch.no_grad()
def compare(run: Run, peer: Peer) -> list[str]:
    """Returns sentences on what was compared and what differs.

    Raises UserError unless both models embed and compare random images and CHECK_TEXTS alike. REPAIRED_TEXTS may differ.
    """
    encoder, pixels = run.encoder(), random_pixels(run)
    cosines = encoder.compares_cosines
    images = encoder.encode_image(pixels), peer.encode_image(pixels)
    check_close(*images, "image embeddings", peer.library, cosines, _advice(peer))
    for texts in (
        [text for text in CHECK_TEXTS if len(text) < 200],
        [text for text in CHECK_TEXTS if len(text) >= 200],
    ):
        ours, theirs = encoder.encode_text(texts), peer.encode_text(texts)
        if difference(ours, theirs, cosines) > TOLERANCE:
            _raise_for_texts(run, texts, encoder, peer)
        if not cosines:
            similarities = encoder.similarity(images[0], ours), peer.similarity(images[1], theirs)
            check_close(*similarities, "similarities", peer.library, False, _advice(peer))
    notes = [
        f"Checked in {peer.library}: {len(CHECK_TEXTS)} texts in over 20 scripts and {len(pixels)} images have equal embeddings."
    ]
    differing = {
        kind: sum(
            difference(encoder.encode_text([text]), peer.encode_text([text]), cosines) > TOLERANCE for text in texts
        )
        for kind, texts in REPAIRED_TEXTS.items()
    }
    if found := [
        f"{kind} ({number} of {len(REPAIRED_TEXTS[kind])} texts)" for kind, number in differing.items() if number
    ]:
        notes.append(
            f"{peer.library} cleans these otherwise than the run, and embeds them differently: {', '.join(found)}."
        )
    return notes + (_compare_preprocessing(run, encoder, peer) if peer.encode_files else [])


def _advice(peer: Peer) -> str:
    return "" if peer.library == "ONNX" else "; use --to onnx"


def _raise_for_texts(run: Run, texts: Sequence[str], encoder: DualEncoder, peer: Peer) -> None:
    """Raises UserError with the first of texts that are tokenized or embedded differently."""
    cosines, advice = encoder.compares_cosines, _advice(peer)
    for text in texts:
        if differing_texts(run, [text], peer.token_ids):
            raise UserError(f"{peer.library} returns other token ids than the run, such as for {text[:40]!r}{advice}.")
        what = f"text embeddings (such as of {text[:40]!r})"
        check_close(encoder.encode_text([text]), peer.encode_text([text]), what, peer.library, cosines, advice)
    embeds = encoder.encode_text(texts), peer.encode_text(list(texts))
    check_close(*embeds, "embeddings of several texts at once", peer.library, cosines, advice)


def _compare_preprocessing(run: Run, encoder: DualEncoder, peer: Peer) -> list[str]:
    """Returns a sentence on images that each library resizes itself. Raises UserError if they differ by more than rounding."""
    side, settings = image_size(run.method), preprocess(run.method)

    def distance(images: list[Image.Image]) -> float:
        assert peer.encode_files is not None
        views = np.stack([evaluation_view(np.asarray(image), side, settings) for image in images])
        ours = encoder.encode_image(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
        return difference(ours, peer.encode_files(images))

    resized, shifted = distance(check_images(side)), distance([_smooth_image(side + 3, side)])
    if resized > PREPROCESSING_TOLERANCE:
        raise UserError(
            f"{peer.library} cannot represent the preprocessing of this model: embeddings of images that it resizes would differ by "
            f"{resized:.1e}; use --to onnx."
        )
    rounding = f"differ by at most {resized:.1e}, as it rounds pixels otherwise"
    notes = [
        f"Embeddings of images that {peer.library} resizes itself {'are equal' if resized <= TOLERANCE else rounding}."
    ]
    if shifted > TOLERANCE:
        notes.append(
            f"If an odd number of pixels is cut off, {peer.library} may crop one pixel beside; then they differ, as of one image by "
            f"{shifted:.1e}."
        )
    return notes


def check_images(side: int) -> list[Image.Image]:
    """Returns random images of several shapes: as the model takes them, large, small, of one pixel, and long."""
    wide, tall, small = (2 * side + 8, 2 * side), (4 * side, 4 * side + 16), (side // 2, side // 2 + 2)
    return [_smooth_image(*size) for size in ((side, side), wide, tall, small, (1, 1), (side, 9 * side))]


def _smooth_image(width: int, height: int) -> Image.Image:
    shape = (height // 16 + 1, width // 16 + 1, 3)
    pixels = np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def random_pixels(run: Run) -> Tensor:
    side, generator = image_size(run.method), torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=generator)


def difference(expected: Embeds, actual: Embeds, cosines: bool = True) -> float:
    """Returns the largest difference of the tensors' values, infinite if they have other shapes.

    Vectors that are compared by cosines may differ in length; other tensors differ relative to their largest value.
    """
    largest = 0.0
    for one, other in zip(fields(expected).values(), fields(actual).values(), strict=True):
        if one.shape != other.shape:
            return float("inf")
        a, b = (F.normalize(x.float(), dim=-1) if cosines else x.float() for x in (one, other))
        distance = float((a - b).abs().max() / (1.0 if cosines else a.abs().max().clamp(min=1e-6)))
        largest = max(largest, distance if distance == distance else float("inf"))
    return largest


def check_close(
    expected: Embeds, actual: Embeds, what: str, library: str, cosines: bool = True, advice: str = ""
) -> None:
    """Raises UserError, which ends with the advice, if the tensors differ by more than rounding."""
    distance = difference(expected, actual, cosines)
    if distance > TOLERANCE:
        raise UserError(f"{library} cannot represent this model: its {what} would differ by {distance:.1e}{advice}.")
