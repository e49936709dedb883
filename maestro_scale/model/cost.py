"""What a model costs, counted from its description alone: parameters, tokens, FLOPs, memory by ZeRO stage.

A FLOP is one multiplication or addition (a multiply-add counts two). Only matrix products are counted, and only over
tokens that are computed: the encoder sees visible ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import num_masked
from maestro_scale.model.sequences import num_rows, num_tokens, sequences

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Counts for one sample and one replica. ``forward_flops`` is pretraining's; ``step_flops`` adds backward (twice
    the forward) and recomputation, which ``model_flops``, what MFU goes by, leaves out (arXiv 2204.02311, appendix B).
    ``activations``: values kept for backward per sample."""

    parameters: int
    tokens: dict[str, int]
    visible_tokens: int
    forward_flops: int
    step_flops: int
    activations: int

    @property
    def model_flops(self) -> int:
        """Forward and backward, whatever is computed twice to save memory."""
        return 3 * self.forward_flops


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters, counted on a model without storage."""
    with torch.device("meta"):
        return sum(p.numel() for p in Maestro(config).parameters())


def compute_cost(config: ModelConfig, mask_ratio: float) -> Cost:
    """The cost of pretraining one sample."""
    size = config.size
    flops, block_flops, again, kept, visible_all = 0, 0, 0, 0, 0
    encoder = _Block(size.width, size.heads * size.dim_head, size.width * size.mlp_ratio)
    decoder = _Block(
        size.decoder_width, size.decoder_heads * size.decoder_dim_head, size.width * size.decoder_mlp_ratio
    )
    for s in config.sensors:
        patch_tokens = s.num_dates * s.grid**2
        values = patch_tokens * s.patch**2 * len(s.bands)
        flops += 2 * values * (size.width + size.decoder_width)
        kept += 3 * values + 2 * config.rows(s) * s.grid**2 * size.width
    runs: list[_Run] = []
    for q in sequences(config):
        rows, tokens = num_rows(config, q), num_tokens(config, q)
        visible = tokens - num_masked(mask_ratio, tokens)
        visible_all += rows * visible
        if size.width != size.decoder_width:
            flops += 2 * rows * visible * size.width * size.decoder_width
        # The last block of a decoder computes what it says of hidden tokens only.
        runs.append(_Run(encoder, size.depth - config.inter_depth, rows, visible, visible))
        runs.append(_Run(decoder, size.decoder_depth, rows, tokens, tokens - visible or tokens))
    if config.inter_depth:
        runs.append(_Run(encoder, config.inter_depth, 1, visible_all, visible_all))
    for run in runs:
        for i in range(run.depth):
            wanted = run.wanted if i == run.depth - 1 else run.tokens
            recompute = bool(config.recompute_every) and i % config.recompute_every == 0
            block_flops += run.rows * run.block.flops(run.tokens, wanted)
            again += run.rows * run.block.flops(run.tokens, wanted) * recompute
            kept += run.rows * run.block.kept(run.tokens, wanted, recompute)
    forward = flops + block_flops
    return Cost(
        parameters=num_parameters(config),
        tokens={s.name: config.rows(s) * s.grid**2 for s in config.sensors},
        visible_tokens=visible_all,
        forward_flops=forward,
        step_flops=3 * forward + again,
        activations=kept,
    )


@dataclass(frozen=True)
class _Block:
    """FLOPs, and values kept for backward, of one block over n tokens, of which ``wanted`` are asked for."""

    width: int
    attention: int
    mlp: int

    def flops(self, n: int, wanted: int) -> int:
        products = n * 3 * self.attention + wanted * (self.attention + 2 * self.mlp)
        return 2 * self.width * products + 4 * wanted * n * self.attention

    def kept(self, n: int, wanted: int, recompute: bool) -> int:
        if recompute:
            return n * self.width
        # Both norms' inputs and outputs, q, k, v and their mix, and the MLP before and after GELU.
        return n * (2 * self.width + 3 * self.attention) + wanted * (
            2 * self.width + self.attention + 2 * self.mlp
        )


@dataclass(frozen=True)
class _Run:
    """A stack of blocks over ``rows`` sequences of ``tokens`` tokens; the last block is asked for ``wanted``."""

    block: _Block
    depth: int
    rows: int
    tokens: int
    wanted: int
