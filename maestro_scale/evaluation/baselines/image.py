"""Image encoders of ``transformers`` (DINOv2, DINOv3, ViT) as a baseline: every date of every sensor is an image."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.evaluation.baselines.baseline import TrainableBaseline
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.embed import network_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # an optional dependency, imported where weights are loaded

_RGB = ("R", "G", "B")
# Mean and standard deviation of ImageNet's channels, in [0, 1]: what such encoders were trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageEncoder(TrainableBaseline):
    """A vision transformer for images of three channels (DINOv2, DINOv3 …, by ``transformers``).

    Each date is one image (late fusion: features of dates are pooled afterwards). The patch embedding is adapted to C
    bands: R, G and B keep their kernels, every other band gets their mean, all times 3/C. Mixing the bands into three
    channels beforehand is the same linear map, and leaves the backbone as it is. Images are resized so that a patch
    of the backbone covers a patch of the sensor: tokens then lie on the grid that heads and labels expect.
    """

    def __init__(self, spec: DatasetSpec, backbone: PreTrainedModel, name: str) -> None:
        super().__init__(f"image:{name}", spec)
        self.backbone = _drop_unused(backbone)
        self.width = int(backbone.config.hidden_size)
        # Some backbones always interpolate their position encodings to the image size, some only on request.
        options = inspect.signature(backbone.forward).parameters.keys() & {"interpolate_pos_encoding"}
        self._options = dict.fromkeys(options, True)
        self._patch = int(backbone.config.patch_size)
        self._bands = {s.name: tuple(spec.modality(s.source).bands[b] for b in s.bands) for s in spec.sensors}

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
        # Class and register tokens come first, the patches are the last.
        return rearrange(hidden[:, -(sensor.grid**2) :], "(b d) l e -> b d l e", b=len(x))

    def reinitialised(self, seed: int) -> ImageEncoder:
        """The same encoder with the random initial weights of its class."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            fresh = copy.deepcopy(self)
            fresh.backbone = _drop_unused(type(self.backbone)(self.backbone.config))
        return fresh

    def prepared_for_training(self) -> ImageEncoder:
        """A copy; its unused parameters were removed when it was built."""
        return copy.deepcopy(self)


def _drop_unused(backbone: PreTrainedModel) -> PreTrainedModel:
    """Remove mask tokens and poolers: the tokens do not depend on them, so they would never get a gradient."""
    for module in backbone.modules():
        if "mask_token" in module._parameters:
            module.register_parameter("mask_token", None)
        if module._modules.get("pooler") is not None:
            module.register_module("pooler", None)
    return backbone


def _standardise(x: Tensor, bands: tuple[str, ...]) -> Tensor:
    """RGB images by ImageNet's statistics (other bands as red); others to mean 0, deviation 1 per date and band."""
    if set(_RGB) <= set(bands):
        at = [_RGB.index(b) if b in _RGB else 0 for b in bands]
        mean, deviation = torch.tensor(_MEAN)[at].to(x), torch.tensor(_DEVIATION)[at].to(x)
        return (x - mean[:, None, None]) / deviation[:, None, None]
    mean, deviation = x.mean(dim=(3, 4), keepdim=True), x.std(dim=(3, 4), keepdim=True, correction=0)
    return (x - mean) / (deviation + 1e-6)


def _mixing(bands: tuple[str, ...]) -> Tensor:
    """(3, C): the weight of every band in each channel of the backbone."""
    mixing = torch.full((3, len(bands)), 1 / 3)
    for channel, name in enumerate(_RGB):
        if name in bands:
            mixing[:, bands.index(name)] = torch.eye(3)[channel]
    return mixing * 3 / len(bands)


def load_backbone(weights: str) -> PreTrainedModel:
    """The vision transformer in a folder or of a name on the hub. EvaluationError where it cannot be loaded."""
    try:
        from transformers import AutoModel
    except ImportError:
        raise EvaluationError(
            "image baselines need transformers: pip install 'maestro-scale[baselines]'"
        ) from None
    try:
        backbone = AutoModel.from_pretrained(weights)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"{weights}: no image encoder can be loaded from there ({reason})") from None
    if not hasattr(backbone.config, "patch_size"):
        raise EvaluationError(
            f"{weights}: {type(backbone).__name__} is not a vision transformer: it has no patch_size"
        )
    return backbone
