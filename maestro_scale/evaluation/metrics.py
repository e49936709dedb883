"""Metrics from exact integer counts, which are summed over tiles, batches and ranks before a score is computed.

So a score does not depend on the number of ranks or the batch size.

Shapes: N samples, C classes; ``…`` are leading axes, such as bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maestro_scale.evaluation.regression_metrics import rmse
from maestro_scale.evaluation.results import EvaluationError


@dataclass(frozen=True)
class MultilabelCounts:
    """True positives, false positives, false negatives per class, each (C,) int64. Adding merges samples."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray

    @classmethod
    def of(cls, predicted: np.ndarray, target: np.ndarray) -> MultilabelCounts:
        """Counts of predictions (N, C) bool against targets (N, C) bool. ValueError if the shapes differ."""
        return cls.from_array(tile_counts(predicted, target).sum(axis=0))

    @classmethod
    def zeros(cls, num_classes: int) -> MultilabelCounts:
        """The counts of zero samples."""
        return cls.from_array(np.zeros((3, num_classes), np.int64))

    @classmethod
    def from_array(cls, counts: np.ndarray) -> MultilabelCounts:
        """From (3, C): rows tp, fp, fn."""
        tp, fp, fn = np.asarray(counts, np.int64)
        return cls(tp, fp, fn)

    def as_array(self) -> np.ndarray:
        """(3, C) int64: rows tp, fp, fn; one array to sum over ranks."""
        return np.stack([self.tp, self.fp, self.fn])

    def __add__(self, other: MultilabelCounts) -> MultilabelCounts:
        return MultilabelCounts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def support(self) -> np.ndarray:
        """Samples labelled with each class, (C,) int64."""
        return self.tp + self.fn

    def f1(self, zero_division: float = 0.0) -> np.ndarray:
        """F1 per class, (C,) float64; ``zero_division`` where a class is neither present nor predicted."""
        return f1(self.as_array(), zero_division)

    def wf1(self, zero_division: float = 0.0) -> float:
        """F1 weighted by support (the benchmark's wF1); the plain mean if no class is present at all."""
        return float(wf1(self.as_array(), zero_division))

    def macro_f1(self, zero_division: float = 0.0) -> float:
        """Mean F1 over classes; undefined ones are left out where ``zero_division`` is NaN."""
        scores = self.f1(zero_division)
        defined = scores[~np.isnan(scores)]
        return float(defined.mean()) if defined.size else float("nan")


def tile_counts(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Counts of each sample, (N, 3, C) bool: rows tp, fp, fn. The bootstrap resamples these.

    ``predicted``, ``target``: (N, C) bool. ValueError if the shapes differ or the dtypes are not bool.
    """
    predicted, target = np.asarray(predicted), np.asarray(target)
    if predicted.shape != target.shape or predicted.ndim != 2:
        raise ValueError(
            f"predictions {predicted.shape} and targets {target.shape} must both be (samples, classes)"
        )
    if predicted.dtype != bool or target.dtype != bool:
        raise ValueError(
            f"predictions ({predicted.dtype}) and targets ({target.dtype}) must be bool: apply a threshold"
        )
    return np.stack([predicted & target, predicted & ~target, ~predicted & target], axis=1)


def class_counts(predicted: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of one class per sample, (N, 3, C) bool as of :func:`tile_counts`; zero where the target is negative.

    ``predicted``, ``target``: (N,) class indices.
    """
    classes = np.arange(num_classes)
    counted = (target >= 0)[:, None]
    return tile_counts((predicted[:, None] == classes) & counted, target[:, None] == classes)


def classification_scores(counts: np.ndarray) -> dict[str, float]:
    """``accuracy`` and ``macro_f1`` of counts (3, C) of one class per sample; classes that are neither in a target nor
    predicted have no F1 and are left out of the mean, as in scikit-learn."""
    summed = MultilabelCounts.from_array(counts)
    num = int(summed.support.sum())
    accuracy = float(summed.tp.sum() / num) if num else float("nan")
    return {"accuracy": accuracy, "macro_f1": summed.macro_f1(zero_division=np.nan)}


def f1(counts: np.ndarray, zero_division: float = 0.0) -> np.ndarray:
    """F1 = 2·tp / (2·tp + fp + fn) per class, (…, C) float64, of counts (…, 3, C)."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    whole = 2 * tp + fp + fn
    return np.divide(2 * tp, whole, out=np.full_like(whole, zero_division), where=whole > 0)


def wf1(counts: np.ndarray, zero_division: float = 0.0) -> np.ndarray:
    """Support-weighted F1, (…) float64, of counts (…, 3, C); the plain mean where no class is present."""
    scores = f1(counts, zero_division)
    tp, _, fn = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    support = tp + fn
    total = support.sum(-1)
    # A class without support has weight 0, also where its score is NaN (0 · NaN would be NaN).
    weighted = np.where(support > 0, scores * support, 0.0).sum(-1)
    return np.where(total > 0, weighted / np.maximum(total, 1), scores.mean(-1))


def average_precision(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Average precision per class, (C,), of ``scores`` (N, C) against ``target`` (N, C) bool; NaN without a positive.

    The area under the step function, without interpolation (sklearn.metrics.average_precision_score).
    """
    # Here, since each rank of a training imports this module, and scikit-learn takes as long as torch to import.
    from sklearn.metrics import average_precision_score

    pairs = zip(np.asarray(scores).T, np.asarray(target, bool).T, strict=True)
    return np.array([average_precision_score(t, s) if t.any() else np.nan for s, t in pairs])


def confusion(
    predicted: np.ndarray, target: np.ndarray, num_classes: int, ignored: Collection[int] = ()
) -> np.ndarray:
    """Pixels by (target class, predicted class): (C, C) int64, which adds over tiles and ranks.

    ``predicted``, ``target``: integers of one shape, in [0, num_classes); pixels whose target is in
    ``ignored`` count nowhere, whatever was predicted. ValueError names a value outside both.
    """
    predicted, target = np.asarray(predicted), np.asarray(target)
    if predicted.shape != target.shape:
        raise ValueError(f"predictions have shape {predicted.shape}, targets {target.shape}: they must agree")
    counted = ~np.isin(target, list(ignored))
    rows, columns = target[counted].astype(np.int64), predicted[counted].astype(np.int64)
    for what, values in (("target", rows), ("predicted", columns)):
        outside = values[(values < 0) | (values >= num_classes)]
        if outside.size:
            raise ValueError(
                f"{what} class {outside[0]} is outside the {num_classes} classes 0-{num_classes - 1} "
                f"(ignored: {sorted(ignored) or 'none'})"
            )
    cells = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union per class, (…, C), of confusions (…, C, C); NaN where no target has it."""
    matrix = np.asarray(matrix, np.float64)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    present = matrix.sum(-1)
    union = present + matrix.sum(-2) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=present > 0)


def mean_iou(matrix: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes present in the targets, (…) float64, of confusions (…, C, C); NaN where no pixel was
    counted."""
    scores = iou(matrix)
    present = ~np.isnan(scores)
    total, count = np.where(present, scores, 0.0).sum(-1), present.sum(-1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def tile_mean_iou(counts: np.ndarray) -> np.ndarray:
    """As ``mean_iou``, of counts (…, C + 1, C) whose last row is of ignored pixels, as they are kept per tile."""
    return mean_iou(np.asarray(counts)[..., :-1, :])


STATISTICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "wf1": wf1,
    "miou": tile_mean_iou,
    "rmse": rmse,
}
"""By the name of the metric: its score of counts of ``counts.npz`` summed over tiles; leading axes are resamples."""


def best_index(scores: Sequence[float], split: str = "validation", sign: int = 1) -> int:
    """Index of the best score, the first of equal ones. EvaluationError if one is undefined.

    ``sign``: of the metric (``MetricKind.sign``): -1 where a lower score is better.
    """
    if np.isnan(scores).any():
        raise EvaluationError(
            f"no label of the {split} split counts (every one is ignored or missing), so it cannot select or score "
            "anything: use another split"
        )
    return int(np.argmax(sign * np.asarray(scores)))


def segmentation_scores(counts: np.ndarray) -> dict[str, float]:
    """Other scores of counts (C + 1, C) by (target, predicted) class, where row C is of ignored pixels.

    ``pixel_accuracy``; ``mean_f1`` over the classes present; ``miou_absent_as_zero``: a class in no target counts 0;
    ``miou_with_other``: as in the FLAIR challenge, a prediction on an ignored pixel ("other") is a false positive of
    its class, and "other" is not in the mean.
    """
    counted, other = np.asarray(counts, np.float64)[:-1], np.asarray(counts, np.float64)[-1]
    hits, present, predicted = np.diagonal(counted), counted.sum(1), counted.sum(0)
    is_present = present > 0
    f1_scores = 2 * hits[is_present] / (present + predicted)[is_present]
    with_other = hits[is_present] / (present + predicted + other - hits)[is_present]
    return {
        "pixel_accuracy": float(hits.sum() / present.sum()),
        "mean_f1": float(f1_scores.mean()),
        "miou_absent_as_zero": float(np.nan_to_num(iou(counted)).mean()),
        "miou_with_other": float(with_other.mean()),
    }
