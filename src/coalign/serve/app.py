"""The application: its routes, and one sentence for each error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coalign.errors import UserError
from coalign.serve.api import ENDPOINTS, route
from coalign.serve.description import describe
from coalign.serve.guard import Access, Guard
from coalign.serve.limits import DEFAULT_LIMITS, Limits
from coalign.serve.page import page_routes
from coalign.serve.service import Service
from coalign.serve.worker import Worker
from coalign.workflows.collection.query import Collection


def create_app(
    collections: Sequence[Collection], access: Access | None = None, limits: Limits = DEFAULT_LIMITS
) -> ASGIApp:
    """Returns the page and the API over the collections, as an ASGI application behind its guard."""
    access = access or Access()
    service = Service(collections, limits)
    workers = {"model": Worker(limits.waiting), "images": Worker(limits.connections)}
    description = describe(ENDPOINTS, access.token is not None)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for worker in workers.values():
            worker.close()

    app = Starlette(
        routes=[
            *page_routes(access),
            Route("/api/openapi.json", lambda request: JSONResponse(description), methods=["GET"]),
            *(route(endpoint, service, workers) for endpoint in ENDPOINTS),
        ],
        exception_handlers={HTTPException: _http_error, UserError: _user_error, Exception: _failure},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return Guard(app, access, limits)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {404: "There is nothing at this address.", 405: "This address does not accept the method."}
    detail = sentence[error.status_code] if error.detail in ("Not Found", "Method Not Allowed") else error.detail
    return JSONResponse({"error": detail}, error.status_code, error.headers)


def _user_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed on this request; its terminal shows the details."}, 500)
