"""The values that travel between the layers. Imports no torch, so that help and configuration stay fast.

Axis words used in shapes all over the project: batch (one rank's samples), global_batch (all ranks'), token, patch, dim, view, queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

# ---------------------------------------------------------------- what a method asks of the data


@dataclass(frozen=True)
class AugmentationPolicy:
    """How an image view is drawn. The defaults change nothing but the size: the evaluation view (resize, centre crop).

    `crop_scale` None is the evaluation view; otherwise RandomResizedCrop's area and aspect ranges. Jitter strengths are torchvision's
    half-ranges. `blur_sigma` is in pixels of a 224-pixel view and scales with the size of the output.
    """

    crop_scale: tuple[float, float] | None = None  # least and greatest share of the area that a crop keeps
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # least and greatest width to height of a crop
    flip_p: float = 0.0  # probability of a horizontal flip
    jitter_p: float = 0.0  # probability of the changes of colour
    brightness: float = 0.0  # greatest change of brightness
    contrast: float = 0.0  # greatest change of contrast
    saturation: float = 0.0  # greatest change of saturation
    hue: float = 0.0  # greatest change of hue, in turns
    grey_p: float = 0.0  # probability of greyscale
    blur_p: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # least and greatest sigma of the blur


EVALUATION = AugmentationPolicy()
# SLIP's two image policies, which UniCLIP and MCD take over: the base view of the contrastive term, and SimCLR's augmentations.
WEAK = AugmentationPolicy(crop_scale=(0.5, 1.0))
STRONG = AugmentationPolicy(
    crop_scale=(0.08, 1.0),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey_p=0.2,
    blur_p=0.5,
)


@dataclass(frozen=True)
class AugmentationParams:
    """What was drawn for one image view, enough to make the view again (UniCLIP §3.2, 11 numbers).

    The box is in fractions of the (upright) image; colour changes are zero when nothing changed: the factors minus one for brightness,
    contrast and saturation, turns (-0.5 … 0.5) for hue; blur is sigma in pixels of a 224-pixel view.
    """

    x: float = 0.0
    y: float = 0.0
    w: float = 1.0
    h: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0
    flipped: float = 0.0
    greyed: float = 0.0

    def vector(self) -> tuple[float, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class TextPolicy:
    """How a text view is made of one of the sample's captions: as it is, by easy data augmentation (EDA), or by a stored paraphrase."""

    kind: Literal["original", "eda", "paraphrase"] = "original"
    mask_p: float = 0.0  # share of the ordinary tokens chosen for masked language modelling; 0: no masking


@dataclass(frozen=True)
class ViewPlan:
    """The views a method wants of every sample, by name."""

    images: Mapping[str, AugmentationPolicy]
    texts: Mapping[str, TextPolicy]
    patch_ranks: bool = False  # image views carry a random rank in [0, 1) per patch, which a mask ratio thresholds
    tags: int = 0  # ids of the sample's tags, of a vocabulary of this many, the most frequent of the training data
    captionless: bool = False  # samples without any caption are used, too: their text views hold no words
    imageless: bool = False  # samples without an image are used, too: their image views are another sample's


NOT_MASKED = -100  # the label of a token that is not to be predicted


# ---------------------------------------------------------------- what the data gives


@dataclass(frozen=True)
class Record:
    """One sample without its pixels."""

    key: str  # unique and readable: a path, a member's name, a row number
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # ground truth or provenance, e.g. {"style": "etiquette"}


@dataclass(frozen=True)
class Foil:
    """A two-way choice for one sample: a caption that is true of its image, and one that is false in one kind of fact."""

    index: int  # of the sample in its source
    kind: str  # what the false caption is wrong about
    how: str  # how it was made: "replace", "swap" or "add"
    true: str
    false: str


class Source(Protocol):
    """Addressable image-text pairs. Everything raised for a single sample is `BadSample`; everything raised at opening is `UserError`."""

    name: str

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record: ...

    def image(self, index: int) -> bytes | np.ndarray:
        """The encoded file's bytes, or decoded RGB pixels, uint8 [height, width, 3]."""
        ...


def _map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {name: _map_tensors(item, change) for name, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return change(value)


@dataclass
class ImageView:
    pixels: Tensor  # uint8 [batch, 3, height, width]; the method normalises
    params: Tensor  # float32 [batch, 11], AugmentationParams.vector()
    patch_ranks: Tensor | None = None  # float32 [batch, rows, columns]


@dataclass
class TextView:
    ids: Tensor  # int64 [batch, token], trimmed to the longest of the batch; what lies beyond a row's length is padding
    lengths: Tensor  # int64 [batch], start and end token included
    labels: Tensor | None = (
        None  # int64 [batch, token], the original id where a token was masked for MLM, else NOT_MASKED
    )


@dataclass
class Batch:
    indices: Tensor  # int64 [batch], the sample's index in its source
    images: dict[str, ImageView]
    texts: dict[str, TextView]
    caption_ids: Tensor  # int64 [batch], equal exactly where the captions are equal (63-bit hash)
    has_caption: Tensor  # bool [batch]
    tags: Tensor | None = None  # int64 [batch, max_tags], tag ids, padded with -1
    has_image: Tensor | None = None  # bool [batch]; None: every sample has one

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Batch:
        return _map_tensors(self, lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Batch:
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


# ---------------------------------------------------------------- what a method gives the trainer

Features = dict[str, "Tensor"]  # name -> tensor whose first axis is the sample


@dataclass(frozen=True)
class StepInfo:
    step: int  # 0 for the first
    total_steps: int

    @property
    def fraction(self) -> float:
        """Progress of the run, 0 at the first step, 1 after the last."""
        return self.step / max(1, self.total_steps)


@dataclass
class LossTerm:
    """A ratio of sums: the loss is Σ_terms weight · Σ_ranks total / Σ_ranks count. So any mean is exact on any number of ranks."""

    name: str
    total: Tensor  # scalar, this rank's sum, with gradient
    count: Tensor | float  # this rank's count
    weight: float = 1.0


class Gather(Protocol):
    """Collects rows of all ranks. One process: the identity."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """[batch, …] -> [global_batch, …] in global order, differentiable."""
        ...

    def own_rows(self, tensor: Tensor) -> Tensor:
        """The global positions of this rank's rows: int64 [batch], on the device of `tensor` [batch, …]."""
        ...


# ---------------------------------------------------------------- what evaluation needs


# uint8 pixels [batch, 3, side, side] and a text for each -> how much each place of the image has to do with it, [batch, row, column]
Localizer = Callable[["Tensor", Sequence[str]], "Tensor"]
# uint8 pixels [batch, 3, side, side] and a text for each, as one input -> embeds [batch, dim] in the space of images and texts
JointEncoder = Callable[["Tensor", Sequence[str]], "Tensor"]


@dataclass
class DualEncoder:
    """Anything that embeds images and texts in one space, as two callables: ours, another library's, or a test's.

    encode_image: uint8 pixels [batch, 3, size, size] (evaluation view, not normalised) -> float [batch, dim]
    encode_text: sequence of strings -> float [batch, dim]
    image_features: the same pixels -> float [batch, width], the image encoder's output before its projection; probes need it.
    preprocess: an upright RGB PIL image -> uint8 [3, size, size], where it is not the evaluation view.
    modules: makes copies of both encoders to be trained, modules of the same pixels and of the same strings, which may share weights;
        fine-tuning and detectors need them.
    weights: all weights, by which embeddings are kept and found again.
    Embeddings need not be normalised; evaluation normalises. `logit_scale` multiplies cosines where probabilities are shown.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Sequence[str]], Tensor]
    image_size: int
    name: str = "model"
    logit_scale: float = 100.0
    image_features: Callable[[Tensor], Tensor] | None = None
    preprocess: Callable[[Any], Tensor] | None = None
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    modules: Callable[[], tuple[nn.Module, nn.Module]] | None = None
