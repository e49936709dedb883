"""What a benchmark asks of a frozen encoder, by kind of target: which features, which labels, how answers are scored.

Shapes: B crops, P places of the reference grid, F features, C classes that count, H×W label pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Target
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
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import CropGrid

NUM_MAPS = 4  # tiles whose maps are kept beside a result


@dataclass(frozen=True)
class Predictions:
    """What a classifier made of the test split. ``counts`` (tiles, …): exact, of each tile on its own."""

    counts: np.ndarray
    chosen: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)  # other than the task's, by name
    maps: Mapping[str, np.ndarray] | None = None  # label and answer of a few tiles, (n, H, W) uint8 each
    tile_maps: Callable[[], Iterator[np.ndarray]] | None = None  # answers of all tiles in order, (H, W) each


Classifier = Callable[[FeatureCache, FeatureCache, FeatureCache, int, torch.device], Predictions]


class Task(Protocol):
    """A benchmark's question. ``modes``: classifiers of its ``features`` by name; each fits on train, chooses on val,
    answers on test, given a seed and a device.

    ``crops``: how many of a large tile's crops are looked at; None for all.
    """

    target: Target
    metric: str
    feature_dtype: str
    num_crops: int | None
    classifiers: Mapping[str, Classifier]

    def features(self, model: Maestro, batch: Batch) -> Tensor:
        """(B, …, F): what is kept of a batch."""
        ...

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, …) labels of a batch."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes that count."""
        ...

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """The score of summed counts; leading axes are resamples."""
        ...

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """(C,) scores of summed counts, NaN where a class is in no target."""
        ...

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
        """Pixels by (target, predicted) class of summed counts, where the task has such a table."""
        ...


@dataclass(frozen=True)
class MultilabelTask:
    """Several classes per tile, from one vector per tile; scored by wF1."""

    target: Target
    metric: ClassVar[str] = "wf1"
    feature_dtype: ClassVar[str] = "float32"
    num_crops: ClassVar[int | None] = 1  # one answer per tile, from one crop of it

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN and logistic regression."""
        return {"knn": self._classifier(knn), "probe": self._classifier(linear_probe)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class of the target."""
        return self.target.classes

    def features(self, model: Maestro, batch: Batch) -> Tensor:
        """(B, F = S·E): the mean over each sensor's tokens, sensors side by side."""
        return model.embed(batch).vector

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, C) bool: share above the target's threshold."""
        return batch.targets[self.target.name].numpy() > self.target.threshold

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """wF1 of (…, 3, C)."""
        return wf1(counts)

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """F1 per class."""
        tp, _, fn = counts
        return np.where(tp + fn > 0, f1(counts), np.nan)

    def confusion(self, counts: np.ndarray) -> None:
        """A pixel table has no meaning here."""

    def _classifier(
        self, classify: Callable[[LabelledFeatures, LabelledFeatures, np.ndarray], ClassifierResult]
    ) -> Classifier:
        def fit(
            train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
        ) -> Predictions:
            labelled = [LabelledFeatures(np.asarray(e.features), e.labels) for e in (train, val)]
            result = classify(labelled[0], labelled[1], np.asarray(test.features))
            return multilabel_predictions(
                result.predicted, result.scores, np.asarray(test.labels), result.chosen
            )

        return fit


@dataclass(frozen=True)
class SegmentationTask:
    """A class per pixel, from one vector per place of the reference sensor's token grid; scored by mIoU."""

    target: Target
    layout: dense.PixelLayout
    metric: ClassVar[str] = "miou"
    feature_dtype: ClassVar[str] = "float16"
    num_crops: ClassVar[int | None] = None

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN over places and a linear map per place."""
        return {"knn": self._classifier(dense.knn), "probe": self._classifier(dense.probe)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that is not ignored."""
        return tuple(c for i, c in enumerate(self.target.classes) if i not in self.target.ignored)

    def features(self, model: Maestro, batch: Batch) -> Tensor:
        """(B, P, F = S·E): per place the mean over dates of each sensor's tokens, sensors side by side."""
        return torch.cat([_at(t.mean(dim=1), self.layout.grid) for t in model.encode(batch).values()], dim=-1)

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, H, W) uint8: index among the classes that count, ``dense.IGNORED`` elsewhere."""
        values = batch.targets[self.target.name].numpy()
        side = self.layout.crop_pixels
        if values.shape[1:] != (side, side):
            raise ResultsError(
                f"{self.target.name} of {batch.keys[0]} has {values.shape[1:]} pixels where {side}x{side} are expected"
            )
        known = {i for i, _ in enumerate(self.target.classes)} | set(self.target.ignored)
        table = np.full(256, dense.IGNORED, np.uint8)
        counted = [i for i, _ in enumerate(self.target.classes) if i not in self.target.ignored]
        table[counted] = np.arange(len(counted))
        if foreign := sorted(set(np.unique(values).tolist()) - known):
            raise ResultsError(
                f"{self.target.name} holds the value {foreign[0]} (in {batch.keys[0]} …), which is no class"
            )
        return table[values]

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """mIoU of (…, C + 1, C) over the classes present, whatever was answered where labels are ignored."""
        return mean_iou(self._counted(counts))

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """IoU per class."""
        return iou(self._counted(counts))

    def confusion(self, counts: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Rows are targets."""
        return tuple(tuple(row) for row in self._counted(counts).tolist())

    def first_tiles(self, crops: np.ndarray) -> np.ndarray:
        """(n, H, W): the first few tiles, put together from crops (M, h, w)."""
        per_tile = self.layout.crop_grid.num_crops
        firsts = range(0, min(len(crops), NUM_MAPS * per_tile), per_tile)
        return np.stack([self.layout.assemble(crops[first : first + per_tile]) for first in firsts])

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """(H, W) uint8 of each tile, put together from predictions (M, P, Q) of its crops."""
        per_tile = self.layout.crop_grid.num_crops
        for first in range(0, len(predicted), per_tile):
            yield self.layout.assemble(self.layout.per_pixel(predicted[first : first + per_tile]))

    def _counted(self, counts: np.ndarray) -> np.ndarray:
        return counts[..., : len(self.classes), :]

    def _classifier(self, classify: Callable[..., tuple[np.ndarray, dict[str, float]]]) -> Classifier:
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
    """Of predictions (N, C) bool, probabilities (N, C) and labels (N, C) bool of N tiles."""
    counts = MultilabelCounts.of(predicted, labels)
    precision = average_precision(probabilities, labels)
    scores = {
        "macro_f1": counts.macro_f1(zero_division=np.nan),
        "mean_average_precision": float(np.nanmean(precision)) if counts.support.any() else np.nan,
    }
    return Predictions(tile_counts(predicted, labels), chosen, scores)


def _at(tokens: Tensor, grid: int) -> Tensor:
    """(B, L, E) -> (B, grid², E), bilinearly where the sensor's own grid is another."""
    own = round(tokens.shape[1] ** 0.5)
    if own == grid:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(-1, (own, own))
    return F.interpolate(maps, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)


def task_for(spec: DatasetSpec, target: str | None = None) -> Task:
    """The task of a dataset's target (its first, if not named); ``spec``: with the sensors that the encoder reads.

    ResultsError where the dataset has no such target, or the reference grid does not fit its labels.
    """
    if not spec.targets:
        raise ResultsError(
            f"{spec.name} has no labels, so there is nothing to evaluate: it is for pretraining"
        )
    names = [t.name for t in spec.targets]
    if target is not None and target not in names:
        raise ResultsError(f"{spec.name} has no target {target!r}; it has: {', '.join(names)}")
    chosen = spec.target(target or names[0])
    if chosen.kind == "multilabel":
        return MultilabelTask(chosen)
    refs = [s for s in spec.sensors if s.name == spec.ref_sensor]
    if not refs:
        raise ResultsError(
            f"{spec.name}: {chosen.name} is predicted on the grid of {spec.ref_sensor!r}, which is not among the "
            f"sensors in use: {', '.join(s.name for s in spec.sensors)}"
        )
    try:
        crops = CropGrid(spec)
        layout = dense.PixelLayout(refs[0].grid, refs[0].patch, chosen.resolution_m or spec.crop_m, crops)
        return SegmentationTask(chosen, layout)
    except ValueError as error:
        raise ResultsError(f"{spec.name}: sensor {refs[0].name}: {error}") from None
