"""Linear probes by stochastic gradient descent, as MCT and SLIP report them: on features computed once, and on those of random crops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from coalign.evaluation.accuracy import AccuracyResult, Part, accuracy, check_parts


@dataclass(frozen=True)
class Protocol:
    lr: float  # at the start, for batches of this size
    batch_size: int
    epochs: int
    decay: Callable[[float], float]  # share of the run that is done -> what the learning rate is multiplied by


def _thrice_by_five(done: float) -> float:
    """Divided by five after a half, two thirds and five sixths of the run."""
    return 0.2 ** sum(done >= share for share in (1 / 2, 2 / 3, 5 / 6))


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


PROTOCOLS = {
    # §4.1: momentum 0.9, no decay of weights, 60 epochs of batches of 256, the rate divided by 5 at epochs 30, 40 and 50
    "mct": Protocol(30.0, 256, 60, _thrice_by_five),
    # MoCo-v3's, which SLIP follows: 90 epochs, rate 0.1 for 256 items, on a cosine; its batches are of 4,096, to which the rate is scaled;
    # on random crops and flips
    "slip": Protocol(0.1 * 16, 4096, 90, _cosine),
}


def sgd_probe(name: str, train: Callable[[int], Part], test: Part, num_classes: int, seed: int = 0) -> AccuracyResult:
    """A linear classifier from zero, trained on the features [item, dim] of each epoch, `train(epoch)`, by one of PROTOCOLS. A batch is at
    most a tenth of the items, at a rate that is as much smaller. UserError where a part is empty or there is one class alone."""
    first = train(0)
    check_parts(train=first, test=test)
    protocol = PROTOCOLS[name]
    count = len(first[1])
    batch_size = max(1, min(protocol.batch_size, count // 10))
    weight = torch.zeros(num_classes, first[0].shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    peak, steps = protocol.lr * batch_size / protocol.batch_size, -(-count // batch_size)
    for epoch in range(protocol.epochs):
        features, labels = (torch.from_numpy(np.ascontiguousarray(part)) for part in (train(epoch) if epoch else first))
        for step, rows in enumerate(torch.randperm(len(labels), generator=generator).split(batch_size)):
            optimiser.param_groups[0]["lr"] = peak * protocol.decay((epoch + step / steps) / protocol.epochs)
            loss = F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        predicted = F.linear(torch.from_numpy(test[0]), weight, bias).argmax(1).numpy()
    return accuracy(f"linear_probe_{name}", predicted, test[1], num_classes, seed)
