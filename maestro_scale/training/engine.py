"""The DeepSpeed engine around the model: built once, from the recipe's own DeepSpeed section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from maestro_scale.model.masking import Mask
from maestro_scale.stream.batch import Batch
from maestro_scale.training.distributed import World
from maestro_scale.training.fragments import ShardedState
from maestro_scale.training.guard import Guard
from maestro_scale.training.optimizer import Schedule, set_lr

# What DeepSpeed counts per step; its monitors and profiler go by them.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class StepResult:
    """One step. ``sums`` (S,): error sums per sensor of the global batch, fp32. ``norm``: of its gradient, before
    clipping. ``skipped``: why the optimizer was kept from it, else None. ``local_sums``: (micro-batches, S), this
    rank's own error sums."""

    loss: float
    sums: Tensor
    norm: float
    lr: float
    skipped: str | None
    local_sums: Tensor


class Engine:
    """One optimizer step over the micro-batches of a rank; gradients are those of the *global* loss."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: dict[str, Any],
        world: World,
        guard: Guard,
    ) -> None:
        import deepspeed

        self._raw, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model, self.guard = model, guard
        self.sharded = ShardedState(self._raw, world.rank, world.size)
        self._world, self._schedule = world, schedule
        self._plain = self._raw.optimizer is self._raw.basic_optimizer
        self._stage = config.get("zero_optimization", {}).get("stage", 0)
        # DeepSpeed calls it, once per group, when it has the norm and has changed nothing yet.
        self._update = self._raw.basic_optimizer.step
        self._raw.basic_optimizer.step = self._update_unless_skipped

    def step(
        self, step: int, batches: list[Batch], masks: list[dict[str, Mask]], counts: Tensor
    ) -> StepResult:
        """Forward, backward and, unless the guard objects, the optimizer's step number ``step`` (the first is 0).

        ``counts`` (S,): hidden pixels per sensor of the whole global batch.
        """
        lr = set_lr(self._raw.basic_optimizer, self._schedule(step))
        local_sums = self._run(batches, masks, counts)
        if not self._judged:  # DeepSpeed itself gave up on the step
            self._judge()
            self._forget_partial_sums()
            if self._skipped is None:
                raise RuntimeError("DeepSpeed skipped a step whose loss and gradient norm are finite")
        if self._skipped is None:
            self.guard.record_step(self._loss, self._norm)
        else:
            self.guard.record_skip()
        return StepResult(self._loss, self._sums, self._norm, lr, self._skipped, local_sums)

    def rehearse(self, batches: list[Batch], masks: list[dict[str, Mask]], counts: Tensor) -> None:
        """Go through a step and change nothing: weights, moments, the guard and every counter stay, bit by bit.

        AdamW's moments are allocated first, as zeros, which is how its own first step would begin: so the memory
        that forward and backward find is what a step in the middle of a run finds.
        """
        raw = self._raw
        self.sharded.begin_adam_at(self.sharded.adam_step)
        before = {name: getattr(raw, name) for name in _COUNTERS}
        update, self._update = self._update, lambda *args, **kwargs: None
        try:
            self._run(batches, masks, counts)
        finally:
            self._update = update
            for name, value in before.items():
                setattr(raw, name, value)

    def _run(self, batches: list[Batch], masks: list[dict[str, Mask]], counts: Tensor) -> Tensor:
        if self._stage == 3 and self.model.config.others:
            self._forget_gradients()
        local_sums = []
        for batch, mask in zip(batches, masks, strict=True):
            share, sums = self._raw(batch, mask, counts)
            # The shares of all ranks and micro-batches add up to the loss, but DeepSpeed averages gradients over
            # ranks and would divide by the accumulation steps: undo the first, switch off the second.
            self._raw.backward(share * self._world.size, scale_wrt_gas=False)
            local_sums.append(sums)
            if self._raw.is_gradient_accumulation_boundary():
                self._begin_judging(batch.dataset, torch.stack(local_sums), counts)
            self._raw.step()
        return torch.stack(local_sums)

    def _begin_judging(self, dataset: str, local_sums: Tensor, counts: Tensor) -> None:
        self._sums = self._world.sum(local_sums.sum(0))
        self._global_loss = self.model.loss(dataset, self._sums, counts)
        self._plain_norm = self._norm_of_plain_gradients() if self._plain else None
        self._judged = False
        self._skipped: str | None = None

    def _judge(self) -> None:
        norm = self._raw.optimizer._global_grad_norm if self._plain_norm is None else self._plain_norm
        self._judged, self._loss, self._norm = True, float(self._global_loss), float(norm)
        self._skipped = self.guard.judge(self._loss, self._norm)
        # The numbers are global already; asking makes sure that no rank goes on alone. By the network of the gradients:
        # the device has been waited for just now.
        objections = torch.tensor(float(self._skipped is not None), device=self._world.device)
        if float(self._world.sum(objections)) and self._skipped is None:
            self._skipped = "another rank objects"

    def _update_unless_skipped(self, *args: Any, **kwargs: Any) -> Any:
        if not self._judged:
            self._judge()
        if self._skipped is None:
            return self._update(*args, **kwargs)
        return None

    def _forget_gradients(self) -> None:
        # Stage 3 overwrites a parameter's gradient only where a step uses it: what another dataset of a mixture left
        # would be applied again. The other stages start from zero.
        optimizer = self._raw.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for partition in optimizer.fp32_partitioned_groups_flat:
            if partition.grad is not None:
                partition.grad.zero_()

    def _forget_partial_sums(self) -> None:
        # With offload, stages 1 and 2 keep the sums of a step that they gave up (0.19.8): every later one would be NaN.
        if self._stage in (1, 2):
            sums = getattr(self._raw.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))

    def _norm_of_plain_gradients(self) -> Tensor:
        # DeepSpeed reports no norm where it leaves the optimizer as it is (stage 0).
        return get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
