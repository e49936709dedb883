"""The network that a benchmark finetunes: MAESTRO's encoder and a head, without the decoder."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from maestro_scale.evaluation.objectives import Objective
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch


class Predictor(Maestro):
    """``config`` names one head, whose target ``objective`` is of."""

    def __init__(self, config: ModelConfig, objective: Objective) -> None:
        super().__init__(config)
        self._objective = objective
        for unused in (self.to_decoder, self.mask_token, self.decoders, self.to_pixels):
            unused.clear()

    def forward(self, batch: Batch, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """This batch's share of the global loss, and its error sum (1,), in fp32.

        ``counts`` (1,): terms of the loss in the whole global batch; shares of all its parts add up to the loss.
        """
        error = self._objective.error_sum(self.logits(batch), labels)
        return self.loss(batch.dataset, error[None], counts), error.detach()[None]

    def loss(self, dataset: str, sums: Tensor, counts: Tensor) -> Tensor:
        """The mean over all terms; 0 where there are none."""
        return (sums / counts.clamp_min(1))[0].float()

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) per crop, or (B, C, H, W) per pixel of the reference sensor's image."""
        return self.predict(batch)[self._objective.task.target.name]


@torch.no_grad()
def predictor(encoder: Maestro, dataset: str, objective: Objective, seed: int, pretrained: bool) -> Predictor:
    """The network as it is before the first step: a fresh head on ``encoder``, or, unless ``pretrained``, on the same
    encoder drawn anew from ``seed``."""
    # Without crop_m the head predicts the pixels of the reference image, as the objective has them.
    try:
        config = dataclasses.replace(encoder.config.of(dataset), heads=(objective.task.target,), crop_m=None)
    except ValueError as error:
        raise ResultsError(f"{dataset}: {error}") from None
    made = Predictor(config, objective).initialise(seed)
    if pretrained:
        state = encoder.state_dict()
        for name, tensor in made.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    return made
