"""Weights of classes in a loss: given by name, or inverse to the number of labels of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.protocol import LossSettings


@dataclass(frozen=True)
class ClassWeights:
    """(C,) weights, as a tensor on any device."""

    values: tuple[float, ...]
    _tensors: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> Tensor:
        """(C,) float32; created once per device, by kernels: the host would wait for the copy of a list."""
        tensor = self._tensors.get(device)
        if tensor is None:
            tensor = torch.empty(len(self.values), device=device)
            for i, value in enumerate(self.values):
                tensor[i].fill_(value)
            self._tensors[device] = tensor
        return tensor


def class_weights(
    settings: LossSettings, classes: Sequence[str], counts: np.ndarray | None
) -> ClassWeights | None:
    """Weights of ``classes``, None where all are 1.

    ``counts``: (C,) training labels of each class. They scale the weights so that the mean weight of a training label
    is 1, which keeps the size of the loss; a class without a label has weight 1 under ``balanced``. EvaluationError for
    a name that is not a class.
    """
    if settings.class_weights == "none":
        return None
    if counts is None:
        raise ValueError("class weights need the number of training labels of each class")
    if isinstance(settings.class_weights, str):
        raw = np.divide(1.0, counts, out=np.zeros(len(classes)), where=counts > 0)
    else:
        for name in settings.class_weights:
            if name not in classes:
                raise EvaluationError(
                    f"evaluation.class_weights: {name!r} is not a class{did_you_mean(name, classes)}"
                )
        raw = np.array([settings.class_weights.get(name, 1.0) for name in classes])
    total = counts.sum()
    mean = float((raw * counts).sum() / total) if total else 1.0
    scaled = np.where(raw > 0, raw / (mean or 1.0), 1.0)
    return ClassWeights(tuple(float(w) for w in scaled))
