"""Predicts the time of an optimizer step: compute, kernel launches, AdamW and communication.

A roofline model: nothing here was measured on a GPU. Compute time is that of matrix products at a fraction of the
GPU's peak, plus that of the bytes that other operations move. The host launches operations while the device computes,
so the slower of both decides: a layout is *launch-bound* if launching takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost, parameter_counts
from maestro_scale.model.operations import elementwise_bytes, num_operations
from maestro_scale.recipe import Recipe
from maestro_scale.training.footprint import Traffic
from maestro_scale.training.metrics.gpus import Gpu

_ACHIEVED_BANDWIDTH = 0.85  # fraction of the memory bandwidth that streaming kernels reach
_ACHIEVED_LINK = 0.8  # fraction of the link's bandwidth that NCCL's rings reach
_FP32_RATE = 1 / 15  # of the bf16 peak: fp32 matrix products do not use tensor cores (TF32 is off)
_OVERLAPPED = 0.5  # of the communication beside compute, which it slows: NCCL's kernels take part of the GPU
_FUSED = 0.5  # traffic of elementwise operations after fusion by inductor
# Bytes per parameter: gradient norm and clipping, AdamW on fp32 weights and moments, gradients set to zero.
_OPTIMIZER_BYTES = 44
# By ZeRO stage, in bf16, as benchmarks/optimizer_operations.py counts them. The optimizer step, per parameter tensor:
_OPTIMIZER_OPERATIONS = {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.7}
# DeepSpeed's hooks in a backward pass, per parameter tensor, in units of the host's time for one operation. Their
# Python takes longer than the 1.0, 1.5, 2.5 and 2.1 operations that they dispatch: a step of a model with 453 tensors
# took 27 ms of CPU time at stage 0, 60 at stage 2 and 103 at stage 3. Stage 1 is interpolated.
_HOOK_OPERATIONS = {0: 1.0, 1: 4.0, 2: 6.5, 3: 14.0}


@dataclass(frozen=True)
class Assumptions:
    """``mfu``: fraction of the peak FLOP/s that matrix products reach. ``launch_s``: host time per operation.
    ``link``: bytes/s and direction of a rank's collectives."""

    mfu: float
    launch_s: float
    link: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by cause. ``launch_s``: of the host, beside ``compute_s``.

    ``communication_s``: the part that does not overlap with compute.
    """

    compute_s: float
    launch_s: float
    optimizer_s: float
    communication_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return max(self.compute_s, self.launch_s) + self.optimizer_s + self.communication_s

    @property
    def is_launch_bound(self) -> bool:
        """Whether the device waits for the host to launch operations."""
        return self.launch_s > self.compute_s


@dataclass(frozen=True)
class Workload:
    """What a recipe computes; means over the mixture by weight, as a step is of one dataset.

    ``step_flops`` and ``model_flops``: of a sample, with and without recomputation. ``tensors``: number of parameter
    tensors.
    """

    configs: tuple[ModelConfig, ...]
    weights: tuple[float, ...]
    ratio: float
    parameters: int
    tensors: int
    step_flops: float
    model_flops: float

    @staticmethod
    def of(recipe: Recipe, config: ModelConfig) -> Workload:
        """The workload of a recipe with this model."""
        configs = tuple(config.for_dataset(v.dataset) for v in config.views)
        weights = tuple(e.weight for e in recipe.data.mixture)
        costs = [compute_cost(c, recipe.masking.ratio) for c in configs]
        return Workload(
            configs,
            weights,
            recipe.masking.ratio,
            *parameter_counts(config),
            step_flops=_mean([c.step_flops for c in costs], weights),
            model_flops=_mean([c.model_flops for c in costs], weights),
        )

    def operations(self, precision: str, compiled: str) -> float:
        """Operations of a micro-batch."""
        counts = [num_operations(c, self.ratio, precision, compiled) for c in self.configs]
        return _mean(counts, self.weights)

    def elementwise_bytes(self, precision: str, micro_batch: int) -> float:
        """Memory traffic of a micro-batch beside matrix products, in eager mode."""
        moved = [
            elementwise_bytes(c, self.ratio, precision, micro_batch, self.parameters) for c in self.configs
        ]
        return _mean(moved, self.weights)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def step_time(
    work: Workload, recipe: Recipe, world_size: int, gpu: Gpu, sent: Traffic, assumed: Assumptions
) -> StepTime:
    """The time of a step of ``recipe``, whose micro-batch is a number, on ``world_size`` GPUs."""
    micro_batch, precision = recipe.train.samples_per_micro_batch, recipe.train.precision_on("cuda")
    times, mode = recipe.num_micro_batches(world_size), recipe.model.compile
    peak = gpu.tflops * 1e12 * (_FP32_RATE if precision == "fp32" else 1)
    bandwidth = _ACHIEVED_BANDWIDTH * gpu.bandwidth
    moved = work.elementwise_bytes(precision, micro_batch) * (1 if mode == "none" else _FUSED)
    compute_s = times * (micro_batch * work.step_flops / (peak * assumed.mfu) + moved / bandwidth)
    operations = work.operations(precision, mode)
    hooks = _HOOK_OPERATIONS[recipe.zero_stage] * work.tensors
    share = work.parameters / (world_size if recipe.zero_stage else 1)
    optimizer_s = max(
        _OPTIMIZER_BYTES * share / bandwidth,
        _OPTIMIZER_OPERATIONS[recipe.zero_stage] * work.tensors * assumed.launch_s,
    )
    return StepTime(
        compute_s=compute_s,
        launch_s=times * (operations + hooks) * assumed.launch_s,
        optimizer_s=optimizer_s,
        communication_s=_exposed(recipe, sent, assumed, compute_s),
    )


def _exposed(recipe: Recipe, sent: Traffic, assumed: Assumptions, compute_s: float) -> float:
    """Seconds of communication that compute does not hide. With overlap_comm (the default of stage 3), collectives run
    beside compute; without, gradients are reduced between kernels, and all weights are gathered after the step."""
    link = _ACHIEVED_LINK * assumed.link
    if not recipe.deepspeed.get("zero_optimization", {}).get("overlap_comm", recipe.zero_stage == 3):
        return sent.total / link
    # Stages 1 and 2 gather the new weights after the optimizer, when nothing is left to overlap with.
    beside = sent.total if recipe.zero_stage == 3 else sent.all_reduce
    return sent.total / link - min(_OVERLAPPED * beside / link, compute_s)
