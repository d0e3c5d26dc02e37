"""`coalign eval`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from coalign.cli.parse import Command, first_sentence, parse


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a model from any library: image-text retrieval, zero-shot classification, probes and more, with 95 % bootstrap intervals.

    A task is KIND:DATA. DATA is anything that `coalign train --data` accepts, or, with --data-root, one of oxford_pets, cifar10, cifar100,
    sun397, food101, flowers102, stanford_cars, caltech101, fgvc_aircraft, dtd and imagenet. The kinds:

        retrieval, retrieval-1k            image-text retrieval; retrieval-1k among 1,000 images at a time
        zeroshot                           zero-shot classification
        probe, probe-mct, probe-slip       linear probes: logistic regression, MCT's SGD, SLIP's SGD on 90 random crops per image
        fewshot, knn                       linear probes on 1 to 16 images per class; k-NN with 20 neighbors
        tagging, vse                       MCT's tagging (data with tags), and its retrieval with a GRU over words
        finetune, finetune-retrieval       fine-tuning for classification, and of both encoders for retrieval
        detection, detection-c4            detectors on a ResNet image encoder: scenes, coco:instances.json:images or voc:VOCdevkit
        segmentation                       the same with masks
        foils                              true or false captions, by kind of fact: scenes or sugarcrepe:FOLDER
        pairs                              winoground:FOLDER
        localization                       heat maps against object masks, on scenes
        bootstrap, guided                  OneR only: zero-shot guided by its own top predictions; the size of a named object, on scenes

    suite11 and suite11-probe run zeroshot and probe on all eleven named datasets.

    Example: coalign eval runs/clip --tasks retrieval:data/openclipart zeroshot:data/openclipart --json out.json
    """

    # A run folder, an exported folder, open_clip:NAME:WEIGHTS (an open_clip pretrained tag or a .safetensors file), or
    # transformers:NAME (a CLIPModel on the hub, or its folder).
    model: Positional[str]
    tasks: tuple[str, ...]
    """One or more tasks KIND:DATA, such as retrieval:my-pairs or zeroshot:my-pairs, or a suite; `coalign eval --help` lists them."""
    weights: str = "last"
    """Checkpoint of the run: last or best."""
    split: str | None = None
    """train, val, test, … or all. None: the run's held-out pairs if DATA is its training data, else the test or val split, else all."""
    classes: Path | None = None
    """Text file with your classes, one per line: `name`, or `label = name`."""
    label: str | None = None
    """Column that holds an image's class. None: label, class, category or folder."""
    # Prompt templates: default, imagenet, a dataset's name (cifar10, food101, …), or a text file with {} for the class. None: the
    # named dataset's own, else default.
    prompts: str | None = None
    data_root: Path | None = None
    """Folder with the named datasets, each as torchvision unpacks it."""
    preprocess: str | None = None
    """How images are resized and cropped: coalign, open_clip or transformers. None: the model's own preprocessing."""
    precision: str = "fp32"
    """fp32 or bf16; bf16 raises an error if it changes the embeddings noticeably."""
    cache: Path | None = None
    """Folder to cache embeddings in, keyed by the content of weights and inputs (probe-slip caches every crop)."""
    epochs: int = 10
    """Epochs of fine-tuning and of detector training."""
    train_data: str | None = None
    """Data to train detectors on, if the dataset has no train split."""
    json: Path | None = None
    """Write the results to this JSON file."""
    report: Path | None = None
    """Write a report to this HTML file."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    workers: int = 0
    """Number of loader processes."""


def eval_command(args: list[str]) -> None:
    options = vars(parse(EvalCommand, args, "eval", description=inspect.cleandoc(EvalCommand.__doc__ or "")))
    from coalign.workflows.evaluate.evaluate import evaluate_and_write

    evaluate_and_write(**options)


EVAL = Command(first_sentence(EvalCommand), eval_command)
