"""Renders docs/methods/NAME.svg: one training step of each method with its default settings, and overview.svg, a table of all methods.

Run: python scripts/render_method_diagrams.py, and commit what it writes. `tests/test_diagrams.py` checks that the files are up to date.

All pictures share columns (views, encoders, heads, embeddings, losses) and colors: blue is image, green is text, violet is both. What CLIP
has is outlined in gray, what a method adds in orange. An EMA copy is dashed, and // marks a path without gradient. method_pictures.py
holds the drawing vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from method_pictures import (
    ACCENT,
    CAPTION,
    CLIP,
    EDITED,
    EMA,
    EMBED,
    EMBED_IN,
    EMBED_OUT,
    ENCODER,
    ENCODER_IN,
    ENCODER_OUT,
    HEAD,
    HEAD_IN,
    HEAD_OUT,
    IMAGE_OUT,
    INK,
    MASKED,
    NEW,
    PALE,
    SMALL,
    STRONG_1,
    STRONG_2,
    TEXT_OUT,
    VIEW,
    WEAK,
    Picture,
)

FOLDER = Path(__file__).parents[1] / "docs/methods"


def clip() -> Picture:
    picture = Picture(
        "One training step of CLIP",
        "One image view passes the image encoder and one caption passes the text encoder. A linear layer after each gives one embedding "
        "per image and per caption. InfoNCE pulls each image and its own caption together and pushes other pairs of the batch apart.",
        height=330,
    )
    picture.tower(50, 130, "image")
    picture.clip_pair(90, 230)
    for row in range(4):
        for column in range(4):
            picture.cell(596 + 22 * column, 127 + 22 * row, CLIP, filled=row == column)
    picture.note(629, 92, "images × texts")
    picture.note(704, 244, "diagonal: pull together\nothers: push apart", "end")
    picture.legend(notes="linear: projection to the shared space")
    return picture


def filip() -> Picture:
    picture = Picture(
        "One training step of FILIP",
        "The image encoder gives one embedding per patch and the text encoder one per token. Every patch is compared with every token. "
        "The mean over patches of the most similar token, and the mean over tokens of the most similar patch, are the two similarities "
        "that InfoNCE compares over the batch.",
        height=440,
    )
    picture.image(168, WEAK, "weak crop")
    picture.caption(316, CAPTION, "caption")
    picture.tower(128, 208, "image")
    picture.tower(276, 356, "text")
    for start, y in ((IMAGE_OUT, 168), (TEXT_OUT, 316)):
        picture.wire((start, y), (ENCODER_IN, y))
        for offset in (-24, -8, 8, 24):
            picture.wire((ENCODER_OUT, y + offset), (HEAD_IN, y + offset), kind=NEW, arrow=False)
    best_token, best_patch = [1, 3, 3, 0], [3, 0, 2, 1]  # by patch; by token
    for number in range(4):
        y, x = 132 + 24 * number, 460 + 24 * number
        picture.wire((HEAD_OUT, y), (EMBED_IN, y), kind=NEW, arrow=False)
        picture.wire((EMBED_OUT, y), (448, y), kind=NEW, arrow=False)
        picture.embed(y, "image", NEW)
        picture.wire((x, 286), (x, 216), kind=NEW, arrow=False)
        picture.embed(316, "text", NEW, x=x, vertical=True)
        for column in range(4):
            picture.cell(460 + 24 * column, y)
        picture.dot(460 + 24 * best_token[number], y)
    for column, row in enumerate(best_patch):
        picture.ring(460 + 24 * column, 132 + 24 * row)
    picture.wire((HEAD_OUT, 316), (446, 316), kind=NEW)
    picture.note(EMBED - 6, 236, "patches")
    picture.note(496, 364, "tokens")
    for start, y, direction in (((496, 118), 72, "text to image"), ((546, 168), 168, "image to text")):
        picture.wire(start, (start[0], y), (584, y), kind=NEW)
        picture.loss(640, y, "InfoNCE")
        picture.note(640, y + 28, direction)
        picture.note(580, y + 50, "mean of", "start")
    picture.dot(664, 218)
    picture.ring(664, 122)
    picture.legend(CLIP, NEW, dot="best token of a patch", ring="best patch of a token")
    return picture


def slip() -> Picture:
    picture = Picture(
        "One training step of SLIP",
        "A weak image view and the caption are compared by InfoNCE as in CLIP. Two strong views of the same image pass the same image "
        "encoder and an MLP head of their own, and NT-Xent compares the two outputs.",
        height=540,
    )
    picture.tower(50, 330, "image", head="")
    picture.box(HEAD, 145, 76, 190, "MLP", NEW)
    picture.box(HEAD, 300, 76, 60, "linear")
    for y, view in ((90, STRONG_1), (200, STRONG_2)):
        picture.image(y, view, "strong crop", NEW)
        picture.row(y, "image", NEW)
    picture.bracket(90, 200, "NT-Xent")
    picture.note(545, 145, "two views of\none image", "start")
    picture.clip_pair(300, 430)
    picture.note(545, 365, "image and\nits caption", "start")
    picture.legend(CLIP, NEW)
    return picture


def declip() -> Picture:
    picture = Picture(
        "One training step of DeCLIP",
        "Two image views and two text views, one of them masked, pass CLIP's two encoders. InfoNCE compares each image view with each text "
        "view and with the nearest neighbor of the masked caption in a queue of earlier texts. SimSiam compares the two image views "
        "through a projector and a predictor. The text encoder also predicts the masked words.",
        height=690,
    )
    first, second, eda, masked = 90, 290, 410, 510
    picture.tower(50, 330, "image")
    picture.tower(370, 550, "text")
    picture.image(first, STRONG_1, "strong crop")
    picture.image(second, STRONG_2, "strong crop", NEW)
    picture.caption(eda, EDITED, "edited words", NEW)
    picture.caption(masked, MASKED, "masked")
    for y, space, kind in ((first, "image", CLIP), (second, "image", NEW), (eda, "text", NEW), (masked, "text", CLIP)):
        picture.row(y, space, kind)
    changed, caption, neighbor = 546, 606, 670
    for y, kind in ((first, CLIP), (second, NEW)):
        picture.wire((EMBED_OUT, y), (neighbor, y), kind=kind, arrow=False)
    for x, y, kind in ((changed, eda, NEW), (caption, masked, CLIP)):
        picture.wire((EMBED_OUT, y), (x, y), (x, first), kind=kind, arrow=False)
    picture.wire((caption, masked), (642, masked), kind=NEW)
    picture.wire((neighbor, 491), (neighbor, first), kind=NEW, arrow=False)
    picture.queue(neighbor, masked, "text")
    picture.stop(neighbor, 450)
    picture.note(706, 562, "nearest in a\nqueue of texts", "end")
    for x in (changed, caption, neighbor):
        for y in (first, second):
            picture.dot(x, y, CLIP if (x, y) == (caption, first) else NEW, radius=11)
    picture.wire((462, first), (462, second), kind=NEW, arrow=False)
    picture.box(462, 124, 96, 28, "projector", NEW)
    picture.box(462, 162, 96, 28, "predictor", NEW)
    picture.loss(462, 200, "SimSiam")
    picture.stop(462, 226)
    picture.box(462, 252, 96, 28, "projector", NEW)
    picture.masked_words(550, 610)
    picture.legend(CLIP, NEW, "stop", dot="InfoNCE of both lines")
    return picture


def uniclip() -> Picture:
    picture = Picture(
        "One training step of UniCLIP",
        "One weak and two strong image views pass one image encoder. An augmentation encoder passes the crop, color changes, blur and flip "
        "of each view to a residual head. MP-NCE compares the embeddings of the three views and of the caption, each with every other, "
        "with a temperature and an offset of its own for image-image, image-text and text-text pairs.",
        height=600,
    )
    rows = (160, 260, 360, 490)
    picture.text(VIEW, 72, "crop, color,\nblur, flip", SMALL, ACCENT)
    picture.wire((VIEW + 50, 72), (ENCODER - 54, 72), kind=NEW)
    picture.box(ENCODER + 8, 72, 124, 52, "augmentation\nencoder", NEW)
    picture.wire((ENCODER + 70, 72), (HEAD, 72), (HEAD, 120), kind=NEW)
    picture.tower(120, 400, "image", head="")
    picture.box(HEAD, 260, 76, 280, "residual\nhead", NEW)
    views = (STRONG_1, "strong crop", NEW), (STRONG_2, "strong crop", NEW), (WEAK, "weak crop", CLIP)
    for y, (view, label, kind) in zip(rows, views):
        picture.image(y, view, label, kind)
        picture.row(y, "image", kind)
    picture.caption(rows[3], CAPTION, "caption")
    picture.tower(450, 530, "text")
    picture.row(rows[3], "text")
    for number, top in enumerate(rows):
        for bottom in rows[number + 1 :]:
            picture.arc(top, bottom, CLIP if (top, bottom) == rows[2:] else NEW)
    picture.loss(569, 325, "MP-NCE")
    picture.note(706, 200, "all views of a\npair are positives", "end")
    picture.note(706, 450, "own τ and b for\nimage–image,\nimage–text,\ntext–text", "end")
    picture.legend(CLIP, NEW)
    return picture


def mcd() -> Picture:
    picture = Picture(
        "One training step of MCD",
        "An augmented view and the original view of an image pass the image encoder and its EMA teacher. The masked caption passes the "
        "text encoder. MP-NCE compares the student's three embeddings; the augmented view fades out of it over the run. A log-ratio loss, "
        "which fades in, matches ratios of the student's distances between images and texts to the teacher's: augmented to original view, "
        "with the own text and with other texts, and one pair to another pair. The text encoder also predicts the masked words.",
        height=610,
    )
    augmented, original, text = 110, 210, 420
    picture.image(augmented, STRONG_1, "strong crop ṽ", NEW)
    picture.image(original, WEAK, "weak crop v")
    picture.caption(text, MASKED, "masked t")
    picture.tower(62, 142, "image", kind=EMA)
    picture.tower(178, 258, "image")
    picture.tower(text - 40, text + 40, "text")
    picture.row(text, "text")
    for y, kind in ((augmented, NEW), (original, CLIP)):
        picture.wire((IMAGE_OUT, y), (122, y), kind=kind, arrow=False)
    picture.wire((122, 102), (122, 218), kind=CLIP, arrow=False)
    for y, kind in ((102, EMA), (218, CLIP)):
        picture.wire((122, y), (ENCODER_IN, y), kind=kind)
        picture.wire((ENCODER_OUT, y), (HEAD_IN, y), kind=kind, dashed=kind == EMA)
        for view, offset, outline in (("ṽ", -17, NEW), ("v", 17, CLIP)):
            picture.wire((HEAD_OUT, y), (HEAD_OUT, y + offset), (EMBED_IN, y + offset), kind=kind, arrow=False)
            picture.embed(y + offset, "image", EMA if kind == EMA else outline)
            picture.note(EMBED_OUT + 12, y + offset - 12, view)
            picture.wire((EMBED_OUT, y + offset), (536, y + offset), kind=kind, dashed=kind == EMA)
    picture.masked_words(text + 40, 520)
    picture.wire((462, 201), (462, text), kind=NEW, arrow=False)
    for y in (201, 235, text):
        picture.dot(462, y, radius=6)
    picture.loss(462, 320, "MP-NCE")
    picture.note(474, 354, "ṽ fades out", "start")
    picture.note(EMBED_OUT + 12, text - 12, "t")
    ratios = "|ṽ−t| : |v−t|\n|ṽ−t′| : |v−t′|\n|v−t| : |v′−t′|"
    picture.box(614, 100, 156, 74, ratios, EMA)
    picture.box(614, 220, 156, 74, ratios, NEW)
    picture.wire((614, 102), (614, 218), kind=NEW, arrow=False)
    picture.loss(614, 160, "log-ratio")
    picture.note(544, 160, "fades in", "end")
    picture.wire((EMBED_OUT, text), (614, text), (614, 257))
    picture.wire((614, text), (706, text), (706, 102), (692, 102), dashed=True)
    picture.stop(706, 280)
    picture.legend(CLIP, NEW, EMA, "stop", notes="t′: other pair")
    return picture


def mct() -> Picture:
    picture = Picture(
        "One training step of MCT",
        "One image view and one paraphrase of the caption give queries. Another view and another paraphrase pass EMA copies of the "
        "encoders and give keys, which then enter queues. Each encoder has two MLP heads. InfoNCE compares queries with keys within "
        "images, where shared tags add positives, and within texts. A margin loss compares them across modalities.",
        height=640,
    )
    picture.image(100, STRONG_1, "strong crop")
    picture.image(226, STRONG_2, "strong crop", NEW)
    picture.caption(374, "a *building\non a hill", "paraphrase", NEW)
    picture.caption(500, "*one house\non a hill", "paraphrase")
    image, text = {"inter": 78, "intra": 122}, {"inter": 522, "intra": 478}  # queries
    image_keys, text_keys = {"intra": 204, "inter": 248}, {"inter": 352, "intra": 396}
    for lanes, space, kind in (
        (image, "image", CLIP), (image_keys, "image", EMA), (text_keys, "text", EMA), (text, "text", CLIP)
    ):  # fmt: skip
        y = sum(lanes.values()) / 2
        picture.tower(y - 42, y + 42, space, head="", kind=kind)
        picture.wire((IMAGE_OUT if space == "image" else TEXT_OUT, y), (ENCODER_IN, y), kind=kind)
        for head, lane in lanes.items():
            picture.box(HEAD, lane, 76, 32, head, EMA if kind == EMA else NEW)
            for left, right in ((ENCODER_OUT, HEAD_IN), (HEAD_OUT, EMBED_IN)):
                picture.wire((left, lane), (right, lane), kind=EMA if kind == EMA else NEW, dashed=kind == EMA)
            picture.embed(lane, space, EMA if kind == EMA else NEW)
            if kind == EMA:
                picture.wire((EMBED_OUT, lane), (436, lane), kind=NEW)
                picture.queue(464, lane, space)
    for query, key, edge in ((image, image_keys, 185), (text, text_keys, 415)):
        y = (query["intra"] + key["intra"]) / 2
        picture.wire((EMBED, query["intra"]), (EMBED, key["intra"]), kind=NEW, arrow=False)
        picture.wire((464, edge), (464, y), (EMBED, y), kind=NEW, arrow=False)
        picture.loss(EMBED, y, "InfoNCE")
    picture.note(482, 158, "shared tags:\nalso positive", "start")
    for query, key, x, y in ((image, text_keys, 656, 200), (text, image_keys, 574, 437)):
        picture.wire((EMBED_OUT, query["inter"]), (x, query["inter"]), (x, key["inter"]), (493, key["inter"]), kind=NEW)
        picture.loss(x, y, "margin")
    picture.note(706, 572, "intra, inter: MLP heads", "end")
    picture.queue(514, 616, "text")
    picture.note(550, 616, "queue of keys", "start")
    picture.legend(CLIP, NEW, EMA)
    return picture


def oner() -> Picture:
    picture = Picture(
        "One training step of OneR",
        "A masked image, a masked caption and both as one sequence pass one Transformer and one head. InfoNCE compares the image with the "
        "text, and the sequence with the mean of image and text, each query with the keys of an EMA copy that has unmasked inputs. The "
        "Transformer also predicts masked words and patches.",
        height=600,
    )
    rows = {"image": 90, "text": 190, "mean": 274, "joint": 360}
    for x, w, label, space in ((182, 88, "one\nTrans-\nformer", "joint"), (HEAD, 76, "MLP", "")):
        picture.box(x + 8, 248, w, 380, "", EMA)
        picture.box(x, 240, w, 380, label, NEW, space)
    picture.image(rows["image"], WEAK, "masked", masked=True)
    picture.caption(rows["text"], MASKED, "masked")
    picture.sequence(rows["joint"] - 16)
    for name, y in rows.items():
        space, kind = (name, CLIP) if name in ("image", "text") else ("joint", NEW)
        if name != "mean":
            picture.wire((VIEW + {"image": 40, "text": 52, "joint": 60}[name], y), (138, y), kind=kind)
        picture.wire((226 if name != "mean" else 242, y), (HEAD_IN, y), kind=kind)
        picture.wire((HEAD_OUT, y), (EMBED_IN, y), kind=kind)
        picture.wire((HEAD_OUT + 8, y + 26), (EMBED_IN, y + 26), kind=EMA, dashed=True, arrow=False)
        picture.embed(y, space, kind)
        picture.embed(y + 26, space, EMA)
        picture.note(EMBED_OUT + 6, y - 12, name, "start")
    picture.wire((242, 90), (242, 274), kind=NEW, arrow=False)
    for name in ("image", "text"):
        picture.dot(242, rows[name], radius=4)
    for top, bottom, kind in (("image", "text", CLIP), ("mean", "joint", NEW)):
        first, last = rows[top], rows[bottom]
        for x, start, end in ((530, first, last + 26), (510, first + 26, last)):
            picture.wire((EMBED_OUT, start), (x, start), (x, end), (EMBED_OUT, end), kind=kind, arrow=False)
        picture.stop(440, first + 26)
        picture.stop(440, last + 26)
        picture.loss(520, (first + last + 26) / 2, "InfoNCE", kind)
    picture.note(704, 460, "MLP: projector, predictor\nEMA copy: no predictor,\nunmasked inputs", "end")
    picture.masked_words(430, 490, 210)
    picture.masked_words(430, 530, 156, "MIM", "predict masked patches")
    picture.legend(CLIP, NEW, EMA, "stop")
    return picture


# image views, text views, encoders (with *, an EMA copy) and what the losses compare (with *, unlike CLIP)
OVERVIEW = {
    "CLIP": ((WEAK,), ("",), ("image", "text"), "image – text"),
    "FILIP": ((WEAK,), ("",), ("image", "text"), "*patches – tokens"),
    "SLIP": ((WEAK, STRONG_1, STRONG_2), ("",), ("image", "text"), "image – text\n*image – image"),
    "DeCLIP": ((STRONG_1, STRONG_2), ("masked", "edited"), ("image", "text"),
               "image – text\n*image – image\n*image – neighbor\n*masked words"),
    "UniCLIP": ((WEAK, STRONG_1, STRONG_2), ("",), ("image", "text", "augmentation"), "image – text\n*image – image"),
    "MCD": ((WEAK, STRONG_1), ("masked",), ("image", "text", "*image"),
            "image – text\n*image – image\n*ratios of distances\n*masked words"),
    "MCT": ((STRONG_1, STRONG_2), ("edited", "edited"), ("image", "text", "*image", "*text"),
            "*image – text queue\n*text – image queue\n*image – image queue\n*text – text queue"),
    "OneR": ((WEAK,), ("masked",), ("joint", "*joint"),
             "image – text\n*sequence – mean\n*masked words\n*masked patches"),
}  # fmt: skip


def overview() -> Picture:
    picture = Picture(
        "What each method adds to CLIP",
        "A table of the eight methods: image views, text views, encoders and what the losses compare.",
        height=0,
        columns=False,
    )
    columns = {56: "method", 190: "image views", 330: "text views", 444: "encoders", 600: "losses compare"}
    for x, name in columns.items():
        picture.note(x, 28, name)
    top = 46.0
    for name, (views, texts, encoders, losses) in OVERVIEW.items():
        lines = losses.split("\n")
        height = max(64, 21 * len(lines) + 24)
        y = top + height / 2
        picture.rect(360, top, 680, 2, PALE[CLIP])
        picture.text(24, y, name, anchor="start", bold=True)
        for number, view in enumerate(views):
            x = 190 + 50 * (number - (len(views) - 1) / 2)
            picture.image(y, view, "", NEW if number else CLIP, masked=name == "OneR", x=x, w=44)
        for number, change in enumerate(texts):
            x = 330 + 50 * (number - (len(texts) - 1) / 2)
            picture.text_icon(x, y, change, NEW if number else CLIP)
        for number, encoder in enumerate(encoders):
            x = 444 + 28 * (number - (len(encoders) - 1) / 2)
            copy, kind = encoder.startswith("*"), CLIP if encoder in ("image", "text") else NEW
            picture.box(x, y, 22, 34, "", EMA if copy else kind, encoder)
        for number, line in enumerate(lines):
            place = 520, y + 21 * (number - (len(lines) - 1) / 2)
            picture.text(*place, line.removeprefix("*"), SMALL, ACCENT if line.startswith("*") else INK, "start")
        top += height
    picture.height = round(top) + 56
    picture.legend(CLIP, NEW, EMA)
    return picture


PICTURES = {draw.__name__: draw for draw in (clip, filip, slip, declip, uniclip, mcd, mct, oner, overview)}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
