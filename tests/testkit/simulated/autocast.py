"""Autocast of the simulated device: the operations that CUDA's autocast runs in bf16 and in fp32.

torch registers none for a new backend, so that the precision of a run would otherwise be that of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KEY = torch._C.DispatchKey.AutocastPrivateUse1
# Of torch/csrc's AT_FORALL_LOWER_PRECISION_FP and AT_FORALL_FP32, what models here may use.
_LOWER = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "conv2d",
    "scaled_dot_product_attention",
)
_FP32 = (
    "binary_cross_entropy_with_logits",
    "cumsum",
    "exp",
    "group_norm",
    "l1_loss",
    "layer_norm",
    "log",
    "mse_loss",
    "native_layer_norm",
    "norm",
    "pow",
    "rsqrt",
    "softmax",
    "sum",
)
_library = torch.library.Library("aten", "IMPL")
_fallback = torch.library.Library("_", "IMPL")


def register() -> None:
    """Register the casts, for the overloads that take tensors."""
    _fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, lower in ((_LOWER, True), (_FP32, False)):
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" in overload or "dimname" in overload.lower():
                    continue
                _register(getattr(packet, overload), lower)


def _register(operation: Any, lower: bool) -> None:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(dtype)
        if isinstance(value, (list, tuple)):
            return type(value)(cast(item, dtype) for item in value)
        return value

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("simulated") if lower else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            args = tuple(cast(a, dtype) for a in args)
            return operation(*args, **{k: cast(v, dtype) for k, v in kwargs.items()})

    name = operation._schema.name
    if operation._overloadname != "default":
        name = f"{name}.{operation._overloadname}"
    _library.impl(name, run, "AutocastPrivateUse1")
