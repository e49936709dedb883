"""The DeepSpeed engine around a network: gradients of the global loss, and the guard's decision on the device.

What relies on DeepSpeed's behaviour in a step is in this file and in ``optimizer_step.py``, checked against 0.19.8. Do
not reorder the calls: the guard, the loss of the global batch and the rehearsal step depend on where DeepSpeed reduces
gradients, computes the norm and calls the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_scale.model.maestro import GATHER_UNITS
from maestro_scale.stream.batch import Batch
from maestro_scale.training.deepspeed_import import import_deepspeed
from maestro_scale.training.distributed import World
from maestro_scale.training.fragments import ShardedState
from maestro_scale.training.guard import Guard
from maestro_scale.training.optimizer import Schedule, set_lr
from maestro_scale.training.optimizer_step import OptimizerStep

# DeepSpeed's own counters of steps, which its monitors and profiler read.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class StepResult:
    """One step of the global batch, N sums of the network: its loss sums, and others for metrics.

    ``sums`` (N,): fp32, over all ranks. ``norm``: of the gradient, before clipping. ``skipped``: why the optimizer did
    not run, else None. ``local_sums`` (micro-batches, N): this rank's own.
    """

    loss: float
    sums: Tensor
    norm: float
    lr: float
    skipped: str | None
    local_sums: Tensor


class Engine:
    """One optimizer step over the micro-batches of a rank; gradients are those of the *global* loss.

    ``network(batch, inputs, num_terms)`` returns (its share of the global loss, sums (N,)), and
    ``network.loss(dataset, sums, num_terms)`` the global loss from sums (N,) and counts (S,) over all ranks.
    ``uses_vary``: the steps use different parameters, as their batches have different sensors.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        config: dict[str, Any],
        world: World,
        guard: Guard,
        uses_vary: bool = False,
    ) -> None:
        deepspeed = import_deepspeed()
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.network: Any = network  # typed Any for its ``loss`` and ``config``
        self.guard = guard
        self._uses_vary = uses_vary
        self.sharded = ShardedState(self._deepspeed, world.rank, world.size)
        self._world, self._schedule = world, schedule
        zero = config.get("zero_optimization", {})
        self._stage = zero.get("stage", 0)
        if self._stage == 3:
            # Stage 3 gathers a module's own parameters in the hooks of its forward. These modules read the parameters
            # of their children too, so that one operation can cast them together.
            for module in (m for m in network.modules() if isinstance(m, GATHER_UNITS)):
                for parameter in module.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
        offload = zero.get("offload_optimizer") or {}
        self._updates_on_host = offload.get("device", "none") != "none" and self._stage > 0
        self._optimizer_step = OptimizerStep(
            self._deepspeed, config.get("gradient_clipping", 0.0), world, self._decide
        )
        self._decision: Tensor | None = None

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
        loss, norm, skipped = self._read_decision()
        if skipped is None:
            self.guard.record_step(loss, norm)
        else:
            self.guard.record_skip()
        return StepResult(loss, self._sums, norm, lr, skipped, local_sums)

    def rehearse(self, batches: Sequence[Batch], inputs: Sequence[Any], num_terms: Tensor) -> None:
        """Run a step and change nothing: weights, moments, guard and counters stay the same, bit by bit.

        AdamW's moments are allocated first, as zeros, which is what its own first step does. So forward and backward
        find as much free memory as in the middle of a run.
        """
        raw = self._deepspeed
        self.sharded.begin_adam_at(self.sharded.adam_step)
        before = {name: getattr(raw, name) for name in _COUNTERS}
        update, self._optimizer_step.run = self._optimizer_step.run, lambda: None
        try:
            self._forward_backward(batches, inputs, num_terms)
        finally:
            self._optimizer_step.run = update
            for name, value in before.items():
                setattr(raw, name, value)

    def _forward_backward(self, batches: Sequence[Batch], inputs: Sequence[Any], num_terms: Tensor) -> Tensor:
        """Also the optimizer's step: DeepSpeed makes it inside its ``step`` at the last micro-batch."""
        uses_vary = self._uses_vary or self.network.config.others
        if uses_vary and (self._stage == 3 or self._updates_on_host):
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
        self._decision = None

    def _decide(self, norm: Tensor) -> Tensor:
        """Decide on the device whether the optimizer skips; returns ``norm`` where the optimizer runs.

        DeepSpeed's step calls it through ``OptimizerStep`` when the gradient norm is known and no weight has changed.
        """
        refused = self.guard.refuses(self._global_loss, norm).double()
        # Loss and norm are global already. One sum makes sure that no rank continues alone, and that all record rank
        # 0's numbers. Zeros of the other ranks, not products with zero: the numbers may be infinite.
        zero = torch.zeros_like(refused)
        numbers = (self._global_loss, norm) if self._world.is_main else (zero, zero)
        self._decision = self._world.sum(torch.stack([*(n.detach().double() for n in numbers), refused]))
        if self._updates_on_host:
            # Gradients and masters are on the host, which waits for them anyway: the read comes first here.
            self._decision = self._decision.cpu()
            norm = self._decision[1].to(norm.dtype)
        self._optimizer_step.set_found_inf((self._decision[2] > 0).float())
        return norm

    def close(self) -> None:
        """Release what keeps the memory of an engine that is not used any more, for a process that builds another.

        DeepSpeed's hooks on the parameters refer to its optimizer through autograd's nodes, where the garbage collector
        does not see the cycle. Under stage 3, DeepSpeed 0.19.8 keeps a reference to the network in any case.
        """
        self._deepspeed.destroy()

    def _read_decision(self) -> tuple[float, float, str | None]:
        """Loss, gradient norm, and why the step was skipped (else None).

        The one read of a step by the engine: after the kernels of the optimizer are queued. The trainer's read of the
        stop flags follows, when the device has nothing left to do.
        """
        if self._decision is None:
            raise RuntimeError("DeepSpeed's step did not ask for the gradient norm")
        loss, norm, refusals = self._decision.tolist()
        if not refusals:
            return loss, norm, None
        return loss, norm, self.guard.skip_reason(loss, norm) or "refused by another rank"

    def _clear_gradients(self) -> None:
        # Stage 3, and stages 1 and 2 under offload, overwrite a parameter's gradient only where a step uses it, so
        # gradients of another dataset of a mixture, or of a sensor that the tiles lack, would be applied again, and not
        # be part of the norm that the guard sees. Otherwise the other stages start from zero.
        optimizer = self._deepspeed.optimizer
        if self._stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
            partitions = optimizer.fp32_partitioned_groups_flat
        else:
            partitions = optimizer.single_partition_of_fp32_groups
        for partition in partitions:
            if partition.grad is not None:
                partition.grad.zero_()
