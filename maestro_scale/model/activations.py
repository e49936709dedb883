"""Memory that forward and backward take beyond weights, gradients and the batch, from a model's configuration.

Follows what ``model/maestro.py`` computes: each part of the forward pass keeps tensors for the backward pass, which
frees them in reverse order. The peak is the largest of three kinds of moments: the forward pass of a block, the loss,
and the backward pass of a block, which recomputes it first where it is checkpointed. ``benchmarks/memory.py`` counts
the same bytes on tensors without data; a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sequences import Sequence, has_equal_patches, num_rows, num_tokens, sequences
from maestro_scale.model.stacks import BlockCall, BlockShape, Stack, stacks

_FP32 = 4
_STATISTICS = 2 * _FP32  # LayerNorm keeps mean and inverse deviation per token
_INDEX = 8  # int64


@dataclass(frozen=True)
class _Widths:
    """Bytes of a value: of the residual stream and the norms, of the inputs of matrix products, and of the copies that
    autocast makes of weights (0: it makes none)."""

    residual: int
    product: int
    weight_cast: int


_WIDTHS = {"fp32": _Widths(4, 4, 0), "bf16": _Widths(4, 2, 2), "bf16_weights": _Widths(2, 2, 0)}


@dataclass(frozen=True)
class _Moment:
    """A part of the forward pass. ``kept``: bytes from its forward to its backward pass; ``forward`` and ``backward``:
    bytes that exist beside it only while it is computed."""

    kept: int
    forward: int
    backward: int


def activation_bytes(config: ModelConfig, mask_ratio: float, precision: str, micro_batch: int) -> int:
    """Estimated peak bytes of a micro-batch of that many samples. ``precision``: bf16, bf16_weights or fp32."""
    widths = _WIDTHS[precision]
    # The fp32 patches are alive until the loss has been computed; in fp32 the patch embedding keeps them anyway.
    values = sum(_values(config, q) for q in sequences(config))
    patches = 0 if precision == "fp32" else _FP32 * micro_batch * values
    peak = before = 0
    for moment in _moments(config, mask_ratio, widths, micro_batch):
        peak = max(peak, before + moment.kept + max(moment.forward + patches, moment.backward))
        before += moment.kept
    return peak


def kept_bytes(config: ModelConfig, mask_ratio: float, precision: str, micro_batch: int) -> int:
    """Estimated bytes that the forward pass of a micro-batch keeps for the backward pass."""
    return sum(m.kept for m in _moments(config, mask_ratio, _WIDTHS[precision], micro_batch))


def _moments(config: ModelConfig, mask_ratio: float, w: _Widths, micro_batch: int) -> Iterator[_Moment]:
    """The parts of a forward pass in order; all bytes are of the whole micro-batch."""
    size, listed = config.size, stacks(config, mask_ratio)
    yield _embedding(config, w, micro_batch)
    for stack in listed:
        for call in stack.calls(config.recompute_every):
            yield _block(call, w, micro_batch)
        yield _final_norm(stack, w, micro_batch)
        if stack.part != "decoder" and stack is _last_encoder(listed) and size.width != size.decoder_width:
            visible = micro_batch * sum(s.rows * s.tokens for s in listed if s.part == "encoder")
            weights = (
                w.weight_cast * len({q.encoder for q in sequences(config)}) * size.width * size.decoder_width
            )
            yield _Moment(visible * size.width * w.product + weights, 0, 0)
    yield _loss(config, mask_ratio, w, micro_batch)


def _last_encoder(listed: tuple[Stack, ...]) -> Stack:
    return [s for s in listed if s.part != "decoder"][-1]


def _embedding(config: ModelConfig, w: _Widths, micro_batch: int) -> _Moment:
    """Masks, patch embedding with its norm, and the tokens from which the visible ones are gathered."""
    seqs, width = sequences(config), config.size.width
    tokens = micro_batch * sum(num_rows(config, q) * num_tokens(config, q) for q in seqs)
    values = micro_batch * sum(_values(config, q) for q in seqs)
    weights = {s.embed: s.patch**2 * len(s.bands) * width for s in config.sensors}
    # Input and output of the norm, and the packed tokens: gather keeps what it gathers from.
    grids = tokens * width * w.residual
    kept = values * w.product + 3 * grids + w.weight_cast * sum(weights.values())
    masks = tokens * (_INDEX + 1)
    return _Moment(kept + masks, 0, 2 * grids)


def _block(call: BlockCall, w: _Widths, micro_batch: int) -> _Moment:
    shape, n = call.shape, micro_batch * call.rows * call.tokens
    outputs = micro_batch * call.rows * call.outputs
    full = _block_bytes(shape, n, outputs, w) + w.weight_cast * shape.matrix_parameters
    kept = n * shape.width * w.residual if call.recomputed else full
    # In the backward pass of the MLP: the gradients of the output, and of the hidden values.
    gradients = outputs * (shape.width * (w.residual + w.product) + shape.mlp * w.product)
    # Autocast casts the gradients of all matrices of a block together, when the block's activations are freed.
    cast = (w.weight_cast + _FP32) * shape.matrix_parameters if w.weight_cast else 0
    return _Moment(
        kept, full - kept + n * shape.width * w.residual, max(full - kept + gradients, cast - kept)
    )


def _block_bytes(shape: BlockShape, n: int, outputs: int, w: _Widths) -> int:
    """Activations that a block keeps: both norms' inputs and outputs, q, k, v, the attention's output and log-sum-exp,
    and the MLP before and after GELU."""
    attention = 3 * n * shape.attention * w.product + outputs * (
        shape.attention * w.product + shape.heads * _FP32
    )
    norms = (n + outputs) * (shape.width * (w.residual + w.product) + _STATISTICS)
    return attention + norms + 2 * outputs * shape.mlp * w.product


def _final_norm(stack: Stack, w: _Widths, micro_batch: int) -> _Moment:
    outputs = micro_batch * stack.rows * stack.num_outputs
    return _Moment(outputs * (stack.shape.width * w.residual + _STATISTICS), 0, 0)


def _loss(config: ModelConfig, mask_ratio: float, w: _Widths, micro_batch: int) -> _Moment:
    """Prediction of the masked pixels and their error, sequence by sequence."""
    width = config.size.decoder_width
    kept = decoded = predictions = largest = 0
    decoders = [s for s in stacks(config, mask_ratio) if s.part == "decoder"]
    for q, stack in zip(sequences(config), decoders, strict=True):
        outputs = micro_batch * stack.rows * stack.num_outputs
        values = micro_batch * _values(config, q)
        decoded += outputs * width * w.residual
        if has_equal_patches(config, q):
            # Every masked token is predicted with the weights of each sensor of its sequence.
            sensor, num_sensors = q.sensors[0], len(q.sensors)
            masked = outputs * sensor.patch**2 * len(sensor.bands)
            predicted = num_sensors * masked
            # Packed patches; gathered and normalised targets; absolute errors.
            largest = max(largest, _FP32 * (values + 2 * masked + predicted))
        else:
            # All tokens in order, the visible ones as zeros.
            predicted = values
            tokens = micro_batch * stack.rows * stack.tokens
            kept += tokens * width * w.residual
            largest = max(largest, _FP32 * 3 * values)
        kept += outputs * width * w.product + predicted * _FP32
        predictions += predicted * w.product
    weights = {s.embed: s.patch**2 * len(s.bands) * width for s in config.sensors}
    kept += w.weight_cast * sum(weights.values())
    return _Moment(kept, decoded + predictions + largest, predictions + largest)


def _values(config: ModelConfig, sequence: Sequence) -> int:
    """Pixel values of a sequence's sensors per sample."""
    return sum(s.num_dates * s.grid**2 * s.patch**2 * len(s.bands) for s in sequence.sensors)
