"""From a recipe and a cluster to memory, traffic, data rate and time, and the layout to run; pure computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import MaestroError
from maestro_scale.model.cost import Cost, compute_cost, num_parameters
from maestro_scale.recipe import Recipe
from maestro_scale.training.footprint import Footprint, Traffic, footprint, traffic
from maestro_scale.training.metrics.meter import PEAK_TFLOPS
from maestro_scale.training.pretrain import build_model_config

_USABLE = 0.9  # of a device's memory; the rest is the CUDA context's and lost between blocks


class PlanningError(MaestroError):
    """A cluster that cannot be planned for; the message says what would do."""


@dataclass(frozen=True)
class Gpu:
    """``memory_bytes`` and ``tflops``: dense bf16, by the vendor's datasheet."""

    memory_bytes: int
    tflops: float


GPUS = {
    "a100-40": Gpu(40 * 10**9, PEAK_TFLOPS["A100"]),
    "a100": Gpu(80 * 10**9, PEAK_TFLOPS["A100"]),
    "h100-pcie": Gpu(80 * 10**9, PEAK_TFLOPS["H100 PCIe"]),
    "h100": Gpu(80 * 10**9, PEAK_TFLOPS["H100"]),
    "h200": Gpu(141 * 10**9, PEAK_TFLOPS["H200"]),
}


@dataclass(frozen=True)
class Cluster:
    """``num_gpus`` of one kind, ``per_node`` to a node; ``mfu``: share of their peak that a step reaches."""

    gpu: str
    num_gpus: int
    per_node: int
    mfu: float

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise PlanningError(f"--gpu {self.gpu}: not known; use one of {', '.join(GPUS)}")
        if self.num_gpus % min(self.per_node, self.num_gpus):
            raise PlanningError(
                f"--gpus {self.num_gpus} do not fill nodes of --per-node {self.per_node}: use a multiple of it"
            )
        if not 0 < self.mfu <= 1:
            raise PlanningError(f"--mfu {self.mfu:g}: must be above 0 and at most 1; 0.4 is usual")

    @property
    def num_nodes(self) -> int:
        """Nodes in use."""
        return math.ceil(self.num_gpus / self.per_node)


@dataclass(frozen=True)
class LayoutEstimate:
    """One ZeRO stage and micro-batch: what a rank holds and sends. ``activations``: bytes, an estimate."""

    stage: int
    micro_batch: int
    num_micro_batches: int
    footprint: Footprint
    activations: int
    traffic: Traffic
    fits: bool

    @property
    def device_bytes(self) -> int:
        """All that a GPU must hold."""
        return self.footprint.device + self.activations


@dataclass(frozen=True)
class ClusterPlan:
    """``best``: the layout that is recommended, None where none fits. ``seconds``: None where the length of an epoch is
    not known. ``bytes_per_sample``: as stored, averaged over the mixture by weight."""

    parameters: int
    layouts: tuple[LayoutEstimate, ...]
    best: LayoutEstimate | None
    samples_per_s: float
    bytes_per_sample: float
    num_steps: int | None
    seconds: float | None

    def node_bytes_per_s(self, cluster: Cluster) -> float:
        """What the stream must bring to every node."""
        return self.samples_per_s * self.bytes_per_sample / cluster.num_nodes

    def gpu_hours(self, cluster: Cluster) -> float | None:
        """Of all GPUs together."""
        return None if self.seconds is None else self.seconds * cluster.num_gpus / 3600


def plan_cluster(
    recipe: Recipe, specs: Sequence[DatasetSpec], stored: Sequence[tuple[int, int] | None], cluster: Cluster
) -> ClusterPlan:
    """``stored``: (samples, bytes) of each dataset of the mixture in shards, None where they are not at hand: then a
    sample counts as its spec has it, with as many dates as the model sees.

    PlanningError where the ranks cannot share the recipe's global batch or lanes.
    """
    n, batch = cluster.num_gpus, recipe.train.global_batch
    if batch % n or recipe.data.lanes % n:
        raise PlanningError(
            f"{n} GPUs cannot share train.global_batch {batch} and data.lanes {recipe.data.lanes} evenly: set both to "
            f"multiples of {n}"
        )
    config = build_model_config(recipe, specs)
    parameters, gpu = num_parameters(config), GPUS[cluster.gpu]
    costs = [compute_cost(config.for_dataset(v.dataset), recipe.masking.ratio) for v in config.views]
    largest = max(costs, key=lambda c: c.activations)
    layouts = tuple(
        _layout(recipe, parameters, largest, gpu, n, stage, micro)
        for stage in range(4)
        for micro in (m for m in range(1, batch // n + 1) if (batch // n) % m == 0)
    )
    fitting = [x for x in layouts if x.fits]
    weights = [e.weight for e in recipe.data.mixture]
    flops = sum(c.step_flops * w for c, w in zip(costs, weights, strict=True)) / sum(weights)
    sizes = [held[1] / held[0] if held else _bytes_by_spec(s) for held, s in zip(stored, specs, strict=True)]
    speed = n * gpu.tflops * 1e12 * cluster.mfu / flops
    steps = recipe.train.steps
    if steps is None and all(stored):
        steps = recipe.train.epochs * sum(max(1, held[0] // batch) for held in stored if held)
    return ClusterPlan(
        parameters=parameters,
        layouts=layouts,
        # At one MFU what differs is what is sent; then fewer, larger passes; then room.
        best=min(fitting, key=lambda x: (x.traffic.total, -x.micro_batch, x.device_bytes), default=None),
        samples_per_s=speed,
        bytes_per_sample=sum(b * w for b, w in zip(sizes, weights, strict=True)) / sum(weights),
        num_steps=steps,
        seconds=None if steps is None else steps * batch / speed,
    )


def _layout(
    recipe: Recipe, parameters: int, largest: Cost, gpu: Gpu, n: int, stage: int, micro: int
) -> LayoutEstimate:
    num_micro_batches = recipe.train.global_batch // (n * micro)
    config = recipe.with_zero_stage(stage, micro).deepspeed_config(n, "cuda")
    held = footprint(parameters, n, config, num_micro_batches, ema=recipe.optim.ema > 0)
    value = 2 if recipe.train.precision_on("cuda") == "bf16" else 4
    activations = micro * largest.activations * value
    fits = held.device + activations <= _USABLE * gpu.memory_bytes
    sends = traffic(parameters, n, config, num_micro_batches)
    return LayoutEstimate(stage, micro, num_micro_batches, held, activations, sends, fits)


def _bytes_by_spec(spec: DatasetSpec) -> float:
    dates = {m.name: 1 for m in spec.modalities}
    for s in spec.sensors:
        dates[s.source] = max(dates[s.source], s.num_dates)
    item = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2}
    return sum(dates[m.name] * len(m.bands) * m.size**2 * item.get(m.dtype, 4) for m in spec.modalities)
