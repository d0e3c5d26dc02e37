"""Who may use the server, how large and slow a body may be, and the headers that every response has."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coalign.errors import UserError
from coalign.serve.limits import Limits

MIN_TOKEN = 12  # characters
_CONTENT = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "content-security-policy": _CONTENT,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


@dataclass(frozen=True)
class Access:
    """Who may use the API: with a token, whoever has it; without, pages and programs that address the server by one of `hosts`.

    The check of the host defeats DNS rebinding: the page of another site whose name resolves to 127.0.0.1.
    """

    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})
    token: str | None = None  # SHA-256, as is the cookie's value
    cookie: str = "coalign"

    def refusal(self, request: HTTPConnection) -> tuple[int, str] | None:
        """Returns the status and the sentence of the response to a request that is not allowed."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.token is None and name.lower() not in self.hosts:
            return (
                403,
                "The request's Host header is not this server's address; open it as http://localhost and the port.",
            )
        if not request.scope["path"].startswith("/api"):  # not request.url, which contains the Host header
            return None  # the page itself is public, so that links to it work before the browser has the cookie
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        foreign = (
            site in ("cross-site", "same-site") if site else origin is not None and urlsplit(origin).netloc != host
        )
        if foreign:
            return 403, "Another site's page sent the request; use the server's own page."
        if self.token is not None and not self._has_token(request):
            return (
                401,
                "A token is needed; open the address that `coalign serve` printed, or send it as a bearer token.",
            )
        return None

    def is_token(self, given: str) -> bool:
        """Compares in constant time."""
        return self.token is not None and hmac.compare_digest(digest(given), self.token)

    def _has_token(self, request: HTTPConnection) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        return hmac.compare_digest(request.cookies.get(self.cookie, "").encode(), (self.token or "").encode())


def digest(token: str) -> str:
    """Returns the token's SHA-256: of one length, and valid in a cookie, for any token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def resolve_token(token: str | None, local: bool, host: str) -> str | None:
    """Returns the token to use: `auto` generates one. Raises UserError if it is too weak, or if an address needs one and there is none."""
    if token == "auto":
        return secrets.token_urlsafe(24)
    if token is None:
        if not local:
            raise UserError(f"Other machines can reach {host}, so it needs a token; add --token auto.")
        return None
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--token must have at least {MIN_TOKEN} characters, ASCII without spaces; auto generates one.")
    return token


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits) -> None:
        self.app, self.access, self.limits = app, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = HTTPConnection(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_RAW_HEADERS]}
            await send(message)

        refusal = self.access.refusal(request)
        try:
            if refusal is None:
                await self.app(scope, self._bounded(request, receive), send_with_headers)
            else:
                challenge = {"www-authenticate": "Bearer"} if refusal[0] == 401 else None
                await JSONResponse({"error": refusal[1]}, refusal[0], challenge)(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass  # nobody to respond to

    def _bounded(self, request: HTTPConnection, receive: Receive) -> Receive:
        """Returns `receive` with limits on the body's bytes and time. It raises HTTPException, which becomes a response."""
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/")
        limit = self.limits.upload_bytes if is_form else self.limits.json_bytes
        deadline = asyncio.get_running_loop().time() + self.limits.body_seconds
        announced = int(length) if (length := request.headers.get("content-length", "")).isdecimal() else 0
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            if announced > limit:
                raise too_large(limit)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                sentence = f"The request's body did not arrive within {self.limits.body_seconds:g} seconds."
                raise HTTPException(408, sentence, {"connection": "close"}) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise too_large(limit)
            return message

        return bounded


def too_large(limit: int) -> HTTPException:
    size = f"{limit / (1 << 20):.3g} MiB" if limit >= 1 << 20 else f"{limit / 1024:.3g} KiB"
    return HTTPException(413, f"The request is too large; at most {size} are accepted.")
