"""What a task needs of its data and its model, checked before any task runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from coalign.data.scenes.source import Scenes
from coalign.data.sources.benchmarks.detection import DetectionSource
from coalign.data.sources.benchmarks.sugarcrepe import SugarCrepe
from coalign.data.sources.benchmarks.winoground import Winoground
from coalign.errors import UserError
from coalign.networks.detector import resnet_trunk

if TYPE_CHECKING:
    from coalign.workflows.evaluate.context import EvalContext
    from coalign.workflows.evaluate.tasks import Task


def check_needs(task: Task, context: EvalContext) -> None:
    """Raises UserError if the data or the model lacks something that the task needs."""
    if problem := unmet_need(task, context):
        raise UserError(problem)


def unmet_need(task: Task, context: EvalContext) -> str | None:
    """Returns what the data or the model lacks for the task, as a sentence; None if the task can run."""
    for need in task.needs:
        if problem := _PROBLEMS[need](task, context):
            return problem
    if task.learns and not len(context.train.indices):
        return (
            f"{task.name}:{context.data} has nothing to train on: all of its samples are evaluated; add a train split, "
            "evaluate --split val, or set --train-data."
        )
    return None


def _classes(task: Task, context: EvalContext) -> str | None:
    try:
        context.labels()
        context.templates()
    except UserError as error:
        return str(error)
    return None


def _foils(task: Task, context: EvalContext) -> str | None:
    if isinstance(context.source, (Scenes, SugarCrepe)):
        return None
    return f"{context.source.name} has no false captions; use scenes:… or sugarcrepe:FOLDER."


def _image_pairs(task: Task, context: EvalContext) -> str | None:
    if isinstance(context.source, Winoground):
        return None
    return f"{context.source.name} has no pairs of images with two captions; use winoground:FOLDER."


def _object_masks(task: Task, context: EvalContext) -> str | None:
    if isinstance(context.source, Scenes):
        return None
    return f"{task.name} needs the ground truth of every object, which only scenes:… have."


def _boxes(task: Task, context: EvalContext) -> str | None:
    test, train = context.source, context.train.source
    assert isinstance(test, DetectionSource)  # as `open_detection` opened them
    assert isinstance(train, DetectionSource)
    if train.classnames != test.classnames:
        return f"{train.name} has different classes from {test.name}; train on data with the same classes."
    if find_spec("pycocotools") is None:
        return 'Average precision needs the extra "detection": pip install "coalign[detection]".'
    return None


def _masks(task: Task, context: EvalContext) -> str | None:
    sources = (context.source, context.train.source)
    if all(isinstance(source, DetectionSource) and source.has_masks for source in sources):
        return None
    return f"{task.name} needs masks, which some of the data does not have; use detection."


def _features(task: Task, context: EvalContext) -> str | None:
    encoder = context.model.encoder
    return (
        None if encoder.image_features else f"{encoder.name} does not expose image features, which {task.name} needs."
    )


def _trainable(task: Task, context: EvalContext) -> str | None:
    encoder = context.model.encoder
    return None if encoder.modules else f"{encoder.name} does not expose its encoders, which {task.name} needs."


def _resnet(task: Task, context: EvalContext) -> str | None:
    assert context.model.encoder.modules is not None  # the tasks also need trainable encoders
    try:
        resnet_trunk(context.model.encoder.modules()[0])
    except UserError as error:
        return str(error)
    return None


def _joint(task: Task, context: EvalContext) -> str | None:
    if context.model.has_joint:
        return None
    return f"{context.model.name} cannot embed an image and a text jointly, which {task.name} needs; OneR models can."


def _maps(task: Task, context: EvalContext) -> str | None:
    if context.model.run is not None:
        return None
    return f"{context.model.name} is not a coalign run; only runs support localization maps, which {task.name} needs."


_PROBLEMS: dict[str, Callable[[Task, EvalContext], str | None]] = {
    "classes": _classes,
    "foils": _foils,
    "image pairs": _image_pairs,
    "object masks": _object_masks,
    "boxes": _boxes,
    "masks": _masks,
    "features": _features,
    "trainable encoders": _trainable,
    "resnet": _resnet,
    "joint embeds": _joint,
    "maps": _maps,
}
