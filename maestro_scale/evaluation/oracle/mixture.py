"""Infers which few variants a tile consists of, and where, by variational inference of a mixture with smooth borders.

Shapes: V variants, K classes, h×w cells.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.special import digamma, logsumexp

_ROUNDS = 25
_CONCENTRATION = 0.05  # of the Dirichlet prior of shares: most tiles have few variants
_NEIGHBOURS = 3.0  # log odds that a cell has the variant of the 8 cells around it, if these agree
_WEIGHT = (
    0.5  # of the likelihood of a cell: errors of neighbours are correlated, and all cells share the tile's
)


def responsibilities(logs: np.ndarray) -> np.ndarray:
    """(V, h, w) probability of each variant in each cell, from log likelihoods (V, h, w); sums to one over V."""
    weighted = _WEIGHT * logs
    prior = np.zeros(len(logs))
    probable = _softmax(weighted)
    for _ in range(_ROUNDS):
        # Of the 3 × 3 cells around; the cell itself is subtracted, so that it does not confirm itself.
        around = (9 * uniform_filter(probable, (0, 3, 3), mode="nearest") - probable) / 8
        probable = _softmax(weighted + prior[:, None, None] + _NEIGHBOURS * around)
        counts = _CONCENTRATION + probable.sum(axis=(1, 2))
        prior = digamma(counts) - digamma(counts.sum())
    return probable


def class_shares(probable: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, h, w) from probabilities of variants (V, h, w) with class ``labels`` (V,)."""
    shares = np.zeros((num_classes, *probable.shape[1:]))
    np.add.at(shares, labels, probable)
    return shares


def _softmax(logs: np.ndarray) -> np.ndarray:
    return np.exp(logs - logsumexp(logs, axis=0))
