"""Cost of a model, computed from its configuration: parameters, tokens, FLOPs and activations.

A FLOP is one multiplication or addition (a multiply-add counts as two). Only matrix products are counted, and only
over the tokens that are computed: in the encoder the visible ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import num_masked
from maestro_scale.model.sequences import Sequence, has_equal_patches, num_rows, num_tokens, sequences

GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Cost of pretraining per sample and replica. ``step_flops``: forward, backward (twice the forward) and the
    recomputation of checkpointed blocks; ``model_flops``, on which MFU is based, leaves recomputation out
    (arXiv 2204.02311, appendix B). ``activations``: values stored for the backward pass, per sample."""

    parameters: int
    tokens: dict[str, int]
    visible_tokens: int
    forward_flops: int
    step_flops: int
    activations: int

    @property
    def model_flops(self) -> int:
        """FLOPs of forward and backward without recomputation."""
        return 3 * self.forward_flops


def num_parameters(config: ModelConfig) -> int:
    """Number of trainable parameters, counted on the meta device, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Maestro(config).parameters())


def compute_cost(config: ModelConfig, mask_ratio: float) -> Cost:
    """The cost of pretraining one sample."""
    size = config.size
    flops, block_flops, recompute_flops, activations, visible_all = 0, 0, 0, 0, 0
    encoder = _Block(size.width, size.heads * size.dim_head, size.width * size.mlp_ratio)
    decoder = _Block(
        size.decoder_width, size.decoder_heads * size.decoder_dim_head, size.width * size.decoder_mlp_ratio
    )
    for s in config.sensors:
        patch_tokens = s.num_dates * s.grid**2
        values = patch_tokens * s.patch**2 * len(s.bands)
        flops += 2 * values * size.width
        activations += 3 * values + 2 * config.rows(s) * s.grid**2 * size.width
    stacks: list[_Stack] = []
    for q in sequences(config):
        rows, tokens = num_rows(config, q), num_tokens(config, q)
        visible = tokens - num_masked(mask_ratio, tokens)
        visible_all += rows * visible
        if size.width != size.decoder_width:
            flops += 2 * rows * visible * size.width * size.decoder_width
        flops += 2 * _predicted_values(config, q, rows * (tokens - visible)) * size.decoder_width
        # The last block of a decoder computes the outputs of masked tokens only, which are all that the loss needs.
        stacks.append(_Stack(encoder, size.depth - config.inter_depth, rows, visible, visible))
        stacks.append(_Stack(decoder, size.decoder_depth, rows, tokens, tokens - visible or tokens))
    if config.inter_depth:
        stacks.append(_Stack(encoder, config.inter_depth, 1, visible_all, visible_all))
    for stack in stacks:
        for i in range(stack.depth):
            outputs = stack.num_outputs if i == stack.depth - 1 else stack.tokens
            recompute = bool(config.recompute_every) and i % config.recompute_every == 0
            block_flops += stack.rows * stack.block.flops(stack.tokens, outputs)
            recompute_flops += stack.rows * stack.block.flops(stack.tokens, outputs) * recompute
            activations += stack.rows * stack.block.activations(stack.tokens, outputs, recompute)
    forward = flops + block_flops
    return Cost(
        parameters=num_parameters(config),
        tokens={s.name: config.rows(s) * s.grid**2 for s in config.sensors},
        visible_tokens=visible_all,
        forward_flops=forward,
        step_flops=3 * forward + recompute_flops,
        activations=activations,
    )


def _predicted_values(config: ModelConfig, sequence: Sequence, masked: int) -> int:
    """Pixel values that the decoder's linear layers predict per sample, for ``masked`` tokens of all rows."""
    if masked and has_equal_patches(config, sequence):
        # Masked tokens only, with the weights of each sensor of the sequence (Maestro._token_errors).
        return sum(masked * s.patch**2 * len(s.bands) for s in sequence.sensors)
    return sum(s.num_dates * s.grid**2 * s.patch**2 * len(s.bands) for s in sequence.sensors)


@dataclass(frozen=True)
class _Block:
    """FLOPs and stored activations of one block over n tokens that computes ``outputs`` of them."""

    width: int
    attention: int
    mlp: int

    def flops(self, n: int, outputs: int) -> int:
        # Keys and values of all tokens; queries are projected for all, too, before the outputs are selected.
        products = n * 3 * self.attention + outputs * (self.attention + 2 * self.mlp)
        return 2 * self.width * products + 4 * outputs * n * self.attention

    def activations(self, n: int, outputs: int, recompute: bool) -> int:
        if recompute:
            return n * self.width  # a checkpointed block stores its input only
        # Inputs and outputs of both norms, q, k, v, the attention output, and the MLP before and after GELU.
        return n * (2 * self.width + 3 * self.attention) + outputs * (
            2 * self.width + self.attention + 2 * self.mlp
        )


@dataclass(frozen=True)
class _Stack:
    """Blocks over ``rows`` sequences of ``tokens`` tokens; the last block computes ``num_outputs`` of them."""

    block: _Block
    depth: int
    rows: int
    tokens: int
    num_outputs: int
