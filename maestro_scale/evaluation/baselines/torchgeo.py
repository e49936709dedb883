"""Encoders of torchgeo 0.8: DOFA, CROMA, Panopticon, Copernicus-FM, Scale-MAE and the vision transformers of SSL4EO-S12
and SoftCon. Their code runs unchanged; tokens are taken before its pooling.

Shapes: as in ``library.py``; N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.baselines.bands import (
    COMMON,
    RADAR,
    RGB,
    SENTINEL_2,
    SENTINEL_2_L2A,
    Reading,
    scaled,
)
from maestro_scale.evaluation.baselines.library import (
    Adapter,
    LibraryEncoder,
    LibraryModel,
    Metadata,
    import_library,
    vit_tokens,
)
from maestro_scale.evaluation.results import EvaluationError

REQUIREMENT = "torchgeo>=0.8,<0.9"


class TorchGeoAdapter(Adapter):
    """A model of ``torchgeo.models``."""

    @staticmethod
    def build(name: str, model: LibraryModel, weights: str | None, readings: list[Reading]) -> nn.Module:
        """As of Adapter. EvaluationError for weights that torchgeo does not have."""
        models = import_library("torchgeo.models", REQUIREMENT)
        arguments = dict(model.arguments)
        if weights is not None:
            members = models.get_model_weights(name).__members__
            if weights not in members:
                raise EvaluationError(
                    f"{name} has no weights {weights!r}{did_you_mean(weights, members)}; or use @untrained or @FILE"
                )
            channels, wanted = members[weights].meta.get("in_chans"), arguments.pop("in_chans", None)
            if wanted is not None and channels != wanted:
                raise EvaluationError(
                    f"{name}@{weights} reads {channels} bands; supported are weights of {wanted}: "
                    f"{', '.join(n for n, m in members.items() if m.meta.get('in_chans') == wanted)}"
                )
            arguments["weights"] = members[weights]
        return models.get_model(name, **arguments)


class Dofa(TorchGeoAdapter):
    """DOFA: kernels of the patch embedding are generated from wavelengths."""

    # fc_norm and head are not in the published weights.
    unused = ("fc_norm", "head")
    _RADAR_WAVELENGTH = 5.405  # as in terratorch's dofa_vit.py and the authors' code: the frequency in GHz

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.patch_size, self.backbone.embed_dim

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter: the output of the last block."""
        micrometres = [w / 1000 for w in reading.wavelengths_nm] or [self._RADAR_WAVELENGTH] * x.shape[1]
        embedded, _ = self.backbone.patch_embed(x, torch.tensor(micrometres, device=x.device))
        return vit_tokens(embedded, self.backbone, None)


class Croma(TorchGeoAdapter):
    """CROMA: one encoder for Sentinel-2, one for Sentinel-1."""

    unused = ("joint_encoder", "s1_GAP_FFN", "s2_GAP_FFN")

    def __init__(self, backbone: nn.Module, model: LibraryModel, readings: list[Reading]) -> None:
        super().__init__(backbone, model, readings)
        kinds = {r.is_radar for r in readings}
        for name, is_radar in (("s1_encoder", True), ("s2_encoder", False)):
            if is_radar not in kinds:
                setattr(backbone, name, nn.Identity())
        # Built once per grid: the library's function takes seconds for large ones.
        grids = {r.sensor.grid for r in readings}
        croma = import_library("torchgeo.models.croma", REQUIREMENT)
        self._bias = {g: croma.get_2dalibi(self.backbone.num_heads, g**2) for g in sorted(grids)}

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.patch_size, self.backbone.encoder_dim

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter: the encodings of one modality."""
        # The authors' input: mean - 2 deviations is 0, mean + 2 deviations is 1, clipped.
        x = ((x + 2) / 4).clamp(0, 1)
        encoder = self.backbone.s1_encoder if reading.is_radar else self.backbone.s2_encoder
        return encoder(imgs=x, attn_bias=self._bias[reading.sensor.grid].to(x.device))


class Panopticon(TorchGeoAdapter):
    """Panopticon: a patch embedding per band, and attention over bands with encodings of wavelength or
    polarisation."""

    root = "model"
    # -1 - (4 * orbit + polarisation), with orbits unknown, ascending, descending and polarisations VV, VH, HH, HV:
    # the order of `transmit`, `receive` and `orbit` in torchgeo's ChnEmb.forward.
    _ORBITS = ("", "ascending", "descending")
    _POLARISATIONS = ("VV", "VH", "HH", "HV")

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.model.patch_embed.patch_size[0], self.backbone.model.embed_dim

    def channel_ids(self, reading: Reading) -> list[float]:
        """Wavelengths in nm, or negative codes of polarisations."""
        if not reading.is_radar:
            return [float(round(w)) for w in reading.wavelengths_nm]
        orbit = self._ORBITS.index(reading.orbit)
        return [-1.0 - 4 * orbit - self._POLARISATIONS.index(b) for b in reading.bands]

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter."""
        vit = self.backbone.model
        # A new tensor for each call: the library changes it.
        ids = torch.tensor(self.channel_ids(reading), device=x.device).repeat(len(x), 1)
        return vit_tokens(vit.patch_embed({"imgs": x, "chn_ids": ids}), vit, vit.norm)


class CopernicusFm(TorchGeoAdapter):
    """Copernicus-FM: kernels generated from wavelengths and bandwidths; encodings of place, area and date."""

    unused = ("fc_norm", "head", "patch_embed_variable")
    _PATCH = 16
    _RADAR = (5e7, 1e9)  # nm: wavelength and bandwidth in the authors' cobench_*_s1.yaml
    # nm, of Sentinel-2: cobench_lcz_s2.yaml. Other images have the bandwidths of the same band.
    _WIDTHS: Mapping[str, float] = MappingProxyType(
        dict(zip(SENTINEL_2, (20, 65, 35, 30, 15, 15, 20, 115, 20, 20, 30, 90, 180), strict=True))
    )
    _LEAST_AREA = 0.001  # km², the smallest that its encoding accepts

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self._PATCH, self.backbone.cls_token.shape[2]

    def forward(self, x: Tensor, reading: Reading, metadata: Metadata) -> Tensor:
        """As of Adapter: the output of the last block, with the encoding of each date."""
        size = x.shape[:2]
        if reading.is_radar:
            waves, widths = [self._RADAR[0]] * x.shape[2], [self._RADAR[1]] * x.shape[2]
        else:
            waves, widths = list(reading.wavelengths_nm), [self._WIDTHS[b] for b in reading.bands]
        found: list[Tensor] = []
        # The library returns the mean of the tokens.
        hook = self.backbone.blocks[-1].register_forward_hook(lambda module, args, out: found.append(out))
        try:
            self.backbone.forward_features(
                x.flatten(0, 1), self._metadata(reading, metadata, x.shape[-1]), waves, widths
            )
        finally:
            hook.remove()
        return found[0][:, 1:].unflatten(0, size)

    def _metadata(self, reading: Reading, metadata: Metadata, side: int) -> Tensor:
        """(B·D, 4) longitude, latitude, days since 1970, km² of a patch; NaN where unknown."""
        days = days_since_1970(metadata.dates).float()
        table = torch.full((*days.shape, 4), torch.nan, device=days.device)
        table[..., 2] = days
        if metadata.latlon is not None:
            table[..., :2] = metadata.latlon.flip(1)[:, None].float()
        area = (reading.pixel_m(side) * self.patch / 1000) ** 2
        if area >= self._LEAST_AREA:
            table[..., 3] = area
        return table.flatten(0, 1)


class TimmVit(TorchGeoAdapter):
    """A vision transformer of timm with weights for Sentinel-2."""

    unused = ("head", "fc_norm")

    def set_sizes(self, model: LibraryModel) -> None:
        """As of Adapter."""
        self.patch, self.width = self.backbone.patch_embed.patch_size[0], self.backbone.embed_dim

    def embedded(self, x: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, L, E) of any image size, which timm's own forward refuses."""
        return self.backbone.patch_embed.proj(x).flatten(2).transpose(1, 2)

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter."""
        return vit_tokens(self.embedded(x), self.backbone, self.backbone.norm)


class ScaleMae(TimmVit):
    """Scale-MAE: encodings of positions in metres."""

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """As of Adapter."""
        library = import_library("torchgeo.models.scale_mae", REQUIREMENT)
        tokens = self.embedded(x)
        metres = torch.full((1,), reading.pixel_m(x.shape[-1]), device=x.device)
        grid = x.shape[-1] // self.patch
        positions = library.get_2d_sincos_pos_embed_with_resolution(self.width, grid, metres, cls_token=True)
        tokens = torch.cat([self.backbone.cls_token.expand(len(x), -1, -1), tokens], dim=1) + positions
        for block in self.backbone.blocks:
            tokens = block(tokens)
        return self.backbone.norm(tokens)[:, 1:]


def days_since_1970(dates: Tensor) -> Tensor:
    """(…, 3) year, day of year, hour -> (…) days since 1970-01-01."""
    year, day = dates[..., 0].long(), dates[..., 1].long()
    before = year - 1
    leaps = before // 4 - before // 100 + before // 400 - (1969 // 4 - 1969 // 100 + 1969 // 400)
    return 365 * (year - 1970) + leaps + day - 1


_ANY = {"sentinel-2": None, "image": None, "landsat": None, "sentinel-1": RADAR}
_EACH_DATE = "Each date of a sensor is an image; dates are pooled by the classifier."
_DOFA = (
    "Kernels are generated from the wavelengths of the bands, radar as 5.405. Images are resized to 16 pixels per "
    f"token and standardised by statistics of TerraMesh and NAIP. {_EACH_DATE}"
)
_CROMA = (
    "Reads the 12 bands of Sentinel-2 L2A and VV, VH. Images are resized to 8 pixels per token, and clipped to the "
    f"mean ± 2 deviations of TerraMesh (the authors: of the batch). Without the joint encoder. {_EACH_DATE}"
)
_VIT = (
    "Reads the 13 bands of Sentinel-2 as reflectance. Images are resized to one patch per token, the table of "
    f"positions to their grid. {_EACH_DATE}"
)
_IMAGENET = scaled(1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), RGB)
_RGB_ONLY = {"image": RGB, "sentinel-2": RGB, "landsat": RGB}
_CROMA_READS = {"sentinel-2": SENTINEL_2_L2A, "sentinel-1": RADAR}


def _dofa(weights: str) -> LibraryModel:
    return LibraryModel(Dofa, _ANY, COMMON, _DOFA, weights)


def _vit(weights: str) -> LibraryModel:
    return LibraryModel(
        TimmVit,
        {"sentinel-2": SENTINEL_2},
        {"reflectance": {}},
        _VIT,
        weights,
        {"in_chans": len(SENTINEL_2)},
    )


class TorchGeo(LibraryEncoder):
    """``--baseline torchgeo:MODEL``."""

    library, requirement = "torchgeo", REQUIREMENT
    models = MappingProxyType(
        {
            "dofa_small_patch16_224": _dofa(""),
            "dofa_base_patch16_224": _dofa("DOFA_MAE"),
            "dofa_large_patch16_224": _dofa("DOFA_MAE"),
            "croma_base": LibraryModel(Croma, _CROMA_READS, COMMON, _CROMA, "CROMA_VIT"),
            "croma_large": LibraryModel(Croma, _CROMA_READS, COMMON, _CROMA, "CROMA_VIT"),
            "panopticon_vitb14": LibraryModel(
                Panopticon,
                _ANY,
                COMMON,
                "Attention over bands, encoded by wavelength, or polarisation and orbit. Images are resized to 14 "
                f"pixels per token and standardised by statistics of TerraMesh and NAIP. {_EACH_DATE}",
                "VIT_BASE14",
            ),
            "copernicusfm_base": LibraryModel(
                CopernicusFm,
                _ANY,
                COMMON,
                "Kernels are generated from wavelengths and bandwidths. Images are resized to 16 pixels per token and "
                "standardised by statistics of TerraMesh and NAIP. Date, place and area of a token are encoded; an "
                f"area below 0.001 km² as unknown. {_EACH_DATE}",
                "CopernicusFM_ViT",
            ),
            "scalemae_large_patch16": LibraryModel(
                ScaleMae,
                _RGB_ONLY,
                {"brightness": _IMAGENET, "reflectance": COMMON["reflectance"]},
                "Reads R, G, B: images standardised by ImageNet's statistics, reflectance by those of TerraMesh. They "
                f"are resized to 16 pixels per token, and positions encoded in metres. {_EACH_DATE}",
                "FMOW_RGB",
            ),
            "vit_small_patch16_224": _vit("SENTINEL2_ALL_DINO"),
            "vit_base_patch16_224": _vit("SENTINEL2_ALL_MAE"),
            "vit_large_patch16_224": _vit("SENTINEL2_ALL_MAE"),
            "vit_huge_patch14_224": _vit("SENTINEL2_ALL_MAE"),
            "vit_small_patch14_dinov2": _vit("SENTINEL2_ALL_SOFTCON"),
            "vit_base_patch14_dinov2": _vit("SENTINEL2_ALL_SOFTCON"),
        }
    )
