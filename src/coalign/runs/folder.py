"""The layout of a run folder: file names and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coalign.config import TrainConfig, from_json, to_json
from coalign.data.sources.mixture import SEPARATOR
from coalign.errors import UserError
from coalign.files import write_json
from coalign.methods import config_class

# ends the names of tasks on pairs without look-alikes in training
WITHOUT_LOOK_ALIKES = "_without_look_alikes"
CONFIG, TOKENIZER, MODEL, RESULTS, REPORT, HELD_OUT, START_RESULTS, START_OUTCOMES = (
    "config.json",
    "tokenizer.json",
    "model.json",
    "results.json",
    "report.html",
    "held_out.npz",
    "tracked_start.json",
    "tracked_start.npz",
)

# with their number, the names of the tasks of --track in HELD_OUT, as their own names may contain any character
TRACKED = "tracked"
EXPORTED = "coalign_run.json"  # of an export: CONFIG of its run without local paths

RUN_FILES = {
    *(CONFIG, TOKENIZER, MODEL, RESULTS, REPORT, HELD_OUT, START_RESULTS, START_OUTCOMES),
    *("metrics.jsonl", "bad_samples.jsonl"),
}


# also "simplecache::s3://bucket/photos/{00..10}.tar" and with a query; the groups are the protocol and the path
_URL = re.compile(r"(?:[\w.+-]+::)*([\w.+-]+)://[^/?#]*([^?#]*).*")
_SLASHES = re.compile(r"/+(?![^{}]*\})")  # not those in braces, as in "{a/00,b/00}.tar"


@dataclass(frozen=True)
class SavedConfig:
    """Contents of config.json: enough to rebuild the model, and to refuse resuming with different settings or data."""

    data: str
    config: TrainConfig
    num_train: int
    num_val: int
    fingerprint: str = ""  # of the training pairs
    extended_from: tuple[float, ...] = ()  # epochs that the run had before each extension
    interpolated: str = (
        ""  # how weights that were not trained were made, such as "0.75 × clip-b32 + 0.25 × clip (WiSE-FT)"
    )

    def describe_epochs(self) -> str:
        """Returns "20", or "20 (extended from 10)"."""
        extended = (
            f" (extended from {', '.join(f'{each:g}' for each in self.extended_from)})" if self.extended_from else ""
        )
        return f"{self.config.epochs:g}{extended}"


def describe_samples(config: TrainConfig, number: int) -> str:
    """Returns "8,192 pairs", or the number and kinds of samples if captions without images are used."""
    if config.unpaired_captions:
        return f"{number:,} samples ({100 * config.train_fraction:g} % pairs, the rest captions only)"
    return f"{number:,} pairs"


def describe_model(config: TrainConfig) -> str:
    """Returns the model's name, or the names of what its two encoders start from. Of a path, only the end."""
    model, image, text = (name and end_of_path(name) for name in (config.model, config.image_tower, config.text_tower))
    if image and text:
        return f"{image} and {text}"
    other = f"the text encoder of {model}" if image else f"the image encoder of {model}"
    return " and ".join(name for name in (image, other, text) if name) if image or text else str(model)


def end_of_path(name: str) -> str:
    """Returns a file's name, or the last two parts of a folder, as "model" alone says little; also after `timm:NAME:`."""
    kind, colon, path = name.rpartition(":")
    parts = Path(path).parts
    return kind + colon + str(Path(*parts[-1:] if Path(path).suffix else parts[-2:]))


def write_config(folder: Path, saved: SavedConfig) -> None:
    fields: dict[str, Any] = {**vars(saved), "config": to_json(saved.config)}
    write_json(folder / CONFIG, fields)


def write_exported(folder: Path, saved: SavedConfig) -> None:
    """Writes EXPORTED, by which the pairs that were held out are known when the export is evaluated."""
    fields: dict[str, Any] = {**vars(saved), "data": data_name(saved.data), "config": to_json(saved.config)}
    write_json(folder / EXPORTED, public(fields))


def data_name(data: str) -> str:
    """Returns the name of data without its folder; of a mixture, the names of its sources with their weights."""
    parts = (_weight_and_source(part) for part in data.split(SEPARATOR))
    return SEPARATOR.join(weight + (_name(_without_host(source)) or source) for weight, source in parts)


def public(value: Any) -> Any:
    """Reduces paths and URLs to their last name, so that what is published reveals no local folders, hosts and keys: also after
    `timm:NAME:`, and in mixtures.

    Relative paths within the current folder are kept. Lists and objects are reduced value by value.
    """
    if isinstance(value, Mapping):
        return {name: public(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    parts = (_weight_and_source(part) for part in value.split(SEPARATOR))
    return SEPARATOR.join(
        weight + ":".join(map(_public_path, _without_host(source).split(":"))) for weight, source in parts
    )


def _weight_and_source(part: str) -> tuple[str, str]:
    """Returns "0.5*" and "/data/web" of a part of a mixture, "0.5*/data/web"."""
    source = re.sub(r"^\s*\d+(\.\d+)?\s*[*×]\s*", "", part)
    return part.removesuffix(source), source


def _public_path(path: str) -> str:
    is_local = Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts
    return _name(path) if is_local else path


def _without_host(source: str) -> str:
    """Replaces a URL by its last name; one without a path, by its protocol."""
    return _URL.sub(lambda url: _name(url[2]) or url[1], source)


def _name(path: str) -> str:
    return _SLASHES.split(path.rstrip("/"))[-1]


def read_results(folder: Path) -> dict[str, Any]:
    """Reads results.json: the final state of training, the parameters by role, and the results of each task.

    Raises UserError if it is missing or not in the form of this version.
    """
    try:
        results = json.loads((folder / RESULTS).read_text())
        sum(results["parameters"].values())
        if results["run"].keys() >= {"step", "seconds", "cpu_seconds"} and all(
            "metrics" in task for task in results["tasks"].values()
        ):
            return results
        reason = "it was written by another version"
    except FileNotFoundError:
        raise UserError(f"The run {folder} is not finished; resume it with `coalign train … --resume auto`.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    raise UserError(
        f"{folder / RESULTS} is not a valid results file: {reason}; delete it, and run `coalign train … --resume auto` to write it again."
    )


def check_output(path: Path) -> None:
    """Creates the folder of a report, before the work.

    Raises UserError if it cannot be created, or if `path` is a folder or one of the files of a run.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a file.")
    if path.name in RUN_FILES and (path.parent / CONFIG).exists():
        raise UserError(f"{path} belongs to the run in {path.parent}; choose another file name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder of {path} cannot be created: {error.strerror}; choose another path.") from error


def read_config(folder: Path, file: str = CONFIG) -> SavedConfig:
    """Reads config.json, or EXPORTED. Raises UserError if `folder` has no such file or the configuration cannot be read."""
    path = folder / file
    if not path.is_file():
        problem = "does not exist" if not folder.exists() else f"is not a run (it has no {CONFIG})"
        raise UserError(f"{folder} {problem}.")
    try:
        saved = json.loads(path.read_text())
        config = saved["config"]
        method_config = from_json(config_class(config["method"]), config.pop("method_config"))
        config = {"group_look_alikes": False, **config, "method_config": None}  # older runs were split without
        train_config = replace(from_json(TrainConfig, config), method_config=method_config)
        extended_from = tuple(saved.get("extended_from", ()))
        return SavedConfig(**{**saved, "config": train_config, "extended_from": extended_from})
    except (ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{path} cannot be read by this version of coalign: {str(error).rstrip('.')}.") from error
