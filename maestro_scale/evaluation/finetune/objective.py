"""The trainer's objective in a finetuning: a benchmark's loss on its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_scale.evaluation.tasks.losses import TargetLoss
from maestro_scale.model.cost import Cost
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source


@dataclass(frozen=True)
class FinetuneObjective:
    """One loss sum: ``target_loss`` over the labels of ``source``. See :class:`~maestro_scale.training.objectives`."""

    target_loss: TargetLoss
    source: Source

    def inputs(self, batch: Batch, on_device: Batch) -> Tensor:
        """(B, …) what the logits are compared with. EvaluationError where a label is not a class."""
        task = self.target_loss.task
        # The copy on the host is checked: reading the one on the device would make the host wait.
        task.check_labels(batch)
        return self.target_loss.loss_targets(task.label_tensor(on_device))

    def num_terms(self, dataset: str, inputs: Sequence[Tensor]) -> Tensor:
        """(1,) labels that count: all classes of each sample, or the pixels that are not ignored."""
        return torch.stack([self.target_loss.num_terms(targets) for targets in inputs]).sum(0, keepdim=True)

    def loss_metrics(self, dataset: str, sums: Tensor, num_terms: Tensor) -> dict[str, float | None]:
        """None: the loss has one part."""
        return {}

    def cost(self, dataset: str) -> Cost | None:
        """Not known: the counts of ``model/cost.py`` are of pretraining."""
        return None

    def mock_batches(self, micro_batch: int) -> list[Batch]:
        """Made-up samples and labels."""
        return [mock_batch(self.source, self.source.spec.name, micro_batch)]
