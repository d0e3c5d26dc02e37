"""The data commands: make, check and curate datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from coalign.cli.parse import Reading
from coalign.config import DETECT


def check_command(
    data: Positional[str],
    report: Path | None = None,
    json: Path | None = None,
    samples: int = 100,
    limit: int | None = None,
    reading: Reading = DETECT,
) -> None:
    """Check a dataset before training on it: broken files, sizes, captions, duplicates, languages, tags.

    Args:
        data: anything that `coalign train --data` accepts
        report: write a report with figures and a gallery to this HTML file
        json: write what is used and left out, by reason, and the first samples to this JSON file
        samples: number of samples in the JSON file
        limit: number of samples to check, drawn at random; None: all
    """
    from coalign.workflows.data import check_data

    check_data(data, report, limit, json, samples, reading)


def curate_command(
    data: Positional[str], out: Path, min_side: int = 0, drop_chinese: bool = False, reading: Reading = DETECT
) -> None:
    """Apply DeCLIP's data rules and write the pairs that pass.

    The rules: no damaged images, no empty captions, at least 80 % English words, more than one part of speech. dropped.jsonl lists the
    dropped pairs with the reasons.

    Args:
        data: anything that `coalign train --data` accepts
        out: output folder, new or empty
        min_side: also drop images whose shorter side is below this many pixels (web data)
        drop_chinese: also drop captions in Chinese (web data)
    """
    from coalign.workflows.data import curate_data

    curate_data(data, out, min_side, drop_chinese, reading)


def paraphrase_command(
    data: Positional[str],
    out: Path,
    apertium: tuple[str, ...] = (),
    marian: tuple[str, ...] = (),
    device: str | None = None,
    reading: Reading = DETECT,
) -> None:
    """Write a copy of a dataset with back-translated paraphrases of its English captions, which MCT uses as text views.

    Unusable paraphrases are dropped and counted.

    Args:
        data: anything that `coalign train --data` accepts
        out: output folder, new or empty
        apertium: pivot languages for Apertium, such as spa (Debian packages apertium and apertium-eng-spa)
        marian: pairs of Marian models, forward and backward, by name (Helsinki-NLP/opus-mt-en-de Helsinki-NLP/opus-mt-de-en) or folder
        device: device of the Marian models: cpu, cuda, cuda:N or mps; None: the best there is
    """
    from coalign.workflows.data import write_paraphrases

    write_paraphrases(data, out, apertium, marian, device, reading)


def queries_command(data: Positional[str], out: Path, reading: Reading = DETECT) -> None:
    """Build a list of search queries as in DeCLIP's Appendix C: the dataset's tags and words with their WordNet synonyms.

    Args:
        data: anything that `coalign train --data` accepts
        out: the text file to write, one query per line
    """
    from coalign.workflows.data import build_query_list

    build_query_list(data, out, reading)


def tokenizer_command(data: Positional[str], out: Path, vocab_size: int = 8192, reading: Reading = DETECT) -> None:
    """Train a small byte-pair tokenizer on the training captions, for `coalign train --tokenizer FILE`.

    Args:
        data: anything that `coalign train --data` accepts
        out: the JSON file to write
        vocab_size: size of the vocabulary
    """
    from coalign.workflows.data import train_tokenizer

    train_tokenizer(data, out, vocab_size, reading)


def openclipart_command(
    out: Path, download: bool = False, from_: Annotated[Path | None, arg(name="from")] = None, max_side: int = 256
) -> None:
    """Prepare Open Clip Art: about 6,900 public-domain pairs with noisy captions, from Debian's openclipart-png and openclipart-svg.

    Args:
        out: output folder, new or empty
        download: download the two packages with apt-get (on Debian or Ubuntu; needs no root)
        from_: read the packages' files under this root instead, such as / if they are installed
        max_side: longest side of the written images in pixels
    """
    from coalign.workflows.data import prepare_openclipart

    prepare_openclipart(out, download, from_, max_side)


def emoji_command(out: Path, vendors: tuple[str, ...] = (), language: str = "en", max_side: int = 72) -> None:
    """Prepare emoji: about 1,900 of them, each drawn by Twemoji, OpenMoji and Noto, with their names as captions.

    Requires the extra "emoji": pip install "coalign[emoji]", and for Noto Debian's package fonts-noto-color-emoji. The test split is
    OpenMoji. Two further tables hold out emoji instead (concepts.jsonl), or both (both.jsonl).

    Args:
        out: output folder, new or empty
        vendors: openmoji, and twemoji or noto or both; if unset, all that are available
        language: language of the captions: en, es, ja, ko, pt, it, fr, de, fa, id, zh, ru, tr or ar
        max_side: side of the written images in pixels, at most 72
    """
    from coalign.workflows.data import prepare_emoji

    prepare_emoji(out, vendors, language, max_side)


def scenes_command(
    out: Path,
    level: Literal["simple", "standard", "hard"] = "simple",
    size: int = 64,
    train: int = 8192,
    seed: int = 0,
    swap: float = 0.0,
) -> None:
    """Write the scenes dataset to disk: synthetic images with captions, tags and exact ground truth.

    Training does not need a copy on disk; use --data scenes:8192 or scenes:8192:hard.

    Args:
        out: output folder, new or empty
        level: captions of the same images: simple (every fact, one word for each thing), standard (most facts, several words and orders)
            or hard (one to three facts of many kinds)
        size: side of the images in pixels
        train: number of training pairs; val, test, combinations (compositional) and shifted (distribution shift) have 2,000 pairs each
        seed: seed of the dataset
        swap: fraction of the training captions to swap between images as noise (marked in the data)
    """
    from coalign.workflows.data import write_scenes

    write_scenes(out, level, size, train, seed, swap)
