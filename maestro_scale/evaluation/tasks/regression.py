"""The tasks of predicting a number per tile, or a map of numbers, and their losses. NaN labels are left out.

Networks learn standardised values, (value - mean) / deviation of the training labels; scores have the target's units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.missing import tile_vector
from maestro_scale.evaluation.probes import dense, dense_regression
from maestro_scale.evaluation.probes.regression import (
    NumberFeatures,
    NumberResult,
    knn_regression,
    ridge,
)
from maestro_scale.evaluation.regression_metrics import NUM_SUMS, regression_scores, rmse, tile_sums
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.maps import cell_features, first_tiles, tile_maps
from maestro_scale.evaluation.tasks.protocol import DEFAULT_LOSS, Classifier, LossSettings, Predictions
from maestro_scale.model.heads import Standardised
from maestro_scale.stream.batch import Batch

NUM_LABEL_SUMS = 3  # number, sum, sum of squares


class _Numbers:
    """What both regression tasks share. Counts are sums (T, 6), see ``regression_metrics.tile_sums``."""

    target: Target
    metric: ClassVar[str] = "rmse"

    @property
    def classes(self) -> tuple[str, ...]:
        """None: there is nothing to score by class."""
        return ()

    def labels(self, batch: Batch) -> np.ndarray:
        """(B, …) float32, NaN where missing."""
        self.check_labels(batch)
        return self.label_tensor(batch).numpy()

    def check_labels(self, batch: Batch) -> None:
        """Any number is a label."""

    def label_tensor(self, batch: Batch) -> Tensor:
        """As ``labels``."""
        return self.encode_labels(batch.targets[self.target.name])

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, …) stored values -> labels."""
        raise NotImplementedError

    def label_counts(self, labels: np.ndarray) -> np.ndarray:
        """(3,) float64: number, sum and sum of squares of the values that are not missing."""
        values = labels[~np.isnan(labels)].astype(np.float64)
        return np.array([values.size, values.sum(), (values**2).sum()])

    def total(self, counts: np.ndarray) -> np.ndarray:
        """(6,) float64."""
        return counts.sum(axis=0, dtype=np.float64)

    def statistic(self, counts: np.ndarray) -> np.ndarray:
        """RMSE of (…, 6)."""
        return rmse(counts)

    def per_class(self, counts: np.ndarray) -> np.ndarray:
        """(0,)."""
        return np.zeros(0)

    def confusion(self, counts: np.ndarray) -> None:
        """None: there are no classes."""

    def predictions(
        self, sums: np.ndarray, chosen: Mapping[str, float], maps: Mapping[str, np.ndarray] | None = None
    ) -> Predictions:
        """From the sums (T, 6) of each tile."""
        return Predictions(sums, chosen, regression_scores(self.total(sums)), maps)


@dataclass(frozen=True)
class RegressionTask(_Numbers):
    """A number per tile, predicted from one feature vector per tile; scored by RMSE."""

    target: Target
    loss: LossSettings = DEFAULT_LOSS
    feature_dtype: ClassVar[str] = "float32"
    num_crops: ClassVar[int | None] = 1  # one prediction per tile
    layout: ClassVar[None] = None

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """The weighted mean of the nearest neighbours, and ridge regression."""
        return {"knn": self._fit(knn_regression), "probe": self._fit(ridge)}

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, F = S·E): the mean over each sensor's tokens, concatenated over sensors."""
        return tile_vector(model, batch)

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, 1) -> (B,)."""
        return values[:, 0]

    def _fit(self, fit: Callable[..., NumberResult]) -> Classifier:
        def fitted(
            train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
        ) -> Predictions:
            found = fit(
                NumberFeatures.of(np.asarray(train.features), np.asarray(train.labels), "training"),
                NumberFeatures.of(np.asarray(val.features), np.asarray(val.labels), "validation"),
                np.asarray(test.features),
                device=device,
            )
            return self.predictions(tile_sums(found.predicted, np.asarray(test.labels)), found.chosen)

        return fitted


_CellRegression = Callable[
    [dense.PixelLayout, FeatureCache, FeatureCache, FeatureCache, int, torch.device],
    tuple[np.ndarray, dict[str, float]],
]


@dataclass(frozen=True)
class RegressionMapTask(_Numbers):
    """A map of numbers, predicted from one feature vector per cell of the reference grid; scored by RMSE of pixels."""

    target: Target
    layout: dense.PixelLayout
    loss: LossSettings = DEFAULT_LOSS
    feature_dtype: ClassVar[str] = "float16"
    num_crops: ClassVar[int | None] = None

    @property
    def classifiers(self) -> Mapping[str, Classifier]:
        """kNN over cells, and a linear map per cell."""
        return {"knn": self._fit(dense_regression.knn), "probe": self._fit(dense_regression.probe)}

    def features(self, model: FrozenEncoder, batch: Batch) -> Tensor:
        """(B, P, F = S·E), as of ``cell_features``."""
        return cell_features(model, batch, self.layout.grid)

    def check_labels(self, batch: Batch) -> None:
        """EvaluationError where labels have another size than the crop."""
        shape, side = tuple(batch.targets[self.target.name].shape[1:]), self.layout.crop_pixels
        if shape != (side, side):
            raise EvaluationError(
                f"{self.target.name} of {batch.keys[0]} has {shape} pixels where {side}x{side} are expected"
            )

    def encode_labels(self, values: Tensor) -> Tensor:
        """(B, H, W), unchanged."""
        return values

    def map_predictions(
        self, predicted: np.ndarray, labels: np.ndarray, chosen: Mapping[str, float]
    ) -> Predictions:
        """From predictions (M, P, Q) and labels (M, H, W)."""
        maps = {
            "truth": first_tiles(self.layout, labels),
            "answer": first_tiles(self.layout, self.layout.per_pixel(predicted)),
        }
        sums = dense_regression.tile_map_sums(self.layout, predicted, labels)
        found = self.predictions(sums, chosen, maps)
        return Predictions(
            found.counts, chosen, found.scores, maps, lambda: tile_maps(self.layout, predicted)
        )

    def _fit(self, fit: _CellRegression) -> Classifier:
        def fitted(
            train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
        ) -> Predictions:
            predicted, chosen = fit(self.layout, train, val, test, seed, device)
            return self.map_predictions(predicted, np.asarray(test.labels), chosen)

        return fitted


@dataclass(frozen=True)
class LabelScale:
    """Mean and standard deviation of the training labels."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, counts: np.ndarray) -> LabelScale:
        """From sums (3,) as of ``label_counts``. Deviation 1 where all labels are equal, or there is none."""
        num, total, squares = (float(c) for c in counts)
        if not num:
            return cls()
        mean = total / num
        variance = squares / num - mean**2
        return cls(mean, variance**0.5 if variance > 1e-12 * max(mean**2, 1e-300) else 1.0)


class _NumberLoss:
    """What both losses share: squared error or smooth L1 of standardised values, the mean over values with a label."""

    task: RegressionTask | RegressionMapTask
    scale: LabelScale

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Sums of a tile."""
        return (NUM_SUMS,)

    def prepare(self, head: nn.Module) -> None:
        """Store mean and deviation of the labels in a new head."""
        assert isinstance(head, Standardised)  # built for this target
        head.set_scale(self.scale.mean, self.scale.deviation)

    def num_terms(self, targets: Tensor) -> Tensor:
        """Values with a label."""
        return (~torch.isnan(targets)).sum().double()

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits are standardised values, (B, 1) or (B, 1, H, W)."""
        output = self._arranged(logits).float()
        missing = torch.isnan(targets)
        wanted = torch.where(missing, 0.0, (targets.float() - self.scale.mean) / self.scale.deviation)
        output = torch.where(missing, 0.0, output)  # before the loss: the gradient of NaN · 0 would be NaN
        error = F.mse_loss if self.task.loss.regression == "l2" else F.smooth_l1_loss
        return error(output, wanted, reduction="sum")

    def predict(self, logits: Tensor) -> Tensor:
        """(B, …) float32 in the units of the target."""
        return self._arranged(logits).float() * self.scale.deviation + self.scale.mean

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """From the sums of each tile."""
        return self.task.predictions(tiles, {})

    def _arranged(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class RegressionLoss(_NumberLoss):
    """The loss of a number per tile."""

    task: RegressionTask
    scale: LabelScale = LabelScale()
    num_crops: int = 1

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B,), unchanged."""
        return labels

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(B, 6) sums."""
        return tile_sums(predicted, labels)

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """None: labels are of whole tiles."""

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """Empty."""
        return iter(())

    def _arranged(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


@dataclass(frozen=True)
class RegressionMapLoss(_NumberLoss):
    """The loss of a map of numbers."""

    task: RegressionMapTask
    scale: LabelScale = LabelScale()

    @property
    def num_crops(self) -> int:
        """All of a tile: its map is assembled from them."""
        return self.task.layout.crop_grid.num_crops

    def loss_targets(self, labels: Tensor) -> Tensor:
        """(B, P, Q)."""
        return self.task.layout.per_cell(labels)

    def per_tile(self, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(T, 6) sums, each pixel of a tile once."""
        return dense_regression.tile_map_sums(self.task.layout, predicted, labels)

    def first_maps(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """In units."""
        layout = self.task.layout
        return {
            "truth": first_tiles(layout, labels),
            "answer": first_tiles(layout, layout.per_pixel(predicted)),
        }

    def tile_maps(self, predicted: np.ndarray) -> Iterator[np.ndarray]:
        """In units."""
        return tile_maps(self.task.layout, predicted)

    def _arranged(self, logits: Tensor) -> Tensor:
        grid = self.task.layout.grid
        return rearrange(logits[:, 0], "b (h p) (w q) -> b (h w) (p q)", h=grid, w=grid)
