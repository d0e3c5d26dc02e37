"""classify(): the probability of each label for images, from the similarity to the label's prompts, without training (zero-shot)."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from coalign.config import DETECT, DataConfig
from coalign.data.account import account_lines
from coalign.data.loading.eval import image_batches
from coalign.data.loading.samples import BadEntry, sample_key
from coalign.data.sources.base import Source, is_image_name, read_image_file
from coalign.data.text.prompts import class_prompts, read_classes, templates
from coalign.errors import UserError
from coalign.evaluation.embed import cut_lines, embed_images
from coalign.evaluation.zero_shot import ClassEmbeds, class_scores, embed_classes
from coalign.files import write_atomically
from coalign.progress import progress
from coalign.runs.folder import check_output
from coalign.types import Embeds, Record
from coalign.workflows.evaluate.eval_model import EvalModel, open_eval_model
from coalign.workflows.evaluate.samples import open_as_trained

MAX_SHOWN = 50  # images in the result of `classify_data`; a file has all
_BATCH = 256  # images
_FILES = (".json", ".txt")  # of labels
Outcome = np.ndarray | BadEntry  # of an image: its probabilities, float32 [label], or why it is unreadable


def classify(
    model: EvalModel, images: Sequence[str | Path | Image.Image], labels: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Returns the probability of each label for each image, float32 [image, label]; see `probabilities`.

    images: files, or images of Pillow. labels: label -> its prompts. Raises UserError if an image cannot be read, or there are fewer than
    two labels.
    """
    classes = label_embeds(model, labels)
    rows = []
    for key, outcome in _classified(model, _Images(images), classes, 0, lambda done: None):
        if isinstance(outcome, BadEntry):
            raise UserError(f"The image {key} cannot be used: {outcome.reason}.")
        rows.append(outcome)
    return np.stack(rows) if rows else np.empty((0, len(labels)), np.float32)


def label_embeds(model: EvalModel, labels: Mapping[str, Sequence[str]]) -> ClassEmbeds:
    """Returns the embeds of labels, each with its prompts, for `probabilities`. Raises UserError if there are fewer than two labels."""
    if len(labels) < 2:
        raise UserError("Probabilities are relative to all labels, and sum to 1; give at least two labels.")
    return embed_classes(model.encoder, list(labels.values()))


@torch.no_grad()
def probabilities(model: EvalModel, images: Embeds, labels: ClassEmbeds) -> np.ndarray:
    """Returns the probability of each label for embedded images, float32 [image, label]: each row sums to 1.

    It is the softmax over the labels of the similarity, multiplied by the model's logit scale as in its training. images: as those of
    `embed_images`.
    """
    scores = class_scores(model.encoder.similarity, images, labels)
    return (model.encoder.logit_scale * scores).softmax(dim=1).numpy()


def read_labels(
    labels: Sequence[str], prompts: Sequence[str] = (), model: EvalModel | None = None
) -> dict[str, list[str]]:
    """Returns each label with its prompts.

    labels: names, or one file as in `read_classes`. prompts: for labels without prompts of their own, as in `templates`; by default those
    of the model's run, if its captions were made of class names. Raises UserError if the labels or prompts are invalid.
    """
    own: dict[str, Sequence[str]] = {}
    names = [label.strip() for label in labels]
    if len(names) == 1 and Path(names[0]).suffix.lower() in _FILES:
        entries = read_classes(Path(names[0]), prompts)
        names, own = [entry.name for entry in entries], {entry.name: entry.prompts for entry in entries}
    elif not all(names):
        raise UserError("A label is empty; give at least two, such as --labels cat dog.")
    run = model.run if model is not None else None
    if not prompts and run is not None and run.config.reading.captions_from is not None:
        prompts = run.config.reading.prompts
    return dict(zip(names, class_prompts(names, templates(*prompts), own)))


# ---------------------------------------------------------------- a dataset


@dataclass
class Classified:
    """What `classify_data` found.

    Attributes:
        labels: Label to its prompts.
        counts: Number of images by their most probable label.
        shown: The first images: key and probabilities, float32 [label].
        num_images: Readable images.
        bad: Unreadable images, in order.
        logit_scale: The factor of the similarities.
        account: Sentences on prompts that were cut, and on what opening the data left out.
    """

    labels: dict[str, list[str]]
    logit_scale: float
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[tuple[str, np.ndarray]] = field(default_factory=list)
    num_images: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    account: list[str] = field(default_factory=list)

    def add(self, key: str, outcome: Outcome) -> None:
        if isinstance(outcome, BadEntry):
            self.bad.append(outcome)
            return
        self.num_images += 1
        self.counts[list(self.labels)[int(outcome.argmax())]] += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append((key, outcome))


def classify_data(
    model: str | Path | EvalModel,
    images: str | Path | Sequence[str | Path],
    labels: Sequence[str],
    out: Path | None = None,
    *,
    device: str | None = None,
    workers: int = 0,
    reading: DataConfig = DETECT,
) -> Classified:
    """Classifies the images of a folder, of any dataset, or image files, and writes the probabilities to the CSV file `out`.

    The file has a row per image, with its key and a column per label; the cells of unreadable images are empty. labels: as in
    `read_labels`. Raises UserError if the model, the data or the labels are invalid, no image can be read, or
    the file cannot be written.
    """
    if out is not None:
        check_output(out)
    model = model if isinstance(model, EvalModel) else open_eval_model(model, device=device)
    prompts = read_labels(labels, reading.prompts, model)
    classes = label_embeds(model, prompts)
    source = _open(images, model, reading)
    result = Classified(prompts, model.encoder.logit_scale)
    with progress("Classifying", len(source)) as task:
        rows = _classified(model, source, classes, workers, task.update)
        if out is None:
            for each in rows:
                result.add(*each)
            _require_images(source, result)
        else:
            _write(out, rows, source, result)
    texts = [prompt for own in prompts.values() for prompt in own]
    result.account = [*cut_lines(model.encoder, texts, "prompts"), *account_lines(source, with_notes=False)]
    return result


def _open(images: str | Path | Sequence[str | Path], model: EvalModel, reading: DataConfig) -> Source:
    given = [images] if isinstance(images, str | Path) else list(images)
    files = all(is_image_name(str(each)) and Path(each).is_file() for each in given)
    if given and files:
        return _Images(given)
    if len(given) != 1:
        other = next((each for each in given if not (is_image_name(str(each)) and Path(each).is_file())), None)
        raise UserError(f"Several images must all be image files, but {other} is none; give one folder or one dataset.")
    data = str(given[0])
    return open_as_trained(data, model.run, reading)


class _Images(Source):
    """Image files, or images of Pillow, without captions."""

    name = "the images"

    def __init__(self, images: Sequence[str | Path | Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def record(self, index: int) -> Record:
        image = self.images[index]
        return Record(f"number {index + 1}" if isinstance(image, Image.Image) else str(image), ())

    def image(self, index: int) -> bytes | np.ndarray:
        image = self.images[index]
        if isinstance(image, Image.Image):
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        return read_image_file(image)


def _classified(
    model: EvalModel, source: Source, classes: ClassEmbeds, workers: int, on_progress: Callable[[int], Any]
) -> Iterator[tuple[str, Outcome]]:
    """Yields the key of each image in order, with its probabilities, or with why it is unreadable."""
    encoder, done = model.encoder, 0
    batches = image_batches(
        source, range(len(source)), encoder.image_size, _BATCH, workers, preprocess=encoder.preprocess
    )
    with closing(batches):
        for indices, pixels, bad in batches:
            embedded = embed_images(encoder, [(indices, pixels, [])]).embeds if indices else None
            rows = iter(()) if embedded is None else iter(probabilities(model, embedded, classes))
            readable, unreadable = set(indices), iter(bad)
            for index in range(done, done + len(indices) + len(bad)):
                key = sample_key(source, index)
                yield key, next(rows) if index in readable else next(unreadable)
            done += len(indices) + len(bad)
            on_progress(done)


def _require_images(source: Source, result: Classified) -> None:
    if not result.num_images:
        raise UserError(f"There is nothing to classify: {source.name} has no readable image ({len(result.bad)} bad).")


def _write(out: Path, rows: Iterator[tuple[str, Outcome]], source: Source, result: Classified) -> None:
    """Writes the rows to the CSV file, and adds them to the result."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *result.labels])
            for key, outcome in rows:
                row = [None] * len(result.labels) if isinstance(outcome, BadEntry) else outcome.tolist()
                writer.writerow([key, *("" if value is None else f"{value:.6g}" for value in row)])
                result.add(key, outcome)
        _require_images(source, result)  # else an existing file is kept

    try:
        write_atomically(out, write)
    except OSError as error:
        raise UserError(f"The probabilities could not be written to {out}: {error.strerror}.") from error


# ---------------------------------------------------------------- terminal


def classified_lines(result: Classified, top: int, out: Path | None = None) -> list[str]:
    """Returns the `top` labels of the first images, unless they are in the file `out`, and sentences on all of them."""
    names, lines = list(result.labels), []
    if out is None:
        shown = [(key, (-row).argsort(kind="stable")[:top], row) for key, row in result.shown]
        width = max(len(key) for key, _, _ in shown)
        label_width = max(len(names[number]) for _, order, _ in shown for number in order)
        for key, order, row in shown:
            cells = [f"{names[number]:{label_width}} {row[number]:.3f}" for number in order]
            lines.append("  ".join([f"{key:{width}}", *cells]))
        if (more := result.num_images - len(shown)) > 0:
            lines.append(f"… and {more:,} more; write all to a file with --out FILE.csv")
    counts = ", ".join(f"{name} {count:,}" for name, count in result.counts.most_common())
    images = "1 image" if result.num_images == 1 else f"{result.num_images:,} images"
    lines.append(f"Most probable label of {images}: {counts}")
    lines.append(f"Probabilities: softmax of {result.logit_scale:.4g} × similarity over {len(names):,} labels")
    reasons = Counter(entry.reason for entry in result.bad)
    lines += [f"Unreadable images: {count:,} ({reason})" for reason, count in reasons.most_common()]
    lines += [f"  {entry.key}: {entry.reason}" for entry in result.bad[:MAX_SHOWN]]
    if (more := len(result.bad) - MAX_SHOWN) > 0:
        lines.append(f"  … and {more:,} more; they are the empty rows of --out FILE.csv")
    return [*lines, *result.account, *([f"Table: {out}"] if out else [])]
