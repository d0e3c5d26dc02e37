"""The API's OpenAPI 3.1 description, generated from the table of endpoints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from coalign.serve import schemas
from coalign.serve.api import JSON, Endpoint
from coalign.version import __version__

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is malformed",
    401: "A token is needed",
    403: "The request comes from another site, or addresses another host",
    404: "There is no such collection or row, or its image cannot be read",
    408: "The body arrived too slowly",
    413: "The body is too large",
    415: "The body's content type is not accepted",
    422: "A value is not valid, or the model cannot do this",
    503: "Too many requests are waiting",
}
_OF_BODIES = (408, 413, 415)


def describe(endpoints: tuple[Endpoint, ...], has_token: bool) -> dict[str, Any]:
    """Returns the OpenAPI document."""
    inputs = {model for each in endpoints for model in (each.bodies or {}).values()}
    results = {each.result for each in endpoints if not isinstance(each.result, str)} | {schemas.Error}
    ordered = sorted(
        [*((model, "validation") for model in inputs), *((model, "serialization") for model in results)], key=str
    )
    _, definitions = models_json_schema(ordered, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, has_token)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "coalign serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
    if has_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _operation(endpoint: Endpoint, has_token: bool) -> dict[str, Any]:
    result = {"schema": _reference(endpoint.result)} if not isinstance(endpoint.result, str) else {}
    kind = endpoint.result if isinstance(endpoint.result, str) else JSON
    responses: dict[str, Any] = {"200": {"description": "Success", "content": {kind: result}}}
    if endpoint.cached:
        responses["304"] = {"description": "The image is the one that the client has"}
    for status, description in _ERRORS.items():
        if (status not in _OF_BODIES or endpoint.bodies) and (status != 401 or has_token):
            content = {JSON: {"schema": _reference(schemas.Error)}}
            responses[str(status)] = {"description": description, "content": content}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__,
        "parameters": _parameters(endpoint),
        "responses": responses,
    }
    if endpoint.bodies:
        content = {kind: {"schema": _reference(model)} for kind, model in endpoint.bodies.items()}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    schema = endpoint.params.model_json_schema()
    return [
        {
            "name": name,
            "in": "path" if f"{{{name}}}" in endpoint.path else "query",
            "required": name in schema.get("required", ()),
            "schema": value,
        }
        for name, value in schema.get("properties", {}).items()
    ]


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
