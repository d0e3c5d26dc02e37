"""What a recipe would take on GPUs, predicted from a step's operations and bytes. Nothing here is measured on one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coalign.config import TrainConfig
from coalign.run.cost import Measured, step_cost

# Of the half-precision peak. Well-kept ViT training reaches a third; what DeCLIP's authors say of their runs (80 V100 for 8 and 10 days, 16
# for 304 hours) comes to 2 to 5 per cent: their GPUs waited, most likely for images.
GOOD, AS_DECLIP = 0.35, 0.03
SPARE = 4 / 3  # the working memory of single operations, over what is counted
COUNTS = (1, 8, 64)


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it."""

    name: str
    flops: float  # a second, dense, in half precision
    memory: float  # bytes
    within: float  # bytes a second between GPUs of one machine, each way
    between: float  # and between machines, a GPU's share


DEVICES = (
    Device("V100", 125e12, 32 * 2**30, 150e9, 1.5e9),  # eight share one port of 100 Gbit/s
    Device("A100", 312e12, 80 * 2**30, 300e9, 25e9),  # a port of 200 Gbit/s each
    Device("H100", 989e12, 80 * 2**30, 450e9, 50e9),  # 400 Gbit/s
)
A_MACHINE = 8  # GPUs


@dataclass(frozen=True)
class Plan:
    """One recipe on a number of GPUs of a kind."""

    device: Device
    count: int
    hours: float  # at `GOOD` use of the GPUs
    slow_hours: float  # at `AS_DECLIP`
    memory: float  # bytes of each GPU
    communication: float  # share of a step, where nothing of it is hidden
    micro_batch: int | None  # the largest that fits where the whole share does not; None: it does
    fits: bool  # with that micro-batch
    cores: float  # to load the pairs that a GPU takes at `GOOD`

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.count


def plan(measured: Measured, config: TrainConfig, steps: int, device: Device, count: int, load_seconds: float) -> Plan:
    """`steps` of `config` on `count` GPUs. `load_seconds`: of one core, for a pair."""
    config = replace(config, micro_batch=None)
    local = config.batch_size // count
    micro_batch, fits = None, True
    cost = step_cost(measured, config, count)
    while sum(cost.memory.values()) * SPARE > device.memory:
        smaller = (micro_batch or local) // 2
        if smaller < 1:
            fits = False
            break
        micro_batch = smaller
        cost = step_cost(measured, replace(config, micro_batch=micro_batch), count)
    operations = sum(cost.flops.values()) / device.flops
    bandwidth = device.within if count <= A_MACHINE else device.between
    # a ring sends all but a share of every tensor once to gather, and twice to add up: features there and back, and gradients
    volume = (1 - 1 / count) * (3 * cost.gathered + 2 * cost.memory["gradients"])
    sending = volume / bandwidth
    step = operations / GOOD + sending
    return Plan(
        device,
        count,
        hours=steps * step / 3600,
        slow_hours=steps * (operations / AS_DECLIP + sending) / 3600,
        memory=sum(cost.memory.values()) * SPARE,
        communication=sending / step,
        micro_batch=micro_batch,
        fits=fits,
        cores=local / step * load_seconds,
    )


def plans(measured: Measured, config: TrainConfig, steps: int, load_seconds: float) -> list[Plan]:
    """On every kind of GPU and 1, 8 and 64 of them, where these share the batch equally."""
    counts = [count for count in COUNTS if not config.batch_size % count and config.batch_size // count >= 1]
    return [plan(measured, config, steps, device, count, load_seconds) for device in DEVICES for count in counts]
