"""A part of the training samples that keeps the shares of the classes, for label efficiency.

Samples are put in an order in which every class comes at an even pace; a fraction is the beginning of that order. So
a smaller fraction is part of every larger one, and the order depends on labels and seed alone.
Shapes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CANDIDATES = 8  # samples of a class that are compared
_STREAM = 2  # of the draws under a seed; others are used by the classifiers


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
    """Every sample once: of the class that lags most behind its share, that of a few at random which fits best."""
    without = weights.sum(1, keepdims=True) == 0
    weights = np.concatenate([weights, without], axis=1)  # samples of no class are a class of their own
    weights = weights[:, weights.any(0)]
    weights /= weights.sum(0)  # now a sample's part of all there is of a class
    half = 0.5 / (weights > 0).sum(0)  # a class of n samples is due after (i + 1/2) / n of them all
    shuffled = np.argsort(np.random.Philox(key=[seed, _STREAM]).random_raw(len(weights)), kind="stable")
    queues = [shuffled[weights[shuffled, c] > 0] for c in range(weights.shape[1])]
    gained, taken = np.zeros(weights.shape[1]), np.zeros(len(weights), bool)
    for num_taken in range(1, len(weights) + 1):
        lagging = int(np.argmin(gained + half))
        candidates = _first_free(queues, lagging, taken)
        while not len(candidates):
            half[lagging] = np.inf  # all of this class are taken
            lagging = int(np.argmin(gained + half))
            candidates = _first_free(queues, lagging, taken)
        after = gained + weights[candidates]
        best = int(np.argmin(((after - num_taken / len(weights)) ** 2).sum(1)))
        sample = int(candidates[best])
        taken[sample] = True
        gained = after[best]
        yield sample


def _first_free(queues: list[np.ndarray], which: int, taken: np.ndarray) -> np.ndarray:
    """The first few of a queue that are not taken; what was taken before them is dropped from it."""
    head = queues[which][: 4 * _CANDIDATES]
    while len(head):
        free = head[~taken[head]]
        if len(free):
            return free[:_CANDIDATES]
        queues[which] = queues[which][len(head) :]
        head = queues[which][: 4 * _CANDIDATES]
    return head
