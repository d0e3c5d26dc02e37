"""Linear probes trained by SGD: MCT's on features computed once, SLIP's on features of random crops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from coalign.evaluation.probes.accuracy import FeatureSplit, accuracy, check_splits
from coalign.metric import Metric
from coalign.progress import track


@dataclass(frozen=True)
class Protocol:
    lr: float  # at the start, for batches of `batch_size`
    batch_size: int
    epochs: int
    decay: Callable[[float], float]  # fraction of the run -> learning rate multiplier


def _step_decay(progress: float) -> float:
    """Multiplies by 0.2 after 1/2, 2/3 and 5/6 of the run."""
    return 0.2 ** sum(progress >= milestone for milestone in (1 / 2, 2 / 3, 5 / 6))


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


PROTOCOLS = {
    # MCT §4.1: momentum 0.9, no weight decay, 60 epochs with batches of 256, learning rate × 0.2 at epochs 30, 40 and 50
    "mct": Protocol(30.0, 256, 60, _step_decay),
    # SLIP, after MoCo-v3: 90 epochs with batches of 4,096 random crops and flips, learning rate 0.1 per 256 items, cosine decay
    "slip": Protocol(0.1 * 16, 4096, 90, _cosine),
}


def sgd_probe(
    name: str, train: Callable[[int], FeatureSplit], test: FeatureSplit, num_classes: int, seed: int = 0
) -> list[Metric]:
    """Trains a zero-initialized linear classifier on `train(epoch)`, the features [item, dim] of each epoch, by one of PROTOCOLS.

    Batches hold at most a tenth of the items; the learning rate scales with them. Raises UserError if a split is empty or `train` has a
    single class.
    """
    first_epoch = train(0)
    check_splits(train=first_epoch, test=test)
    protocol = PROTOCOLS[name]
    num_items = len(first_epoch[1])
    batch_size = max(1, min(protocol.batch_size, num_items // 10))
    weight = torch.zeros(num_classes, first_epoch[0].shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    base_lr, steps = protocol.lr * batch_size / protocol.batch_size, -(-num_items // batch_size)
    for epoch in track(range(protocol.epochs), "Training the probe", unit="epochs"):
        split = train(epoch) if epoch else first_epoch
        features, labels = (torch.from_numpy(np.ascontiguousarray(array)) for array in split)
        for step, rows in enumerate(torch.randperm(len(labels), generator=generator).split(batch_size)):
            optimizer.param_groups[0]["lr"] = base_lr * protocol.decay((epoch + step / steps) / protocol.epochs)
            loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predicted = F.linear(torch.from_numpy(test[0]), weight, bias).argmax(1).numpy()
    return accuracy(f"Linear probe ({name.upper()})", predicted, test[1], num_classes, seed)
