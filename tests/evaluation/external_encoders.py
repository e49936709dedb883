"""External encoders of tests, loaded by ``--baseline python:tests.evaluation.external_encoders:…``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maestro_scale.evaluation.baselines.protocol import Images, SensorInput


class PixelMeans(nn.Module):
    """A linear map of the mean of every sensor's cells; of width 8, so that attentive heads accept it."""

    width = 8
    adaptation = "bands by a linear map per sensor,\n  dates one by one"

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(options.get("seed", "0")))
            self.maps = nn.ModuleDict({n: nn.Linear(len(s.bands), self.width) for n, s in sensors.items()})
            self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.grids = {n: s.grid for n, s in sensors.items()}

    def tokens(self, images: Images) -> dict[str, Tensor]:
        """One token grid per date."""
        found = {}
        for name, pixels in images.pixels.items():
            cells = nn.functional.adaptive_avg_pool2d(pixels.flatten(0, 1), self.grids[name])
            cells = cells.flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2])
            found[name] = self.dropout(self.maps[name](cells))
        return found


class Vector(nn.Module):
    """One vector per sample, of the mean of the colours; without parameters."""

    width = 3
    adaptation = "the mean of the colours"

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        sensors["aerial"].band("R")

    def tokens(self, images: Images) -> Tensor:
        """(B, 3)."""
        return images.pixels["aerial"].mean(dim=(1, 3, 4))


class Wrong(Vector):
    """An encoder whose output does not keep the protocol; ``returns`` says how."""

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__(sensors, options)
        self.returns = options["returns"]

    def tokens(self, images: Images) -> object:
        """Never what is expected."""
        return {
            "nothing": {},
            "sensor": {"aeral": torch.zeros(2, 1, 4, 3)},
            "axes": {"aerial": torch.zeros(2, 4, 3)},
            "width": {"aerial": torch.zeros(2, 1, 4, 5)},
            "grid": {"aerial": torch.zeros(2, 1, 5, 3)},
            "integers": {"aerial": torch.zeros(2, 1, 4, 3, dtype=torch.int32)},
            "complex": torch.zeros(2, 3, dtype=torch.complex64),
        }[self.returns]


class Uneven(Vector):
    """Tokens that keep the protocol for the constant pixels of the check, and something else for those of tiles;
    ``returns`` says what."""

    width = 8  # as attentive heads accept it

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__(sensors, options)
        self.returns = options["returns"]

    def tokens(self, images: Images) -> object:
        """One token per date of Sentinel-2 in the check."""
        tokens = images.pixels["s2"].mean(dim=(3, 4))[:, :, None, :1].expand(-1, -1, -1, self.width)
        if images.pixels["s2"].std() == 0:
            return {"s2": tokens}
        return {
            "cells": {"s2": tokens.repeat(1, 1, 4, 1)},
            "rows": {"s2": tokens[:, :1]},
            "sensors": {"s2": tokens, "aerial": tokens},
            "integers": {"s2": tokens.int()},
        }[self.returns]


class NoModule:
    """Not a torch module."""

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        pass
