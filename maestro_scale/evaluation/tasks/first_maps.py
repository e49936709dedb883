"""Labels and answers of the first few tiles of a split, to look at: the same ones on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from maestro_scale.evaluation.tasks.task import NUM_MAPS
from maestro_scale.training.distributed import World


class FirstMaps:
    """Each rank gives the tiles that it has; ``gathered`` are all of them, (n, H, W) uint8 by name."""

    def __init__(self, num_tiles: int) -> None:
        self._num = min(num_tiles, NUM_MAPS)
        self._maps: dict[str, np.ndarray] = {}

    def add(self, first: int, maps: Mapping[str, np.ndarray] | None) -> None:
        """Maps (k, H, W) of the tiles from number ``first`` on; None where the task has none."""
        for name, values in (maps or {}).items() if first < self._num else ():
            held = self._maps.setdefault(name, np.zeros((self._num, *values.shape[1:]), np.uint8))
            mine = held[first : first + len(values)]
            mine[:] = values[: len(mine)]

    def gather(self, world: World | None) -> dict[str, np.ndarray] | None:
        """All ranks must call it. None where there are no maps."""
        if world is None:
            return self._maps or None
        names = ("truth", "answer")
        shape = world.maxima([max((s for m in self._maps.values() for s in m.shape[1:]), default=0)])
        side = int(shape[0])
        if not side:
            return None
        empty = np.zeros((self._num, side, side), np.uint8)
        stacked = np.stack([self._maps.get(name, empty) for name in names]).astype(np.int32)
        total = world.sum(torch.from_numpy(stacked).to(world.device)).cpu().numpy().astype(np.uint8)
        return dict(zip(names, total, strict=True))
