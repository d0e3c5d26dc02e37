"""What the API takes and returns. Requests are validated by these classes, and its OpenAPI description is generated from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

CollectionNumber = Annotated[int, Field(ge=0, le=999, description="the collection's `id`")]
Row = Annotated[int, Field(ge=0, le=2**31 - 1, description="an image's row in the collection")]
Text = Annotated[str, Field(min_length=1, max_length=2000, pattern=r"[^\s]")]
Key = Annotated[str, Field(min_length=1, max_length=4000)]
Tag = Annotated[str, Field(min_length=1, max_length=500)]
Upload = Annotated[bytes, Field(description="an image file: JPEG, PNG, WebP, GIF, TIFF, …")]
Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"[^\s]")]
Prompt = Annotated[
    str, Field(max_length=500, pattern=r"^[^{}]*\{\}[^{}]*$", description="a text with {} for the label")
]
Labels = Annotated[tuple[Label, ...], Field(min_length=2, max_length=1000)]
Prompts = Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=100)]
DEFAULT_PROMPTS = ("a photo of a {}.",)


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Nothing(_Input):
    """No parameters."""


class CollectionPath(_Input):
    collection: CollectionNumber


class ItemPath(CollectionPath):
    row: Row


class ImagePath(ItemPath):
    side: Annotated[int, Field(ge=16, le=1600, description="maximum width and height in pixels")] = 256


class SearchJson(_Input):
    """At least one of text, image and like."""

    collection: CollectionNumber = 0
    text: Text | None = None
    like: Annotated[Key | None, Field(description="the key of an indexed image, to find similar ones")] = None
    exclude: Annotated[Text | None, Field(description="what the images should not show")] = None
    tags: Annotated[tuple[Tag, ...], Field(max_length=50)] = ()
    folder: Key | None = None
    top: Annotated[int, Field(ge=1, le=500, description="number of images to return")] = 60


class SearchForm(SearchJson):
    image: Upload | None = None


class ClassifyForm(_Input):
    """Either row or image."""

    collection: CollectionNumber = 0
    row: Row | None = None
    image: Upload | None = None
    labels: Labels
    prompts: Prompts = DEFAULT_PROMPTS


class ClassifyCollection(_Input):
    collection: CollectionNumber = 0
    labels: Labels
    prompts: Prompts = DEFAULT_PROMPTS
    top: Annotated[int, Field(ge=0, le=100, description="number of images to return per label")] = 12


class Localize(_Input):
    collection: CollectionNumber = 0
    row: Row
    text: Text


class Error(BaseModel):
    error: Annotated[str, Field(description="one sentence: what is wrong and what to do")]


class Health(BaseModel):
    status: str = "ok"


class Abilities(BaseModel):
    localize: Annotated[bool, Field(description="whether the model can show which region of an image matches a text")]
    joint: Annotated[bool, Field(description="whether the model embeds an image and a text as one sequence")]


class CollectionInfo(BaseModel):
    id: int
    name: str
    model: str
    size: Annotated[int, Field(description="number of images")]
    dim: Annotated[int, Field(description="dimension of the embeddings")]
    tags: Annotated[list[tuple[str, int]], Field(description="the most frequent tags with their number of images")]
    folders: Annotated[list[tuple[str, int]], Field(description="the largest folders with their number of images")]
    can: Abilities


class Collections(BaseModel):
    collections: list[CollectionInfo]


class Item(BaseModel):
    row: int
    key: str
    captions: tuple[str, ...]
    tags: tuple[str, ...]


class Hit(Item):
    score: float


class SearchResult(BaseModel):
    hits: list[Hit]
    query: Annotated[str, Field(description="how the query was embedded")]
    missing: Annotated[
        int, Field(description="candidates that could not be read, which a model's own similarity needs")
    ]
    seconds: float


class LabelProbability(BaseModel):
    label: str
    probability: float


class Classified(BaseModel):
    labels: list[LabelProbability]


class LabelImages(BaseModel):
    label: str
    count: Annotated[int, Field(description="number of images for which this label is the most probable")]
    hits: list[Hit]


class ClassifiedCollection(BaseModel):
    labels: list[LabelImages]


class Map(BaseModel):
    points: Annotated[
        list[Annotated[list[int | float], Field(min_length=3, max_length=3)]],
        Field(
            description="row, x and y in [0, 1] of at most 5,000 images, by the two principal components of their embeddings"
        ),
    ]
