"""The transformer stacks of a forward pass with their shapes, from a model's configuration.

FLOPs, activation memory, kernel launches and memory traffic are all computed from this list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.masking import num_masked
from maestro_scale.model.sequences import num_rows, num_tokens, sequences


@dataclass(frozen=True)
class BlockShape:
    """Channels of a block: ``width`` of its input, ``attention`` of all heads together, ``mlp`` hidden."""

    width: int
    attention: int
    mlp: int
    heads: int

    @property
    def matrix_parameters(self) -> int:
        """Weights and biases of its linear layers, which are cast under autocast."""
        weights = self.width * (4 * self.attention + 2 * self.mlp)
        return weights + 2 * self.width + self.mlp


@dataclass(frozen=True)
class BlockCall:
    """One block over ``rows`` sequences of ``tokens``, of which it computes ``outputs``. ``recomputed``: under
    activation checkpointing."""

    shape: BlockShape
    rows: int
    tokens: int
    outputs: int
    recomputed: bool


@dataclass(frozen=True)
class Stack:
    """Blocks over ``rows`` sequences of ``tokens`` tokens per sample; the last block computes ``num_outputs`` of them.

    ``part``: encoder, inter or decoder.
    """

    part: str
    shape: BlockShape
    depth: int
    rows: int
    tokens: int
    num_outputs: int

    def calls(self, recompute_every: int) -> Iterator[BlockCall]:
        """Its blocks in order."""
        for i in range(self.depth):
            outputs = self.num_outputs if i == self.depth - 1 else self.tokens
            recomputed = bool(recompute_every) and i % recompute_every == 0
            yield BlockCall(self.shape, self.rows, self.tokens, outputs, recomputed)


def stacks(config: ModelConfig, mask_ratio: float) -> tuple[Stack, ...]:
    """The stacks of pretraining in the order of a forward pass: encoders, inter-group blocks, decoders."""
    size = config.size
    encoder = BlockShape(size.width, size.heads * size.dim_head, size.width * size.mlp_ratio, size.heads)
    decoder = BlockShape(
        size.decoder_width,
        size.decoder_heads * size.decoder_dim_head,
        size.width * size.decoder_mlp_ratio,
        size.decoder_heads,
    )
    encoders, decoders, visible_all = [], [], 0
    for q in sequences(config):
        rows, tokens = num_rows(config, q), num_tokens(config, q)
        visible = tokens - num_masked(mask_ratio, tokens)
        visible_all += rows * visible
        encoders.append(Stack("encoder", encoder, size.depth - config.inter_depth, rows, visible, visible))
        # The last block of a decoder computes the outputs of masked tokens only, which are all that the loss needs.
        decoders.append(
            Stack("decoder", decoder, size.decoder_depth, rows, tokens, tokens - visible or tokens)
        )
    inter = (
        [Stack("inter", encoder, config.inter_depth, 1, visible_all, visible_all)]
        if config.inter_depth
        else []
    )
    return (*encoders, *inter, *decoders)
