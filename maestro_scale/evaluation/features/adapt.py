"""An encoder for a dataset it was not trained on: the sensors whose weights it has, seen as the recipe says."""

from __future__ import annotations

import dataclasses

from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.config import DatasetView, ModelConfig, conflicts
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sequences import sequences


def adapt_encoder(model: Maestro, view: DatasetView, trains: bool = False) -> tuple[Maestro, list[str]]:
    """(model, what to report) that sees a dataset as ``view``, with the encoder of ``model``.

    Weights go by name: patch embeddings by ``embed``, encoders by ``group``. A sensor without either is left out, or,
    where the encoder ``learns`` on, starts afresh; the lines say so. The decoder is fresh: nothing of it is used where
    nothing is masked. ResultsError where the encoder has weights for no sensor, or a shared embedding would be fed
    another patch or number of bands.
    """
    own = model.config
    if any(v.dataset == view.dataset and v.sensors == view.sensors for v in own.views):
        return model, []
    kept = tuple(s for s in view.sensors if _why_not(model, s.embed, s.group, s.name) is None)
    left, fate = [s for s in view.sensors if s not in kept], "starts afresh" if trains else "is left out"
    notes = [f"{s.name} {fate}: {_why_not(model, s.embed, s.group, s.name)}" for s in left]
    if not kept:
        raise ResultsError(
            f"{view.dataset}: the checkpoint has weights for none of its sensors: " + "; ".join(notes)
        )
    if trains:
        kept = view.sensors
    if problems := conflicts([*own.views, dataclasses.replace(view, sensors=kept)]):
        raise ResultsError(f"the checkpoint does not fit: {problems[0]}")
    config = dataclasses.replace(own, **vars(dataclasses.replace(view, sensors=kept)), others=(), heads=())
    adopted, state = Maestro(config).initialise(0), model.state_dict()
    for name, tensor in adopted.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            tensor.copy_(state[name])
    used = ", ".join(s.name for s in kept)
    return adopted.eval(), [*notes, f"{view.dataset} is seen through {used}"]


def _why_not(model: Maestro, embed: str, group: str, name: str) -> str | None:
    if embed not in model.patch_embed:
        return f"the checkpoint has no embedding {embed!r} (it has: {', '.join(model.patch_embed)})"
    encoder = _encoder(model.config, group, name)
    if encoder not in model.encoders:
        return f"the checkpoint has no encoder {encoder!r} (it has: {', '.join(model.encoders)})"
    return None


def _encoder(config: ModelConfig, group: str, name: str) -> str:
    """Name of the encoder that a sensor's sequence would be read by."""
    alone = dataclasses.replace(config.views[0].sensors[0], name=name, group=group, embed=name)
    (sequence,) = sequences(dataclasses.replace(config, sensors=(alone,), others=()))
    return sequence.encoder
