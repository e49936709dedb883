"""What a pretrained encoder must beat: statistics of the channels, random weights, and encoders of ordinary images."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.config import DatasetView
from maestro_scale.model.embed import network_input, patchify
from maestro_scale.model.maestro import Embedding, Maestro
from maestro_scale.recipe import Recipe
from maestro_scale.stream.batch import Batch
from maestro_scale.training.pretrain import build_model_config

NAMES = ("statistics", "random", "image")

_RGB = ("R", "G", "B")
# Of images in [0, 1], as encoders trained on ImageNet and its like expect them.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BaselineConfig:
    """What a baseline is and which dataset it sees, for the key of its features."""

    kind: str
    view: DatasetView
    others: tuple[DatasetView, ...] = ()
    """Further datasets of the same model, of which a baseline has none."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Baseline(nn.Module):
    """An encoder that is asked as a Maestro is: ``view``, ``encode``, ``embed``."""

    def __init__(self, kind: str, view: DatasetView) -> None:
        super().__init__()
        self.config = BaselineConfig(kind, view)

    def view(self, dataset: str) -> DatasetView:
        """How the dataset is seen, whatever it is called."""
        return self.config.view

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """{sensor: (B, D, L, E)}."""
        return {s.name: self.tokens(s, batch.pixels[s.name]) for s in self.config.view.sensors}

    def embed(self, batch: Batch) -> Embedding:
        """Token grids, and their means side by side."""
        tokens = self.encode(batch)
        return Embedding(tokens, torch.cat([t.mean(dim=(1, 2)) for t in tokens.values()], dim=1))

    def tokens(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, C, H, W) raw pixels -> (B, D, L, E)."""
        raise NotImplementedError


class ChannelStatistics(Baseline):
    """Per patch the mean and the deviation of every band: E = 2·C. Nothing is learned."""

    def __init__(self, view: DatasetView) -> None:
        super().__init__("statistics", view)

    def tokens(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, L, 2·C)."""
        patches = patchify(network_input(sensor, pixels), sensor.patch)
        return torch.cat([patches.mean(dim=3), patches.std(dim=3, correction=0)], dim=-1)


class ImageEncoder(Baseline):
    """A vision transformer for images of three channels (DINOv2, DINOv3 …, by ``transformers``).

    Each date is an image of its own (late fusion: the features of dates are averaged later). Its patch embedding is
    adapted to C bands: R, G and B keep their kernels, every other band gets their mean, all times 3/C; which is the
    same as mixing the bands into three channels first. The image is resized so that a patch of the backbone covers a
    patch of the sensor.
    """

    def __init__(self, spec: DatasetSpec, view: DatasetView, backbone: nn.Module, name: str) -> None:
        super().__init__(f"image:{name}", view)
        self.backbone = _drop_unused(backbone)
        self.width = int(backbone.config.hidden_size)
        # Some interpolate their positions to other sizes by themselves, some when asked.
        asked = inspect.signature(backbone.forward).parameters.keys() & {"interpolate_pos_encoding"}
        self._options = dict.fromkeys(asked, True)
        self._patch = int(backbone.config.patch_size)
        self._bands = {s.name: tuple(spec.modality(s.source).bands[b] for b in s.bands) for s in view.sensors}

    def tokens(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, L, E) of the backbone's last layer."""
        bands = self._bands[sensor.name]
        x = _standardise(network_input(sensor, pixels), bands)
        mixing = _mixing(bands).to(x)
        images = rearrange(torch.einsum("bdchw,kc->bdkhw", x, mixing), "b d k h w -> (b d) k h w")
        side = sensor.grid * self._patch
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
        images = images.to(self.backbone.dtype)
        hidden = self.backbone(pixel_values=images, **self._options).last_hidden_state
        # Class and register tokens come first.
        return rearrange(hidden[:, -(sensor.grid**2) :], "(b d) l e -> b d l e", b=len(x))

    def reinitialised(self, seed: int) -> ImageEncoder:
        """The same encoder with the random weights that its class begins with."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            fresh = copy.deepcopy(self)
            fresh.backbone = _drop_unused(type(self.backbone)(self.backbone.config))
        return fresh


def _drop_unused(backbone: nn.Module) -> nn.Module:
    """What takes no part in the tokens, and so would get no gradient: tokens for masking, and the pooled answer."""
    for module in backbone.modules():
        if "mask_token" in module._parameters:
            module.register_parameter("mask_token", None)
        if module._modules.get("pooler") is not None:
            module.pooler = None
    return backbone


def _standardise(x: Tensor, bands: tuple[str, ...]) -> Tensor:
    """Photographs as ImageNet's (near infrared as red); anything else to mean 0 and deviation 1 per date and band."""
    if set(_RGB) <= set(bands):
        at = [_RGB.index(b) if b in _RGB else 0 for b in bands]
        mean, deviation = torch.tensor(_MEAN)[at].to(x), torch.tensor(_DEVIATION)[at].to(x)
        return (x - mean[:, None, None]) / deviation[:, None, None]
    mean, deviation = x.mean(dim=(3, 4), keepdim=True), x.std(dim=(3, 4), keepdim=True, correction=0)
    return (x - mean) / (deviation + 1e-6)


def _mixing(bands: tuple[str, ...]) -> Tensor:
    """(3, C): the share of every band in each channel of the backbone."""
    mixing = torch.full((3, len(bands)), 1 / 3)
    for channel, name in enumerate(_RGB):
        if name in bands:
            mixing[:, bands.index(name)] = torch.eye(3)[channel]
    return mixing * 3 / len(bands)


def build_baseline(name: str, recipe: Recipe, spec: DatasetSpec, view: DatasetView) -> Maestro | Baseline:
    """``statistics``; ``random``: the recipe's own model, untrained; ``image:WEIGHTS``: a folder or hub name.

    ResultsError for any other name, or where the weights cannot be had.
    """
    kind, _, weights = name.partition(":")
    if name == "statistics":
        return ChannelStatistics(view)
    if name == "random":
        return Maestro(build_model_config(recipe, [spec])).initialise(recipe.seed).eval()
    if kind == "image" and weights:
        return ImageEncoder(spec, view, _backbone(weights), weights).eval()
    raise ResultsError(f"no baseline is called {name!r}; there are: statistics, random, image:WEIGHTS")


def _backbone(weights: str) -> nn.Module:
    try:
        from transformers import AutoModel
    except ImportError:
        raise ResultsError(
            "image baselines need transformers: pip install 'maestro-scale[baselines]'"
        ) from None
    try:
        backbone = AutoModel.from_pretrained(weights)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ResultsError(f"{weights}: no image encoder can be loaded from there ({reason})") from None
    if not hasattr(backbone.config, "patch_size"):
        raise ResultsError(
            f"{weights}: {type(backbone).__name__} is no vision transformer: it has no patch_size"
        )
    return backbone
