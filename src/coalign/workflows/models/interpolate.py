"""interpolate(): weights between the start of a run and its result (WiSE-FT, Wortsman et al. 2022), as runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from coalign.data.images import evaluation_view
from coalign.data.text.tokenizer import load_tokenizer
from coalign.devices import best_device
from coalign.errors import UserError
from coalign.files import write_json
from coalign.formatting import percent
from coalign.interop.open_clip.load import CONFIG as OPEN_CLIP_CONFIG
from coalign.metric import Metric
from coalign.networks.towers.spec import Tower
from coalign.progress import track
from coalign.runs.folder import CONFIG, MODEL, RESULTS, TOKENIZER, read_config, read_results, write_config
from coalign.runs.outcomes import item_hashes, write_outcomes
from coalign.runs.run import Run, build_method, initial_weights, load, queue_names
from coalign.training import checkpoint
from coalign.workflows.evaluate.context import TaskResult
from coalign.workflows.evaluate.tasks import TASKS
from coalign.workflows.models.export import check_new_folder
from coalign.workflows.models.held_out import held_out_context, validation_pairs
from coalign.workflows.train.batches import TrainingData

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
Weights = Mapping[str, Tensor]


@dataclass
class Interpolation:
    """The runs that `interpolate` wrote, and their metrics on the validation pairs.

    Attributes:
        runs: α to the folder of its run.
        scores: α to its validation score: the mean recall, or the accuracy if the captions are class labels. Empty if the run held out no
            pairs.
        metrics: α to its validation metrics.
        chosen: The α with the best score, the smallest of several. None if the run held out no pairs.
        taken_from_run: The names of the tensors that only the run has, such as new heads: equal for all α.
    """

    runs: dict[float, Path]
    scores: dict[float, float] = field(default_factory=dict)
    metrics: dict[float, list[Metric]] = field(default_factory=dict)
    chosen: float | None = None
    taken_from_run: list[str] = field(default_factory=list)


def interpolate(
    start: str | Path, run: str | Path, out: str | Path, alpha: Sequence[float] = ALPHAS, device: str | None = None
) -> Interpolation:
    """Interpolates the weights of a run with those that it started from, and chooses α on the run's validation pairs.

    Between the two, a model often keeps what the start knew and what the run learned (WiSE-FT, Wortsman et al. 2022). For each α, a run
    with the weights (1 − α) · start + α · run is written to `out`: its parameters and running statistics. Tensors that only the run has,
    such as new heads, are the run's. The runs can be loaded, evaluated, compared and exported like any other; training cannot resume them.

    Args:
        start: A run, a folder in open_clip's format (such as an export), or "start": the weights that the run itself started from.
        run: The folder of a finished run. Its last weights are used.
        out: The new folder that receives a run `alpha-0.5` for each α.
        alpha: One or more values between 0 (the start) and 1 (the run).
        device: Where the models are evaluated: "cpu", "cuda", "cuda:N" or "mps". None: the best there is.

    Returns:
        The folders of the runs, their validation metrics, and the chosen α.

    Raises:
        UserError: The two have different models or tokenizers, the data of the run has changed, `out` is not empty, or there is no such
            device.

    Example:
        ```python
        result = coalign.interpolate("runs/clip", "runs/more", "between", [0, 0.5, 1])
        encoder = coalign.load(result.runs[result.chosen]).encoder()
        ```
    """
    alphas = sorted(dict.fromkeys(float(value) for value in alpha))
    if not alphas or not all(0 <= value <= 1 for value in alphas):
        raise UserError(f"--alpha is {' '.join(f'{value:g}' for value in alphas)}, but must be between 0 and 1.")
    device, out = best_device(device), check_new_folder(out)
    ours = load(run)
    theirs, name = _start_weights(str(start), ours)
    common, taken = _match(theirs, ours, name)
    _check_tokenizer(Path(start), ours)
    pairs = validation_pairs(ours)
    result = Interpolation({value: out / f"alpha-{value:g}" for value in alphas}, taken_from_run=taken)
    own = {
        key: value.clone() for key, value in ours.method.state_dict().items()
    }  # loading below overwrites the method's
    ours.method.to(device)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as temporary:
            folder = Path(temporary) / "interpolated"
            for value in track(alphas, "Evaluating α", unit="values"):
                weights = own | {key: (1 - value) * theirs[key] + value * own[key] for key in common}
                ours.method.load_state_dict(weights)
                made = f"{1 - value:g} × {name} + {value:g} × {ours.path.resolve().name}, WiSE-FT"
                _write(folder / f"alpha-{value:g}", ours, weights, made)
                if pairs is not None:
                    result.metrics[value], result.scores[value] = _evaluate(folder / f"alpha-{value:g}", ours, pairs)
            folder.replace(out)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise UserError(f"The runs could not be written to {out}: {error}") from error
    if result.scores:
        result.chosen = max(alphas, key=lambda value: (result.scores[value], -value))
    return result


def print_interpolation(result: Interpolation) -> None:
    """Prints the validation metrics of each α, the chosen one, and what was taken from the run."""
    console = Console(highlight=False, soft_wrap=True)
    if result.scores:
        shown = ("acc1", "image_to_text.r1", "text_to_image.r1")
        first = [metric for metric in next(iter(result.metrics.values())) if metric.name in shown]
        table = Table("α", "validation score", *(metric.title for metric in first))
        for alpha, metrics in result.metrics.items():
            cells = (f"{metric.text()} ({metric.interval_text()})" for metric in metrics if metric.name in shown)
            table.add_row(f"{alpha:g}", percent(result.scores[alpha]), *cells)
        console.print(table)
        console.print(
            "The validation score is the accuracy if the captions are class labels, else the mean of the recalls at 1, 5 and 10 in both "
            "directions. In parentheses: 95 % bootstrap intervals."
        )
    if result.taken_from_run:
        names, more = ", ".join(result.taken_from_run[:3]), len(result.taken_from_run) - 3
        names += f" and {more:,} more tensors" if more > 0 else ""
        console.print(f"The start does not have {names}, which is the run's for every α.", markup=False)
    for path in result.runs.values():
        console.print(str(path), markup=False)
    if result.chosen is None:
        console.print("No α is chosen, as the run held out no pairs.")
    else:
        console.print(
            f"Chosen on the validation pairs: α = {result.chosen:g}, {result.runs[result.chosen]}", markup=False
        )


# ---------------------------------------------------------------- weights


def _start_weights(start: str, run: Run) -> tuple[Weights, str]:
    """Returns the weights of the start under the run's names, and the name of the start."""
    if start == "start":
        if not (run.path / "start").is_dir():
            raise UserError(
                f"{run.path} has not stored what it started from, as its first weights were random; give a run or an open_clip folder."
            )
        return checkpoint.load(run.path / "start").model, "start"
    folder = Path(start)
    name = folder.resolve().name
    if (folder / CONFIG).is_file():
        other = load(folder)
        state = other.method.state_dict()
        return {key: value for key, value in state.items() if not key.startswith(queue_names(other.method))}, name
    if (folder / OPEN_CLIP_CONFIG).is_file():
        config = replace(run.config, model=start, pretrained=start, image_tower=None, text_tower=None, init_from=None)
        return initial_weights(build_method(config, run.tokenizer), config), name
    problem = "holds no model" if folder.exists() else "does not exist"
    raise UserError(
        f'{start} {problem}; give a run, a folder in open_clip\'s format, or "start" for what {run.path} started from.'
    )


def _match(start: Weights, run: Run, name: str) -> tuple[list[str], list[str]]:
    """Returns the names of the tensors to interpolate, and of those that only the run has.

    Raises UserError if a tower of the two has different layers or a tensor has different shapes.
    """
    state = run.method.state_dict()
    for tower in (key for key, module in run.method.named_modules() if isinstance(module, Tower)):
        own, other = (_trunk_names(weights, tower) for weights in (state, start))
        if other and own != other:
            raise UserError(
                f"{name} and {run.path} have different models: {min(own ^ other)} is in one of them only; use equal encoders."
            )
    shared = [key for key in state if key in start and not key.startswith(queue_names(run.method))]
    for key in shared:
        if start[key].shape != state[key].shape:
            raise UserError(
                f"{key} has the shape {list(start[key].shape)} in {name} and {list(state[key].shape)} in {run.path}; interpolation needs "
                "equal shapes."
            )
    common = [key for key in shared if state[key].is_floating_point() and start[key].is_floating_point()]
    if not common:
        raise UserError(
            f"{name} and {run.path} have no weights in common; give a model that the run could have started from."
        )
    return common, [key for key in state if key not in start and not key.startswith(queue_names(run.method))]


def _check_tokenizer(start: Path, run: Run) -> None:
    """Raises UserError if the start is a run with another tokenizer, whose token embeddings belong to other words."""
    if (start / CONFIG).is_file() and load_tokenizer(start / TOKENIZER).to_str() != run.tokenizer.to_str():
        raise UserError(f"{start} and {run.path} have different tokenizers, so their weights cannot be interpolated.")


def _trunk_names(weights: Weights, tower: str) -> set[str]:
    return {key for key in weights if key.startswith(f"{tower}.") and not key.startswith(f"{tower}.projection.")}


def _write(folder: Path, run: Run, weights: Weights, made: str) -> None:
    folder.mkdir(parents=True)
    saved = read_config(run.path)
    write_config(folder, replace(saved, interpolated=made))
    for name in (TOKENIZER, MODEL):
        if (run.path / name).exists():
            shutil.copy(run.path / name, folder / name)
    checkpoint.save(folder, "last", weights)


# ---------------------------------------------------------------- validation


def _evaluate(folder: Path, run: Run, pairs: TrainingData) -> tuple[list[Metric], float]:
    """Evaluates the model on the validation pairs and writes the results to the folder of its run. Returns the metrics and the score."""
    source, context = pairs.val_source, held_out_context(run.encoder(), run, pairs)
    names = [*(["zeroshot"] if source.classes is not None else []), "retrieval"]
    results = {name: TASKS[name].load()(context) for name in names}
    items = {
        name: item_hashes(source, each.evaluation.images.indices, each.evaluation.texts)
        for name, each in results.items()
        if each.evaluation
    }
    write_outcomes(folder, {name: each.metrics for name, each in results.items()}, items)
    finished = read_results(run.path)
    tasks = {name: each.to_json() for name, each in results.items()}
    of_run = {"run": finished["run"], "parameters": finished["parameters"]}
    write_json(folder / RESULTS, {**of_run, "tasks": tasks, "evaluation_view": evaluation_view.VERSION}, default=str)
    return [metric for each in results.values() for metric in each.metrics], _score(results)


def _score(results: Mapping[str, TaskResult]) -> float:
    """Returns the score by which training chooses its best weights: the mean recall, or the accuracy if the captions are class labels."""
    if "zeroshot" in results:
        return results["zeroshot"].metrics[0].value
    return next((metric.value for metric in results["retrieval"].metrics if metric.name == "mean_recall"), 0.0)
