"""Commands that use a trained model: search, localize, space, interpolate, export, import, card."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from coalign.cli.parse import Reading
from coalign.config import DETECT
from coalign.errors import UserError


def search_command(
    model: Positional[str],
    data: str,
    text: str | None = None,
    image: Path | None = None,
    top: int = 10,
    split: str = "all",
    report: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
    reading: Reading = DETECT,
) -> None:
    """Find the images of a dataset that are nearest to a text, to an image, or to both.

    OneR embeds both as one sequence; for a two-tower model the similarities to both are averaged.

    Example: coalign search runs/oner --data data/openclipart --image apple.png --text "green" --report found.html

    Args:
        model: a run folder, an exported folder, or another library's model, as for `coalign eval`
        data: dataset to search: anything that `coalign train --data` accepts
        text: what the images should show
        image: an image file that the images should resemble
        top: number of images to return
        split: train, val, test, … or all
        report: write the query and the images found to this HTML file
        device: cpu, cuda or cuda:N
        workers: number of loader processes
    """
    from coalign.workflows.explore.search import search

    result = search(
        model, data, text, image, top=top, split=split, report=report, device=device, workers=workers, reading=reading
    )
    for number, hit in enumerate(result.hits, 1):
        captions = " / ".join(hit.captions)
        print(f"{number:3}  {hit.score:.3f}  {hit.key}  {captions if len(captions) <= 100 else captions[:99] + '…'}")
    print(f"{result.num_images:,} images searched")
    print("".join(f"{line}\n" for line in result.account), end="")
    if report:
        print(f"Report: {report}")


def localize_command(
    runs: Positional[tuple[str, ...]], image: Path, text: tuple[str, ...], out: Path, device: str = "cpu"
) -> None:
    """Draw heat maps of the image regions that match a text: the method's own (FILIP, OneR), or Grad-CAM.

    Example: coalign localize runs/oner runs/clip --image photo.jpg --text "a red apple" "a table" --out map.png

    Args:
        runs: the folders of one or more runs (rows of the figure)
        image: an image file
        text: one or more texts (columns of the figure)
        out: the figure to write: .png, .jpg, .pdf or .svg
        device: cpu, cuda or cuda:N
    """
    from coalign.workflows.explore.localize import localize

    localize(runs, image, text, out, device)
    print(out)


def space_command(
    run: Positional[str],
    data: str,
    out: Path,
    pairs: int = 300,
    similarity: str | None = None,
    device: str = "cpu",
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
        device: cpu, cuda or cuda:N
    """
    from coalign.workflows.explore.space import space

    for name, gap in space(run, data, out, pairs, device, similarity).items():
        print(f"{name}: modality gap {gap:.2f} (distance between the centroids of image and text embeddings)")
    print(out)


def interpolate_command(
    start: Positional[str], run: Positional[str], out: Path, alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> None:
    """Interpolate the weights of a run with those that it started from, to keep what the start knew (WiSE-FT).

    Writes a run with the weights (1 − α) · START + α · RUN for each α, and chooses α on the held-out pairs of RUN.

    Example: coalign interpolate start runs/more --out between

    Args:
        start: a run, a folder in open_clip's format, or `start`: what RUN started from, if that was not random
        run: the folder of a finished run
        out: output folder, new or empty, which receives a run alpha-0.5 for each α
        alpha: one or more values between 0 (START) and 1 (RUN)
    """
    from coalign.workflows.models.interpolate import interpolate, print_interpolation

    print_interpolation(interpolate(start, run, out, alpha))


def export_command(
    run: Positional[str],
    to: str,
    out: Path,
    weights: str = "last",
    similarity: str | None = None,
    quantize: str | None = None,
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
    """
    from coalign.workflows.models.export import export

    print(export(run, to, out, weights, similarity, quantize))


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
