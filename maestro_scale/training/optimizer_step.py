"""DeepSpeed's optimizer step with our gradient norm and clipping, which the host does not wait for.

DeepSpeed 0.19.8 computes the norm tensor by tensor, and reads it on the host before the optimizer runs, to skip a step
with an overflow and to clip. Here one multi-tensor operation computes the norm, the guard's decision stays on the
device (``Engine``), and clipping multiplies by a factor there. The order of operations within the norm and the clipping
is DeepSpeed's, so that loss curves stay bitwise the same.

Methods are replaced on the instances of one engine, never on DeepSpeed's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_scale.training.distributed import World

Decide = Callable[[Tensor], Tensor]
"""From the norm of the global gradient to the same norm where the optimizer runs (the host, under offload); sets the
optimizer's ``found_inf``. Called once per step, before the optimizer."""

# What DeepSpeed's step gets as the norm: a number of the host, so that its own check reads nothing from the device.
_FINITE = 1.0
_EPS = 1e-6  # DeepSpeed adds it to the norm


class OptimizerStep:
    """The optimizer step of one DeepSpeed engine, whatever its ZeRO stage.

    ``run``: what updates the weights, torch's AdamW; the rehearsal replaces it. It skips on the device where
    ``found_inf`` is 1: neither weights, moments nor its step counter change then.
    """

    def __init__(self, raw: Any, clip: float, world: World, decide: Decide) -> None:
        self._raw, self._zero, self._adam = raw, raw.optimizer, raw.basic_optimizer
        self._clip, self._world, self._decide = clip, world, decide
        self.run: Callable[[], Any] = self._adam.step
        self._adam.step = lambda *args, **kwargs: self.run()
        if self._zero is self._adam:
            raw.clip_fp32_gradients = lambda: None
            self._adam.step = self._step_without_zero
        elif hasattr(self._zero, "fp32_partitioned_groups_flat"):
            self._zero._get_norm_groups = self._norm_of_stage_3
            self._zero.unscale_and_clip_grads = self._clip_stage_3
        elif hasattr(self._zero, "averaged_gradients"):
            self._zero.scaled_global_norm = self._norm_of_stages_1_and_2
            self._zero.unscale_and_clip_grads = self._clip_stages_1_and_2
            # It reads a flag per offloaded gradient in the backward pass, for the check that is off.
            self._zero.update_offload_overflow_tracker = lambda grad: None
        else:
            self._zero.step = self._step_of_bf16_optimizer

    def set_found_inf(self, refused: Tensor) -> None:
        """``refused``: fp32, () on the device of the master weights, 1 to skip the step and 0 to make it."""
        # torch's fused AdamW takes it as the flag of a gradient scaler (torch/optim/adam.py, _fused_adam): its kernel
        # returns at 1, and the step counter, which was increased, is decreased by the flag.
        self._adam.found_inf = refused

    # --- stage 0: the optimizer is torch's own, the gradients are those of the model

    def _step_without_zero(self, *args: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self._raw.module.parameters() if p.grad is not None]
        norm = self._decide(torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5))
        if self._clip:
            # DeepSpeed averages the norm over ranks before this, but it is the same on all. A tensor over a tensor:
            # torch computes number / tensor as number * (1 / tensor), which rounds differently.
            factor = torch.full_like(norm, self._clip) / (norm + _EPS)
            torch._foreach_mul_(gradients, factor.clamp(max=1.0))
        self.run()

    # --- stages 1 and 2

    def _norm_of_stages_1_and_2(self, norm_type: int = 2) -> float:
        zero = self._zero
        if zero.cpu_offload:
            norms = [self._offloaded(zero.params_in_partition[i]) for i in range(len(zero.bit16_groups))]
        else:
            norms = [zero.averaged_gradients[i] for i in range(len(zero.bit16_groups))]
            norms = [_norms(g for g in group if not getattr(g, "_zero_padding", False)) for group in norms]
        squares = self._world.sum(torch.stack([self._sum_of_squares(n).float() for n in norms]))
        self._set_factor(torch.linalg.vector_norm(squares.pow(0.5)))
        return _FINITE

    def _clip_stages_1_and_2(self, gradients: Sequence[Tensor], norm: Any) -> None:
        if self._factor is not None:
            for gradient in gradients:
                gradient.data.mul_(self._factor)

    # --- stage 3

    def _norm_of_stage_3(self) -> list[float]:
        zero, groups = self._zero, range(len(self._zero.fp16_groups))
        if zero.offload_optimizer:
            norms = [self._offloaded(zero.fp16_groups[i]) for i in groups]
        else:
            norms = [_norms(zero.averaged_gradients[i]) for i in groups]
        squares = self._world.sum(torch.stack([self._sum_of_squares(n) for n in norms]))
        self._set_factor(torch.linalg.vector_norm(squares.pow(0.5)))
        return [_FINITE]

    def _clip_stage_3(self, sub_group_id: int, norm: Any) -> None:
        if self._factor is not None:
            self._zero.fp32_partitioned_groups_flat[sub_group_id].grad.mul_(self._factor)

    # --- stage 1 with bf16 weights, for which DeepSpeed has another optimizer

    @torch.no_grad()
    def _step_of_bf16_optimizer(self, closure: Any = None) -> None:
        """The calls of BF16_Optimizer.step (deepspeed/runtime/bf16_optimizer.py) without its checks."""
        zero = self._zero
        gradients = zero.get_grads_for_norm(for_clipping=True)  # summed over ranks, and whole on each
        norm = self._decide(torch.stack(torch._foreach_norm(gradients)).pow(2).sum().pow(0.5))
        if self._clip:
            torch._foreach_mul_(gradients, (self._clip / (norm + _EPS)).clamp(max=1.0))
        pairs = zip(zero.fp32_groups_flat_partition, zero.fp32_groups_gradient_flat_partition, strict=True)
        for weights, gradient in pairs:
            weights.grad = gradient.to(weights.dtype)
        zero.optimizer.step()
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
        zero.clear_hp_grads()

    # ---

    def _set_factor(self, norm: Tensor) -> None:
        norm = self._decide(norm)
        self._factor = 1.0 / ((norm + _EPS) / self._clip).clamp(min=1.0) if self._clip else None

    def _offloaded(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Norms of the gradients that the backward pass has sent to the host; a parameter without one was not used."""
        by_id = self._zero.norm_for_param_grads
        return [by_id[i] for p in parameters if (i := self._zero.get_param_id(p)) in by_id]

    def _sum_of_squares(self, norms: list[Tensor]) -> Tensor:
        if not norms:  # a rank without a part of this group
            return torch.zeros((), dtype=torch.float64, device=self._world.device)
        return torch.stack(norms).to(self._world.device).double().pow(2).sum()


def _norms(gradients: Iterable[Tensor]) -> list[Tensor]:
    # fp64, as DeepSpeed's (deepspeed/runtime/zero/utils.py, get_norm_dtype).
    gradients = list(gradients)
    return list(torch._foreach_norm(gradients, 2, torch.float64)) if gradients else []
