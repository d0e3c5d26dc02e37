"""Names and short titles of the pages, in the order of the navigation, and the names of the methods."""

from __future__ import annotations

INDEX = "Evidence"
HEADLINE = "headline-emoji-concepts"
COMPARISONS = {
    HEADLINE: "Unseen emoji, all arms",
    "emoji-vendor": "Another vendor's emoji",
    "style-shift": "Unseen styles of clip art",
    "scenes": "Simple scenes",
    "pretrained-openclipart": "Pretrained encoders on Open Clip Art",
    "pretrained-emoji": "Pretrained encoders on emoji",
    "pretrained-emoji-concepts": "Pretrained encoders on unseen emoji",
}
ABLATIONS = {
    "declip-emoji": "DeCLIP's supervision",
    "uniclip-losses-emoji": "UniCLIP's loss",
    "uniclip-views-emoji": "UniCLIP's views",
    "uniclip-heads-emoji": "UniCLIP's image head",
    "mcd-emoji": "MCD's distillation",
    "oner-emoji": "OneR's losses",
    "oner-masking-emoji": "OneR's masked modeling",
    "oner-transfer-emoji": "OneR with more captions",
    "mct-openclipart": "MCT's terms",
    "mct-heads-openclipart": "MCT's heads",
}
OTHERS = {
    "headline": "Fewer pairs: unseen emoji",
    "plan": "Planned claims",
    "transfer": "Transfer to other data",
    "misalignment": "Misalignment",
    "oner-mct": "OneR and MCT beside CLIP",
    "small-models": "Small models",
    "speed": "Speed",
}
METHODS = {
    "clip": "CLIP",
    "clip-strong": "CLIP with strong views",
    "filip": "FILIP",
    "slip": "SLIP",
    "declip": "DeCLIP",
    "uniclip": "UniCLIP",
    "mcd": "MCD",
    "oner": "OneR",
    "mct": "MCT",
}
ARMS = {**METHODS, "locked": "Locked pretrained encoders"}
TABLE_TITLES = COMPARISONS | ABLATIONS
TITLES = TABLE_TITLES | OTHERS


def link(name: str) -> str:
    return f"[{TITLES[name]}]({name}.md)"
