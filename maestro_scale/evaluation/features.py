"""Frozen embeddings of a whole split: every sample once, in order, over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from maestro_scale.model.maestro import Maestro
from maestro_scale.stream.batch import Batch


@dataclass(frozen=True)
class Features:
    """``vectors`` (N, F) float32, ``targets[name]`` (N, …), ``keys`` of the N samples."""

    vectors: np.ndarray
    targets: dict[str, np.ndarray]
    keys: tuple[str, ...]


@torch.no_grad()
def encode(model: Maestro, batches: Iterable[Batch], device: torch.device) -> Features:
    """Embed every sample of ``batches``: the mean over each sensor's tokens, sensors side by side (F = S·E)."""
    vectors, targets, keys = [], {}, []
    for batch in batches:
        vectors.append(model.embed(batch.to(device)).vector.float().cpu().numpy())
        for name, value in batch.targets.items():
            targets.setdefault(name, []).append(value.numpy())
        keys.extend(batch.keys)
    if not vectors:
        raise ValueError("there is no sample to encode")
    return Features(np.concatenate(vectors), {k: np.concatenate(v) for k, v in targets.items()}, tuple(keys))
