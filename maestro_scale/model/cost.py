"""Cost of a model, computed from its configuration: parameters, tokens and FLOPs.

A FLOP is one multiplication or addition (a multiply-add counts as two). Only matrix products are counted, and only
over the tokens that are computed: in the encoder the visible ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import num_masked
from maestro_scale.model.sequences import Sequence, has_equal_patches, sequences
from maestro_scale.model.stacks import BlockCall, stacks

GIB = 2**30
_NO_MASKING = 1e-6  # a mask ratio at which no token is masked


@dataclass(frozen=True)
class Cost:
    """Cost of pretraining per sample and replica. ``step_flops``: forward, backward (twice the forward) and the
    recomputation of checkpointed blocks; ``model_flops``, on which MFU is based, leaves recomputation out
    (arXiv 2204.02311, appendix B). Memory is in :mod:`maestro_scale.model.activations`."""

    parameters: int
    tokens: dict[str, int]
    visible_tokens: int
    forward_flops: int
    step_flops: int

    @property
    def model_flops(self) -> int:
        """FLOPs of forward and backward without recomputation."""
        return 3 * self.forward_flops


def num_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters."""
    return parameter_counts(config)[0]


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """(parameters, parameter tensors), counted on the meta device, without allocating them."""
    with torch.device("meta"):
        sizes = [p.numel() for p in Maestro(config).parameters()]
    return sum(sizes), len(sizes)


def sensor_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by sensor of the modules that depend on its bands: patch embedding, mask tokens, projection to pixels.

    Sensors of one ``embed`` share the first and the last. All other parameters are of encoders, decoders and heads.
    """
    with torch.device("meta"):
        model = Maestro(config)

    def modules(sensor: Sensor) -> tuple[nn.Module, ...]:
        return model.patch_embed[sensor.embed], model.mask_token[sensor.name], model.to_pixels[sensor.embed]

    return {
        s.name: sum(p.numel() for module in modules(s) for p in module.parameters()) for s in config.sensors
    }


def compute_cost(config: ModelConfig, mask_ratio: float) -> Cost:
    """The cost of pretraining one sample."""
    size = config.size
    block_flops = recompute_flops = visible = 0
    flops = _embedding_flops(config)
    listed = stacks(config, mask_ratio)
    for q, stack in zip(sequences(config), (s for s in listed if s.part == "decoder"), strict=True):
        masked = num_masked(mask_ratio, stack.tokens) * stack.rows
        flops += 2 * _predicted_values(config, q, masked) * size.decoder_width
    for stack in listed:
        if stack.part == "encoder":
            visible += stack.rows * stack.tokens
        for call in stack.calls(config.recompute_every):
            block_flops += _flops(call)
            recompute_flops += _flops(call) * call.recomputed
    if size.width != size.decoder_width:
        flops += 2 * visible * size.width * size.decoder_width
    forward = flops + block_flops
    return Cost(
        parameters=num_parameters(config),
        tokens={s.name: config.rows(s) * s.grid**2 for s in config.sensors},
        visible_tokens=visible,
        forward_flops=forward,
        step_flops=3 * forward + recompute_flops,
    )


def encoder_flops(config: ModelConfig) -> int:
    """FLOPs of the encoder's forward pass for one sample without masking, as in evaluation and supervised training."""
    blocks = (
        _flops(call)
        for stack in stacks(config, _NO_MASKING)
        if stack.part != "decoder"  # of a group (encoder) and over all groups (inter)
        for call in stack.calls(config.recompute_every)
    )
    return _embedding_flops(config) + sum(blocks)


def _embedding_flops(config: ModelConfig) -> int:
    return sum(
        2 * s.num_dates * s.grid**2 * s.patch**2 * len(s.bands) * config.size.width for s in config.sensors
    )


def _predicted_values(config: ModelConfig, sequence: Sequence, masked: int) -> int:
    """Pixel values that the decoder's linear layers predict per sample, for ``masked`` tokens of all rows."""
    if masked and has_equal_patches(config, sequence):
        # Masked tokens only, with the weights of each sensor of the sequence (Maestro._token_errors).
        return sum(masked * s.patch**2 * len(s.bands) for s in sequence.sensors)
    return sum(s.num_dates * s.grid**2 * s.patch**2 * len(s.bands) for s in sequence.sensors)


def _flops(call: BlockCall) -> int:
    shape = call.shape
    # Keys and values of all tokens; queries are projected for all, too, before the outputs are selected.
    products = call.tokens * 3 * shape.attention + call.outputs * (shape.attention + 2 * shape.mlp)
    per_row = 2 * shape.width * products + 4 * call.outputs * call.tokens * shape.attention
    return call.rows * per_row
