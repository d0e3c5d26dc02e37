"""An image encoder pretrained on the tags of scenes, from which tables on hard scenes start: from scratch, small runs stay on a plateau."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.data.scenes.source import Scenes
from coalign.errors import UserError
from coalign.interop.timm import to_timm
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.spec import model_config

MODEL = "tiny"
SEED = 5  # of scenes that no dataset uses by default
EPOCHS, BATCH, LR, WEIGHT_DECAY = 20, 128, 3e-3, 0.05


def train(number: int, image_size: int, folder: Path) -> None:
    """Trains MODEL's image encoder to predict the tags of `number` scenes, and writes its trunk to the new folder `folder` as
    `coalign export --to timm` does.

    One logistic regression per tag on the trunk's features, without augmentation; deterministic. Raises UserError if the folder cannot be
    written.
    """
    source = Scenes(number, level="hard", seed=SEED, size=image_size, split="train")
    pixels = torch.from_numpy(np.stack([source.image(index) for index in range(number)])).permute(0, 3, 1, 2)
    tags = _tags(source)
    vision = model_config(MODEL)["vision_cfg"]
    torch.manual_seed(0)
    network: Any = timm.create_model(vision["timm_model_name"], num_classes=tags.shape[1])
    tower = ImageTower(network, network.num_features, 0, image_size, nn.Identity())
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = number // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(number)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(tower.normalize(pixels[rows])), tags[rows]).backward()
            optimizer.step()
            schedule.step()
    network.reset_classifier(0)
    try:
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            (written := Path(temporary) / "encoder").mkdir()
            to_timm(MODEL, vision, tower, written)
            written.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The image encoder could not be written to {folder}: {error}") from error


def _tags(source: Scenes) -> Tensor:
    """The tags of every image as 0 or 1, float [images, tags]."""
    tags_of_image = [source.record(index).tags for index in range(len(source))]
    column = {tag: number for number, tag in enumerate(sorted({tag for tags in tags_of_image for tag in tags}))}
    targets = torch.zeros(len(tags_of_image), len(column))
    for row, tags in enumerate(tags_of_image):
        targets[row, [column[tag] for tag in tags]] = 1
    return targets
