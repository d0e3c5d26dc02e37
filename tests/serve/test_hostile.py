"""Requests that are meant to harm: paths, huge numbers, large bodies, broken images and decompression bombs."""

import io
import struct
import tracemalloc
import zlib

import httpx
import numpy as np
import pytest
from helpers.collections import color_collection, image_bytes
from helpers.servers import exchange, running
from PIL import Image, PngImagePlugin

from coalign.serve.limits import Limits

# one for all requests, as creating it takes longer than a request
CLIENT = httpx.Client(timeout=30, headers={"Connection": "close"})
LIMITS = Limits(json_bytes=4096, upload_bytes=200_000, image_pixels=1_000_000)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with running([color_collection()], limits=LIMITS) as port:
        yield port


def post(port, path="/api/search", **sent):
    return CLIENT.post(f"http://localhost:{port}{path}", **sent)


def raw(port, target, method="GET"):
    return exchange(port, f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


TARGETS = [
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/page.js/../../server.py",
    "/server.py",
    "/__init__.py",
    "//etc/passwd",
    "/.",
    "/%00",
    "/page.js%00.html",
    "/api/image/0/../../../etc/passwd",
    "/api/image/0/..%2f..%2fetc%2fpasswd",
    "/api/image/%2e%2e/1",
    "/api/image/0/file:%2f%2f%2fetc%2fpasswd",
    "/api/image/0/1%00",
    "/api/image/0/" + "9" * 5000,
    "/api/image/" + "9" * 400 + "/1",
    "/api/image/0/-1",
    "/api/image/0/1e3",
    "/api/image/0/0x1",
    "/api/image/0/٣",
    "/api/image/0/nan",
    "/api/image/0/1?side=" + "9" * 4000,
    "/api/image/0/1?side=-1",
    "/api/image/0/1?side=" + "%ff",
    "/api/map/999999999999",
    "/api/image/0/1/",
    "/api/",
]


@pytest.mark.parametrize("target", TARGETS, ids=range(len(TARGETS)))
def test_no_path_reaches_a_file(port, target):
    code, body = raw(port, target.encode("utf-8").decode("latin-1") if not target.isascii() else target)
    assert code in (400, 404, 422)
    assert list(body) == ["error"]
    assert "root:" not in body["error"]


@pytest.mark.parametrize(
    "key", ["../../../../etc/passwd", "/etc/passwd", "even/../even/8.png", "even/8.png\0", "e" * 4000]
)
def test_keys_are_looked_up_not_opened(port, key):
    assert post(port, json={"like": key}).status_code == 422
    assert post(port, json={"text": "x", "folder": key}).status_code == 422


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "NaN", "Infinity", "9" * 3000, "-1", "1.5", "true", "null", '"1"', "[1]", "{}"]
)
@pytest.mark.parametrize("name", ["top", "collection"])
def test_numbers_in_json(port, name, number):
    response = post(port, content=f'{{"text": "x", "{name}": {number}}}', headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert name in response.json()["error"] or "JSON" in response.json()["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 4000,
        b'{"text":' * 500,
        b"\xff\xfe",
        b'{"text": "\\ud800"}',
        b'{"text": "\xc3\x28"}',
        b"null",
        b'"x"',
        b"{}}",
    ],
)
def test_broken_json(port, content):
    response = post(port, content=content, headers={"content-type": "application/json; charset=utf-8"})
    assert response.status_code == 422
    assert list(response.json()) == ["error"]


def test_texts_of_any_characters_are_searched(port):
    for text in ("\0", "\u202e", "😀" * 100, "a\n\tb", "<script>alert(1)</script>", "%s {} {0}"):
        assert post(port, json={"text": text}).status_code == 200


def form_body(*parts, boundary=b"x"):
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


FIELD = b'Content-Disposition: form-data; name="text"\r\n\r\nred'


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("multipart/form-data; boundary=x", form_body(FIELD), 200),
        ("multipart/form-data; boundary=x; charset=nonsense", form_body(FIELD), 200),
        ("Multipart/Form-Data; boundary=x", form_body(FIELD), 200),
        ("multipart/form-data", form_body(FIELD), 400),
        ("multipart/form-data; boundary=y", form_body(FIELD), 400),
        ("multipart/form-data; boundary=", form_body(FIELD), 400),
        ("multipart/form-data; boundary=" + "x" * 300, form_body(FIELD), 400),
        ("multipart/form-data; boundary=x", b"", (400, 422)),
        ("multipart/form-data; boundary=x", b"--x\r\n", (400, 422)),
        ("multipart/form-data; boundary=x", form_body(b"\r\n\r\nred"), 400),
        ("multipart/form-data; boundary=x", form_body(b"Content-Disposition: form-data\r\n\r\nred"), 400),
        ("multipart/form-data; boundary=x", form_body(*[FIELD] * 1500), (400, 413)),
        ("multipart/form-data; boundary=x", form_body(b'Content-Disposition: form-data; name="text"\r\n\r\n' + b"x" * 100_000), 400),
        ("multipart/form-data; boundary=x", form_body(FIELD.replace(b"red", b"\xff\xfe")), 200),
        ("multipart/mixed; boundary=x", form_body(FIELD), 415),
        ("text/plain", form_body(FIELD), 415),
        ("application/x-www-form-urlencoded", b"text=red", 415),
    ],
)  # fmt: skip
def test_malformed_forms(port, kind, content, status):
    response = post(port, content=content, headers={"content-type": kind})
    assert response.status_code in (status if isinstance(status, tuple) else (status,)), response.text
    if response.status_code != 200:
        assert list(response.json()) == ["error"]


def test_file_names_are_ignored(port):
    files = {"image": ("../../../../tmp/x\0.png", image_bytes((1, 2, 3)), "text/html")}
    assert post(port, files=files).status_code == 200


def stream(total, size=10_000):
    for _ in range(total // size):
        yield b"x" * size


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(port, kind, chunked):
    content = stream(400_000) if chunked else b"x" * 400_000
    prefix = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    content = (part for part in (prefix, *content)) if chunked else prefix + content
    try:
        response = post(port, content=content, headers={"content-type": kind})
    except httpx.WriteError:  # the connection closed while it was sent
        return
    assert response.status_code == 413
    assert "too large" in response.json()["error"]


def test_a_body_announced_as_large_is_refused_before_it_arrives(port):
    head = "POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    assert exchange(port, head.encode())[0] == 413


def png_of(width, height):
    """A valid PNG of zeros, a thousandth of its decoded size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_decompression_bombs_are_not_decoded(port):
    bomb = png_of(4000, 4000)
    assert len(bomb) < 100_000
    tracemalloc.start()
    response = post(port, files={"image": ("x.png", bomb)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert response.status_code == 422
    assert "4000 × 4000 pixels" in response.json()["error"]
    assert peak < 10e6
    response = post(
        port,
        files={"image": ("x.png", png_of(1, 2)[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png_of(1, 2)[24:])},
    )
    assert response.status_code == 422


def test_bombs_in_the_metadata_are_not_read(port):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 50_000_000, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    assert len(file.getvalue()) < 100_000
    assert post(port, files={"image": ("x.png", file.getvalue())}).status_code in (200, 422)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "PPM"])
def test_broken_images_are_refused_or_searched(port, kind):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    data, rng = file.getvalue(), np.random.default_rng(1)
    assert post(port, files={"image": ("x", data)}).status_code == 200
    for _ in range(20):
        broken = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(broken), 5):
            broken[place] = rng.integers(256)
        response = post(port, files={"image": ("x", bytes(broken))})
        assert response.status_code in (200, 422), response.text


@pytest.mark.parametrize(
    "data", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_files_that_are_not_raster_images_are_refused(port, data):
    response = post(port, files={"image": ("x.png", data)})
    assert response.status_code == 422


def test_nothing_but_pixels_leaves_the_server():
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    original = image_bytes(
        (9, 99, 199), kind="JPEG", exif=exif, comment=b"a secret comment", icc_profile=b"a secret profile"
    )
    assert original.count(b"secret") == 3
    collection = color_collection()
    collection.records.image = lambda row: original
    with running([collection]) as port:
        response = httpx.get(f"http://localhost:{port}/api/image/0/1")
        fields = [("row", (None, "1")), ("labels", (None, "red")), ("labels", (None, "blue"))]
        assert httpx.post(f"http://localhost:{port}/api/classify", files=fields).status_code == 200
    assert response.status_code == 200
    assert b"secret" not in response.content


def test_too_many_texts_of_labels_are_refused():
    with running([color_collection()]) as port:
        given = {"labels": [f"label {number}" for number in range(900)], "prompts": [f"{{}} {n}" for n in range(50)]}
        response = post(port, "/api/classify-collection", json=given)
    assert response.status_code == 422
    assert "at most 2000 texts" in response.json()["error"]
