"""The DeepSpeed engine around a network. Everything that relies on DeepSpeed's behaviour in a step is in this file.

Checked against DeepSpeed 0.19.8. Do not reorder the calls: where DeepSpeed reduces gradients, computes the norm and
calls the optimizer is what the guard, the loss of the global batch and the rehearsal step depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from maestro_scale.model.maestro import GATHER_UNITS
from maestro_scale.stream.batch import Batch
from maestro_scale.training.distributed import World
from maestro_scale.training.fragments import ShardedState
from maestro_scale.training.guard import Guard
from maestro_scale.training.optimizer import Schedule, set_lr

# DeepSpeed's own counters of steps, which its monitors and profiler read.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class StepResult:
    """One step of the global batch, S loss sums.

    ``sums`` (S,): fp32, over all ranks. ``norm``: of the gradient, before clipping. ``skipped``: why the optimizer did
    not run, else None. ``local_sums`` (micro-batches, S): this rank's own.
    """

    loss: float
    sums: Tensor
    norm: float
    lr: float
    skipped: str | None
    local_sums: Tensor


class Engine:
    """One optimizer step over the micro-batches of a rank; gradients are those of the *global* loss.

    ``network(batch, inputs, num_terms)`` returns (its share of the global loss, loss sums (S,)), and
    ``network.loss(dataset, sums, num_terms)`` the global loss from sums and counts (S,) over all ranks.
    """

    _skipped: str | None

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: dict[str, Any],
        world: World,
        guard: Guard,
    ) -> None:
        import deepspeed

        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.network: Any = network  # typed Any for its ``loss`` and ``config``
        self.guard = guard
        self.sharded = ShardedState(self._deepspeed, world.rank, world.size)
        self._world, self._schedule = world, schedule
        self._is_stage_0 = self._deepspeed.optimizer is self._deepspeed.basic_optimizer
        self._stage = config.get("zero_optimization", {}).get("stage", 0)
        if self._stage == 3:
            # Stage 3 gathers a module's own parameters in the hooks of its forward. These modules read the parameters
            # of their children too, so that one operation can cast them together.
            for module in (m for m in network.modules() if isinstance(m, GATHER_UNITS)):
                for parameter in module.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
        # DeepSpeed calls it once per parameter group, when the gradient norm is known and no weight has changed yet:
        # the one place where a step can be skipped without undoing anything.
        self._optimizer_step = self._deepspeed.basic_optimizer.step
        self._deepspeed.basic_optimizer.step = self._step_unless_skipped
        self._decided, self._skipped = False, None
        self._loss, self._norm = 0.0, 0.0

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        inputs: Sequence[Any],
        num_terms: Tensor,
        while_computing: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Forward, backward and, unless the guard refuses it, the optimizer's step number ``step`` (the first is 0).

        ``inputs``: the objective's, per micro-batch. ``num_terms`` (S,): of the whole global batch.
        ``while_computing`` is called once, when the kernels of the step are queued: work of the host, and copies on
        another stream, that the device need not wait for.
        """
        lr = set_lr(self._deepspeed.basic_optimizer, self._schedule(step))
        local_sums = self._forward_backward(batches, inputs, num_terms)
        while_computing()
        if not self._decided:  # DeepSpeed found an overflow and did not call the optimizer
            self._decide()
            self._clear_partial_sums()
            if self._skipped is None:
                raise RuntimeError("DeepSpeed skipped a step whose loss and gradient norm are finite")
        if self._skipped is None:
            self.guard.record_step(self._loss, self._norm)
        else:
            self.guard.record_skip()
        return StepResult(self._loss, self._sums, self._norm, lr, self._skipped, local_sums)

    def rehearse(self, batches: Sequence[Batch], inputs: Sequence[Any], num_terms: Tensor) -> None:
        """Run a step and change nothing: weights, moments, guard and counters stay the same, bit by bit.

        AdamW's moments are allocated first, as zeros, which is what its own first step does. So forward and backward
        find as much free memory as in the middle of a run.
        """
        raw = self._deepspeed
        self.sharded.begin_adam_at(self.sharded.adam_step)
        before = {name: getattr(raw, name) for name in _COUNTERS}
        optimizer_step, self._optimizer_step = self._optimizer_step, lambda *args, **kwargs: None
        try:
            self._forward_backward(batches, inputs, num_terms)
        finally:
            self._optimizer_step = optimizer_step
            for name, value in before.items():
                setattr(raw, name, value)

    def _forward_backward(self, batches: Sequence[Batch], inputs: Sequence[Any], num_terms: Tensor) -> Tensor:
        """Also the optimizer's step: DeepSpeed makes it inside its ``step`` at the last micro-batch."""
        if self._stage == 3 and self.network.config.others:
            self._clear_gradients()
        local_sums: list[Tensor] = []
        for batch, given in zip(batches, inputs, strict=True):
            share, sums = self._deepspeed(batch, given, num_terms)
            # The shares of all ranks and micro-batches add up to the loss, but DeepSpeed averages gradients over
            # ranks and would divide by the accumulation steps: undo the first, switch off the second.
            self._deepspeed.backward(share * self._world.size, scale_wrt_gas=False)
            local_sums.append(sums)
            if self._deepspeed.is_gradient_accumulation_boundary():
                self._reduce_loss(batch.dataset, torch.stack(local_sums), num_terms)
            self._deepspeed.step()
        return torch.stack(local_sums)

    def _reduce_loss(self, dataset: str, local_sums: Tensor, num_terms: Tensor) -> None:
        # Before DeepSpeed's step, so that the reduction runs while the device still computes the backward pass.
        self._sums = self._world.sum(local_sums.sum(0))
        self._global_loss = self.network.loss(dataset, self._sums, num_terms)
        self._stage_0_norm = self._norm_of_gradients() if self._is_stage_0 else None
        self._decided, self._skipped = False, None

    def _decide(self) -> None:
        norm: Any = self._stage_0_norm if self._is_stage_0 else self._deepspeed.optimizer._global_grad_norm
        self._decided, self._loss, self._norm = True, float(self._global_loss), float(norm)
        self._skipped = self.guard.skip_reason(self._loss, self._norm)
        # The numbers are global already; the collective makes sure that no rank continues alone. It uses the
        # gradients' process group: the device was synchronised just now.
        refusals = torch.tensor(float(self._skipped is not None), device=self._world.device)
        if float(self._world.sum(refusals)) and self._skipped is None:
            self._skipped = "refused by another rank"

    def _step_unless_skipped(self, *args: Any, **kwargs: Any) -> Any:
        if not self._decided:  # once per step, not once per parameter group
            self._decide()
        if self._skipped is None:
            return self._optimizer_step(*args, **kwargs)
        return None

    def _clear_gradients(self) -> None:
        # Stage 3 overwrites a parameter's gradient only where a step uses it, so gradients of another dataset of a
        # mixture would be applied again. The other stages start from zero.
        optimizer = self._deepspeed.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for partition in optimizer.fp32_partitioned_groups_flat:
            if partition.grad is not None:
                partition.grad.zero_()

    def _clear_partial_sums(self) -> None:
        # With offload, stages 1 and 2 keep the sums of a step that DeepSpeed skipped (0.19.8): every later one would
        # be NaN.
        if self._stage in (1, 2):
            sums = getattr(self._deepspeed.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))

    def _norm_of_gradients(self) -> Tensor:
        # DeepSpeed reports no norm at stage 0, where it leaves the optimizer as it is.
        return get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
