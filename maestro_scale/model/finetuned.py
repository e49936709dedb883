"""What a finetuned model knows beside its weights, and its predictions.

Shapes: B samples, C classes that are predicted, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maestro_scale.datasets.spec import DatasetSpec, Target, Tile
from maestro_scale.model.config import MAX_OVERLAP, OVERLAP, ModelConfig
from maestro_scale.model.heads import Standardised
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import CropGrid
from maestro_scale.stream.tile import evaluation_batch, fitted_spec


@dataclass(frozen=True)
class Finetuned:
    """What config.json records of a finetuned model as ``finetuned``; the attributes are the JSON keys.

    ``spec``: the dataset as it was used: sensors with their scaling, crop, tiles and targets. ``target``: what is
    predicted; ``metric``: its score. ``mode``: finetune or scratch; ``step``: of the best weights, and ``validation``
    their score. ``test``: the score of the test split. ``trained_on``: datasets of the pretraining. ``overlap``: of
    windows of maps, from 0 to ``MAX_OVERLAP``.
    """

    spec: DatasetSpec
    target: str
    metric: str
    mode: str
    step: int
    validation: float
    test: float
    trained_on: tuple[str, ...] = ()
    overlap: float = OVERLAP

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"overlap: {self.overlap:g} is not from 0 to {MAX_OVERLAP:g}")
        if self.target not in {t.name for t in self.spec.targets}:
            raise ValueError(f"target: {self.target!r} is not a target of {self.spec.name}")


@dataclass(frozen=True)
class Prediction:
    """The predictions of one target for B samples.

    ``values``: of segmentation (B, H, W) and classification (B,) the label values, keys of ``classes``; of multilabel
    (B, C) whether each class is there; of regression (B,) or (B, H, W) float32 in ``units``. ``probabilities``: (B, C),
    or (B, C, H, W), in the order of ``classes``; None of a regression. ``classes``: {label value: name}.
    """

    target: str
    kind: str
    values: Tensor
    probabilities: Tensor | None
    classes: Mapping[int, str]
    units: str = ""


def sized(config: ModelConfig, finetuned: Finetuned | None) -> ModelConfig:
    """``config`` with the extent of its images, and where that is of ``finetuned``, without heads.

    The configuration of a finetuned model has none, as its head predicts the pixels of the reference image.
    """
    if config.crop_m is not None or finetuned is None:
        return config
    return replace(config, crop_m=finetuned.spec.crop_m, heads=())


def predict_target(target: Target, head: nn.Module, outputs: Tensor, factor: int = 1) -> Prediction:
    """The prediction of a head's ``outputs``. ``factor``: label pixels per predicted pixel, per side."""
    outputs = outputs.float()
    if target.is_map and factor > 1:
        outputs = outputs.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if target.kind == "regression":
        values = head.in_units(outputs)[:, 0] if isinstance(head, Standardised) else outputs[:, 0]
        return Prediction(target.name, target.kind, values, None, {}, target.units)
    if target.kind == "multilabel":  # its head has the ignored classes too
        classes = dict(enumerate(target.classes))
        probabilities = outputs.sigmoid()
        return Prediction(target.name, target.kind, probabilities > 0.5, probabilities, classes)
    classes = {i: name for i, name in enumerate(target.classes) if i not in target.ignored}
    counted = torch.tensor(list(classes)).to(outputs.device)
    return Prediction(
        target.name, target.kind, counted[outputs.argmax(1)], outputs.softmax(1), classes, target.units
    )


def crops_of(tile: Tile, finetuned: Finetuned) -> tuple[Batch, CropGrid]:
    """The crops of a tile that the model is evaluated on, and where they lie. Of a label of the whole tile: the first,
    as in evaluation."""
    spec = fitted_spec(tile, finetuned.spec)
    grid = CropGrid(spec)
    is_map = finetuned.spec.target(finetuned.target).is_map
    return evaluation_batch(tile, spec, grid.num_crops if is_map else 1), grid


def label_factor(spec: DatasetSpec, target: Target, pixels: int) -> int:
    """Label pixels per predicted pixel of a crop, per side; ``pixels``: predicted per side."""
    resolution_m = target.resolution_m or spec.crop_m
    return max(CropGrid(spec).side(resolution_m, round(spec.tile_m / resolution_m)) // pixels, 1)


def assembled(prediction: Prediction, grid: CropGrid, resolution_m: float) -> Prediction:
    """Predictions of a tile's crops as one of the tile, (1, …, H, W); where crops overlap, the later one counts."""
    side = round(grid.tile_m / resolution_m)

    def whole(crops: Tensor | None) -> Tensor | None:
        if crops is None:
            return None
        tile = crops.new_empty((1, *crops.shape[1:-2], side, side))
        for number, crop in enumerate(crops):
            window = grid.window(grid.tiling(number), resolution_m, side)
            rows, columns = window or (slice(None), slice(None))
            tile[0, ..., rows, columns] = crop
        return tile

    values = whole(prediction.values)
    assert values is not None
    return Prediction(
        prediction.target,
        prediction.kind,
        values,
        whole(prediction.probabilities),
        prediction.classes,
        prediction.units,
    )
