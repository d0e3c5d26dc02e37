"""Names and short titles of the pages, in the order of the navigation, and the names of the methods."""

from __future__ import annotations

INDEX = "Evidence"
COMPARISONS = {
    "pretrained-openclipart": "Pretrained encoders on Open Clip Art",
    "pretrained-emoji": "Pretrained encoders on emoji",
    "pretrained-emoji-concepts": "Pretrained encoders on unseen emoji",
    "two-towers-openclipart": "Five methods on Open Clip Art",
    "style-shift-openclipart": "Style shift",
    "fractions-openclipart": "Fewer pairs: Open Clip Art",
    "fractions-scenes": "Fewer pairs: scenes",
    "two-towers-scenes": "Five methods on scenes",
    "oner-mct-scenes": "OneR and MCT on scenes",
}
ABLATIONS = {
    "declip-openclipart": "DeCLIP's supervision",
    "uniclip-losses-openclipart": "UniCLIP's loss",
    "uniclip-views-openclipart": "UniCLIP's views",
    "views-scenes": "Views and distillation",
    "mcd-openclipart": "MCD's distillation",
    "mct-openclipart": "MCT's terms",
    "mct-heads-openclipart": "MCT's heads",
    "oner-openclipart": "OneR's losses",
    "learning-rates-openclipart": "Learning rates",
}
OTHERS = {
    "plan": "Planned claims",
    "clip-openclipart": "CLIP on Open Clip Art",
    "detection": "Detectors on scenes",
    "misalignment": "Misalignment",
    "oner-mct": "OneR and MCT beside CLIP",
    "small-models": "Small models",
    "speed": "Speed",
}
METHODS = {
    "clip": "CLIP",
    "slip": "SLIP",
    "declip": "DeCLIP",
    "uniclip": "UniCLIP",
    "mcd": "MCD",
    "oner": "OneR",
    "mct": "MCT",
}
TABLE_TITLES = COMPARISONS | ABLATIONS
TITLES = TABLE_TITLES | OTHERS


def link(name: str) -> str:
    return f"[{TITLES[name]}]({name}.md)"
