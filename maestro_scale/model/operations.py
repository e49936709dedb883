"""Kernel launches and memory traffic of forward and backward, by formulas fitted to counts.

A test compares both with the operations that ``benchmarks/memory.py`` dispatches. Matrix products and attention are in
``model/cost.py``; here is what the GPU does beside them: norms, GELU, residual sums, casts, bias gradients, the loss.
"""

from __future__ import annotations

from dataclasses import replace

from maestro_scale.model.activations import kept_bytes
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sequences import sequences
from maestro_scale.model.stacks import stacks

# Operations of a block, forward and backward; casts included.
_PER_BLOCK = {"bf16": 34, "bf16_weights": 28, "fp32": 28}
_PER_BLOCK_COMPILED = 20  # by inductor: matrix products, attention and fused kernels between them
_PER_RECOMPUTED_BLOCK = 10
_PER_SEQUENCE = 61  # patch embedding, encodings, gather, norms, decoder input, pixels and error
_PER_MICRO_BATCH = 99  # masks, counts, encodings of all tokens, the loss

# Bytes that elementwise operations read and write, per byte that is kept for the backward pass.
_TRAFFIC_PER_KEPT = {"bf16": 5.75, "bf16_weights": 4.1, "fp32": 3.8}
_RECOMPUTED_TRAFFIC = 0.22  # of the traffic, if every block is recomputed
_CAST_TRAFFIC = (
    12  # bytes per weight and micro-batch: read in fp32, written in bf16; its gradient the other way
)


def num_operations(config: ModelConfig, mask_ratio: float, precision: str, compiled: str = "none") -> int:
    """Operations of a micro-batch, forward and backward. ``compiled``: ``model.compile``; with ``step``, CUDA graphs
    replay the whole graph by one launch each way."""
    if compiled == "step":
        return 2
    calls = [c for stack in stacks(config, mask_ratio) for c in stack.calls(config.recompute_every)]
    per_block = _PER_BLOCK_COMPILED if compiled == "blocks" else _PER_BLOCK[precision]
    recomputed = sum(c.recomputed for c in calls)
    blocks = per_block * len(calls) + _PER_RECOMPUTED_BLOCK * recomputed
    return _PER_MICRO_BATCH + _PER_SEQUENCE * len(sequences(config)) + blocks


def elementwise_bytes(
    config: ModelConfig, mask_ratio: float, precision: str, micro_batch: int, parameters: int
) -> float:
    """Bytes that a micro-batch reads and writes beside matrix products, in eager mode. ``parameters``: of the model."""
    plain = replace(config, checkpointing="none")
    per_sample = kept_bytes(plain, mask_ratio, precision, 2) - kept_bytes(plain, mask_ratio, precision, 1)
    calls = [c for stack in stacks(config, mask_ratio) for c in stack.calls(config.recompute_every)]
    recomputed = sum(c.recomputed for c in calls) / len(calls)
    traffic = _TRAFFIC_PER_KEPT[precision] * per_sample * micro_batch * (1 + _RECOMPUTED_TRAFFIC * recomputed)
    if precision == "bf16":
        traffic += _CAST_TRAFFIC * parameters * (1 + recomputed / 2)
    return traffic
