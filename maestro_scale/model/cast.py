"""Casts to the compute dtype of autocast: many tensors by one operation.

Autocast casts every weight and bias by an operation of its own, forward and backward: two thirds more operations than
the computation has. Here a multi-tensor copy casts all tensors of a module at once. Values and gradients are those of
autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = tuple[Tensor, Tensor | None]  # weight and bias of a linear layer


def cast_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype in which autocast computes matrix products; unchanged where autocast is off."""
    # The compiler fuses casts itself, and cannot trace an in-place multi-tensor copy into autograd.
    if torch.compiler.is_compiling():
        return list(tensors)
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    # ZeRO 3 gathers the weights of linear layers in the autocast dtype already.
    others = [t for t in tensors if t.dtype != dtype]
    cast = iter(_Cast.apply(dtype, *others)) if others else iter(())
    return [t if t.dtype == dtype else next(cast) for t in tensors]


def cast_linears(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, list[Parameters]]:
    """``x`` and the weights and biases of linear layers, cast together.

    The input of the first layer is cast with them: its gradient is complete only after those of all later layers, so
    it joins their cast in the backward pass, too.
    """
    inputs, parameters = cast_all([x], linears)
    return inputs[0], parameters


def cast_all(inputs: Sequence[Tensor], linears: Sequence[nn.Linear]) -> tuple[list[Tensor], list[Parameters]]:
    """Inputs, and the weights and biases of linear layers, cast together."""
    parameters = [p for layer in linears for p in (layer.weight, layer.bias) if p is not None]
    cast = cast_together([*inputs, *parameters])
    rest = iter(cast[len(inputs) :])
    return cast[: len(inputs)], [
        (next(rest), None if layer.bias is None else next(rest)) for layer in linears
    ]


def apply_linears(inputs: Sequence[Tensor], linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Each layer applied to its input; inputs have the dtype of the weights, or are cast by autocast."""
    inputs, parameters = cast_all(inputs, linears)
    return [F.linear(x, weight, bias) for x, (weight, bias) in zip(inputs, parameters, strict=True)]


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in tensors]
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(g, d) for g, d in zip(grads, ctx.dtypes, strict=True) if g is not None]
        copies = iter(_copies([g for g, _ in pairs], [d for _, d in pairs]))
        return None, *(None if g is None else next(copies) for g in grads)


def _copies(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    # empty_like keeps strides: the multi-tensor kernel is used only where source and destination have the same.
    copies = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies
