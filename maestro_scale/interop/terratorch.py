"""MAESTRO in TerraTorch: ``import maestro_scale.interop.terratorch`` registers the backbone ``maestro``.

TerraTorch 1.2 looks for backbones in its registry and reads no entry points, so the import is what registers. With a
configuration file, name a folder whose Python file has this import as ``custom_modules_path``. Interface:
``terratorch/models/encoder_decoder_factory.py`` and ``pixel_wise_model.py`` of terratorch 1.2: a list of maps, and
``out_channels``; images are (B, C, H, W), series (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_scale.interop.backbone import backbone
from maestro_scale.model.backbone import Backbone


class TerraTorchBackbone(nn.Module):
    """A backbone with TerraTorch's order of axes; ``out_channels`` as of :class:`Backbone`."""

    def __init__(self, inner: Backbone) -> None:
        super().__init__()
        self.inner, self.out_channels = inner, inner.out_channels

    def freeze(self) -> None:
        """Train none of its parameters; TerraTorch calls it for ``freeze_backbone``."""
        self.inner.freeze()

    def forward(
        self,
        x: Tensor | Mapping[str, Tensor],
        temporal_coords: Tensor | Mapping[str, Tensor] | None = None,
        **ignored: Any,
    ) -> list[Tensor]:
        """Raw values (B, C, H, W) or (B, C, T, H, W), of the only sensor or by sensor -> maps.

        ``temporal_coords``: (B, T, 2) of year and day of the year, as TerraTorch passes it, or (B, T, 3) with the hour.
        """
        if not isinstance(x, Mapping) and len(self.inner.sensors) == 1:
            x = {self.inner.sensors[0]: x}
        if not isinstance(x, Mapping):
            return self.inner(x)  # whose error names the sensors
        pixels = {n: t.transpose(1, 2) if t.dim() == 5 else t for n, t in x.items()}
        when = temporal_coords
        if when is not None and not isinstance(when, Mapping):
            when = dict.fromkeys(pixels, when)
        return self.inner(pixels, None if when is None else {n: _with_hour(t) for n, t in when.items()})


def maestro(path: str | Path, **arguments: Any) -> TerraTorchBackbone:
    """``BACKBONE_REGISTRY.build("maestro", path=…)``; ``arguments``: of ``maestro_scale.backbone``."""
    return TerraTorchBackbone(backbone(path, **arguments))


def _with_hour(dates: Tensor) -> Tensor:
    """Noon where there is no hour."""
    if dates.shape[-1] == 3:
        return dates
    return torch.cat([dates, torch.full_like(dates[..., :1], 12)], dim=-1)


def register() -> None:
    """Enter ``maestro`` into TerraTorch's registry of backbones. ImportError where TerraTorch is not installed."""
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

    TERRATORCH_BACKBONE_REGISTRY.register(maestro)


register()
