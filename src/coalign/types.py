"""Types shared by data, methods, training and evaluation. Does not import torch, to keep the command line's help fast.

Axis names in shape comments: batch (samples of this rank), global_batch (samples of all ranks), token, patch, dim, view, queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# ---------------------------------------------------------------- views that a method requests


@dataclass(frozen=True)
class AugmentationPolicy:
    """Random augmentation of an image view. The default is the evaluation view: resize and center crop, no randomness.

    Crops are drawn as by torchvision's RandomResizedCrop and colors as by its ColorJitter: jitter of strength s multiplies by a factor in
    [1 - s, 1 + s]. The blur scales with the size of the view.
    """

    # Crop area as a fraction of the image, min and max; None: evaluation view.
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Aspect ratio of the crop, width / height, min and max.
    flip_p: float = 0.0  # Probability of a horizontal flip.
    jitter_p: float = 0.0  # Probability of color jitter.
    brightness: float = 0.0  # Strength of brightness jitter.
    contrast: float = 0.0  # Strength of contrast jitter.
    saturation: float = 0.0  # Strength of saturation jitter.
    hue: float = 0.0  # Maximum hue shift, in turns.
    gray_p: float = 0.0  # Probability of grayscale.
    blur_p: float = 0.0  # Probability of Gaussian blur.
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # Sigma of the blur in pixels of a 224-pixel view, min and max.


EVALUATION = AugmentationPolicy()
# SLIP's two policies, also used by UniCLIP and MCD: the view of the contrastive term, and SimCLR's augmentations.
WEAK = AugmentationPolicy(crop_scale=(0.5, 1.0))
STRONG = AugmentationPolicy(
    crop_scale=(0.08, 1.0),
    flip_p=0.5,
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_p=0.2,
    blur_p=0.5,
)


@dataclass(frozen=True)
class AugmentationParams:
    """Sampled augmentations of one image view, sufficient to reproduce it (the 11 numbers of UniCLIP §3.2).

    The crop box is in fractions of the upright image. Brightness, contrast and saturation are the factor minus one; hue is in turns,
    -0.5 … 0.5; blur is the sigma in pixels of a 224-pixel view. Zero means unchanged.
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
    grayed: float = 0.0

    def vector(self) -> tuple[float, ...]:
        """The 11 numbers in field order."""
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class TextPolicy:
    """Augmentation of a text view: the caption itself, easy data augmentation (EDA) of it, or one of its stored paraphrases."""

    kind: Literal["original", "eda", "paraphrase"] = "original"
    mask_p: float = 0.0  # probability that a token is selected for masked language modeling (MLM); 0: no masking


@dataclass(frozen=True)
class ViewPlan:
    """The views of each sample that a method trains on, by name."""

    images: Mapping[str, AugmentationPolicy]
    texts: Mapping[str, TextPolicy]
    patch_ranks: bool = False  # add a random number in [0, 1) per patch, to compare with a mask ratio
    tags: int = 0  # size of the tag vocabulary: the most frequent tags of the training data; 0: load no tags
    captionless: bool = False  # also load samples without a caption, with empty text views
    imageless: bool = False  # also load samples without an image; their image views are copied from another sample


NOT_MASKED = -100  # MLM label of a token that is not predicted


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Record:
    """One sample without its pixels.

    Attributes:
        key: Unique and human-readable, such as a path or a row number.
        captions: Empty for a sample without a caption, which some methods can train on.
        tags: The tags of the image.
        facts: Ground truth and metadata, such as {"style": "etiquette"}.
        no_caption: Why there is no caption: reason and detail, as in `BadSample`.
        unusable: Why further captions of the image cannot be used: a reason each, as in `BadSample`. Blank ones are not mentioned.
    """

    key: str
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    no_caption: tuple[str, str] = ("no caption", "")
    unusable: tuple[str, ...] = ()

    def fact(self, name: str) -> str:
        """Returns a fact as text, "" if it is missing or empty. The name matches exactly, else ignoring case."""
        if name not in self.facts:
            name = next((each for each in self.facts if each.lower() == name.lower()), name)
        value = self.facts.get(name)
        return "" if value is None or value != value else str(value).strip()  # NaN: an empty cell of a Parquet table


@dataclass(frozen=True)
class Foil:
    """A true caption of an image and its foil: a false caption that differs in one kind of fact."""

    index: int  # sample index in the source
    kind: str  # kind of the false fact, such as "colour"
    how: str  # edit that makes the foil: "replace", "swap" or "add"
    true: str  # the true caption
    false: str  # the foil


def _map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {name: _map_tensors(item, function) for name, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return function(value)


@dataclass
class ImageView:
    pixels: Tensor  # uint8 [batch, 3, height, width]; the method normalizes
    params: Tensor  # float32 [batch, 11], AugmentationParams.vector()
    patch_ranks: Tensor | None = None  # float32 [batch, rows, columns]


@dataclass
class TextView:
    """One text view of a batch.

    The loader pads to the longest caption of the batch of this rank. A training step pads further, to the longest caption of the global
    batch, so in a method the token axis has the same length in all slices and on all ranks.
    """

    ids: Tensor  # int64 [batch, token], padded with 0
    lengths: Tensor  # int64 [batch], including the start and end tokens
    # int64 [batch, token], MLM labels: the original id of a selected token, else NOT_MASKED
    labels: Tensor | None = None


@dataclass
class Batch:
    indices: Tensor  # int64 [batch], sample indices in the source
    images: dict[str, ImageView]
    texts: dict[str, TextView]
    caption_ids: Tensor  # int64 [batch], 63-bit hash of the caption
    has_caption: Tensor  # bool [batch]
    tags: Tensor | None = None  # int64 [batch, max_tags], tag ids, padded with -1 to the longest, as captions are
    has_image: Tensor | None = None  # bool [batch]; None: all samples have an image
    # int64 [batch], in data with groups: 63-bit hash of the group, or the index of a sample without one
    group_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Batch:
        return _map_tensors(self, lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Batch:
        from coalign.devices import copies_asynchronously  # imports torch

        non_blocking = copies_asynchronously(device)
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def ids(self) -> Features:
        """Returns "caption_ids" and, in data with groups, "group_ids": pairs that share one are not negatives of each other."""
        groups = {} if self.group_ids is None else {"group_ids": self.group_ids}
        return {"caption_ids": self.caption_ids, **groups}

    @property
    def queue_ids(self) -> Tensor:
        """Ids to store in a queue: groups in data with groups, else the indices of the samples."""
        return self.indices if self.group_ids is None else self.group_ids


# ---------------------------------------------------------------- what a method returns to the trainer

Features = dict[str, "Tensor"]  # name -> tensor with one row per sample, [batch, …]


@dataclass(frozen=True)
class StepInfo:
    step: int  # counted from 0
    total_steps: int

    @property
    def fraction(self) -> float:
        """Progress of the run: 0 at the first step, 1 after the last."""
        return self.step / max(1, self.total_steps)


@dataclass
class LossTerm:
    """One term of the loss, as a sum and a count: loss = Σ_terms weight · Σ_ranks total / Σ_ranks count.

    A mean over the global batch is therefore exact for any number of ranks, also if they hold different counts.
    """

    name: str
    total: Tensor  # scalar with gradient, summed over this rank's rows
    count: Tensor | float  # number of summands on this rank
    weight: float = 1.0


class Gather(Protocol):
    """Differentiable all-gather of rows over ranks; the identity in a single process.

    All ranks must call it in the same order, with tensors of the same shape and dtype. Features with a token axis fulfill this, as
    captions are padded to the longest of the global batch (see `TextView`).
    """

    def __call__(self, tensor: Tensor) -> Tensor:
        """[batch, …] -> [global_batch, …], in rank order. Raises ValueError on all ranks if their shapes or dtypes differ."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, without gradient, such as for batch statistics. Does not check that shapes are equal on all ranks."""
        ...

    def global_indices(self, tensor: Tensor) -> Tensor:
        """Position of each local row in the gathered tensor: int64 [batch], on the device of `tensor` [batch, …]."""
        ...


# ---------------------------------------------------------------- preprocessing of images


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of an image tower: the geometry of its evaluation view, and the normalization of its pixels.

    `shortest` crops the central square, `squash` distorts the image to a square, `longest` pads it to a square with black. The default is
    CLIP's.
    """

    # of pixels in [0, 1], by channel
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Preprocess:
        """Reads what open_clip calls `preprocess_cfg`; absent values are CLIP's. Raises ValueError for invalid values."""
        known = {each.name: values[each.name] for each in fields(Preprocess) if each.name in values}
        for name in ("mean", "std"):
            if name in known:
                known[name] = tuple(map(float, known[name]))
                if len(known[name]) != 3:
                    raise ValueError(f"{name} is {known[name]}, but must have three values")
        if "interpolation" in known:  # open_clip and timm have others, such as "random"
            known["interpolation"] = "bilinear" if known["interpolation"] == "bilinear" else "bicubic"
        if known.get("resize_mode", "shortest") not in ("shortest", "squash", "longest"):
            raise ValueError(f"resize_mode is {known['resize_mode']!r}, but must be shortest, squash or longest")
        return Preprocess(**known)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of open_clip's `preprocess_cfg`."""
        return {each.name: list(v) if isinstance(v := getattr(self, each.name), tuple) else v for each in fields(self)}


CLIP_PREPROCESS = Preprocess()


# ---------------------------------------------------------------- evaluation

# Embeddings of samples: a tensor [sample, …], or a NamedTuple of such tensors, such as token embeds and which of them are valid. Joining
# batches pads the other axes at their end with zeros (False). See `coalign.embeds`.
Embeds = Union["Tensor", tuple["Tensor", ...]]
# (embeds of images, embeds of texts) -> similarity of each image and text, float [image, text]
Similarity = Callable[[Any, Any], "Tensor"]


def dot_product(images: Tensor, texts: Tensor) -> Tensor:
    """The default similarity: [image, dim] and [text, dim] -> [image, text]; the cosine if both are normalized."""
    return images @ texts.T


# (uint8 pixels [batch, 3, size, size], one text per image) -> relevance of each region to the text, [batch, row, column]
Localizer = Callable[["Tensor", Sequence[str]], "Tensor"]
# (uint8 pixels [batch, 3, size, size], one text per image) -> embeds of the pairs, comparable with those of images and texts
JointEncoder = Callable[["Tensor", Sequence[str]], Any]


@dataclass
class DualEncoder:
    """A model that embeds images and texts and compares them, from coalign or another library.

    `Run.encoder` returns one. For a model of your own, pass two functions; the other fields are needed only by some tasks.

    Attributes:
        encode_image: uint8 pixels [batch, 3, size, size], as returned by `load_images`, to embeddings: float [batch, dim], or a NamedTuple
            of tensors with the sample first if the model has its own similarity.
        encode_text: A sequence of strings to embeddings of the same kind.
        image_size: Side of the input image in pixels.
        name: The name in tables and reports.
        logit_scale: Factor of the similarities in softmax probabilities.
        image_features: The same pixels to float [batch, width], the image encoder's output before the projection. Needed by probes.
        preprocess: How an image becomes pixels: the settings of the evaluation view, or a function from an upright RGB PIL image to uint8
            [3, size, size]. The default resizes bicubically and center-crops.
        weights: Returns all weights by name. Their hash is the key of cached embeddings.
        num_tokens: The number of tokens of a text. With `context_length`, texts that are cut are reported.
        context_length: How many tokens of a text are kept.
        modules: Returns trainable copies of the image and the text encoder, with the same inputs, which may share weights. Needed by
            fine-tuning and detection.
        similarity: Embeddings of images and of texts to float [image, text]. The default compares tensors [batch, dim] by their cosine:
            evaluation normalizes them. Embeddings for another similarity are compared as they are. If embeddings of images and texts
            have the same form, it compares any two of them, else it raises UserError.

    Example:
        ```python
        encoder = coalign.DualEncoder(my_image_function, my_text_function, image_size=224)
        results = coalign.evaluate(encoder, ["retrieval:photos"])
        ```
    """

    encode_image: Callable[[Tensor], Any]
    encode_text: Callable[[Sequence[str]], Any]
    image_size: int
    name: str = "model"
    logit_scale: float = 100.0
    image_features: Callable[[Tensor], Tensor] | None = None
    preprocess: Preprocess | Callable[[Any], Tensor] = CLIP_PREPROCESS
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    modules: Callable[[], tuple[nn.Module, nn.Module]] | None = None
    similarity: Similarity = dot_product
    num_tokens: Callable[[str], int] | None = None
    context_length: int | None = None

    @property
    def compares_cosines(self) -> bool:
        """Whether a sample is one vector, compared by its cosine."""
        return self.similarity is dot_product
