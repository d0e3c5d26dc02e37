"""search(): the images of an index or of a dataset that are nearest to a text, to an image, or to both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from coalign.config import DETECT, DataConfig
from coalign.data.account import account_lines
from coalign.data.loading.eval import image_batches
from coalign.devices import device_line
from coalign.embeds import pooled, take
from coalign.errors import BadSample, UserError
from coalign.evaluation.embed import cut_lines, embed_images
from coalign.report.page import GalleryCell, Page
from coalign.runs.folder import check_output
from coalign.workflows.collection.index_files import is_index
from coalign.workflows.collection.nearest import ExactVectors
from coalign.workflows.collection.query import Collection, Found, Query, open_collection
from coalign.workflows.collection.records import SourceRecords
from coalign.workflows.evaluate.eval_model import device_for, open_eval_model
from coalign.workflows.evaluate.samples import open_as_trained, select_split
from coalign.workflows.image_files import read_picture, thumbnail


@dataclass(frozen=True)
class SearchResult:
    query: str  # how the query was embedded
    hits: list[Found]  # best first
    num_images: int  # searched
    device: str  # that embedded
    # whether the query is cut, and what was skipped or left out, in sentences
    account: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns what the command line prints."""
        lines = [device_line(self.device)]
        for number, hit in enumerate(self.hits, 1):
            captions = " / ".join(hit.captions)
            shown = captions if len(captions) <= 100 else captions[:99] + "…"
            lines.append(f"{number:3}  {hit.score:.3f}  {hit.key}  {shown}")
        return [*lines, f"{self.num_images:,} images searched", *self.account]


@torch.no_grad()
def search(
    path: str | Path,
    data: str | None = None,
    text: str | None = None,
    image: str | Path | None = None,
    *,
    exclude: str | None = None,
    tags: tuple[str, ...] = (),
    folder: str | None = None,
    top: int = 10,
    split: str = "all",
    report: str | Path | None = None,
    device: str | None = None,
    workers: int = 0,
    reading: DataConfig = DETECT,
) -> SearchResult:
    """Finds the `top` images nearest to a text, to an image, or to both: of an index, or of `data`, embedded by a model for this call.

    path: the folder of an index, or a model, as for `coalign eval`, with `data`. exclude: a text that the images should not match. tags,
    folder: search only images with all these tags, and in this folder or below it. With `report`, also writes a page with the images.
    `Collection.answer` describes the ranking. Raises UserError if the query is empty, the index, the model, the data or the image cannot be
    read, or the model cannot compare two images.
    """
    if report is not None:
        check_output(Path(report))
    picture = None if image is None else read_picture(image)
    query = Query(text, picture, None, exclude, tags, folder)
    query.check(top)  # before a dataset is embedded
    account: list[str] = []
    if is_index(path):
        if data is not None or split != "all" or reading != DETECT:
            raise UserError(
                f"{path} is an index, which has its data and split; omit --data, --split and options of reading."
            )
        collection = open_collection(path, device)
    else:
        if data is None:
            raise UserError(f"{path} is not an index; give the folder of one, or a model with --data.")
        collection, account = _embed_collection(path, data, split, device, workers, reading)
    answer = collection.answer(query, top)
    encoder = collection.model.encoder
    texts = ((text, "query"), (exclude, "excluded text"))
    account = [*(line for each, what in texts if each for line in cut_lines(encoder, [each], what)), *account]
    if answer.missing:
        account.append(f"Skipped images near the query that cannot be read again: {answer.missing:,}")
    result = SearchResult(answer.query, answer.found, answer.searched, collection.device, account)
    if report is not None:
        _write_report(Path(report), collection, query, result)
    return result


def _embed_collection(
    path: str | Path, data: str, split: str, device: str | None, workers: int, reading: DataConfig
) -> tuple[Collection, list[str]]:
    """Embeds all images of a dataset. Returns the collection, and what was skipped or left out."""
    device = device_for(path, device)
    model = open_eval_model(path, device=device)
    source = open_as_trained(data, model.run, reading)
    indices, encoder = select_split(source, data, model.run, split)[1], model.encoder
    batches = image_batches(source, indices, encoder.image_size, workers=workers, preprocess=encoder.preprocess)
    images = embed_images(encoder, batches, total=len(indices))

    def embeds_of(rows: np.ndarray) -> tuple[object, list[int]]:
        return take(images.embeds, torch.from_numpy(rows)), list(range(len(rows)))

    collection = Collection(
        model.name,
        model,
        ExactVectors(pooled(images.embeds).numpy()),
        SourceRecords(source, images.indices),
        embeds_of,
        candidates=len(images.indices),
        device=device,
    )
    skipped = Counter(bad.reason for bad in images.bad).most_common()
    lines = [f"Skipped samples: {count:,} ({reason})" for reason, count in skipped]
    return collection, [*lines, *account_lines(source)]


def _write_report(path: Path, collection: Collection, query: Query, result: SearchResult) -> None:
    page = Page("Search", f"{collection.model.name}; {result.num_images:,} images; query: {result.query}")
    filters = [*(f"tag {tag}" for tag in query.tags), *([f"folder {query.folder}"] if query.folder else [])]
    if filters:
        page.text(f"Only images with {', '.join(filters)}.")
    page.ranking(
        GalleryCell(
            None if query.image is None else thumbnail(np.asarray(query.image)), query.text or "", note="query"
        ),
        [
            GalleryCell(_thumbnail(collection, hit.row), " / ".join(hit.captions), note=f"{hit.score:.2f}")
            for hit in result.hits
        ],
    )
    for line in result.account:
        page.text(line)
    page.write(path)


def _thumbnail(collection: Collection, row: int) -> np.ndarray | None:
    try:
        return thumbnail(collection.records.image(row))
    except BadSample:  # gone since it was indexed
        return None
