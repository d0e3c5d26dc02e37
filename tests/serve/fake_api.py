"""A server with the REST API of `coalign serve` and drawn pictures: what the page's tests run against.

It has no model: a text finds the captions that share its words, an image the pictures of a similar color.
"""

import io
import math
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image, ImageDraw
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

import coalign.serve

PAGE = Path(coalign.serve.__file__).parent / "page"
COLORS = {
    "red": (200, 52, 46),
    "orange": (226, 136, 40),
    "green": (58, 140, 82),
    "blue": (48, 96, 178),
    "purple": (124, 74, 160),
    "gray": (128, 132, 138),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
HOSTILE = '<img src=x onerror="window.attacked=true"><b>bold</b>'
# the strictest policy that the page must work under
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Item:
    """One drawn picture. `spot` is where its shape is, in fractions of the frame."""

    row: int
    color: str
    shape: str
    size: str
    spot: tuple[float, float]

    @property
    def key(self):
        return f"{self.color}/{self.size}-{self.shape}-{self.row}.png"

    @property
    def captions(self):
        if self.row == 5:
            return [HOSTILE, "a caption that is markup"]
        if self.row == 6:
            return []
        return [f"a {self.size} {self.color} {self.shape}", f"{self.color} {self.shape} on a pale ground"]

    @property
    def tags(self):
        return [self.color, self.shape]

    def json(self, **more):
        return {"row": self.row, "key": self.key, "captions": self.captions, "tags": self.tags, **more}


def draw(item, side):
    width, height = (side, side * 3 // 4) if item.row % 3 else (side * 3 // 4, side)
    image = Image.new("RGB", (width, height), (238, 236, 230))
    radius = min(width, height) * (0.34 if item.size == "large" else 0.18)
    x, y = item.spot[0] * width, item.spot[1] * height
    corners = {"square": 4, "triangle": 3, "star": 10}.get(item.shape)
    pen = ImageDraw.Draw(image)
    if corners is None:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[item.color])
    else:
        turn = math.pi / 4 if item.shape == "square" else -math.pi / 2
        lengths = [radius * (0.42 if item.shape == "star" and corner % 2 else 1) for corner in range(corners)]
        points = [
            (
                x + length * math.cos(turn + 2 * math.pi * at / corners),
                y + length * math.sin(turn + 2 * math.pi * at / corners),
            )
            for at, length in enumerate(lengths)
        ]
        pen.polygon(points, fill=COLORS[item.color])
    return image


def items():
    made = []
    rng = np.random.default_rng(0)
    for _ in range(2):
        for color in COLORS:
            for shape in SHAPES:
                for size in SIZES:
                    x, y = 0.35 + 0.3 * rng.random(2)
                    made.append(Item(len(made), color, shape, size, (float(x), float(y))))
    return made


ITEMS = items()


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def vectors(side):
    """Embeddings of a sort: of color and shape. The second collection hardly sees shapes."""
    colors = np.array([COLORS[item.color] for item in ITEMS]) / 255 - 0.5
    shapes = np.eye(len(SHAPES))[[SHAPES.index(item.shape) for item in ITEMS]]
    return np.concatenate([colors, shapes * (0.6 if side == 0 else 0.05)], axis=1)


def similarity(side, item, text):
    own = words(" ".join([item.color, item.size, item.shape, *item.captions]))
    sought = words(text) - {"a", "on", "of", "the"}
    if side == 1:
        sought -= set(SHAPES)
    share = len(own & sought) / max(1, len(sought))
    return 0.12 + 0.3 * share - 0.0003 * item.row


class Fake:
    """The server. `requests` lists what was sent; `broken` makes the paths that start with it fail."""

    def __init__(self, collections=2):
        self.collections = collections
        self.requests = []
        self.broken = {}
        routes = [
            Route("/", lambda request: FileResponse(PAGE / "index.html")),
            Route("/api/collections", self.list),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/item/{collection:int}/{row:int}", self.item),
            Route("/api/image/{collection:int}/{row:int}", self.image),
            Route("/api/classify", self.classify, methods=["POST"]),
            Route("/api/classify-collection", self.classify_collection, methods=["POST"]),
            Route("/api/localize", self.localize, methods=["POST"]),
            Route("/api/map/{collection:int}", self.map),
            Route("/{file}", self.file),
        ]
        errors = {HTTPException: lambda request, error: JSONResponse({"error": error.detail}, error.status_code)}
        self.app = Starlette(routes=routes, exception_handlers=errors, middleware=[Middleware(self.headers)])

    def headers(self, app):
        async def wrapped(scope, receive, send):
            if scope["type"] == "http":
                self.requests.append(scope["path"])
                for start, (status, sentence) in self.broken.items():
                    if scope["path"].startswith(start):
                        return await JSONResponse({"error": sentence}, status)(scope, receive, send)

            async def with_policy(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await app(scope, receive, with_policy)

        return wrapped

    async def file(self, request):
        path = PAGE / request.path_params["file"]
        if path.suffix not in (".js", ".css") or not path.is_file():
            raise HTTPException(404, "There is no such page.")
        return FileResponse(path)

    async def list(self, request):
        def described(side):
            tags = [[tag, sum(tag in item.tags for item in ITEMS)] for tag in (*COLORS, *SHAPES)]
            folders = [[color, sum(item.color == color for item in ITEMS)] for color in COLORS]
            return {
                "id": side,
                "name": ("shapes", "shapes, before")[side],
                "model": ("oner, 10 epochs", "oner, untrained")[side],
                "size": len(ITEMS),
                "dim": 7,
                "tags": tags,
                "folders": folders,
                "can": {"localize": side == 0, "joint": side == 0},
            }

        return JSONResponse({"collections": [described(side) for side in range(self.collections)]})

    async def search(self, request):
        form = await request.form()
        side, text, like = int(form.get("collection", 0)), form.get("text"), form.get("like")
        scores = np.zeros(len(ITEMS))
        parts = []
        if text:
            parts.append("text")
            scores += [similarity(side, item, text) for item in ITEMS]
        known = vectors(side)
        if like:
            parts.append("an image of the collection")
            rows = [item.row for item in ITEMS if item.key == like]
            if not rows:
                raise HTTPException(404, f"{like} is not in this collection. Search by its picture instead.")
            scores += 1 - np.linalg.norm(known - known[rows[0]], axis=1)
        if "image" in form:
            parts.append("image")
            with Image.open(io.BytesIO(await form["image"].read())) as image:
                pixel = np.asarray(image.convert("RGB").resize((9, 9)))[4, 4] / 255 - 0.5
            scores += 1 - np.linalg.norm(known[:, :3] - pixel, axis=1)
        if not parts:
            raise HTTPException(422, "Give a text, an image or both.")
        if form.get("exclude"):
            scores -= [0.5 * similarity(side, item, form["exclude"]) for item in ITEMS]
        kept = [
            item
            for item in ITEMS
            if set(form.getlist("tags")) <= set(item.tags) and form.get("folder") in (None, "", item.color)
        ]
        kept.sort(key=lambda item: -scores[item.row])
        hits = [item.json(score=float(scores[item.row])) for item in kept[: int(form.get("top", 60))]]
        joint = side == 0 and len(parts) == 2
        query = "image and text as one sequence" if joint else " and ".join(parts)
        return JSONResponse({"hits": hits, "query": query, "missing": 0, "seconds": 0.004})

    async def item(self, request):
        return JSONResponse(self.row(request.path_params["row"]).json())

    async def image(self, request):
        item = self.row(request.path_params["row"])
        return png(draw(item, min(1600, int(request.query_params.get("side", 256)))))

    def row(self, row):
        if not 0 <= row < len(ITEMS):
            raise HTTPException(404, f"There is no image {row}.")
        return ITEMS[row]

    async def classify(self, request):
        form = await request.form()
        labels = form.getlist("labels")
        if len(labels) < 2:
            raise HTTPException(422, "Give at least two labels.")
        if "row" in form:
            scores = [similarity(0, self.row(int(form["row"])), label) for label in labels]
        else:
            scores = [-number for number in range(len(labels))]
        weights = np.exp(np.array(scores) * 12)
        found = [{"label": label, "probability": float(p)} for label, p in zip(labels, weights / weights.sum())]
        return JSONResponse({"labels": found})

    async def classify_collection(self, request):
        body = await request.json()
        labels = body["labels"]
        if len(labels) < 2:
            raise HTTPException(422, "Give at least two labels.")
        groups = [[] for _ in labels]
        for item in ITEMS:
            scores = [similarity(body["collection"], item, label) for label in labels]
            groups[int(np.argmax(scores))].append(item.json(score=max(scores)))
        found = [
            {"label": label, "count": len(group), "hits": group[: body["top"]]} for label, group in zip(labels, groups)
        ]
        return JSONResponse({"labels": found})

    async def localize(self, request):
        body = await request.json()
        item = self.row(body["row"])
        picture = np.asarray(draw(item, 512), float)
        height, width = picture.shape[:2]
        y, x = np.mgrid[:height, :width]
        distance = (x - item.spot[0] * width) ** 2 + (y - item.spot[1] * height) ** 2
        heat = np.exp(-distance / (2 * (0.15 * width) ** 2))[..., None] * 0.6
        return png(Image.fromarray(((1 - heat) * picture + heat * np.array([220, 30, 20])).astype(np.uint8)))

    async def map(self, request):
        known = vectors(request.path_params["collection"])
        centered = known - known.mean(0) + np.random.default_rng(1).normal(0, 0.06, known.shape)
        plane = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
        plane = (plane - plane.min(0)) / (plane.max(0) - plane.min(0))
        return JSONResponse({"points": [[row, *map(float, point)] for row, point in enumerate(plane)]})


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Response(buffer.getvalue(), media_type="image/png")


@contextmanager
def serving(app):
    """The address of a server of the app, on a free port, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)
