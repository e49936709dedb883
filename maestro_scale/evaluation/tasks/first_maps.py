"""Label and predicted maps of the first few tiles of a split; the same tiles on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from maestro_scale.evaluation.tasks.protocol import NUM_MAPS
from maestro_scale.training.distributed import World


class FirstMaps:
    """Every rank adds the tiles it evaluated; ``gather`` returns all of them, (n, H, W) ``dtype`` by name."""

    def __init__(self, num_tiles: int, dtype: Literal["uint8", "float32"] = "uint8") -> None:
        self._num, self._dtype = min(num_tiles, NUM_MAPS), dtype
        self._maps: dict[str, np.ndarray] = {}

    def add(self, first: int, maps: Mapping[str, np.ndarray] | None) -> None:
        """Add maps (k, H, W) of consecutive tiles from number ``first`` on; None where the task has none."""
        for name, values in (maps or {}).items() if first < self._num else ():
            all_tiles = self._maps.setdefault(name, np.zeros((self._num, *values.shape[1:]), self._dtype))
            rows = all_tiles[first : first + len(values)]
            rows[:] = values[: len(rows)]

    def gather(self, world: World | None) -> dict[str, np.ndarray] | None:
        """The maps of all ranks; a collective. None where there are no maps."""
        if world is None:
            return self._maps or None
        names = ("truth", "answer")
        # A rank without any of these tiles does not know their size.
        sides = world.maxima([max((s for m in self._maps.values() for s in m.shape[1:]), default=0)])
        side = int(sides[0])
        if not side:
            return None
        empty = np.zeros((self._num, side, side), self._dtype)
        wide = np.int32 if self._dtype == "uint8" else np.float32  # uint8 cannot be summed on every device
        stacked = np.stack([self._maps.get(name, empty) for name in names]).astype(wide)
        # Every tile was added by one rank and is 0 on the others: the sum is a gather.
        total = world.sum(torch.from_numpy(stacked).to(world.device)).cpu().numpy().astype(self._dtype)
        return dict(zip(names, total, strict=True))
