"""search(): the images of a data set that are nearest to a text, to an image, or to both together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.data.evaluation_views import image_batches, sample_key
from coalign.data.sources import open_source
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.report.page import GalleryCell, Page
from coalign.run.model import check_output
from coalign.run.pictures import read_picture, thumbnail
from coalign.run.samples import captions_of, select_split
from coalign.run.subject import Subject, open_subject


@dataclass(frozen=True)
class Hit:
    """An answer of a search."""

    index: int  # of the sample in the data
    key: str
    score: float  # cosine with the query
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    how: str  # how the query was embedded
    hits: list[Hit]  # the best first
    searched: int  # images
    unreadable: int


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
) -> Answers:
    """The `top` images of `data` nearest to a text, to an image, or to both: OneR takes both as one sequence, of two towers the sum of
    both embeddings is asked. With `report`, also writes a page with the pictures. UserError for a query of nothing, and for what cannot be
    read."""
    if text is not None and not text.strip():
        raise UserError("The text to search for is empty.")
    if text is None and image is None:
        raise UserError("There is nothing to search for; give --text, --image or both.")
    if top < 1:
        raise UserError(f"--top is {top}, but must be at least 1.")
    if report is not None:
        check_output(Path(report))
    subject = open_subject(path, device=device)
    query, how = _embed_query(subject, text, image)
    source = open_source(data)
    indices = select_split(source, data, subject.run, split)[1]
    encoder, captions = subject.encoder, captions_of(source)
    batches = image_batches(source, indices, encoder.image_size, workers=workers, preprocess=encoder.preprocess)
    images = embed_images(encoder, batches)
    scores, rows = (images.embeds @ query).topk(min(top, len(images.indices)))
    found = [(images.indices[row], score) for row, score in zip(rows.tolist(), scores.tolist())]
    hits = [Hit(index, sample_key(source, index), score, tuple(captions(index))) for index, score in found]
    if report is not None:
        page = Page("Search", f"{subject.name}; {len(images.indices):,} images; query: {how}")
        asked = None if image is None else read_picture(image, encoder.image_size)[0].permute(1, 2, 0).numpy()
        page.ranking(
            GalleryCell(asked, text or "", note="query"),
            [
                GalleryCell(thumbnail(source, hit.index), " / ".join(hit.captions), note=f"{hit.score:.2f}")
                for hit in hits
            ],
        )
        page.write(Path(report))
    return Answers(how, hits, len(images.indices), len(images.bad))


@torch.no_grad()
def _embed_query(subject: Subject, text: str | None, image: str | Path | None) -> tuple[Tensor, str]:
    """The query's normalised embedding, float32 [dim], and how it was made."""
    encoder = subject.encoder
    if image is None:
        return embed_texts(encoder, [text or ""])[0], "text"
    pixels = read_picture(image, encoder.image_size, encoder.preprocess)
    if text is not None and subject.has_joint:
        both = subject.joint_encoder()(pixels, [text])[0].float().cpu()
        return F.normalize(both, dim=0), "image and text as one sequence"
    embed = embed_images(encoder, [([0], pixels, [])]).embeds[0]
    if text is None:
        return embed, "image"
    return F.normalize(embed + embed_texts(encoder, [text])[0], dim=0), "sum of the embeddings of image and text"
