"""Commands that use a trained model: embed, index, search, classify, localize, space, interpolate, export, import, card."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from coalign.cli.parse import Reading
from coalign.config import DETECT
from coalign.errors import UserError


def embed_command(
    model: Positional[str],
    data: Positional[str],
    out: Path,
    split: str = "all",
    precision: str = "float16",
    images: bool = True,
    texts: bool = True,
    chunk: int = 4096,
    similarity: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    reading: Reading = DETECT,
) -> None:
    """Write the embeddings of a dataset's images and captions to Parquet files.

    If interrupted, run it again to resume. If the data has changed since, run it again to embed what is new or changed. torchrun shares the
    work between processes and GPUs.

    Example: coalign embed runs/clip photos --out vectors

    Args:
        model: a run folder, an exported folder, or another library's model, as for `coalign eval`
        data: anything that `coalign train --data` accepts
        out: a folder, which receives a Parquet file per chunk, or a file FILE.parquet
        split: train, val, test, … or all
        precision: float16 or float32
        images: embed the images
        texts: embed the captions: one embedding per sample, the mean over its captions
        chunk: samples per file of a folder; an interruption loses at most one chunk per process
        similarity: similarity of the run, if its method has several; OneR has vectors with projector; None: as configured
        device: cpu, cuda, cuda:N or mps; None: the best there is
        workers: number of loader processes per process; None: one per CPU core, at most 8
    """
    from rich.console import Console

    from coalign.workflows.collection.embed import embed

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    embedded = embed(
        model, data, out, split=split, precision=precision, chunk=chunk, texts=texts, images=images,
        similarity=similarity, device=device, workers=workers, reading=reading, console=console,
    )  # fmt: skip
    if embedded.is_first:
        print("".join(f"{line}\n" for line in embedded.lines()), end="")


def index_command(
    model: Positional[str],
    data: Positional[str],
    out: Path,
    split: str = "all",
    device: str | None = None,
    workers: int | None = None,
    reading: Reading = DETECT,
) -> None:
    """Embed the images of a dataset once and index them for `coalign search` and `coalign serve`.

    On an existing index, it embeds only new and changed images. If interrupted, run it again to resume; an earlier index stays usable.

    Example: coalign index runs/clip photos --out shelf

    Args:
        model: a run folder, an exported folder, or another library's model, as for `coalign eval`
        data: dataset to index: anything that `coalign train --data` accepts
        out: folder of the index: new, empty, or an index of the same model and data
        split: train, val, test, … or all
        device: cpu, cuda, cuda:N or mps; None: the best there is
        workers: number of loader processes; None: one per CPU core, at most 8
    """
    from rich.console import Console

    from coalign.workflows.collection.index import build_index

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    indexed = build_index(
        model, data, out, split=split, device=device, workers=workers, reading=reading, console=console
    )
    print("\n".join(indexed.lines()))


def search_command(
    index: Positional[str],
    data: str | None = None,
    text: str | None = None,
    image: Path | None = None,
    exclude: str | None = None,
    tags: tuple[str, ...] = (),
    folder: str | None = None,
    top: int = 10,
    split: str = "all",
    report: Path | None = None,
    device: str | None = None,
    workers: int = 0,
    reading: Reading = DETECT,
) -> None:
    """Find the images of an index or of a dataset that are nearest to a text, to an image, or to both.

    OneR embeds both as one sequence; for other models, the similarities to both have equal influence.

    Example: coalign search shelf --image apple.png --text "green" --exclude "a drawing" --report found.html

    Args:
        index: a folder that `coalign index` wrote; or a model, which then embeds all of --data for this search
        data: dataset to search, if the first argument is a model: anything that `coalign train --data` accepts
        text: what the images should show
        image: an image file that the images should resemble
        exclude: what the images should not show
        tags: search only images that have all of these tags
        folder: search only images in this folder of the data, or below it
        top: number of images to return
        split: train, val, test, … or all, with --data
        report: write the query and the images found to this HTML file
        device: cpu, cuda, cuda:N or mps; None: the best there is
        workers: number of loader processes, with --data
    """
    from coalign.workflows.explore.search import search

    result = search(
        index,
        data,
        text,
        image,
        exclude=exclude,
        tags=tags,
        folder=folder,
        top=top,
        split=split,
        report=report,
        device=device,
        workers=workers,
        reading=reading,
    )
    print("\n".join(result.lines()))
    if report:
        print(f"Report: {report}")


def classify_command(
    model: Positional[str],
    images: Positional[tuple[str, ...]],
    labels: tuple[str, ...],
    out: Path | None = None,
    top: int = 3,
    device: str | None = None,
    workers: int = 0,
    reading: Reading = DETECT,
) -> None:
    """Classify images by your own labels, without training (zero-shot), with the probability of each label.

    The probabilities of an image sum to 1 over the labels, also if none of them fits.

    Example: coalign classify runs/clip photos --labels cat dog "a coffee cup" --prompts "a photo of a {}" --out labels.csv

    Args:
        model: a run folder, an exported folder, or another library's model, as for `coalign eval`
        images: a folder, one or more image files, or anything else that `coalign train --data` accepts
        labels: two or more labels, or a file: a text file with one label per line, or a JSON file of prompts for each label
        out: write a row per image and a column per label to this CSV file
        top: number of labels to print for each image
        device: cpu, cuda, cuda:N or mps; None: the best there is
        workers: number of loader processes
    """
    from coalign.devices import device_line
    from coalign.workflows.collection.classify import classified_lines, classify_data
    from coalign.workflows.evaluate.eval_model import device_for

    if top < 1:
        raise UserError(f"--top is {top}, but must be at least 1.")
    device = device_for(model, device)
    print(device_line(device))
    result = classify_data(model, images, labels, out, device=device, workers=workers, reading=reading)
    print("\n".join(classified_lines(result, top, out)))


def localize_command(
    runs: Positional[tuple[str, ...]], image: Path, text: tuple[str, ...], out: Path, device: str | None = None
) -> None:
    """Draw heat maps of the image regions that match a text: the method's own (FILIP, OneR), or Grad-CAM.

    Example: coalign localize runs/oner runs/clip --image photo.jpg --text "a red apple" "a table" --out map.png

    Args:
        runs: the folders of one or more runs (rows of the figure)
        image: an image file
        text: one or more texts (columns of the figure)
        out: the figure to write: .png, .jpg, .pdf or .svg
        device: cpu, cuda, cuda:N or mps; None: the best there is
    """
    from coalign.devices import best_device, device_line
    from coalign.workflows.explore.localize import localize

    device = best_device(device)
    print(device_line(device))
    localize(runs, image, text, out, device)
    print(out)


def space_command(
    run: Positional[str],
    data: str,
    out: Path,
    pairs: int = 300,
    similarity: str | None = None,
    device: str | None = None,
) -> None:
    """Plot how a model's image and text embeddings are distributed, before and after training (t-SNE).

    For OneR, the plot includes the joint embeddings of image and text; it needs --similarity projector.

    Example: coalign space runs/oner --data scenes:8192 --similarity projector --out space.png

    Args:
        run: the folder of a run
        data: anything that `coalign train --data` accepts; if it is the run's training data, held-out pairs are plotted
        out: the figure to write: .png, .jpg, .pdf or .svg
        pairs: number of pairs to plot
        similarity: similarity of the run, if its method has several (oner: trained or projector); None: as configured
        device: cpu, cuda, cuda:N or mps; None: the best there is
    """
    from coalign.devices import best_device, device_line
    from coalign.workflows.explore.space import space

    device = best_device(device)
    print(device_line(device))
    for name, gap in space(run, data, out, pairs, device, similarity).items():
        print(f"{name}: modality gap {gap:.2f} (distance between the centroids of image and text embeddings)")
    print(out)


def interpolate_command(
    start: Positional[str],
    run: Positional[str],
    out: Path,
    alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    device: str | None = None,
) -> None:
    """Interpolate the weights of a run with those that it started from, to keep what the start knew (WiSE-FT).

    Writes a run with the weights (1 − α) · START + α · RUN for each α, and chooses α on the held-out pairs of RUN.

    Example: coalign interpolate start runs/more --out between

    Args:
        start: a run, a folder in open_clip's format, or `start`: what RUN started from, if that was not random
        run: the folder of a finished run
        out: output folder, new or empty, which receives a run alpha-0.5 for each α
        alpha: one or more values between 0 (START) and 1 (RUN)
        device: cpu, cuda, cuda:N or mps; None: the best there is
    """
    from coalign.devices import best_device, device_line
    from coalign.workflows.models.interpolate import interpolate, print_interpolation

    device = best_device(device)
    print(device_line(device))
    print_interpolation(interpolate(start, run, out, alpha, device))


def export_command(
    run: Positional[str],
    to: str,
    out: Path,
    weights: str = "last",
    similarity: str | None = None,
    quantize: str | None = None,
    max_differing: float = 0.0,
) -> None:
    """Export a model to open_clip, transformers, sentence-transformers, ONNX, or its image encoder to timm.

    The export is loaded in that library and checked for equal embeddings. A model that the format cannot represent is rejected.

    Example: coalign export runs/clip --to onnx --out clip-onnx

    Args:
        run: the folder of a run
        to: open_clip, transformers, sentence-transformers, onnx or timm
        out: output folder, new or empty
        weights: checkpoint: last or best
        similarity: similarity of the run, if its method has several (oner: trained or projector); None: as configured
        quantize: int8 or fp16, for onnx: smaller weights; the loss in retrieval on the held-out pairs is printed and stored
        max_differing: fraction of the captions of the run's data that the library may tokenize otherwise; with more, the export is rejected
    """
    from coalign.workflows.models.export import export

    print(export(run, to, out, weights, similarity, quantize, max_differing))


def import_command(model: Positional[str], out: Path) -> None:
    """Convert a transformers CLIPModel to open_clip's format, so that any two-tower method can start training from it.

    Example: coalign import transformers:openai/clip-vit-base-patch32 --out clip-b32, and then
    coalign train --recipe uniclip --model clip-b32 --pretrained clip-b32 --data my-pairs --out runs/from-clip

    Args:
        model: transformers:NAME (on the hub, or a folder)
        out: output folder, new or empty
    """
    from coalign.workflows.models.import_model import import_model

    print(import_model(model, out))


def card_command(run: Positional[str], out: Path | None = None) -> None:
    """Write a run's model card: method, data, settings, results with intervals, limits, how to load it.

    Args:
        run: the folder of a run
        out: the Markdown file to write; None: print it
    """
    from coalign.files import write_text
    from coalign.runs.card import card
    from coalign.runs.folder import check_output

    text = card(run)
    if out is None:
        print(text)
        return
    check_output(out)
    try:
        write_text(out, text)
    except OSError as error:
        raise UserError(f"The model card could not be written to {out}: {error.strerror}.") from error
    print(out)
