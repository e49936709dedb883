"""Training objectives. The trainer and the hooks use an objective through this protocol only.

A new way to train (another loss, another task) is a class with these methods and a network whose ``forward`` takes
(batch, inputs, num_terms) and returns (share of the global loss, sums). Pretraining is below; finetuning is in
``evaluation/finetune/objective.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from maestro_scale.model.activations import activation_bytes
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import Cost, compute_cost
from maestro_scale.model.masking import Mask, MaskingConfig, draw_masks
from maestro_scale.model.sequences import sequences
from maestro_scale.model.targets import masked_counts
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import finite


class Objective(Protocol):
    """Shapes: S loss sums (one per sensor in pretraining, one in finetuning). ``sums`` of the network begin with them;
    pretraining appends S others for metrics."""

    def inputs(self, batch: Batch, on_device: Batch) -> Any:
        """The network's second argument for a micro-batch, on the device: masks, or labels.

        ``batch`` is on the host, ``on_device`` its copy. Must not synchronise with the device.
        """
        ...

    def num_terms(self, dataset: str, inputs: Sequence[Any]) -> Tensor:
        """(S,) float64: terms of each loss sum over this rank's micro-batches, known before any forward pass.

        The loss of the global batch divides sums over all ranks by these numbers over all ranks, so it does not
        depend on how the batch is split (invariant 4 of docs/architecture.md). float64: an exact count.
        """
        ...

    def loss_metrics(self, dataset: str, sums: Tensor, num_terms: Tensor) -> dict[str, float | None]:
        """The parts of the loss for metrics.jsonl, from the network's global sums and counts (S,)."""
        ...

    def cost(self, dataset: str) -> Cost | None:
        """Cost of a sample, for tokens/s and MFU; None if it is not known."""
        ...

    def mock_batches(self, micro_batch: int) -> list[Batch]:
        """A mock micro-batch of every dataset for the rehearsal step, first of the one that takes the most memory."""
        ...


@dataclass(frozen=True)
class PretrainObjective:
    """Reconstruction of masked patches; masks are computed from the noise in the batch, so a step can be replayed.

    ``configs`` and ``sources`` by the dataset's name in the mixture.
    """

    configs: Mapping[str, ModelConfig]
    sources: Mapping[str, Source]
    masking: MaskingConfig

    def inputs(self, batch: Batch, on_device: Batch) -> dict[str, Mask]:
        """Masks by sequence, drawn on the device from the batch's noise."""
        return draw_masks(self.configs[on_device.dataset], self.masking, on_device)

    def num_terms(self, dataset: str, inputs: Sequence[dict[str, Mask]]) -> Tensor:
        """Hidden pixels per sensor."""
        return hidden_counts(self.configs[dataset], inputs)

    def loss_metrics(self, dataset: str, sums: Tensor, num_terms: Tensor) -> dict[str, float | None]:
        """``loss/<sensor>``: the mean error of its hidden pixels. ``explained/<sensor>``: 1 minus its ratio to that of
        predicting zero, the mean of a normalised target; 0: nothing is learnt. None where no pixel is hidden.
        """
        names, values = [s.name for s in self.configs[dataset].sensors], sums.tolist()
        errors, zero = values[: len(names)], values[len(names) :]
        metrics: dict[str, float | None] = {}
        for name, error, count in zip(names, errors, num_terms.tolist(), strict=True):
            metrics[f"loss/{name}"] = finite(error / count) if count else None
        for name, error, reference in zip(names, errors, zero, strict=True):
            metrics[f"explained/{name}"] = finite(1 - error / reference) if reference else None
        return metrics

    def cost(self, dataset: str) -> Cost:
        """Counted from the description of the model."""
        return self._costs[dataset]

    def mock_batches(self, micro_batch: int) -> list[Batch]:
        """By decreasing activations."""

        def memory(name: str) -> int:  # which of them is largest does not depend on the precision
            return activation_bytes(self.configs[name], self.masking.ratio, "bf16", micro_batch)

        names = sorted(self.configs, key=memory, reverse=True)
        return [mock_batch(self.sources[name], name, micro_batch) for name in names]

    @cached_property
    def _costs(self) -> dict[str, Cost]:
        return {name: compute_cost(config, self.masking.ratio) for name, config in self.configs.items()}


def hidden_counts(config: ModelConfig, masks: Sequence[dict[str, Mask]]) -> Tensor:
    """(S,) float64: hidden pixels per sensor over micro-batches, without those of patches with invalid pixels."""
    per_batch = [masked_counts(config, [mask[q.name].counted for q in sequences(config)]) for mask in masks]
    return per_batch[0] if len(per_batch) == 1 else torch.stack(per_batch).sum(0)
