"""The detection tasks: train a detector on a model's image encoder, and evaluate it."""

from __future__ import annotations

from typing import Literal

from coalign.data.sources.benchmarks.detection import DetectionSource
from coalign.evaluation.finetune.detection import DetectionConfig, evaluate_detector, train_detector
from coalign.networks.detector import build_detector
from coalign.networks.towers.spec import find_towers
from coalign.types import CLIP_PREPROCESS
from coalign.workflows.evaluate.context import EvalContext, TaskResult


def fpn(context: EvalContext) -> TaskResult:
    return _detect(context, "fpn", with_masks=False)


def fpn_with_masks(context: EvalContext) -> TaskResult:
    """Mask R-CNN of MCT's Table 3."""
    return _detect(context, "fpn", with_masks=True)


def c4(context: EvalContext) -> TaskResult:
    """Faster R-CNN of MCT's Table 2."""
    return _detect(context, "c4", with_masks=False)


def _detect(context: EvalContext, kind: Literal["fpn", "c4"], with_masks: bool) -> TaskResult:
    source, train, modules = context.source, context.train, context.model.encoder.modules
    assert isinstance(source, DetectionSource)  # the tasks need it, and the encoders
    assert isinstance(train.source, DetectionSource)
    assert modules is not None
    encoder = modules()[0].cpu()
    seen = next((tower.preprocess for tower in find_towers(encoder)), CLIP_PREPROCESS)
    detector = build_detector(
        encoder, kind, with_masks, len(source.classnames), source.side, source.regions, seen.mean, seen.std
    )
    config, device = DetectionConfig(epochs=context.config.epochs), context.world.device
    bad = train_detector(detector, train.source, train.indices, config, device)
    metrics = evaluate_detector(detector, source, context.indices, bad, device)
    return TaskResult(metrics, bad)
