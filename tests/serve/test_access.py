"""Who may use the API: hosts, tokens, other sites, and the headers of every response."""

import re

import httpx
import pytest
from helpers.collections import color_collection
from helpers.servers import exchange, running

from coalign.errors import UserError
from coalign.serve.guard import Access, digest, resolve_token

TOKEN = "correct horse"


@pytest.fixture(scope="module")
def local():
    with running([color_collection()]) as port:
        yield port


@pytest.fixture(scope="module")
def guarded():
    with running([color_collection()], Access(token=digest(TOKEN), cookie="coalign-1")) as port:
        yield port


def status(port, path="/api/health", host=None, **headers):
    host = f"127.0.0.1:{port}" if host is None else host
    sent = {"Host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=sent).status_code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LocalHost:7860", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("evil.example:7860", 403),
        ("localhost.evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost:80:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.2:7860", 403),
    ],
)
def test_only_local_names_are_served_without_a_token(local, host, expected):
    assert status(local, host=host) == expected
    assert status(local, "/", host=host) == expected


@pytest.mark.parametrize("head", [b"GET /api/health HTTP/1.0\r\n\r\n", b"GET /api/health HTTP/1.1\r\nHost:\r\n\r\n"])
def test_a_request_without_a_host_is_refused(local, head):
    assert exchange(local, head)[0] == 403


@pytest.mark.parametrize("host", ["", "a: b", "x" * 5000, "a\tb", "é"])
def test_malformed_hosts(local, host):
    code, body = exchange(local, b"GET /api/health HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n")
    assert code in (400, 403)
    assert list(body) == ["error"]


def test_pages_of_other_sites_are_refused(local, guarded):
    for port, token in ((local, {}), (guarded, {"Authorization": f"Bearer {TOKEN}"})):
        own = f"http://127.0.0.1:{port}"
        assert status(port, Origin=own, **token) == 200
        assert status(port, Sec_Fetch_Site="same-origin", **token) == 200
        assert status(port, Sec_Fetch_Site="none", **token) == 200
        assert status(port, Origin="https://evil.example", **token) == 403
        assert status(port, Origin="null", **token) == 403
        assert status(port, Origin=f"http://127.0.0.1:{port + 1}", **token) == 403
        assert status(port, Sec_Fetch_Site="cross-site", **token) == 403
        assert status(port, Sec_Fetch_Site="same-site", **token) == 403
        assert status(port, "/", Sec_Fetch_Site="cross-site", **token) == 200  # a link


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer", 401),
        (f"Bearer {digest(TOKEN)}", 401),
        ("Bearer é".encode(), 401),
        (None, 401),
    ],
)
def test_bearer_tokens(guarded, given, expected):
    headers = {} if given is None else {"Authorization": given}
    for path in ("/api/health", "/api/openapi.json", "/api/nothing"):
        wanted = 404 if expected == 200 and path.endswith("nothing") else expected
        response = httpx.get(f"http://127.0.0.1:{guarded}{path}", headers=headers)
        assert response.status_code == wanted
        if wanted == 401:
            assert "token is needed" in response.json()["error"]
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_token_is_served_under_any_host_name(guarded):
    assert status(guarded, host="photos.example", Authorization=f"Bearer {TOKEN}") == 200


@pytest.mark.parametrize("host", ["localhost/x?", "localhost/x#", "localhost/page.js?", "@", "/", "?", "#"])
def test_a_host_cannot_make_the_api_look_like_the_page(guarded, host):
    request = f"GET /api/health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert exchange(guarded, request.encode())[0] in (400, 401)


@pytest.mark.parametrize(
    "target", ["//api/health", "/%61pi/health", "/x/../api/health", "http://localhost/api/health", "/API/health"]
)
def test_other_spellings_of_a_path_need_the_token_too(guarded, target):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert exchange(guarded, request.encode())[0] in (400, 401, 404)


def test_the_address_with_the_token_sets_a_cookie_and_hides_it(guarded):
    with httpx.Client(base_url=f"http://127.0.0.1:{guarded}") as client:
        assert client.get("/").status_code == 200  # the page itself is no secret
        assert client.get("/api/collections").status_code == 401
        response = client.get("/", params={"token": TOKEN})
        assert (response.status_code, response.headers["location"]) == (303, "/")
        cookie = response.headers["set-cookie"]
        assert re.search(r"HttpOnly", cookie, re.I)
        assert re.search(r"SameSite=strict", cookie, re.I)
        assert "domain" not in cookie.lower()
        assert TOKEN not in cookie
        assert client.get("/api/collections").status_code == 200
    wrong = httpx.get(f"http://127.0.0.1:{guarded}/", params={"token": "wrong"})
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers


@pytest.mark.parametrize("cookie", ["coalign-1=", "coalign-1=x", "coalign-2=" + digest(TOKEN), "coalign-1=é", "; =; x"])
def test_wrong_cookies(guarded, cookie):
    request = f"GET /api/health HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"
    assert exchange(guarded, request.encode())[0] == 401


def test_a_server_without_tokens_sets_no_cookie(local):
    response = httpx.get(f"http://localhost:{local}/", params={"token": "anything"})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/api/health", "/api/image/0/1", "/api/image/0/99", "/nothing", "/api/map/x"]
)
def test_every_response_has_the_security_headers(local, path):
    headers = httpx.get(f"http://localhost:{local}{path}").headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]
    assert "server" not in headers


def test_a_preflight_is_refused(local):
    sent = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"http://localhost:{local}/api/search", headers=sent)
    assert response.status_code == 403


def test_a_failure_has_the_headers_and_one_sentence(local, monkeypatch):
    collection = color_collection()
    collection.answer = None  # calling it fails
    with running([collection]) as port:
        response = httpx.post(f"http://localhost:{port}/api/search", json={"text": "red"})
        assert response.status_code == 500
        assert list(response.json()) == ["error"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"http://localhost:{port}/api/health").status_code == 200


def test_tokens():
    assert resolve_token(None, True, "127.0.0.1") is None
    assert resolve_token("long-enough-token", False, "0.0.0.0") == "long-enough-token"
    generated = {resolve_token("auto", False, "0.0.0.0") for _ in range(3)}
    assert len(generated) == 3
    assert min(map(len, generated)) >= 32
    with pytest.raises(UserError, match=r"Other machines can reach 0\.0\.0\.0.*--token auto"):
        resolve_token(None, False, "0.0.0.0")
    for weak in ("short", "", "has spaces in it", "längere Zeichen", "tab\tin the middle"):
        with pytest.raises(UserError, match="at least 12 characters"):
            resolve_token(weak, True, "127.0.0.1")
