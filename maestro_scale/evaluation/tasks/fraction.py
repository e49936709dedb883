"""Stratified sample of a training set, for evaluations with few labels.

Samples are ordered so that every class progresses evenly; a fraction is a prefix of that order. So a smaller fraction
is a subset of every larger one, and the order depends on labels and seed only. Shapes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CANDIDATES = 8  # samples of a class that are compared
_FRACTION_STREAM = 2  # of the random numbers under a seed, see probes.lr_grid


def stratified_sample(weights: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Numbers of round(fraction · N) samples, at least one; ascending.

    ``weights``: (N, C), how much of each class a sample holds: 0 or 1 per label, or pixels. ValueError unless
    0 < fraction <= 1 and there are samples and no weight is negative.
    """
    weights = np.asarray(weights, np.float64)
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction of {fraction:g}: it must be above 0 and at most 1")
    if weights.ndim != 2 or not len(weights) or not (weights >= 0).all():
        raise ValueError(f"weights {weights.shape} must be (samples, classes), some samples, none negative")
    count = max(round(fraction * len(weights)), 1)
    if count == len(weights):
        return np.arange(count)
    order = _evenly(weights, seed)
    return np.sort([next(order) for _ in range(count)])


def _evenly(weights: np.ndarray, seed: int) -> Iterator[int]:
    """Every sample once, in the order of the sample: of the class that lags most behind its due share, the one of a few
    random candidates that brings all classes closest to their due shares."""
    without = weights.sum(1, keepdims=True) == 0
    weights = np.concatenate([weights, without], axis=1)  # samples without a class form a class
    weights = weights[:, weights.any(0)]
    weights /= weights.sum(0)  # a sample's part of the total of each class
    # The i-th of n samples of a class is due after a fraction (i + 1/2) / n of all samples.
    half = 0.5 / (weights > 0).sum(0)
    noise = np.random.Philox(key=[seed, _FRACTION_STREAM]).random_raw(len(weights))
    shuffled = np.argsort(noise, kind="stable")
    queues = [shuffled[weights[shuffled, c] > 0] for c in range(weights.shape[1])]
    gained, used = np.zeros(weights.shape[1]), np.zeros(len(weights), bool)
    for num_used in range(1, len(weights) + 1):
        lagging = int(np.argmin(gained + half))
        candidates = _next_unused(queues, lagging, used)
        while not len(candidates):
            half[lagging] = np.inf  # every sample of this class is used
            lagging = int(np.argmin(gained + half))
            candidates = _next_unused(queues, lagging, used)
        after = gained + weights[candidates]
        best = int(np.argmin(((after - num_used / len(weights)) ** 2).sum(1)))
        sample = int(candidates[best])
        used[sample] = True
        gained = after[best]
        yield sample


def _next_unused(queues: list[np.ndarray], which: int, used: np.ndarray) -> np.ndarray:
    """The first few unused samples of a queue; used ones at its head are dropped."""
    head = queues[which][: 4 * _CANDIDATES]
    while len(head):
        unused = head[~used[head]]
        if len(unused):
            return unused[:_CANDIDATES]
        queues[which] = queues[which][len(head) :]
        head = queues[which][: 4 * _CANDIDATES]
    return head
