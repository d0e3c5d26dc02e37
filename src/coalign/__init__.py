"""coalign: data-efficient language-image pre-training.

The functions below are imported when they are first used, so `import coalign` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from coalign.cores import set_up_apple_gpu, set_up_threads
from coalign.version import __version__

if TYPE_CHECKING:
    from coalign.data.sources.open import open_source as open_data
    from coalign.experiments.benchmark.benchmark import benchmark
    from coalign.experiments.compare.compare import compare
    from coalign.methods import recipe
    from coalign.runs.run import load
    from coalign.types import DualEncoder
    from coalign.workflows.collection.embed import embed
    from coalign.workflows.collection.embedding_files import EmbeddingFiles
    from coalign.workflows.evaluate.config import EvalConfig
    from coalign.workflows.evaluate.evaluate import evaluate
    from coalign.workflows.image_files import load_images
    from coalign.workflows.models.interpolate import interpolate
    from coalign.workflows.train.train import train

# before torch is loaded
set_up_threads()
set_up_apple_gpu()

__all__ = [
    "DualEncoder",
    "EmbeddingFiles",
    "EvalConfig",
    "__version__",
    "benchmark",
    "compare",
    "embed",
    "evaluate",
    "interpolate",
    "load",
    "load_images",
    "open_data",
    "recipe",
    "train",
]

# name -> module and name in it
_PUBLIC = {
    "DualEncoder": ("coalign.types", "DualEncoder"),
    "EmbeddingFiles": ("coalign.workflows.collection.embedding_files", "EmbeddingFiles"),
    "EvalConfig": ("coalign.workflows.evaluate.config", "EvalConfig"),
    "benchmark": ("coalign.experiments.benchmark.benchmark", "benchmark"),
    "compare": ("coalign.experiments.compare.compare", "compare"),
    "embed": ("coalign.workflows.collection.embed", "embed"),
    "evaluate": ("coalign.workflows.evaluate.evaluate", "evaluate"),
    "interpolate": ("coalign.workflows.models.interpolate", "interpolate"),
    "load": ("coalign.runs.run", "load"),
    "load_images": ("coalign.workflows.image_files", "load_images"),
    "open_data": ("coalign.data.sources.open", "open_source"),
    "recipe": ("coalign.methods", "recipe"),
    "train": ("coalign.workflows.train.train", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _PUBLIC[name]
    value = getattr(import_module(module), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
