"""Each endpoint against values computed here from the colors of the images."""

import io
import json

import httpx
import numpy as np
import pytest
import torch
from helpers.collections import COLORS, ColorRecords, color_collection, color_vector, image_bytes, random_colors, unit
from helpers.servers import running
from PIL import Image

from coalign.workflows.collection.nearest import ExactVectors
from coalign.workflows.collection.query import Collection
from coalign.workflows.evaluate.eval_model import open_eval_model

SIZE = 24


@pytest.fixture(scope="module")
def client():
    collections = [color_collection(SIZE, lost=(5,)), color_collection(7, seed=1, name="few")]
    with running(collections) as port, httpx.Client(base_url=f"http://localhost:{port}/api", timeout=30) as client:
        yield client


def vectors(count=SIZE, seed=0):
    return np.stack([unit(color) for color in random_colors(count, seed)])


def best(scores):
    return np.argsort(-scores, kind="stable").tolist()


def rows(response):
    assert response.status_code == 200, response.text
    return [hit["row"] for hit in response.json()["hits"]]


def test_collections(client):
    found = client.get("/collections").json()["collections"]
    assert [(each["id"], each["name"], each["size"], each["dim"]) for each in found] == [
        (0, "colors", 24, 3),
        (1, "few", 7, 3),
    ]
    assert found[0]["folders"] == [["even", 12], ["odd", 12]]
    assert found[0]["tags"] == [["third-0", 8], ["third-1", 8], ["third-2", 8]]
    assert found[0]["model"] == "mean color"
    assert found[0]["can"] == {"localize": False, "joint": False}
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
def test_search_by_text(client, form):
    given = {"text": "a red image", "top": 5}
    sent = {"files": {name: (None, str(value)) for name, value in given.items()}} if form else {"json": given}
    response = client.post("/search", **sent)
    scores = vectors() @ color_vector("red")
    assert rows(response) == best(scores)[:5]
    hit = response.json()["hits"][0]
    row = hit["row"]
    assert hit["score"] == pytest.approx(scores[row], abs=1e-5)
    assert hit["captions"] == [f"image {row}"]
    assert hit["tags"] == [f"third-{row % 3}"]
    assert hit["key"].endswith(f"/{row}.png")
    assert response.json()["query"] == "text"
    assert 0 <= response.json()["seconds"] < 30


def test_search_by_an_uploaded_image_and_by_an_indexed_one(client):
    scores = vectors() @ unit((10, 200, 200))
    response = client.post("/search", files={"image": ("x.png", image_bytes((10, 200, 200))), "top": (None, "4")})
    assert rows(response) == best(scores)[:4]
    response = client.post("/search", json={"like": "even/8.png", "top": 4})
    assert rows(response) == best(vectors() @ vectors()[8])[:4]
    assert rows(response)[0] == 8


def test_parts_of_a_query_are_standardized_and_what_to_exclude_counts_half(client):
    parts = vectors() @ np.stack([color_vector("red"), vectors()[3], color_vector("blue")]).T
    scores = (parts - parts.mean(0)) / parts.std(0) @ np.array([1, 1, -0.5])
    response = client.post("/search", json={"text": "red", "like": "odd/3.png", "exclude": "blue", "top": 24})
    assert rows(response) == best(scores)


def test_filters_and_collections(client):
    response = client.post("/search", json={"text": "blue", "tags": ["third-1"], "folder": "odd"})
    scores = vectors() @ color_vector("blue")
    assert rows(response) == [row for row in best(scores) if row % 2 == 1 and row % 3 == 1]
    fields = [("text", (None, "blue")), ("tags", (None, "third-1")), ("collection", (None, "1"))]
    scores = vectors(7, 1) @ color_vector("blue")
    assert rows(client.post("/search", files=fields)) == [row for row in best(scores) if row % 3 == 1]


def test_an_image_has_a_key_captions_and_tags(client):
    found = client.get("/item/0/7").json()
    assert found == {"row": 7, "key": "odd/7.png", "captions": ["image 7"], "tags": ["third-1"]}


@pytest.mark.parametrize(("side", "size"), [(None, (80, 40)), (20, (20, 10)), (1600, (80, 40))])
def test_images_are_encoded_anew(client, side, size):
    response = client.get("/image/0/4", params={} if side is None else {"side": side})
    assert response.headers["content-type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(response.content))
    assert (picture.format, picture.size) == ("JPEG", size)
    np.testing.assert_allclose(np.asarray(picture)[5, 5], random_colors(SIZE)[4], atol=6)


def test_browsers_keep_images_until_the_server_stops(client):
    first = client.get("/image/0/4")
    assert first.headers["cache-control"] == "private, no-cache"
    again = client.get("/image/0/4", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    with running([color_collection(SIZE)]) as port:
        url = f"http://localhost:{port}/api/image/0/4"
        assert httpx.get(url, headers={"If-None-Match": first.headers["etag"]}).status_code == 200


def softmax(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


@pytest.mark.parametrize("given", [{"row": "9"}, {"image": None}])
def test_classify(client, given):
    color = random_colors(SIZE)[9]
    fields = [("row", (None, "9"))] if "row" in given else [("image", ("x.jpg", image_bytes(color, kind="BMP")))]
    fields += [("labels", (None, label)) for label in COLORS]
    found = client.post("/classify", files=fields).json()["labels"]
    expected = softmax(10.0 * np.array([color_vector(label) @ unit(color) for label in COLORS]))
    by_label = {each["label"]: each["probability"] for each in found}
    np.testing.assert_allclose([by_label[label] for label in COLORS], expected, atol=1e-4)
    assert [each["probability"] for each in found] == sorted(by_label.values(), reverse=True)


def test_prompts_of_labels_are_averaged(client):
    fields = [("row", (None, "9")), ("labels", (None, "red")), ("labels", (None, "blue"))]
    fields += [("prompts", (None, "{}")), ("prompts", (None, "{} and green"))]
    found = {each["label"]: each["probability"] for each in client.post("/classify", files=fields).json()["labels"]}
    classes = [unit(color_vector(label) + color_vector(f"{label} and green")) for label in ("red", "blue")]
    expected = softmax(10.0 * np.stack(classes) @ unit(random_colors(SIZE)[9]))
    np.testing.assert_allclose([found["red"], found["blue"]], expected, atol=1e-4)


def test_classify_collection(client):
    given = {"labels": ["red", "green", "blue"], "prompts": ["{}", "{} and yellow"], "top": 2}
    found = client.post("/classify-collection", json=given).json()["labels"]
    classes = np.stack([unit(color_vector(label) + color_vector(f"{label} and yellow")) for label in given["labels"]])
    scores = vectors() @ classes.T
    assert [each["label"] for each in found] == given["labels"]
    assert sum(each["count"] for each in found) == SIZE
    for number, each in enumerate(found):
        mine = [row for row in best(scores[:, number]) if scores[row].argmax() == number]
        assert each["count"] == len(mine)
        assert [hit["row"] for hit in each["hits"]] == mine[:2]
        np.testing.assert_allclose([hit["score"] for hit in each["hits"]], scores[mine[:2], number], atol=1e-5)


def test_map_is_the_projection_to_principal_components(client):
    points = client.get("/map/0").json()["points"]
    assert [row for row, _, _ in points] == list(range(SIZE))
    places = np.array(points)[:, 1:]
    assert (places >= 0).all() and (places <= 1).all()  # noqa: PT018
    left, values, _ = np.linalg.svd(vectors() - vectors().mean(0), full_matrices=False)
    expected = left[:, :2] * values[:2]

    def distances(each):
        return np.linalg.norm(each[:, None] - each[None], axis=2)

    widest = np.ptp(expected, axis=0).max()
    np.testing.assert_allclose(distances(places), distances(expected) / widest, atol=1e-4)


def test_map_of_a_large_collection_has_5000_points():
    with running([color_collection(6001)]) as port:
        points = httpx.get(f"http://localhost:{port}/api/map/0", timeout=30).json()["points"]
    found = [row for row, _, _ in points]
    assert (len(found), found[0], found[-1]) == (5000, 0, 6000)
    assert found == sorted(set(found))


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_collections_have_a_map(count):
    with running([color_collection(count)]) as port:
        points = httpx.get(f"http://localhost:{port}/api/map/0").json()["points"]
    assert len(points) == count
    assert all(0 <= x <= 1 and 0 <= y <= 1 for _, x, y in points)


def test_localize_without_maps_says_so(client):
    response = client.post("/localize", json={"row": 1, "text": "red"})
    assert response.status_code == 422
    assert "mean color is not a coalign run" in response.json()["error"]


ERRORS = [
    ("POST", "/search", {"json": {}}, 422, "nothing to search for"),
    ("POST", "/search", {"json": {"text": " "}}, 422, "The field text must not be blank."),
    ("POST", "/search", {"json": {"text": "x", "top": 501}}, 422, "The field top must be at most 500."),
    ("POST", "/search", {"json": {"text": "x", "top": True}}, 422, "The field top must be a whole number."),
    ("POST", "/search", {"json": {"text": "x" * 2001}}, 422, "The field text must have at most 2000 characters."),
    ("GET", "/image/0/0?size=64", {}, 422, "The field size is not known."),
    ("POST", "/search", {"json": {"text": "x", "texts": "y"}}, 422, "The field texts is not known."),
    ("POST", "/search", {"json": {"text": "x", "collection": 2}}, 404, "no collection 2"),
    ("POST", "/search", {"json": {"like": "even/0"}}, 422, "'even/0.png'"),
    ("POST", "/search", {"json": {"text": "x", "tags": ["none"]}}, 422, "No image has the tag 'none'"),
    ("POST", "/search", {"content": b"{", "headers": {"content-type": "application/json"}}, 422, "JSON"),
    ("POST", "/search", {"content": b"text=x"}, 415, "application/json or multipart/form-data"),
    (
        "POST",
        "/search",
        {"files": [("text", (None, "a")), ("text", (None, "b"))]},
        422,
        "The field text must be one text.",
    ),
    ("POST", "/search", {"files": {"image": ("x.png", b"no image")}}, 422, "not an image"),
    ("POST", "/search", {"files": {"image": ("x.png", image_bytes((1, 2, 3))[:60])}}, 422, "cannot be used"),
    (
        "POST",
        "/classify",
        {"files": [("labels", (None, "a")), ("labels", (None, "b"))]},
        422,
        "Give either row or image",
    ),
    ("POST", "/classify", {"files": {"row": (None, "1")}}, 422, "The field labels is missing."),
    ("POST", "/classify-collection", {"json": {"labels": ["a", "a"]}}, 422, "once"),
    ("POST", "/classify-collection", {"json": {"labels": ["a"]}}, 422, "The field labels must have at least 2 values."),
    ("GET", "/item/0/24", {}, 404, "no row 24"),
    (
        "POST",
        "/classify-collection",
        {"json": {"labels": ["a", "b"], "prompts": ["{} {}"]}},
        422,
        "The field prompts.0 must have {} once,",
    ),
    ("GET", "/image/0/24", {}, 404, "no row 24"),
    ("GET", "/image/0/5", {}, 404, "gone"),
    ("GET", "/image/0/-1", {}, 422, "The field row must be at least 0."),
    ("GET", "/image/0/1?side=1601", {}, 422, "field side"),
    ("GET", "/image/0/1.5", {}, 422, "The field row must be a whole number."),
    ("GET", "/map/7", {}, 404, "no collection 7"),
    ("GET", "/nothing", {}, 404, "nothing at this address"),
    ("GET", "/search", {}, 405, "does not accept the method"),
]


@pytest.mark.parametrize(("method", "path", "sent", "status", "sentence"), ERRORS)
def test_errors_are_one_sentence(client, method, path, sent, status, sentence):
    response = client.request(method, path, **sent)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sentence in error
    assert error.endswith(".")
    assert "\n" not in error


def test_description_is_of_the_routes_and_their_bounds(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        *("/api/health", "/api/collections", "/api/search", "/api/image/{collection}/{row}", "/api/classify"),
        *("/api/item/{collection}/{row}", "/api/classify-collection", "/api/localize", "/api/map/{collection}"),
    }
    schemas = document["components"]["schemas"]
    assert schemas["SearchJson"]["properties"]["top"]["maximum"] == 500
    assert "image" not in schemas["SearchJson"]["properties"]
    assert set(document["paths"]["/api/search"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    assert "securitySchemes" not in document["components"]
    json.dumps(document)


def test_localize_draws_the_models_map_over_the_image(oner):
    model = open_eval_model(oner)
    records = ColorRecords(random_colors(3), side=64)
    collection = Collection("photos", model, ExactVectors(np.eye(3, dtype=np.float32)), records)
    with running([collection]) as port:
        url = f"http://localhost:{port}/api"
        assert httpx.get(f"{url}/collections").json()["collections"][0]["can"] == {"localize": True, "joint": True}
        response = httpx.post(f"{url}/localize", json={"row": 1, "text": "a red heart"}, timeout=60)
    assert response.headers["content-type"] == "image/png"
    drawn = np.asarray(Image.open(io.BytesIO(response.content)))
    size = model.encoder.image_size
    pixels = torch.tensor(random_colors(3)[1], dtype=torch.uint8)[:, None, None].expand(3, size, size)
    heat = model.localizer()[0](pixels[None], ["a red heart"])[None].float()
    heat = torch.nn.functional.interpolate(heat, drawn.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    gray = random_colors(3)[1].mean() * 0.75 + 64
    lowest, highest = np.unravel_index(heat.argmin(), heat.shape), np.unravel_index(heat.argmax(), heat.shape)
    np.testing.assert_allclose(drawn[lowest], gray, atol=2)
    np.testing.assert_allclose(drawn[highest], 0.1 * gray + 0.9 * 255 * np.array([0.71, 0.17, 0.11]), atol=3)
