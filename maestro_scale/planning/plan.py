"""Computes memory, communication, data rate and time of a recipe on a cluster, and the recommended layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import MaestroError
from maestro_scale.model.config import CompileMode
from maestro_scale.planning.speed import Assumptions, StepTime, Workload, step_time
from maestro_scale.recipe import Recipe, build_model_config
from maestro_scale.training.footprint import Traffic, traffic
from maestro_scale.training.memory import USABLE_MEMORY, MemoryEstimator, StepMemory
from maestro_scale.training.metrics.gpus import GPUS
from maestro_scale.training.stored_data import StoredData, num_steps

DEFAULT_MFU = 0.6  # large bf16 matrix products reach up to 72 % of an H100's peak, those of small widths less
DEFAULT_LAUNCH_US = 5.0  # one operation of PyTorch in eager mode on a current server CPU
DEFAULT_NETWORK_GB_S = 50.0  # one 400 Gbit/s card per GPU


class PlanningError(MaestroError):
    """The recipe cannot run on this cluster; the message says which values are valid."""


@dataclass(frozen=True)
class Cluster:
    """``num_gpus`` GPUs of one kind, ``per_node`` on each node, and what the prediction of time assumes.

    ``mfu``: fraction of the peak FLOP/s that matrix products reach. ``launch_us``: microseconds in which the host
    launches an operation. ``network_gb_s``: bytes/s of the network per GPU and direction, in 10**9.
    """

    gpu: str
    num_gpus: int
    per_node: int
    mfu: float = DEFAULT_MFU
    launch_us: float = DEFAULT_LAUNCH_US
    network_gb_s: float = DEFAULT_NETWORK_GB_S

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise PlanningError(f"--gpu {self.gpu}: unknown; use one of {', '.join(GPUS)}")
        if self.num_gpus % min(self.per_node, self.num_gpus):
            raise PlanningError(
                f"--gpus {self.num_gpus} do not fill nodes of --per-node {self.per_node}: use a multiple of it"
            )
        if not 0 < self.mfu <= 1:
            raise PlanningError(
                f"--mfu {self.mfu:g}: must be above 0 and at most 1; {DEFAULT_MFU:g} is typical"
            )
        if not 0 <= self.launch_us < math.inf:  # also false for nan
            raise PlanningError(f"--launch-us {self.launch_us:g}: must be a number of at least 0")
        if not self.network_gb_s > 0:
            raise PlanningError(f"--network-gb-s {self.network_gb_s:g}: must be above 0")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.num_gpus / self.per_node)

    @property
    def assumptions(self) -> Assumptions:
        """The assumptions of the prediction of time."""
        link = GPUS[self.gpu].link
        if self.num_nodes > 1:
            # A ring crosses to the next node once for each of a node's network cards, which share its traffic.
            link = min(link, self.per_node * self.network_gb_s * 1e9)
        return Assumptions(self.mfu, self.launch_us * 1e-6, link)


@dataclass(frozen=True)
class LayoutEstimate:
    """Memory, communication and step time of a rank with one ZeRO stage and micro-batch."""

    stage: int
    micro_batch: int
    num_micro_batches: int
    memory: StepMemory
    traffic: Traffic
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class ClusterPlan:
    """The plan of a recipe on a cluster.

    ``best``: the fastest layout that fits, None if none does; ``samples_per_s``, ``mfu`` and ``seconds`` are its, or
    those of the smallest layout. ``eager`` and ``compiled``: step time of the fastest layout with model.compile none
    and step.
    ``seconds``: None if the length of an epoch is unknown, because the shards cannot be read here.
    ``bytes_per_sample``: as stored, averaged over the mixture by weight.
    """

    parameters: int
    layouts: tuple[LayoutEstimate, ...]
    best: LayoutEstimate | None
    eager: StepTime
    compiled: StepTime
    samples_per_s: float
    mfu: float
    bytes_per_sample: float
    num_steps: int | None
    seconds: float | None

    def node_bytes_per_s(self, cluster: Cluster) -> float:
        """Data rate that the stream must sustain on each node."""
        return self.samples_per_s * self.bytes_per_sample / cluster.num_nodes

    def gpu_hours(self, cluster: Cluster) -> float | None:
        """GPU-hours of the training; None if its length is unknown."""
        return None if self.seconds is None else self.seconds * cluster.num_gpus / 3600


def plan_cluster(
    recipe: Recipe, specs: Sequence[DatasetSpec], stored: Sequence[StoredData | None], cluster: Cluster
) -> ClusterPlan:
    """Plan a recipe on a cluster.

    ``stored``: what the shards of each dataset of the mixture hold; None if they cannot be read.
    The size of a sample is then computed from its spec, with the number of dates that the model uses.

    Raises PlanningError if the number of ranks does not divide the recipe's global batch and lanes.
    """
    n, batch = cluster.num_gpus, recipe.train.global_batch
    if batch % n or recipe.data.lanes % n:
        raise PlanningError(
            f"{n} GPUs cannot share train.global_batch {batch} and data.lanes {recipe.data.lanes} evenly: set both to "
            f"multiples of {n}"
        )
    config = build_model_config(recipe, specs)
    estimator, work, gpu = MemoryEstimator(config, specs), Workload.of(recipe, config), GPUS[cluster.gpu]

    def layout(stage: int, micro_batch: int, compiled: CompileMode) -> LayoutEstimate:
        variant = recipe.with_zero_stage(stage).with_micro_batch(micro_batch)
        variant = variant.model_copy(update={"model": recipe.model.model_copy(update={"compile": compiled})})
        times, memory = variant.num_micro_batches(n), estimator.step(variant, n, "cuda")
        sent = traffic(estimator.parameters, n, variant.deepspeed_config(n, "cuda"), times)
        seconds = step_time(work, variant, n, gpu, sent, cluster.assumptions)
        fits = memory.device <= USABLE_MEMORY * gpu.memory_bytes
        return LayoutEstimate(stage, micro_batch, times, memory, sent, seconds, fits)

    def layouts_of(compiled: CompileMode) -> tuple[LayoutEstimate, ...]:
        return tuple(
            layout(stage, micro_batch, compiled)
            for stage in range(4 if compiled == "none" else 3)  # stage 3 does not work with torch.compile
            # Only micro-batches that divide a rank's share: all micro-batches of a step have the same size.
            for micro_batch in (m for m in range(1, batch // n + 1) if (batch // n) % m == 0)
        )

    layouts = layouts_of(recipe.model.compile)
    shown = _fastest(layouts)
    sizes = [
        data.bytes / data.samples if data else _sample_bytes(spec)
        for data, spec in zip(stored, specs, strict=True)
    ]
    weights, step_s, steps = work.weights, shown.time.total_s, num_steps(recipe, stored)
    return ClusterPlan(
        parameters=estimator.parameters,
        layouts=layouts,
        best=shown if shown.fits else None,
        eager=_fastest(layouts_of("none")).time,
        compiled=_fastest(layouts_of("step")).time,
        samples_per_s=batch / step_s,
        mfu=batch * work.model_flops / step_s / (n * gpu.tflops * 1e12),
        bytes_per_sample=sum(b * w for b, w in zip(sizes, weights, strict=True)) / sum(weights),
        num_steps=steps,
        seconds=None if steps is None else steps * step_s,
    )


def _fastest(layouts: Sequence[LayoutEstimate]) -> LayoutEstimate:
    """The fastest layout that fits, of equally fast ones that with the least memory; if none fits, the smallest."""
    fitting = [x for x in layouts if x.fits]
    if not fitting:
        return min(layouts, key=lambda x: x.memory.device)
    return min(fitting, key=lambda x: (x.time.total_s, x.memory.device))


def _sample_bytes(spec: DatasetSpec) -> float:
    """Size of an uncompressed sample; a time series has as many dates as its sensor reads."""
    dates = {m.name: 1 for m in spec.modalities}
    for s in spec.sensors:
        dates[s.source] = max(dates[s.source], s.num_dates)
    item_bytes = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2}
    return sum(dates[m.name] * len(m.bands) * m.size**2 * item_bytes.get(m.dtype, 4) for m in spec.modalities)
