"""search(): the images of a dataset that are nearest to a text, to an image, or to both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coalign.config import DETECT, DataConfig
from coalign.data.account import account_lines
from coalign.data.loading.eval import image_batches
from coalign.data.loading.samples import sample_key
from coalign.data.sources.open import open_source
from coalign.embeds import similarities
from coalign.errors import UserError
from coalign.evaluation.embed import cut_lines, embed_images, embed_joint, embed_texts
from coalign.report.page import GalleryCell, Page
from coalign.runs.folder import check_output
from coalign.types import CLIP_PREPROCESS, Embeds
from coalign.workflows.evaluate.eval_model import EvalModel, open_eval_model
from coalign.workflows.evaluate.samples import captions_of, reading_of, select_split
from coalign.workflows.image_files import read_image, thumbnail


@dataclass(frozen=True)
class Hit:
    """One image found by a search."""

    index: int  # of the sample in the data
    key: str
    score: float  # similarity to the query; a query of image and text has the mean of both
    captions: tuple[str, ...]


@dataclass(frozen=True)
class SearchResult:
    query: str  # how the query was embedded
    hits: list[Hit]  # best first
    num_images: int  # searched
    # whether the query is cut, and what was skipped or left out, in sentences
    account: list[str] = field(default_factory=list)


@torch.no_grad()
def search(
    path: str | Path,
    data: str,
    text: str | None = None,
    image: str | Path | None = None,
    *,
    top: int = 10,
    split: str = "all",
    report: str | Path | None = None,
    device: str = "cpu",
    workers: int = 0,
    reading: DataConfig = DETECT,
) -> SearchResult:
    """Finds the `top` images of `data` nearest to a text, to an image, or to both.

    OneR embeds text and image as one sequence. For two-tower models the score is the mean of the similarities to both; with cosines, it
    ranks like the sum of both embeddings. With `report`, also writes a page with the images. Raises UserError if the query is empty, the
    model, the data or the image cannot be read, or the model cannot compare two images.
    """
    if text is not None and not text.strip():
        raise UserError("The text to search for is empty.")
    if text is None and image is None:
        raise UserError("There is nothing to search for; give --text, --image or both.")
    if top < 1:
        raise UserError(f"--top is {top}, but must be at least 1.")
    if report is not None:
        check_output(Path(report))
    model = open_eval_model(path, device=device)
    parts, query = _embed_query(model, text, image)
    source = open_source(data, reading=reading_of(data, model.run, reading))
    indices = select_split(source, data, model.run, split)[1]
    encoder, captions = model.encoder, captions_of(source)
    batches = image_batches(source, indices, encoder.image_size, workers=workers, preprocess=encoder.preprocess)
    images = embed_images(encoder, batches)
    to_parts = torch.cat([similarities(encoder.similarity, images.embeds, part) for part in parts], dim=1)
    scores, rows = to_parts.mean(1).topk(min(top, len(images.indices)))
    nearest = [(images.indices[row], score) for row, score in zip(rows.tolist(), scores.tolist())]
    hits = [Hit(index, sample_key(source, index), score, tuple(captions(index))) for index, score in nearest]
    skipped = Counter(bad.reason for bad in images.bad).most_common()
    account = [
        *cut_lines(encoder, [text] if text else [], "query"),
        *(f"Skipped samples: {count:,} ({reason})" for reason, count in skipped),
        *account_lines(source),
    ]
    if report is not None:
        page = Page("Search", f"{model.name}; {len(images.indices):,} images; query: {query}")
        pixels = (
            None
            if image is None
            else read_image(image, encoder.image_size, CLIP_PREPROCESS)[0].permute(1, 2, 0).numpy()
        )
        page.ranking(
            GalleryCell(pixels, text or "", note="query"),
            [
                GalleryCell(thumbnail(source, hit.index), " / ".join(hit.captions), note=f"{hit.score:.2f}")
                for hit in hits
            ],
        )
        for line in account:
            page.text(line)
        page.write(Path(report))
    return SearchResult(query, hits, len(images.indices), account)


def _embed_query(model: EvalModel, text: str | None, image: str | Path | None) -> tuple[list[Embeds], str]:
    """Returns the embeds of the query's parts, one sample each, and a description of the query."""
    encoder = model.encoder
    if image is None:
        return [embed_texts(encoder, [text or ""])], "text"
    pixels = read_image(image, encoder.image_size, encoder.preprocess)
    if text is not None and model.has_joint:
        return [embed_joint(encoder, model.joint_encoder(), pixels, [text])], "image and text as one sequence"
    image_embeds = embed_images(encoder, [([0], pixels, [])]).embeds
    if text is None:
        return [image_embeds], "image"
    return [image_embeds, embed_texts(encoder, [text])], "mean of the similarities to image and text"
