"""Encoders of terratorch 1.2: Prithvi-EO, TerraMind and Clay. Their code runs unchanged, without decoders.

Shapes: as in ``library.py``; N images, T dates of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.evaluation.baselines.bands import (
    COMMON,
    RADAR,
    RGB,
    SENTINEL_2_L2A,
    Reading,
    Reads,
    Statistics,
    scaled,
)
from maestro_scale.evaluation.baselines.library import (
    Adapter,
    LibraryEncoder,
    LibraryModel,
    Metadata,
    import_library,
)
from maestro_scale.evaluation.results import EvaluationError

REQUIREMENT = "terratorch>=1.2,<1.3"
_PUBLISHED = "published"
"""Name of the weights that terratorch loads: it has one set per model."""


def build_backbone(name: str, weights: str | None, **arguments: object) -> nn.Module:
    """A backbone of terratorch's registry. EvaluationError for weights other than the published ones."""
    if weights not in (None, _PUBLISHED):
        raise EvaluationError(f"{name} has no weights {weights!r}: use @{_PUBLISHED}, @untrained or @FILE")
    registry = import_library("terratorch", REQUIREMENT).BACKBONE_REGISTRY
    return registry.build(name, pretrained=weights is not None, **arguments)


class Prithvi(Adapter):
    """Prithvi-EO: sequences of several dates."""

    unused = ()

    def __init__(self, backbone: nn.Module, model: LibraryModel, readings: list[Reading]) -> None:
        super().__init__(backbone, model, readings)
        self.num_frames = int(self.backbone.num_frames)

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.patch_embed.patch_size[1], self.backbone.embed_dim

    @staticmethod
    def build(name: str, model: LibraryModel, weights: str | None, readings: list[Reading]) -> nn.Module:
        """As of Adapter, for sequences of ``sequence_length`` dates."""
        most = model.arguments["num_frames"]
        frames = sequence_length([r.sensor.num_dates for r in readings], most)
        return build_backbone(name, weights, num_frames=frames)

    def forward(self, x: Tensor, reading: Reading, metadata: Metadata) -> Tensor:
        """As of Adapter: consecutive dates in sequences of ``num_frames``."""
        t, size = self.num_frames, x.shape[:2]
        year_day = metadata.dates[..., :2].float()
        images = rearrange(x, "b (n t) c h w -> (b n) c t h w", t=t)
        place = metadata.latlon
        if place is not None:
            place = place.float().repeat_interleave(size[1] // t, dim=0)
        # Models without encodings of dates and places ignore them.
        layers = self.backbone.forward_features(
            images, rearrange(year_day, "b (n t) k -> (b n) t k", t=t), place
        )
        return rearrange(layers[-1][:, 1:], "(b n) (t l) e -> b (n t) l e", b=size[0], t=t)


def sequence_length(num_dates: list[int], most: int) -> int:
    """The largest number of dates, at most ``most``, that divides the number of dates of every sensor."""
    common = math.gcd(*num_dates)
    return max(t for t in range(1, most + 1) if common % t == 0)


class TerraMind(Adapter):
    """TerraMind: one embedding per modality."""

    # Reading by instrument -> modality of terratorch, and its key in PRETRAINED_BANDS.
    _MODALITIES: Mapping[str, tuple[str, str]] = MappingProxyType(
        {
            "sentinel-2": ("S2L2A", "untok_sen2l2a@224"),
            "sentinel-1": ("S1GRD", "untok_sen1grd@224"),
            "image": ("RGB", "untok_sen2rgb@224"),
        }
    )

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        embedding = next(iter(self.backbone.encoder_embeddings.values()))
        self.patch, self.width = embedding.patch_size[0], embedding.dim_tokens

    @staticmethod
    def build(name: str, model: LibraryModel, weights: str | None, readings: list[Reading]) -> nn.Module:
        """As of Adapter, with the embeddings of the modalities that are read."""
        modalities = {TerraMind._MODALITIES[r.sensor.instrument][0] for r in readings}
        return build_backbone(name, weights, modalities=sorted(modalities), merge_method=None)

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter."""
        modality, _ = self._MODALITIES[reading.sensor.instrument]
        return self.backbone({modality: x})[-1]


class Clay(Adapter):
    """Clay 1: kernels generated from wavelengths; encodings of place, date and pixel size."""

    root = "clay_encoder"
    _RADAR = (3.5, 4.0)  # VV, VH: terratorch's clay_v1/modules.py, as of the published weights

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.clay_encoder.patch_size, self.backbone.clay_encoder.dim

    @staticmethod
    def build(name: str, model: LibraryModel, weights: str | None, readings: list[Reading]) -> nn.Module:
        """As of Adapter."""
        if weights not in (None, _PUBLISHED):
            raise EvaluationError(
                f"{name} has no weights {weights!r}: use @{_PUBLISHED}, @untrained or @FILE"
            )
        embedder = import_library("terratorch.models.backbones.clay_v1.embedder", REQUIREMENT)
        backbone = embedder.clay_v1_base(pretrained=weights is not None)
        return backbone.requires_grad_(True)  # terratorch freezes loaded weights

    def forward(self, x: Tensor, reading: Reading, metadata: Metadata) -> Tensor:
        """As of Adapter, with the encoding of each date. An unknown place is 0, as in a fifth of its training."""
        size, encoder = x.shape[:2], self.backbone.clay_encoder
        utils = import_library("terratorch.models.backbones.clay_v1.utils", REQUIREMENT)
        waves = list(self._RADAR) if reading.is_radar else [w / 1000 for w in reading.wavelengths_nm]
        embedded, _ = encoder.to_patch_embed(x.flatten(0, 1), torch.tensor(waves, device=x.device))
        grid = x.shape[-1] // self.patch
        positions = utils.posemb_sincos_2d_with_gsd(
            grid, grid, self.width - 8, gsd=reading.pixel_m(x.shape[-1])
        )
        encoded = torch.cat([week_and_hour(metadata.dates), self._place(metadata, size)], dim=2).flatten(0, 1)
        table = torch.cat(
            [
                positions.to(x)[None].expand(len(encoded), -1, -1),
                encoded.to(x)[:, None].expand(-1, grid**2, -1),
            ],
            dim=2,
        )
        first = encoder.cls_token.expand(len(encoded), -1, -1)
        layers = encoder.transformer(torch.cat([first, embedded + table], dim=1))
        return layers[-1][:, 1:].unflatten(0, size)

    def _place(self, metadata: Metadata, size: torch.Size) -> Tensor:
        """(B, D, 4): sine and cosine of latitude and of longitude; 0 where unknown."""
        if metadata.latlon is None:
            return torch.zeros(*size, 4, device=metadata.dates.device)
        angles = torch.deg2rad(metadata.latlon.float())
        pairs = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return pairs[:, None].expand(*size, 4)


def week_and_hour(dates: Tensor) -> Tensor:
    """(B, D, 3) -> (B, D, 4): sine and cosine of the week of the year (of 52) and of the hour (of 24), as in Clay's
    data."""
    week = (dates[..., 1].float() - 1) // 7 + 1
    angles = 2 * math.pi * torch.stack([week / 52, dates[..., 2].float() / 24], dim=-1)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


_HLS = ("B2", "B3", "B4", "B8A", "B11", "B12")
_V1: Mapping[str, Statistics] = {
    "reflectance": scaled(
        1e4, (775, 1081, 1229, 2497, 2204, 1611), (1282, 1270, 1399, 1368, 1292, 1155), _HLS
    )
}
_V2: Mapping[str, Statistics] = {
    "reflectance": scaled(
        1e4, (1087, 1342, 1433, 2734, 1958, 1363), (2248, 2179, 2178, 1850, 1242, 1049), _HLS
    )
}
_PRITHVI_READS: Reads = {"sentinel-2": _HLS, "landsat": _HLS}


def _prithvi(statistics: Mapping[str, Statistics], most: int, weights: str = _PUBLISHED) -> LibraryModel:
    return LibraryModel(
        Prithvi,
        _PRITHVI_READS,
        statistics,
        "Reads blue, green, red, narrow NIR and both SWIR of Sentinel-2 or Landsat, standardised by its statistics. "
        "Images are resized to one patch per token. Consecutive dates form sequences, of the largest number that "
        f"divides the number of dates, at most {most}; models called tl encode year, day and place.",
        weights,
        {"num_frames": most},
    )


_TERRAMIND_READS: Reads = {"sentinel-2": SENTINEL_2_L2A, "sentinel-1": RADAR, "image": RGB}
_TERRAMIND = LibraryModel(
    TerraMind,
    _TERRAMIND_READS,
    {
        **COMMON,
        "brightness": scaled(255, (87.271, 80.931, 66.667), (58.767, 47.663, 42.631), RGB),
    },
    "Reads Sentinel-2 as S2L2A, Sentinel-1 as S1GRD and images as RGB, standardised by its statistics. Images are "
    "resized to 16 pixels per token. Each date of a sensor is encoded alone, without fusion of modalities; dates are "
    "pooled by the classifier.",
    _PUBLISHED,
)
# configs/metadata.yaml of Clay-foundation/model.
_CLAY_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
_CLAY = LibraryModel(
    Clay,
    {"sentinel-2": _CLAY_BANDS, "sentinel-1": RADAR, "image": None},
    {
        "reflectance": scaled(
            1e4,
            (1105, 1355, 1552, 1887, 2422, 2630, 2743, 2785, 2388, 1835),
            (1809, 1757, 1888, 1870, 1732, 1697, 1742, 1648, 1470, 1379),
            _CLAY_BANDS,
        ),
        "dB": scaled(1, (-12.113, -18.673), (8.314, 8.017), RADAR),
        "brightness": scaled(
            255, (110.16, 115.41, 98.15, 139.04), (47.23, 39.82, 35.43, 49.86), (*RGB, "B8")
        ),
    },
    "Kernels are generated from the wavelengths of the bands, standardised by its statistics. Images are resized to "
    "8 pixels per token. Week, hour, place and pixel size are encoded. Each date of a sensor is an image; dates are "
    "pooled by the classifier.",
    _PUBLISHED,
    subset=True,
)


class TerraTorch(LibraryEncoder):
    """``--baseline terratorch:MODEL``."""

    library, requirement = "terratorch", REQUIREMENT
    models = MappingProxyType(
        {
            "prithvi_eo_v1_100": _prithvi(_V1, 3),
            "prithvi_eo_v2_tiny_tl": _prithvi(_V2, 4),
            "prithvi_eo_v2_100_tl": _prithvi(_V2, 4),
            "prithvi_eo_v2_300": _prithvi(_V2, 4),
            "prithvi_eo_v2_300_tl": _prithvi(_V2, 4),
            "prithvi_eo_v2_600": _prithvi(_V2, 4),
            "prithvi_eo_v2_600_tl": _prithvi(_V2, 4),
            "terramind_v1_tiny": _TERRAMIND,
            "terramind_v1_small": _TERRAMIND,
            "terramind_v1_base": _TERRAMIND,
            "terramind_v1_large": _TERRAMIND,
            "clay_v1_base": _CLAY,
        }
    )
