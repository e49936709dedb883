"""Attention kernels: PyTorch's automatic choice, one of its backends by name, or the flash-attn package.

Every backend computes softmax(q kᵀ / sqrt(d)) v; they differ in speed, memory and supported devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_function(choice: str) -> Attend:
    """The attention function of an ``AttentionChoice``: q (B, M, heads, dim), k and v (B, N, heads, dim) -> as q."""
    if choice == "flash_attn":
        return _flash_attn
    return partial(_attend, choice) if choice in BACKENDS else _attend_automatically


def available_backends(device: torch.device, dtype: torch.dtype, dim_head: int) -> tuple[str, ...]:
    """The attention choices other than ``auto`` that run forward and backward on a device; each is tried."""
    return tuple(c for c in (*BACKENDS, "flash_attn") if _runs(c, device, dtype, dim_head))


def resolve_backend(choice: str, device: torch.device, dtype: torch.dtype, dim_head: int) -> str:
    """The backend of a choice: the choice itself, or PyTorch's selection for ``auto``.

    Raises:
        ValueError: it does not run on the device; the message lists the choices that do.
    """
    if choice != "auto":
        if not _runs(choice, device, dtype, dim_head):
            usable = ", ".join(("auto", *available_backends(device, dtype, dim_head)))
            raise ValueError(
                f"model.attention: {choice!r} does not run on {device.type} in {_short(dtype)} with heads of "
                f"{dim_head} channels; use one of {usable}"
            )
        return choice
    q = _example(device, dtype, dim_head).transpose(1, 2)
    number = torch._fused_sdp_choice(q, q, q)  # private; what scaled_dot_product_attention calls
    return next((name for name, b in BACKENDS.items() if b.value == number), "math")


def _runs(choice: str, device: torch.device, dtype: torch.dtype, dim_head: int) -> bool:
    x = _example(device, dtype, dim_head).requires_grad_()
    try:
        attention_function(choice)(x, x, x).sum().backward()
    except (RuntimeError, ImportError):
        return False
    return True


def _example(device: torch.device, dtype: torch.dtype, dim_head: int) -> Tensor:
    return torch.zeros(1, 16, 2, dim_head, device=device, dtype=dtype)


# Functions of the module, so that a model can be pickled.
def _attend_automatically(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attend(choice: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Set around each call, not around the step: activation checkpointing recomputes blocks in the backward pass, and
    # must use the same kernel there.
    with sdpa_kernel(BACKENDS[choice]):
        return _attend_automatically(q, k, v)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # optional, CUDA only

    return flash_attn_func(q, k, v)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
