"""The files of the search page, read once from the package."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from coalign.serve.guard import Access

_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_INDEX = "index.html"


def page_routes(access: Access) -> list[Route]:
    """Returns a route per file of the folder `page`. `/?token=…` gives the browser the token's cookie and hides the token."""
    contents = {
        entry.name: entry.read_bytes()
        for entry in (files("coalign.serve") / "page").iterdir()
        if entry.name[entry.name.rfind(".") :] in _KINDS
    }

    def serve(request: Request) -> Response:
        if (token := request.query_params.get("token")) is not None and access.token is not None:
            if not access.is_token(token):
                return JSONResponse(
                    {"error": "The token is wrong; open the address that `coalign serve` printed."}, 401
                )
            response = RedirectResponse("/", 303)
            response.set_cookie(access.cookie, access.token, httponly=True, samesite="strict")
            return response
        name = request.scope["path"].removeprefix("/") or _INDEX
        kind = _KINDS[name[name.rfind(".") :]]
        return Response(contents[name], media_type=kind, headers={"cache-control": "no-cache"})

    return [Route("/" if name == _INDEX else f"/{name}", serve, methods=["GET"]) for name in contents]
