"""Evaluation tasks of multilabel and segmentation targets, and the task of any target (``task_for``).

A class counts unless its index is among the target's ignored values. Shapes: B crops, M crops of a split, P cells of
the reference grid (see ``probes.dense``), F features, C classes that count, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.labelled_features import ClassifierResult, LabelledFeatures
from maestro_scale.evaluation.features.missing import tile_vector
from maestro_scale.evaluation.metrics import (
    MultilabelCounts,
    average_precision,
    f1,
    iou,
    mean_iou,
    segmentation_scores,
    tile_counts,
    wf1,
)
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.probes.knn import knn
from maestro_scale.evaluation.probes.linear import linear_probe
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.class_weights import class_weights
from maestro_scale.evaluation.tasks.classification import ClassificationTask
from maestro_scale.evaluation.tasks.maps import cell_features, first_tiles, tile_maps
from maestro_scale.evaluation.tasks.protocol import (
    DEFAULT_LOSS,
    Classifier,
    LossSettings,
    Predictions,
    Task,
    integer_total,
)
from maestro_scale.evaluation.tasks.regression import RegressionMapTask, RegressionTask
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import CropGrid


@dataclass(frozen=True)
class MultilabelTask:
    """Any number of classes per tile, predicted from one feature vector per tile; scored by wF1."""

    target: Target
    loss: LossSettings = DEFAULT_LOSS
    metric: ClassVar[str] = "wf1"
    feature_dtype: ClassVar[str] = "float32"
    num_crops: ClassVar[int | None] = 1  # one prediction per tile
    layout: ClassVar[None] = None

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN and logistic regression."""
        return {"knn": self._knn, "probe": self._probe}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class of the target."""
        return self.target.classes

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, F = S·E): the mean over each sensor's tokens, concatenated over sensors."""
        return tile_vector(model, batch)

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, C) bool: share above the target's threshold."""
        return self.label_tensor(batch).numpy()

    def check_labels(self, batch: Batch) -> None:
        """Any share is one."""

    def label_tensor(self, batch: Batch) -> Tensor:
        """(B, C) bool: share above the target's threshold."""
        return self.encode_labels(batch.targets[self.target.name])

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, C) shares -> (B, C) bool."""
        return values > self.target.threshold

    def label_counts(self, labels: np.ndarray) -> np.ndarray:
        """(C,) tiles with each class."""
        return labels.sum(axis=0, dtype=np.float64)

    total = staticmethod(integer_total)

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """wF1 of (…, 3, C)."""
        return wf1(counts)

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """F1 per class."""
        tp, _, fn = counts
        return np.where(tp + fn > 0, f1(counts), np.nan)

    def confusion(self, counts: np.ndarray) -> None:
        """None: labels are of whole tiles."""

    def _knn(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        result = knn(*_labelled(train, val), np.asarray(test.features), device=device)
        return _multilabel_result(result, test)

    def _probe(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        weights = class_weights(self.loss, self.classes, self.label_counts(np.asarray(train.labels)))
        result = linear_probe(
            *_labelled(train, val),
            np.asarray(test.features),
            device=device,
            class_weights=None if weights is None else weights.values,
        )
        return _multilabel_result(result, test)


def _labelled(train: FeatureCache, val: FeatureCache) -> tuple[LabelledFeatures, LabelledFeatures]:
    return (
        LabelledFeatures(np.asarray(train.features), train.labels),
        LabelledFeatures(np.asarray(val.features), val.labels),
    )


def _multilabel_result(result: ClassifierResult, test: FeatureCache) -> Predictions:
    return multilabel_predictions(result.predicted, result.scores, np.asarray(test.labels), result.chosen)


@dataclass(frozen=True)
class SegmentationTask:
    """One class per pixel, predicted from one feature vector per cell of the reference grid; scored by mIoU."""

    target: Target
    layout: dense.PixelLayout
    loss: LossSettings = DEFAULT_LOSS
    metric: ClassVar[str] = "miou"
    feature_dtype: ClassVar[str] = "float16"
    num_crops: ClassVar[int | None] = None
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN over cells, and a linear map per cell."""
        return {"knn": self._knn, "probe": self._probe}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that is not ignored."""
        return tuple(c for i, c in enumerate(self.target.classes) if i not in self.target.ignored)

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, P, F = S·E): per cell the mean over dates of each sensor's tokens, concatenated over sensors."""
        return cell_features(model, batch, self.layout.grid)

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, H, W) uint8: index among the classes that count, ``dense.IGNORED`` elsewhere."""
        self.check_labels(batch)
        return self.label_tensor(batch).numpy()

    def check_labels(self, batch: Batch) -> None:
        """EvaluationError where labels have another size than the crop, or a value that is not a class."""
        values = batch.targets[self.target.name].numpy()
        side = self.layout.crop_pixels
        if values.shape[1:] != (side, side):
            raise EvaluationError(
                f"{self.target.name} of {batch.keys[0]} has {values.shape[1:]} pixels where {side}x{side} are expected"
            )
        known = {i for i, _ in enumerate(self.target.classes)} | set(self.target.ignored)
        unknown: Collection[int]
        if (
            values.dtype == np.uint8
        ):  # in finetuning every batch is checked: this is much faster than np.unique
            unknown = values.tobytes().translate(None, delete=bytes(k for k in known if k < 256))
        else:
            unknown = set(np.unique(values).tolist()) - known
        if unknown:
            raise EvaluationError(
                f"{self.target.name} holds the value {min(unknown)} (in {batch.keys[0]} …), which is not a class"
            )

    def label_tensor(self, batch: Batch) -> Tensor:
        """(B, H, W) uint8: index among the classes that count, ``dense.IGNORED`` elsewhere."""
        return self.encode_labels(batch.targets[self.target.name])

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, H, W) stored values -> as ``label_tensor``."""
        return self._label_table(values.device)[values.long()]

    def _label_table(self, device: torch.device) -> Tensor:
        """(256,) uint8: label value -> index among the classes that count."""
        table = self._tables.get(device)
        if table is None:  # filled by kernels: the host would wait for the copy of a list
            table = torch.full((256,), dense.IGNORED, dtype=torch.uint8, device=device)
            counted = [i for i, _ in enumerate(self.target.classes) if i not in self.target.ignored]
            for index, value in enumerate(counted):
                table[value].fill_(index)
            self._tables[device] = table
        return table

    def label_counts(self, labels: np.ndarray) -> np.ndarray:
        """(C,) pixels of each class."""
        return np.bincount(labels.reshape(-1), minlength=256)[: len(self.classes)].astype(np.float64)

    total = staticmethod(integer_total)

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """mIoU of (…, C + 1, C) over the classes present, whatever was predicted on ignored pixels."""
        return mean_iou(self._counted(counts))

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """IoU per class."""
        return iou(self._counted(counts))

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Rows are targets."""
        return tuple(tuple(row) for row in self._counted(counts).tolist())

    def _counted(self, counts: np.ndarray) -> np.ndarray:
        return counts[..., : len(self.classes), :]

    def _knn(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        return self._result(*dense.knn(self.layout, len(self.classes), train, val, test, seed, device), test)

    def _probe(
        self, train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        weights = class_weights(self.loss, self.classes, self.label_counts(np.asarray(train.labels)))
        values = None if weights is None else weights.values
        predicted, chosen = dense.probe(
            self.layout, len(self.classes), train, val, test, seed, device, values
        )
        return self._result(predicted, chosen, test)

    def _result(self, predicted: np.ndarray, chosen: Mapping[str, float], test: FeatureCache) -> Predictions:
        counts = dense.confusions(self.layout, len(self.classes), predicted, test)
        maps = {
            "truth": first_tiles(self.layout, test.labels),
            "answer": first_tiles(self.layout, self.layout.per_pixel(predicted)),
        }
        scores = segmentation_scores(counts.sum(0))
        return Predictions(counts, chosen, scores, maps, lambda: tile_maps(self.layout, predicted))


def multilabel_predictions(
    predicted: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, chosen: Mapping[str, float]
) -> Predictions:
    """From predictions (N, C) bool, probabilities (N, C) and labels (N, C) bool of N tiles."""
    counts = MultilabelCounts.of(predicted, labels)
    precision = average_precision(probabilities, labels)
    scores = {
        "macro_f1": counts.macro_f1(zero_division=np.nan),
        "mean_average_precision": float(np.nanmean(precision)) if counts.support.any() else np.nan,
    }
    return Predictions(tile_counts(predicted, labels), chosen, scores)


_TILE_TASKS: Mapping[str, Callable[[Target, LossSettings], Task]] = {
    "multilabel": MultilabelTask,
    "classification": ClassificationTask,
    "regression": RegressionTask,
}
_MAP_TASKS: Mapping[str, Callable[[Target, dense.PixelLayout, LossSettings], Task]] = {
    "segmentation": SegmentationTask,
    "regression": RegressionMapTask,
}
"""By kind of target; ``tasks.losses.target_loss_for`` has the loss of each task."""


def task_for(spec: DatasetSpec, target: str | None = None, loss: LossSettings = DEFAULT_LOSS) -> Task:
    """The task of predicting ``target`` (default: the dataset's first); ``spec``: with the sensors the encoder reads.

    EvaluationError where the dataset has no such target, or the reference grid does not fit its labels.
    """
    if not spec.targets:
        raise EvaluationError(
            f"{spec.name} has no labels, so there is nothing to evaluate: it is for pretraining"
        )
    names = [t.name for t in spec.targets]
    if target is not None and target not in names:
        raise EvaluationError(f"{spec.name} has no target {target!r}; it has: {', '.join(names)}")
    chosen = spec.target(target or names[0])
    if not chosen.is_map:
        return _TILE_TASKS[chosen.kind](chosen, loss)
    refs = [s for s in spec.sensors if s.name == spec.ref_sensor]
    if not refs:
        raise EvaluationError(
            f"{spec.name}: {chosen.name} is predicted on the grid of {spec.ref_sensor!r}, which is not among the "
            f"sensors in use: {', '.join(s.name for s in spec.sensors)}"
        )
    try:
        crops = CropGrid(spec)
        layout = dense.PixelLayout(refs[0].grid, refs[0].patch, chosen.resolution_m or spec.crop_m, crops)
        return _MAP_TASKS[chosen.kind](chosen, layout, loss)
    except ValueError as error:
        raise EvaluationError(f"{spec.name}: sensor {refs[0].name}: {error}") from None
