"""The DeepSpeed engine around the model: built once, from the recipe's own DeepSpeed section."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from maestro_scale.model.masking import Mask
from maestro_scale.stream.batch import Batch
from maestro_scale.training.distributed import World


class Engine:
    """One optimizer step over the micro-batches of a rank; gradients are those of the *global* loss.

    ``raw`` is DeepSpeed's engine, for checkpoints.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, scheduler: Any, config: dict[str, Any], world: World
    ) -> None:
        import deepspeed

        self.raw, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
        )
        self.model = model
        self._world = world
        self._zero = config.get("zero_optimization", {}).get("stage", 0)

    def step(self, batches: list[Batch], masks: list[dict[str, Mask]], counts: Tensor) -> Tensor:
        """Forward, backward and one optimizer step; returns this rank's error sums (S,) in fp32.

        ``counts`` (S,): hidden pixels per sensor of the whole global batch.
        """
        if self._zero == 3 and self.model.config.others:
            self._forget_gradients()
        total = None
        for batch, mask in zip(batches, masks, strict=True):
            share, sums = self.raw(batch, mask, counts)
            # The shares of all ranks and micro-batches add up to the loss, but DeepSpeed averages gradients over
            # ranks and would divide by the accumulation steps: undo the first, switch off the second.
            self.raw.backward(share * self._world.size, scale_wrt_gas=False)
            total = sums if total is None else total + sums
            if self.raw.is_gradient_accumulation_boundary():
                self._plain_norm = self._norm_of_plain_gradients()
            self.raw.step()
        return total

    @property
    def applied(self) -> bool:
        """Whether the last optimizer step was taken (False: gradients were not finite)."""
        return self.raw.was_step_applied()

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        norm = self.raw.get_global_grad_norm()
        return float(self._plain_norm if norm is None else norm)

    @property
    def lr(self) -> float:
        """Learning rate that the next step will use."""
        return float(self.raw.optimizer.param_groups[0]["lr"])

    def apply_schedule(self) -> None:
        """Set the learning rate that the schedule gives where it stands: after loading, it may be a longer one."""
        scheduler = self.raw.lr_scheduler
        pairs = zip(self.raw.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in pairs:
            group["lr"] = base * factor(scheduler.last_epoch)

    def _forget_gradients(self) -> None:
        # Stage 3 overwrites a parameter's gradient only where a step uses it: what another dataset of a mixture left
        # would be applied again. The other stages start from zero.
        optimizer = self.raw.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for partition in optimizer.fp32_partitioned_groups_flat:
            if partition.grad is not None:
                partition.grad.zero_()

    def _norm_of_plain_gradients(self) -> Tensor | None:
        # DeepSpeed reports no norm where it leaves the optimizer as it is (stage 0 in fp32).
        if self._zero > 0 or hasattr(self.raw.optimizer, "_global_grad_norm"):
            return None
        from torch.nn.utils import get_total_norm

        return get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
