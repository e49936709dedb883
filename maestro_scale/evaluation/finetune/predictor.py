"""The network of a finetuning: an encoder with a head, for MAESTRO and for baselines."""

from __future__ import annotations

import dataclasses
from functools import singledispatch

import torch
from torch import Tensor, nn

from maestro_scale.evaluation.baselines.baseline import BaselineConfig, TrainableBaseline
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.losses import TargetLoss
from maestro_scale.model.config import DecoderName, ModelConfig
from maestro_scale.model.decoders import build_head
from maestro_scale.model.initialise import initialise
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch

TRAINABLE = (Maestro, TrainableBaseline)  # what `build_predictor` accepts


class Predictor(nn.Module):
    """A network that predicts the target of ``target_loss``. Subclasses define ``config`` and ``logits``."""

    config: ModelConfig | BaselineConfig
    target_loss: TargetLoss

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) per crop, or (B, C, H, W) per pixel of the reference sensor's image."""
        raise NotImplementedError

    def forward(self, batch: Batch, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """This batch's share of the global loss, and its sum of terms (1,), in fp32.

        ``counts`` (1,): terms of the loss in the global batch. Shares of all micro-batches and ranks add up to the
        loss, so it does not depend on how the batch is split.
        """
        error = self.target_loss.loss_sum(self.logits(batch), labels)
        return self.loss(batch.dataset, error[None], counts), error.detach()[None]

    def loss(self, dataset: str, sums: Tensor, counts: Tensor) -> Tensor:
        """The mean over all terms; 0 where there are none."""
        return (sums / counts.clamp_min(1))[0].float()


class MaestroPredictor(Predictor, Maestro):  # type: ignore[misc]  # two forwards, see below
    """MAESTRO without its decoder. ``config`` has one head.

    Inherits from Maestro rather than containing it: parameter names are part of the format of checkpoints. ``forward``
    is Predictor's: it takes labels, where Maestro's takes masks.
    """

    def __init__(self, config: ModelConfig, target_loss: TargetLoss) -> None:
        super().__init__(config, decodes=False)
        self.target_loss = target_loss

    def logits(self, batch: Batch) -> Tensor:
        """As of Predictor."""
        return self.head_outputs(batch)[self.target_loss.task.target.name]


class BaselinePredictor(Predictor):
    """A baseline whose dates and sensors are pooled by the same head as MAESTRO's."""

    def __init__(
        self, encoder: TrainableBaseline, target_loss: TargetLoss, decoder: DecoderName = "attentive"
    ) -> None:
        super().__init__()
        self.config, self.target_loss, self.encoder = encoder.config, target_loss, encoder
        view, target = encoder.config.view, target_loss.task.target
        ref = next((s for s in view.sensors if s.name == view.ref_sensor), None)
        if target.is_map and ref is None:
            raise EvaluationError(
                f"{view.dataset}: {target.name} is predicted on the tokens of {view.ref_sensor!r}: do not drop it"
            )
        # Pixels of the reference image, as the target loss has them.
        names = [s.name for s in encoder.token_view().sensors]
        side = ref.patch if ref else 0
        try:
            self.head = build_head(target, encoder.width, "attentive", ref, side, decoder, names)
        except ValueError as error:
            raise EvaluationError(f"{view.dataset}: {error}") from None
        target_loss.prepare(self.head)

    def logits(self, batch: Batch) -> Tensor:
        """As of Predictor."""
        return self.head(self.encoder.encode(batch))


@singledispatch
def build_predictor(
    encoder: nn.Module,
    dataset: str,
    target_loss: TargetLoss,
    seed: int,
    pretrained: bool,
    decoder: DecoderName = "attentive",
) -> Predictor:
    """The network before the first step: a new head on ``encoder``, or, unless ``pretrained``, on the same encoder
    re-initialised from ``seed``. ``decoder``: the kind of head. EvaluationError where the encoder or the decoder does
    not fit the target."""
    raise TypeError(
        f"{type(encoder).__name__} cannot be trained: use one of {', '.join(c.__name__ for c in TRAINABLE)}"
    )


@build_predictor.register
@torch.no_grad()
def _(
    encoder: Maestro,
    dataset: str,
    target_loss: TargetLoss,
    seed: int,
    pretrained: bool,
    decoder: DecoderName = "attentive",
) -> MaestroPredictor:
    # Without crop_m the head predicts the pixels of the reference image, as the target loss has them.
    try:
        config = dataclasses.replace(
            encoder.config.for_dataset(dataset),
            heads=(target_loss.task.target,),
            crop_m=None,
            decoder=decoder,
        )
    except ValueError as error:
        raise EvaluationError(f"{dataset}: {error}") from None
    made = MaestroPredictor(config, target_loss)
    made.initialise(seed)
    if pretrained:
        state = encoder.state_dict()
        for name, tensor in made.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    target_loss.prepare(made.heads[target_loss.task.target.name])
    return made


@build_predictor.register
def _(
    encoder: TrainableBaseline,
    dataset: str,
    target_loss: TargetLoss,
    seed: int,
    pretrained: bool,
    decoder: DecoderName = "attentive",
) -> BaselinePredictor:
    made = BaselinePredictor(
        encoder.prepared_for_training() if pretrained else encoder.reinitialised(seed), target_loss, decoder
    )
    initialise(made.head, seed)
    return made
