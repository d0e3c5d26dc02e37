"""The table of the API's endpoints. Their requests are validated, and their OpenAPI description is generated, from this table alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coalign.serve import schemas
from coalign.serve.service import Service
from coalign.serve.worker import Worker

JSON, FORM = "application/json", "multipart/form-data"
MAX_FIELDS = 1200  # of a form: 1,000 labels, 100 prompts, and the others
MAX_FIELD_BYTES = 64 << 10


@dataclass(frozen=True)
class Endpoint:
    """One method and path. The handler gets one validated request, of `params` (path and query) or of `bodies`, by content type."""

    method: str
    path: str
    handler: Callable[[Service, Any], Any]
    summary: str
    result: type[BaseModel] | str  # a class of schemas.py, or the media type of the handler's bytes
    params: type[BaseModel] = schemas.Nothing
    bodies: Mapping[str, type[BaseModel]] | None = None
    worker: str | None = (
        "model"  # the thread that runs it: the model's, or the one that reads images; None: it takes no time
    )
    cached: bool = False  # by the browser, for as long as this server runs


ENDPOINTS = (
    Endpoint("GET", "/api/health", Service.health, "Whether the server runs", schemas.Health, worker=None),
    Endpoint("GET", "/api/collections", Service.list_collections, "The indexed collections", schemas.Collections),
    Endpoint(
        "POST",
        "/api/search",
        Service.search,
        "Find the images nearest to a text, an uploaded image, an indexed image, or several of these",
        schemas.SearchResult,
        bodies={JSON: schemas.SearchJson, FORM: schemas.SearchForm},
    ),
    Endpoint(
        "GET",
        "/api/item/{collection}/{row}",
        Service.item,
        "Key, captions and tags of an indexed image",
        schemas.Item,
        params=schemas.ItemPath,
        worker=None,
    ),
    Endpoint(
        "GET",
        "/api/image/{collection}/{row}",
        Service.image,
        "An indexed image, encoded anew",
        "image/jpeg",
        params=schemas.ImagePath,
        worker="images",
        cached=True,
    ),
    Endpoint(
        "POST",
        "/api/classify",
        Service.classify,
        "The probability of each label for one image",
        schemas.Classified,
        bodies={FORM: schemas.ClassifyForm},
    ),
    Endpoint(
        "POST",
        "/api/classify-collection",
        Service.classify_collection,
        "Assign each image of a collection to its most probable label",
        schemas.ClassifiedCollection,
        bodies={JSON: schemas.ClassifyCollection},
    ),
    Endpoint(
        "POST",
        "/api/localize",
        Service.localize,
        "The image with a heat map of the regions that match a text",
        "image/png",
        bodies={JSON: schemas.Localize},
    ),
    Endpoint(
        "GET",
        "/api/map/{collection}",
        Service.map,
        "A map of the collection in two dimensions",
        schemas.Map,
        params=schemas.CollectionPath,
    ),
)


def route(endpoint: Endpoint, service: Service, workers: Mapping[str, Worker]) -> Route:
    """Returns the route that validates a request, runs the handler and encodes its result."""
    tag = f'"{secrets.token_hex(8)}"'  # rows may mean other images once the server is started again

    async def handle(request: Request) -> Response:
        given = await _read(endpoint, request)
        headers = (
            {"cache-control": "private, no-cache", "etag": tag} if endpoint.cached else {"cache-control": "no-store"}
        )
        if endpoint.cached and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        work = partial(endpoint.handler, service, given)
        result = await workers[endpoint.worker].run(request, work) if endpoint.worker else work()
        content, kind = (result.model_dump_json(), JSON) if isinstance(result, BaseModel) else (result, endpoint.result)
        return Response(content, media_type=str(kind), headers=headers)

    return Route(endpoint.path, handle, methods=[endpoint.method])


async def _read(endpoint: Endpoint, request: Request) -> BaseModel:
    """Returns the validated request. Raises HTTPException if it is not valid."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if endpoint.bodies is None:
            return endpoint.params.model_validate({**request.query_params, **request.path_params})
        if kind not in endpoint.bodies:
            raise HTTPException(415, f"The content type must be {' or '.join(endpoint.bodies)}.")
        if kind == JSON:
            return endpoint.bodies[JSON].model_validate_json(await request.body(), strict=True)
        return endpoint.bodies[FORM].model_validate(await _read_form(endpoint.bodies[FORM], request))
    except ValidationError as error:
        raise HTTPException(422, _sentence(error)) from error


async def _read_form(model: type[BaseModel], request: Request) -> dict[str, Any]:
    """Returns the values of a form: a list for each field that the model allows several times, or that was sent several times."""
    repeated = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is tuple}
    values: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        for name in form:
            given = [await value.read() if isinstance(value, UploadFile) else value for value in form.getlist(name)]
            values[name] = given if name in repeated or len(given) > 1 else given[0]
    return values


# what is wrong with a field, by pydantic's type of error; the bounds are of its context
_PROBLEMS = {
    "missing": "is missing",
    "extra_forbidden": "is not known",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "string_type": "must be one text",
    "tuple_type": "must be a list",
    "bytes_type": "must be one file",
}


def _sentence(error: ValidationError) -> str:
    """Returns the first problem in one sentence, without what was sent."""
    first = error.errors(include_url=False, include_input=False)[0]
    where, context = ".".join(map(str, first["loc"]))[:80], first.get("ctx", {})
    if where and first["type"] == "string_pattern_mismatch":
        return (
            f"The field {where} must {'have {} once, for the label' if '{' in context['pattern'] else 'not be blank'}."
        )
    if where and first["type"] in _PROBLEMS:
        return f"The field {where} {_PROBLEMS[first['type']].format(**context)}."
    what = first["msg"][:1].lower() + first["msg"][1:]
    return f"The field {where} is not valid: {what}." if where else f"The request is not valid: {what}."
