"""What a model costs, counted from its description alone: parameters, tokens, FLOPs, memory by ZeRO stage.

A FLOP is one multiplication or addition (a multiply-add counts two). Only matrix products are counted, and only over
tokens that are computed: the encoder sees visible ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import num_hidden
from maestro_scale.model.sequences import num_rows, num_tokens, sequences

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Counts for one sample and one replica. ``forward_flops`` is pretraining's; ``step_flops`` adds backward (twice
    the forward) and recomputation. ``activations``: values kept for backward per sample."""

    parameters: int
    tokens: dict[str, int]
    visible_tokens: int
    forward_flops: int
    step_flops: int
    activations: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes a rank holds under one ZeRO stage, without activations and communication buckets."""

    stage: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum in bytes."""
        return self.weights + self.gradients + self.optimizer


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters, counted on a model without storage."""
    with torch.device("meta"):
        return sum(p.numel() for p in Maestro(config).parameters())


def cost(config: ModelConfig, mask_ratio: float) -> Cost:
    """The cost of pretraining one sample."""
    size = config.size
    flops, block_flops, kept, visible_all = 0, 0, 0, 0
    encoder = _block(size.width, size.heads * size.dim_head, size.width * size.mlp_ratio)
    decoder = _block(
        size.decoder_width, size.decoder_heads * size.decoder_dim_head, size.width * size.decoder_mlp_ratio
    )
    for s in config.sensors:
        patch_tokens = s.num_dates * s.grid**2
        values = patch_tokens * s.patch**2 * len(s.bands)
        flops += 2 * values * (size.width + size.decoder_width)
        kept += 3 * values + 2 * config.rows(s) * s.grid**2 * size.width
    for q in sequences(config):
        rows, tokens = num_rows(config, q), num_tokens(config, q)
        visible = tokens - num_hidden(mask_ratio, tokens)
        visible_all += rows * visible
        if size.width != size.decoder_width:
            flops += 2 * rows * visible * size.width * size.decoder_width
        # The last block of a decoder computes what it says of hidden tokens only.
        hidden = tokens - visible or tokens
        for block, depth, n, wanted in (
            (encoder, size.depth - config.inter_depth, visible, visible),
            (decoder, size.decoder_depth - 1, tokens, tokens),
            (decoder, 1, tokens, hidden),
        ):
            block_flops += rows * depth * block.flops(n, wanted)
            kept += rows * depth * n * block.kept(config.checkpointing == "blocks")
    block_flops += config.inter_depth * encoder.flops(visible_all, visible_all) if config.inter_depth else 0
    kept += config.inter_depth * visible_all * encoder.kept(config.checkpointing == "blocks")
    forward = flops + block_flops
    return Cost(
        parameters=num_parameters(config),
        tokens={s.name: config.rows(s) * s.grid**2 for s in config.sensors},
        visible_tokens=visible_all,
        forward_flops=forward,
        step_flops=3 * forward + (block_flops if config.checkpointing == "blocks" else 0),
        activations=kept,
    )


def memory_by_stage(parameters: int, world: int, bf16: bool) -> list[StageMemory]:
    """Model states per rank for ZeRO 0-3 (ZeRO paper, section 3): AdamW keeps fp32 master weights and two moments.

    In fp32 DeepSpeed's stages 1 and 2 hold a partitioned copy of the weights beside the weights themselves.
    """
    value = 2 if bf16 else 4
    stages = []
    for stage in range(4):
        masters = 4 if bf16 or stage > 0 else 0
        stages.append(
            StageMemory(
                stage,
                weights=parameters * value // (world if stage == 3 else 1),
                gradients=parameters * value // (world if stage >= 2 else 1),
                optimizer=parameters * (8 + masters) // (world if stage >= 1 else 1),
            )
        )
    return stages


@dataclass(frozen=True)
class _Block:
    flops: Callable[[int, int], int]  # of n tokens, of which so many are wanted
    kept: Callable[[bool], int]  # values kept per token, with or without recomputation


def _block(width: int, attention: int, mlp: int) -> _Block:
    return _Block(
        flops=lambda n, wanted: (
            2 * width * (n * 3 * attention + wanted * (attention + 2 * mlp)) + 4 * wanted * n * attention
        ),
        # Inputs of both norms and of what follows them, q, k, v and their mix, and the MLP before and after GELU.
        kept=lambda recompute: width if recompute else 4 * width + 4 * attention + 2 * mlp,
    )
