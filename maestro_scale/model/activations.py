"""Memory that forward and backward take beyond weights, gradients and the batch, from a model's configuration."""

from __future__ import annotations

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost


def activation_bytes(config: ModelConfig, mask_ratio: float, precision: str, micro_batch: int) -> int:
    """Estimated peak bytes for a micro-batch of that many samples. ``precision``: bf16, bf16_weights or fp32."""
    return compute_cost(config, mask_ratio).activations * micro_batch * (4 if precision == "fp32" else 2)
