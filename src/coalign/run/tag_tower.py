"""An image tower that has learnt the tags of scenes: where tables on scenes start that would else end on a plateau."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from coalign.data.scenes import Scenes
from coalign.errors import UserError
from coalign.networks.towers import model_config
from coalign.run.model import write_file

MODEL = "tiny"
SEED = 5  # of scenes that no data has by default
EPOCHS, BATCH, LR, WEIGHT_DECAY = 20, 128, 3e-3, 0.05


def train(number: int, image_size: int, path: Path) -> None:
    """Trains MODEL's image tower on the tags of so many scenes, and writes its trunk's weights to `path`, by timm's names.

    A logistic regression of each tag on the features, without views of the pictures; the same weights at every call. UserError where it
    cannot be written.
    """
    source = Scenes(number, seed=SEED, size=image_size, split="train")
    pixels = torch.from_numpy(np.stack([source.image(index) for index in range(number)])).permute(0, 3, 1, 2)
    tags = _tags(source)
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    vision = model_config(MODEL)["vision_cfg"]
    torch.manual_seed(0)
    network: Any = timm.create_model(vision["timm_model_name"], num_classes=tags.shape[1], **vision["timm_kwargs"])
    optimiser = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = number // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=EPOCHS * steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(number)[: steps * BATCH].split(BATCH):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(network((pixels[rows] - mean) / std), tags[rows]).backward()
            optimiser.step()
            schedule.step()
    network.reset_classifier(0)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    try:
        write_file(path, lambda temporary: save_file(weights, temporary))
    except (OSError, SafetensorError) as error:
        raise UserError(f"The image tower could not be written to {path}: {error}") from error


def _tags(source: Scenes) -> Tensor:
    """Which tags a picture has: 0 or 1, float [pictures, tags]."""
    of_all = [source.record(index).tags for index in range(len(source))]
    column = {tag: place for place, tag in enumerate(sorted({tag for tags in of_all for tag in tags}))}
    found = torch.zeros(len(of_all), len(column))
    for row, tags in enumerate(of_all):
        found[row, [column[tag] for tag in tags]] = 1
    return found
