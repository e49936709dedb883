"""Evaluation tasks by kind of target: the features and labels of a batch, classifiers on them, and scores from counts.

A class counts unless its index is among the target's ignored values. Shapes: B crops, M crops of a split, P cells of
the reference grid (see ``probes.dense``), F features, C classes that count, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.labelled_features import ClassifierResult, LabelledFeatures
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
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import CropGrid

NUM_MAPS = 4  # tiles whose label and predicted maps are stored with a result


@dataclass(frozen=True)
class Predictions:
    """Predictions on the test split, as far as scores and maps need them."""

    counts: np.ndarray
    """(tiles, …) exact integer counts of each tile; their sum is what is scored, resamples of them its interval."""
    chosen: Mapping[str, float]
    """Hyperparameters selected on validation."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores other than the task's, by name."""
    maps: Mapping[str, np.ndarray] | None = None
    """``truth`` (labels) and ``answer`` (predictions) of the first few tiles, (n, H, W) uint8 each."""
    tile_maps: Callable[[], Iterator[np.ndarray]] | None = None
    """Predicted maps (H, W) of all tiles in order; a function, so that they are computed only where they are wanted."""


Classifier = Callable[[FeatureCache, FeatureCache, FeatureCache, int, torch.device], Predictions]
"""(train, val, test, seed, device): fits on train, selects hyperparameters on val, predicts test."""


class _VectorClassifier(Protocol):
    def __call__(
        self,
        train: LabelledFeatures,
        validation: LabelledFeatures,
        test_features: np.ndarray,
        *,
        device: torch.device,
    ) -> ClassifierResult: ...


_CellClassifier = Callable[
    [dense.PixelLayout, int, FeatureCache, FeatureCache, FeatureCache, int, torch.device],
    tuple[np.ndarray, dict[str, float]],
]


class Task(Protocol):
    """What is predicted on a benchmark and how it is scored."""

    @property
    def target(self) -> Target:
        """The target in the shards."""
        ...

    @property
    def metric(self) -> str:
        """One of ``results.METRICS``."""
        ...

    @property
    def feature_dtype(self) -> str:
        """In which features are stored on disk."""
        ...

    @property
    def num_crops(self) -> int | None:
        """Crops of a large tile that are evaluated; None for all."""
        ...

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """Classifiers on ``features``, by mode."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes that count."""
        ...

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, …, F) features of a batch."""
        ...

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, …) labels of a batch on the host. EvaluationError as ``check_labels``."""
        ...

    def check_labels(self, batch: Batch) -> None:
        """EvaluationError where a batch on the host does not have labels of this task."""
        ...

    def label_tensor(self, batch: Batch) -> Tensor:
        """As ``labels``, on the device of the batch; not checked, so that the host does not wait for the device."""
        ...

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """The score of summed counts; leading axes are resamples."""
        ...

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """(C,) scores of summed counts, NaN where a class is in no target."""
        ...

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
        """Pixels by (target, predicted) class of summed counts; None for a task without pixels."""
        ...


@dataclass(frozen=True)
class MultilabelTask:
    """Any number of classes per tile, predicted from one feature vector per tile; scored by wF1."""

    target: Target
    metric: ClassVar[str] = "wf1"
    feature_dtype: ClassVar[str] = "float32"
    num_crops: ClassVar[int | None] = 1  # one prediction per tile

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN and logistic regression."""
        return {"knn": self._classifier(knn), "probe": self._classifier(linear_probe)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class of the target."""
        return self.target.classes

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, F = S·E): the mean over each sensor's tokens, concatenated over sensors."""
        return model.embed(batch).vector

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, C) bool: share above the target's threshold."""
        return self.label_tensor(batch).numpy()

    def check_labels(self, batch: Batch) -> None:
        """Any share is one."""

    def label_tensor(self, batch: Batch) -> Tensor:
        """(B, C) bool: share above the target's threshold."""
        return batch.targets[self.target.name] > self.target.threshold

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """wF1 of (…, 3, C)."""
        return wf1(counts)

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """F1 per class."""
        tp, _, fn = counts
        return np.where(tp + fn > 0, f1(counts), np.nan)

    def confusion(self, counts: np.ndarray) -> None:
        """None: labels are of whole tiles."""

    def _classifier(self, classify: _VectorClassifier) -> Classifier:
        def fit(
            train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
        ) -> Predictions:
            labelled = [LabelledFeatures(np.asarray(e.features), e.labels) for e in (train, val)]
            result = classify(labelled[0], labelled[1], np.asarray(test.features), device=device)
            return multilabel_predictions(
                result.predicted, result.scores, np.asarray(test.labels), result.chosen
            )

        return fit


@dataclass(frozen=True)
class SegmentationTask:
    """One class per pixel, predicted from one feature vector per cell of the reference grid; scored by mIoU."""

    target: Target
    layout: dense.PixelLayout
    metric: ClassVar[str] = "miou"
    feature_dtype: ClassVar[str] = "float16"
    num_crops: ClassVar[int | None] = None
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN over cells, and a linear map per cell."""
        return {"knn": self._classifier(dense.knn), "probe": self._classifier(dense.probe)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that is not ignored."""
        return tuple(c for i, c in enumerate(self.target.classes) if i not in self.target.ignored)

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, P, F = S·E): per cell the mean over dates of each sensor's tokens, concatenated over sensors."""
        grids = model.encode(batch).values()
        return torch.cat([_resample_tokens(t.mean(dim=1), self.layout.grid) for t in grids], dim=-1)

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
        values = batch.targets[self.target.name]
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

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """mIoU of (…, C + 1, C) over the classes present, whatever was predicted on ignored pixels."""
        return mean_iou(self._counted(counts))

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """IoU per class."""
        return iou(self._counted(counts))

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Rows are targets."""
        return tuple(tuple(row) for row in self._counted(counts).tolist())

    def first_tiles(self, crops: np.ndarray) -> np.ndarray:
        """(n, H, W): the first few tiles, assembled from crops (M, h, w)."""
        per_tile = self.layout.crop_grid.num_crops
        firsts = range(0, min(len(crops), NUM_MAPS * per_tile), per_tile)
        return np.stack([self.layout.assemble(crops[first : first + per_tile]) for first in firsts])

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """(H, W) uint8 of each tile, assembled from predictions (M, P, Q) of its crops."""
        per_tile = self.layout.crop_grid.num_crops
        for first in range(0, len(predicted), per_tile):
            yield self.layout.assemble(self.layout.per_pixel(predicted[first : first + per_tile]))

    def _counted(self, counts: np.ndarray) -> np.ndarray:
        return counts[..., : len(self.classes), :]

    def _classifier(self, classify: _CellClassifier) -> Classifier:
        def fit(
            train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
        ) -> Predictions:
            predicted, chosen = classify(self.layout, len(self.classes), train, val, test, seed, device)
            counts = dense.confusions(self.layout, len(self.classes), predicted, test)
            maps = {
                "truth": self.first_tiles(test.labels),
                "answer": self.first_tiles(self.layout.per_pixel(predicted)),
            }
            return Predictions(
                counts, chosen, segmentation_scores(counts.sum(0)), maps, lambda: self.tile_maps(predicted)
            )

        return fit


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


def _resample_tokens(tokens: Tensor, grid: int) -> Tensor:
    """(B, L, E) -> (B, grid², E): bilinear interpolation where the sensor has another grid than the reference."""
    side = round(tokens.shape[1] ** 0.5)
    if side == grid:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(-1, (side, side))
    return F.interpolate(maps, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)


def task_for(spec: DatasetSpec, target: str | None = None) -> MultilabelTask | SegmentationTask:
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
    if chosen.kind == "multilabel":
        return MultilabelTask(chosen)
    refs = [s for s in spec.sensors if s.name == spec.ref_sensor]
    if not refs:
        raise EvaluationError(
            f"{spec.name}: {chosen.name} is predicted on the grid of {spec.ref_sensor!r}, which is not among the "
            f"sensors in use: {', '.join(s.name for s in spec.sensors)}"
        )
    try:
        crops = CropGrid(spec)
        layout = dense.PixelLayout(refs[0].grid, refs[0].patch, chosen.resolution_m or spec.crop_m, crops)
        return SegmentationTask(chosen, layout)
    except ValueError as error:
        raise EvaluationError(f"{spec.name}: sensor {refs[0].name}: {error}") from None
