"""Composes a model of the towers of a model configuration and of pretrained towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coalign.networks.towers.image_sources import image_source
from coalign.networks.towers.pretrained import pretrained_preprocess
from coalign.networks.towers.sources import TowerSource
from coalign.networks.towers.spec import TowerSpec, model_config
from coalign.networks.towers.text_sources import text_source

DEFAULT_EMBED_DIM = (
    512  # of the shared space, if both encoders have their own source and pretrained projections do not say
)


@dataclass(frozen=True)
class Composition:
    """A model's configuration, and the sources of its towers that do not come from `--model`.

    Attributes:
        config: In open_clip's format, with what `TowerSource.cfg` adds. The model can be built from it alone.
        starts: "image" and "text" -> `Tower.starts` of that tower.
    """

    config: dict[str, Any]
    starts: dict[str, dict[str, str]]
    image: TowerSource | None = None
    text: TowerSource | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a run's model.json, which `model_config` reads."""
        return {**self.config, "starts": {modality: starts for modality, starts in self.starts.items() if starts}}


def compose(spec: TowerSpec) -> Composition:
    """Composes the model of `spec`. Raises UserError if a model or a source does not exist or is invalid."""
    config, pretrained = dict(model_config(spec.name)), spec.pretrained
    image = image_source(spec.image_tower) if spec.image_tower else None
    text = text_source(spec.text_tower) if spec.text_tower else None
    starts = {modality: dict((spec.starts or {}).get(modality, {})) for modality in ("image", "text")}
    if pretrained:
        starts = {modality: dict.fromkeys(("trunk", "projection"), pretrained) for modality in starts}
        if preprocess := pretrained_preprocess(spec.name, pretrained):
            config["vision_cfg"] = {**config["vision_cfg"], "preprocess": preprocess.to_json()}
    sources = {"image": image, "text": text}
    if image and text:
        dims = {source.embed_dim for source in (image, text) if source.embed_dim}
        config["embed_dim"] = dims.pop() if len(dims) == 1 else DEFAULT_EMBED_DIM
    for modality, key in (("image", "vision_cfg"), ("text", "text_cfg")):
        if source := sources[modality]:
            config[key] = source.cfg
            starts[modality] = source.starts(config["embed_dim"])
        elif any(sources.values()) and "quick_gelu" in config:
            config[key] = {"quick_gelu": config["quick_gelu"], **config[key]}
    if any(sources.values()):
        config.pop("quick_gelu", None)  # of each tower alone
    if spec.head != "linear":  # replaces pretrained projections
        starts = {modality: {"trunk": parts["trunk"]} if parts else {} for modality, parts in starts.items()}
    return Composition(config, starts, image, text)
