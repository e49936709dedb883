"""Memory footprint and communication of a rank under DeepSpeed, from the number of parameters and DeepSpeed's config.

Source: DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py); tests compare it with the bytes
of its live tensors. P parameters, N ranks; a rank's shard is P / N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BUCKET = (
    500_000_000  # elements: DeepSpeed's reduce_bucket_size, and its buffer where it reduces without ZeRO
)
_MAX_LIVE = 1_000_000_000  # parameters: stage3_max_live_parameters and stage3_max_reuse_distance
_PREFETCH = 50_000_000


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of a rank, without activations.

    ``weights``: with copies that are gathered from other ranks; those that autocast casts count as activations
    (model/activations.py), as they live from a block's forward to its backward pass. ``optimizer``: fp32 masters,
    moments, moving average. ``buckets``: buffers of the collectives. ``host``: what offload moves to the node's memory;
    where the device is a CPU, it adds to the rest.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buckets


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step, by collective; ring algorithms."""

    all_reduce: int
    reduce_scatter: int
    all_gather: int

    @property
    def total(self) -> int:
        """Their sum in bytes."""
        return self.all_reduce + self.reduce_scatter + self.all_gather


@dataclass(frozen=True)
class _Engine:
    """The settings of a DeepSpeed config that decide memory. ``value``: bytes of a weight in the forward pass."""

    stage: int
    value: int
    offload_optimizer: bool
    offload_param: bool
    bucket: int
    overlap: bool
    live: int
    prefetch: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> _Engine:
        zero = config.get("zero_optimization", {})
        stage, low = zero.get("stage", 0), config.get("bf16", {}).get("enabled", False)
        reuse = zero.get("stage3_max_reuse_distance", _MAX_LIVE)
        return _Engine(
            stage=stage,
            value=2 if low else 4,
            offload_optimizer=_offloaded(zero, "offload_optimizer") and stage > 0,
            offload_param=_offloaded(zero, "offload_param") and stage == 3,
            bucket=int(zero.get("reduce_bucket_size", _BUCKET)),
            overlap=bool(zero.get("overlap_comm")) and stage in (1, 2),
            live=int(min(zero.get("stage3_max_live_parameters", _MAX_LIVE), reuse)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)),
        )

    @property
    def plain_bf16(self) -> bool:
        """DeepSpeed takes another optimizer for bf16 at stage 1, which reduces whole fp32 gradients."""
        return self.stage == 1 and self.value == 2 and not self.offload_optimizer


def footprint(
    parameters: int, world: int, config: Mapping[str, Any], num_micro_batches: int, ema: bool = False
) -> Footprint:
    """The fullest moment of a step with the DeepSpeed config ``config`` (complete, as ``filled`` gives it)."""
    e, share = _Engine.of(config), -(-parameters // world)
    average = 4 * share if ema else 0
    if e.stage == 0:
        return Footprint(
            weights=4 * parameters,
            gradients=4 * parameters,
            optimizer=8 * parameters + average,
            buckets=4 * min(parameters, _BUCKET) if world > 1 else 0,
            host=0,
        )
    masters_and_moments = 12 * share + average
    weights, buckets = e.value * parameters, e.value * e.bucket * (1 + e.overlap)
    if e.plain_bf16:
        gradients = (2 + 4) * parameters
        buckets = e.value * min(parameters, _BUCKET) if world > 1 else 0
    elif e.stage == 1:
        gradients = 4 * parameters
    else:
        # Stage 2 adds what a micro-batch brings to what there is.
        adding = e.stage == 2 and (num_micro_batches > 1 or e.value == 2)
        gradients = (4 + e.value * adding) * share
    if e.stage == 3:
        gathered = e.value * min(parameters, e.live + (e.prefetch if parameters > e.live else 0))
        weights = (0 if e.offload_param else e.value * share) + gathered
    if not e.offload_optimizer:
        host = e.value * share if e.offload_param else 0
        return Footprint(weights, gradients, masters_and_moments, buckets, host)
    # Gradients in fp32 beside the masters; stages 1 and 2 also cast the new weights there, stage 2 accumulates there,
    # and stage 3 keeps all its gradients there.
    host = masters_and_moments + 4 * share
    if e.stage == 3:
        host += gradients + (e.value * share if e.offload_param else 0)
        gradients = 0
    else:
        host += e.value * share
        if e.stage == 2 and num_micro_batches > 1:
            host += 4 * share
            gradients = e.value * share
    return Footprint(weights, gradients, 0, buckets, host)


def traffic(parameters: int, world: int, config: Mapping[str, Any], num_micro_batches: int) -> Traffic:
    """What a step sends: a ring moves (N - 1) / N of a tensor per reduce-scatter or all-gather, twice that to
    all-reduce it. DeepSpeed all-reduces gradients in stages 1 and 2 as well, in stage 2 of every micro-batch."""
    e = _Engine.of(config)
    ring = (world - 1) / world * parameters
    if e.stage == 0:
        return Traffic(int(2 * ring * 4), 0, 0)
    if e.stage < 3:
        times = num_micro_batches if e.stage == 2 else 1
        return Traffic(int(2 * ring * e.value * times), 0, int(ring * e.value))
    # Weights stay gathered from one use to the next if they fit into what may be live; else each pass gathers them.
    gathers = 1 if parameters <= e.live else 2 * num_micro_batches
    return Traffic(0, int(ring * e.value * num_micro_batches), int(ring * e.value * gathers))


def _offloaded(zero: Mapping[str, Any], part: str) -> bool:
    section = zero.get(part)
    return isinstance(section, Mapping) and section.get("device", "none") not in (None, "none")
