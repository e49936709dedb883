"""``maestro_scale.backbone``: the encoder of an exported model as a module for other decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.backbone import Backbone, Merge, backbone_view, without_decoder
from maestro_scale.model.finetuned import sized


def backbone(
    name_or_path: str | Path,
    out_indices: Sequence[int] | int | None = None,
    *,
    sensors: Sequence[str] | None = None,
    num_dates: Mapping[str, int] | None = None,
    dataset: str | None = None,
    crop_m: float | None = None,
    merge: Merge = "concat",
    grid: int | None = None,
    scales: Sequence[float] | None = None,
    frozen: bool = False,
) -> Backbone:
    """The encoder of a model as a plain module: tensors and dates in, a list of feature maps out.

    ``name_or_path``: as of ``load_model``. ``out_indices``: blocks, ascending from 0 (negative: from the last); None:
    four, evenly spread. ``sensors``: those that will be given, by default all of the model; ``num_dates``: of each, by
    default as in training. ``dataset``: which of those of a mixture; ``crop_m``: extent of the images in metres, if not
    that of training. ``merge``: ``concat`` the sensors' maps (S·E channels) or take their ``mean`` (E). ``grid``: cells
    per side, by default those of the reference sensor or the finest; ``scales``: of each map relative to it, for
    example ``(4, 2, 1, 0.5)`` for decoders that expect a pyramid. ``frozen``: no parameter is trained.

    Raises ExportError where there is no such model, ValueError where it has no such sensor, dataset, block or extent.
    """
    model = load_model(name_or_path)
    view = backbone_view(sized(model.config, model.finetuned), sensors, dataset, num_dates, crop_m)
    return Backbone(without_decoder(model, view), view, out_indices, merge, grid, scales, frozen)
