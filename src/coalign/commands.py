"""The commands but `train`: a function each, whose signature makes the options and whose docstring makes the help. Torch is imported when
one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from coalign.errors import UserError
from coalign.recipes import recipes


def compare_command(
    runs: Positional[tuple[str, ...]] = (),
    data: str | None = None,
    out: Path | None = None,
    methods: tuple[str, ...] = ("clip", "uniclip", "mcd"),
    minutes: float = 60.0,
    epochs: float | None = None,
    fractions: tuple[float, ...] = (1.0,),
    seeds: int = 2,
    jobs: int | None = None,
    report: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare methods on your data, or finished runs on the pairs that they held out, with intervals and paired differences.

    Which method is best for my pairs: coalign compare --data pairs.csv --out runs/contest --minutes 60
    How many fewer pairs it needs than CLIP: … --fractions 0.25 0.5 1. Runs that are there: coalign compare runs/clip runs/slip

    Args:
        runs: the folders of two or more finished runs; those that differ in their seed alone become one line
        data: train on this data instead: anything that `coalign train --data` takes
        out: the folder of these runs, of contest.html and of contest.json; what was stopped goes on there
        methods: the methods that are trained; clip is always among them
        minutes: for all trials together, each method as long as any other
        epochs: instead of the time: each method sees as many pairs as so many epochs have
        fractions: shares of the pairs to train on, each with as many pairs seen
        seeds: each method is trained with seeds 0, 1, … (as many)
        jobs: trials at once, each on its share of the cores (default: one a core)
        report: write a page with figures to this HTML file
        json: write the figures to this file
    """
    from coalign.run.contest import compare_and_write

    options = {"methods": methods, "minutes": minutes, "epochs": epochs, "fractions": fractions, "seeds": seeds}
    compare_and_write(runs, data, out, report, json, jobs=jobs, **options)


def localize_command(
    runs: Positional[tuple[str, ...]], image: Path, text: tuple[str, ...], out: Path, device: str = "cpu"
) -> None:
    """Draw where an image shows what a text names: OneR by the similarity of its patches, two-tower models by Grad-CAM.

    Example: coalign localize runs/oner runs/clip --image photo.jpg --text "a red apple" "a table" --out map.png

    Args:
        runs: the folders of one or more runs, a row each
        image: an image file
        text: one or more texts, a column each
        out: the picture to write: .png, .jpg, .pdf or .svg
        device: cpu, cuda or cuda:N
    """
    from coalign.run.localize import localize

    localize(runs, image, text, out, device)
    print(out)


def space_command(run: Positional[str], data: str, out: Path, pairs: int = 300, device: str = "cpu") -> None:
    """Draw images and captions in the space of a model, before and after its training (t-SNE); of OneR also both together.

    Example: coalign space runs/oner --data scenes:8192 --out space.png

    Args:
        run: the folder of a run
        data: anything that `coalign train --data` takes; of what the run was trained on, the pairs that it held out
        out: the picture to write: .png, .jpg, .pdf or .svg
        pairs: how many pairs to draw
        device: cpu, cuda or cuda:N
    """
    from coalign.run.space import space

    for name, gap in space(run, data, out, pairs, device).items():
        print(f"{name}: the centroids of images and captions are {gap:.2f} apart")
    print(out)


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
) -> None:
    """Find the images that are nearest to a text, to an image, or to both together: OneR takes both as one sequence, of a model of two
    towers the embeddings are added.

    Example: coalign search runs/oner --data data/openclipart --image apple.png --text "green" --report found.html

    Args:
        model: a run, an exported folder, or another library's model, as for `coalign eval`
        data: what to search: anything that `coalign train --data` takes
        text: what the images shall show
        image: an image file like which they shall be
        top: how many images to show
        split: train, val, test, … or all
        report: write a page with the pictures to this HTML file
        device: cpu, cuda or cuda:N
        workers: loader processes
    """
    from coalign.run.search import search

    answers = search(model, data, text, image, top=top, split=split, report=report, device=device, workers=workers)
    for number, hit in enumerate(answers.hits, 1):
        print(f"{number:3}  {hit.score:.3f}  {hit.key}  {' / '.join(hit.captions)[:100]}")
    left_out = f"; {answers.unreadable:,} could not be read" if answers.unreadable else ""
    print(f"{answers.searched:,} images searched{left_out}")
    if report:
        print(f"Report: {report}")


def export_command(run: Positional[str], to: str, out: Path, weights: str = "last") -> None:
    """Write a model for another library: open_clip, transformers (a CLIPModel), ONNX, or its image tower for timm. That library loads
    it and must give the same embeddings; what it cannot hold is refused.

    Example: coalign export runs/clip --to open_clip --out clip-for-open-clip

    Args:
        run: the folder of a run
        to: open_clip, transformers, onnx or timm
        out: the new folder
        weights: the checkpoint: last or best
    """
    from coalign.run.export import export

    print(export(run, to, out, weights))


def import_command(model: Positional[str], out: Path) -> None:
    """Write a CLIPModel of transformers in open_clip's form, from which any method of two towers can start its training.

    Example: coalign import transformers:openai/clip-vit-base-patch32 --out clip-b32, and then
    coalign train --recipe uniclip --model clip-b32 --pretrained clip-b32 --data my-pairs --out runs/from-clip

    Args:
        model: transformers:NAME, of the hub or a folder
        out: the new folder
    """
    from coalign.run.import_model import import_model

    print(import_model(model, out))


def card_command(run: Positional[str], out: Path | None = None) -> None:
    """Write a run's model card: method, data, settings, figures with intervals, limits, how to load it.

    Args:
        run: the folder of a run
        out: the Markdown file to write (default: show it)
    """
    from coalign.run.card import card
    from coalign.run.model import check_output, write_file

    text = card(run)
    if out is None:
        print(text)
        return
    check_output(out)
    try:
        write_file(out, lambda path: path.write_text(text))
    except OSError as error:
        raise UserError(f"The card could not be written to {out}: {error.strerror}.") from error
    print(out)


def reproduce_command(
    table: Positional[str | None] = None,
    data: str | None = None,
    out: Path | None = None,
    scale: Literal["cpu", "paper"] = "cpu",
    seeds: int = 3,
    jobs: int = 1,
    arms: tuple[str, ...] = (),
) -> None:
    """Train every arm of a table of experiments with several seeds, and compare them. Stopped, it goes on where it was.

    Example: coalign reproduce two-towers-scenes --data scenes:8192 --out runs/two-towers --jobs 2

    Args:
        table: the table's name; without one, they are listed
        data: anything that `coalign train --data` takes
        out: the folder of the runs, of table.json and of table.html
        scale: cpu trains small models in hours; paper trains nothing, but writes launch.sh with the commands of the paper's recipes
        seeds: each arm is trained with seeds 0, 1, … (as many)
        jobs: trials at once, each on its share of the cores
        arms: train only these (default: all)
    """
    from coalign.recipes import tables

    if table is None:
        print("".join(f"{name}\n    {sweep.title}\n" for name, sweep in tables.TABLES.items()), end="")
        return
    tables.table(table)  # says what is wrong with its name first
    if data is None or out is None:
        raise UserError(f"The table {table} needs --data and --out; see `coalign reproduce --help`.")
    from coalign.run.reporting import print_comparison
    from coalign.run.reproduce import reproduce

    comparison = reproduce(table, data, out, scale=scale, seeds=seeds, jobs=jobs, arms=arms)
    if comparison is not None:
        print_comparison(comparison)
        print(f"Report: {out / 'table.html'}")


def scenes_command(out: Path, size: int = 64, train: int = 8192, seed: int = 0, swap: float = 0.0) -> None:
    """Write the scenes data set: pictures drawn by code, with captions, tags and exact ground truth.
    Training needs no copy of it: --data scenes:8192.

    Args:
        out: the new folder
        size: side of the pictures in pixels
        train: training pairs; validation, test, held-out combinations and shifted nuisance have 2,000 each
        seed: another seed is another data set
        swap: share of the training captions that are swapped between pictures (noise, flagged)
    """
    from coalign.run.data import write_scenes

    write_scenes(out, size, train, seed, swap)


def openclipart_command(
    out: Path, download: bool = False, from_: Annotated[Path | None, arg(name="from")] = None, max_side: int = 256
) -> None:
    """Prepare Open Clip Art: about 6,900 real, noisy public-domain pairs from Debian's packages openclipart-png and openclipart-svg.

    Args:
        out: the new folder
        download: fetch the two packages with apt-get into a temporary folder (needs a Debian or Ubuntu system, not root)
        from_: read an installed or unpacked copy below this root instead, such as /
        max_side: longest side of the pictures that are written, in pixels
    """
    from coalign.run.data import prepare_openclipart

    prepare_openclipart(out, download, from_, max_side)


def check_command(data: Positional[str], report: Path | None = None, limit: int | None = None) -> None:
    """Say what is in a data set before it is trained on: broken files, sizes, captions, duplicates, languages, tags.

    Args:
        data: anything that `coalign train --data` takes
        report: write a page with figures and a gallery to this HTML file
        limit: look at this many samples, drawn at random (default: all)
    """
    from coalign.run.data import check_data

    check_data(data, report, limit)


def curate_command(data: Positional[str], out: Path, min_side: int = 0, drop_chinese: bool = False) -> None:
    """Apply DeCLIP's data rules and write the kept pairs: no damaged images, no empty captions, an English-word ratio of at least 0.8, more
    than one part of speech. What is dropped, and why, is listed in dropped.jsonl.

    Args:
        data: anything that `coalign train --data` takes
        out: the new folder
        min_side: also drop images whose shorter side is below this many pixels (web data)
        drop_chinese: also drop captions in Chinese (web data)
    """
    from coalign.run.data import curate_data

    curate_data(data, out, min_side, drop_chinese)


def paraphrase_command(
    data: Positional[str],
    out: Path,
    apertium: tuple[str, ...] = (),
    marian: tuple[str, ...] = (),
    device: str = "cpu",
) -> None:
    """Write a copy of the data with paraphrases of its English captions, made by translating them there and back; MCT uses them as views.
    Paraphrases that came back spoiled are left out, and counted.

    Args:
        data: anything that `coalign train --data` takes
        out: the new folder
        apertium: languages to go by, such as spa, with the program apertium (Debian's apertium and apertium-eng-spa)
        marian: Marian models to go by, there and back, such as Helsinki-NLP/opus-mt-en-de Helsinki-NLP/opus-mt-de-en, or their folders
        device: where Marian models run: cpu, cuda or cuda:N
    """
    from coalign.run.data import write_paraphrases

    write_paraphrases(data, out, apertium, marian, device)


def queries_command(data: Positional[str], out: Path) -> None:
    """Build the list of search queries of DeCLIP's Appendix C: the data's tags and words with their WordNet synonyms.

    Args:
        data: anything that `coalign train --data` takes
        out: the text file to write, one query a line
    """
    from coalign.run.data import write_queries

    write_queries(data, out)


def tokenizer_command(data: Positional[str], out: Path, vocab_size: int = 8192) -> None:
    """Train a small byte-pair vocabulary on the training captions; use it by `coalign train --tokenizer FILE`.

    Args:
        data: anything that `coalign train --data` takes
        out: the JSON file to write
        vocab_size: entries of the vocabulary
    """
    from coalign.run.data import train_tokenizer

    train_tokenizer(data, out, vocab_size)


def models_command(contains: Positional[str] = "") -> None:
    """List the names that `coalign train --model` takes.

    Args:
        contains: only names with this in them
    """
    from coalign.networks.towers import model_names

    print("\n".join(name for name in model_names() if contains.lower() in name.lower()))


def recipes_command() -> None:
    """List the recipes: named settings for `coalign train --recipe`."""
    for name, make in sorted(recipes().items()):
        print(f"{name:16} {' '.join((make.__doc__ or '').split())}")
