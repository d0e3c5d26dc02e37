r"""Draws the README's picture of a text search: the first images that each of two runs finds for a few queries.

The runs share the data, the image encoder and the number of steps. The picture searches the
held-out images, which neither run was trained on:

    coalign data openclipart --download --max-side 96 --out data/openclipart
    coalign train --recipe clip --data data/openclipart --val-fraction 0.1 --image-size 48 --batch-size 128 --epochs 15 \
        --workers 0 --evals 3 --out runs/clip
    coalign train --recipe mcd --data data/openclipart --val-fraction 0.1 --image-size 48 --batch-size 128 --epochs 15 \
        --workers 0 --evals 3 --out runs/mcd
    python scripts/render_search_picture.py runs/clip runs/mcd --data data/openclipart

The queries are held-out captions drawn at random (seed 0), at most 24 characters long. The image that a caption belongs to
has a green frame.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coalign.data.images.decode import open_image
from coalign.data.loading.eval import image_batches
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_source
from coalign.embeds import similarities
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.methods import method_class
from coalign.report.figures import INK, LINE, SOFT
from coalign.runs.folder import read_config
from coalign.runs.run import load
from coalign.workflows.evaluate.samples import select_split

NUM_QUERIES, MAX_LENGTH, TOP = 6, 24, 5  # images per query and run

# in pixels of a page on which the picture is 900 wide; SCALE pixels of the file each
WIDTH, TILE, GAP, MARGIN, HEADER, SCALE = 900, 64, 8, 16, 44, 2
RIGHT = "#2a9d4a"
BETWEEN = 36  # the two runs
LABELS = WIDTH - 2 * MARGIN - 2 * (TOP * TILE + (TOP - 1) * GAP) - BETWEEN  # width of the column of queries


def draw(
    queries: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[Sequence[tuple[np.ndarray, bool]]]]
) -> Figure:
    """One row per query, one group of columns per run: `cells` [run][query][rank], an image and whether it is right."""
    height = HEADER + len(queries) * (TILE + GAP) - GAP + MARGIN
    figure = Figure(figsize=(WIDTH / 100, height / 100), facecolor="white")
    FigureCanvasAgg(figure)
    top = lambda row: HEADER + row * (TILE + GAP)  # noqa: E731
    left = lambda run, rank: (  # noqa: E731
        MARGIN + LABELS + run * (TOP * (TILE + GAP) - GAP + BETWEEN) + rank * (TILE + GAP)
    )
    for run, name in enumerate(names):
        figure.text(left(run, 0) / WIDTH, 1 - 26 / height, name, fontsize=12, fontweight="bold", color=INK, va="center")
    for row, query in enumerate(queries):
        lines = "\n".join(textwrap.wrap(query, 16))
        middle = 1 - (top(row) + TILE / 2) / height
        figure.text(MARGIN / WIDTH, middle, lines, fontsize=10.5, color=SOFT, va="center", parse_math=False)
        for run, found in enumerate(cells):
            for rank, (image, right) in enumerate(found[row]):
                box = (left(run, rank) / WIDTH, 1 - (top(row) + TILE) / height, TILE / WIDTH, TILE / height)
                axes = figure.add_axes(box, xticks=[], yticks=[])
                axes.imshow(image, interpolation="lanczos")
                for spine in axes.spines.values():
                    spine.set(color=RIGHT if right else LINE, linewidth=2.5 if right else 0.8)
    return figure


def draw_queries(source: Source, indices: np.ndarray) -> dict[str, set[int]]:
    """Random captions of the samples, each with all samples that have it."""
    samples: dict[str, set[int]] = {}
    for index in indices.tolist():
        for caption in source.record(index).captions:
            samples.setdefault(caption, set()).add(index)
    short = [caption for caption in samples if len(caption) <= MAX_LENGTH]
    drawn = np.random.default_rng(0).choice(len(short), NUM_QUERIES, replace=False)
    return {short[number]: samples[short[number]] for number in drawn.tolist()}


def nearest_images(path: Path, source: Source, indices: np.ndarray, queries: Sequence[str]) -> list[list[int]]:
    """The first samples among `indices` for each query, by the run's model."""
    encoder = load(path).encoder()
    batches = image_batches(source, indices, encoder.image_size, preprocess=encoder.preprocess)
    found = embed_images(encoder, batches)
    nearest = similarities(encoder.similarity, embed_texts(encoder, queries), found.embeds).topk(TOP).indices
    return [[int(found.indices[row]) for row in rows] for rows in nearest.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, help="folders of two runs on the same data")
    parser.add_argument("--data", required=True, help="the data of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/methods-search.png"), help="the picture to write")
    args = parser.parse_args()
    source = open_source(args.data)
    held_out = select_split(source, args.data, load(args.runs[0]), "val")[1]
    queries = draw_queries(source, held_out)
    cells = [
        [
            [(open_image(source.image(index)).decode(), index in right) for index in row]
            for row, right in zip(nearest_images(run, source, held_out, list(queries)), queries.values(), strict=True)
        ]
        for run in args.runs
    ]
    names = [method_class(read_config(run).config.method).__name__ for run in args.runs]
    buffer = io.BytesIO()
    draw(list(queries), names, cells).savefig(buffer, dpi=100 * SCALE)
    # 256 colors are enough for drawings, and a third of the size
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
