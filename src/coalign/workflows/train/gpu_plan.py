"""Predicts training time and memory on GPUs from the FLOPs and bytes of a step. The predictions are not measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coalign.config import TrainConfig
from coalign.workflows.train.step_cost import StepMeasurement, step_cost

# Model FLOPs utilization (MFU): the fraction of the half-precision peak. Well-optimized ViT training reaches about a third. The runs
# reported by DeCLIP's authors (80 V100 for 8 and 10 days, 16 V100 for 304 hours) correspond to 2 to 5 %; most likely, data loading
# limited them.
GOOD_MFU, DECLIP_MFU = 0.35, 0.03
MEMORY_OVERHEAD = 4 / 3  # workspace of operations, which the estimate does not include
GPU_COUNTS = (1, 8, 64)


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet."""

    name: str
    flops: float  # per second, dense, in half precision
    memory: float  # bytes
    intra_node_bandwidth: float  # bytes per second in each direction
    inter_node_bandwidth: float  # bytes per second, per GPU


GPUS = (
    GPU("V100", 125e12, 32 * 2**30, 150e9, 1.5e9),  # eight GPUs share one 100 Gbit/s port
    GPU("A100", 312e12, 80 * 2**30, 300e9, 25e9),  # one 200 Gbit/s port per GPU
    GPU("H100", 989e12, 80 * 2**30, 450e9, 50e9),  # one 400 Gbit/s port per GPU
)
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Plan:
    """Predicted cost of a run on `count` GPUs."""

    gpu: GPU
    count: int
    hours: float  # at `GOOD_MFU`
    slow_hours: float  # at `DECLIP_MFU`
    memory: float  # bytes per GPU
    communication: float  # fraction of a step at `GOOD_MFU`, if not overlapped with compute
    micro_batch: int | None  # largest power-of-two fraction of the GPU's share that fits; None if the whole share fits
    fits: bool  # whether any micro-batch fits
    cores: float  # CPU cores per GPU for data loading at `GOOD_MFU`

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.count


def plan(measured: StepMeasurement, config: TrainConfig, steps: int, gpu: GPU, count: int, load_seconds: float) -> Plan:
    """Predicts the cost of `steps` steps of `config` on `count` GPUs. load_seconds: CPU time to load one pair."""
    config = replace(config, micro_batch=None)
    local = config.batch_size // count
    micro_batch, fits = None, True
    cost = step_cost(measured, config, count)
    while sum(cost.memory.values()) * MEMORY_OVERHEAD > gpu.memory:
        smaller = (micro_batch or local) // 2
        if smaller < 1:
            fits = False
            break
        micro_batch = smaller
        cost = step_cost(measured, replace(config, micro_batch=micro_batch), count)
    compute = sum(cost.flops.values()) / gpu.flops  # seconds at peak
    bandwidth = gpu.intra_node_bandwidth if count <= GPUS_PER_NODE else gpu.inter_node_bandwidth
    # ring collectives send (1 - 1/count) of a tensor in an all-gather and twice that in an all-reduce: features are gathered and their
    # gradients reduced, and weight gradients are reduced
    volume = (1 - 1 / count) * (3 * cost.gathered + 2 * cost.memory["gradients"])
    communication = volume / bandwidth
    step = compute / GOOD_MFU + communication
    return Plan(
        gpu,
        count,
        hours=steps * step / 3600,
        slow_hours=steps * (compute / DECLIP_MFU + communication) / 3600,
        memory=sum(cost.memory.values()) * MEMORY_OVERHEAD,
        communication=communication / step,
        micro_batch=micro_batch,
        fits=fits,
        cores=local / step * load_seconds,
    )


def plans(measured: StepMeasurement, config: TrainConfig, steps: int, load_seconds: float) -> list[Plan]:
    """Returns a plan for every GPU model and for those of 1, 8 and 64 GPUs that divide the batch size."""
    counts = [count for count in GPU_COUNTS if not config.batch_size % count and config.batch_size // count >= 1]
    return [plan(measured, config, steps, gpu, count, load_seconds) for gpu in GPUS for count in counts]
