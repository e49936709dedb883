"""External encoders built from the models of an installed library: names, weights, inputs and token grids.

Shapes: B samples, D dates, C bands, S×S pixels of a resized image, L tokens of a date, E width.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.baselines.bands import Reading, Reads, Statistics, find_readings, model_input
from maestro_scale.evaluation.baselines.protocol import Images, SensorInput, check_options
from maestro_scale.evaluation.baselines.transformer import read_file
from maestro_scale.evaluation.results import EvaluationError

UNTRAINED = ("untrained", "random")
"""Names of initial weights, drawn from seed 0."""


@dataclass(frozen=True)
class Metadata:
    """Of the images of one sensor: ``dates`` (B, D, 3) int16 of year, day of year, hour; ``latlon`` (B, 2) degrees, or
    None where it is unknown."""

    dates: Tensor
    latlon: Tensor | None


class Adapter(nn.Module):
    """Computes the tokens of one family of models, whose module is ``backbone``.

    ``patch``: pixels per side of its patches; ``width``: E. ``root``: the submodule that published weights are of.
    ``unused``: submodules that its tokens do not depend on; they are removed.
    """

    root: ClassVar[str] = ""
    unused: ClassVar[tuple[str, ...]] = ()
    patch: int
    width: int

    def __init__(self, backbone: nn.Module, model: LibraryModel, readings: list[Reading]) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.set_sizes(model)
        for name in self.unused:
            if hasattr(backbone, name):
                setattr(backbone, name, nn.Identity())

    def set_sizes(self, model: LibraryModel) -> None:
        """Set ``patch`` and ``width``."""
        raise NotImplementedError

    @staticmethod
    def build(name: str, model: LibraryModel, weights: str | None, readings: list[Reading]) -> nn.Module:
        """The module of the library. ``weights``: as published under this name; None: initial weights."""
        raise NotImplementedError

    def forward(self, x: Tensor, reading: Reading, metadata: Metadata) -> Tensor:
        """Standardised images (B, D, C, S, S) -> (B, D, L, E). Here: each date is an image of its own."""
        tokens = self.image_tokens(x.flatten(0, 1), reading)
        return tokens.unflatten(0, x.shape[:2])

    def image_tokens(self, x: Tensor, reading: Reading) -> Tensor:
        """(N, C, S, S) -> (N, L, E)."""
        raise NotImplementedError


@dataclass(frozen=True)
class LibraryModel:
    """A row of a library's table.

    ``reads``: bands by instrument; ``statistics``: by unit of the pixels; ``weights``: the published ones that are
    loaded by default (empty: there are none); ``arguments``: of the library's function; ``subset``: as of
    ``find_readings``; ``adaptation``: of bands, resolution and dates, for results and the documentation.
    """

    adapter: type[Adapter]
    reads: Reads
    statistics: Mapping[str, Statistics]
    adaptation: str
    weights: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    subset: bool = False


class LibraryEncoder(nn.Module):
    """An external encoder (``protocol.ExternalEncoder``) of a model of a library: ``MODEL``, ``MODEL@untrained``,
    ``MODEL@NAME`` for published weights of that name, ``MODEL@FILE``.

    Images are resized so that a patch of the model covers a cell of the sensor's token grid. EvaluationError for a
    library that is not installed, an unknown model or weights, or sensors without the bands that it needs.
    """

    library: ClassVar[str]
    models: ClassVar[Mapping[str, LibraryModel]]
    requirement: ClassVar[str]  # for pip

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        check_options(options, ("model",))
        self.model_name, _, weights = options["model"].partition("@")
        if self.model_name not in self.models:
            raise EvaluationError(
                f"no model is called {self.model_name!r}{did_you_mean(self.model_name, self.models)}"
            )
        self.readings, excluded = find_readings(
            sensors, self.model.reads, self.model.statistics, self.model.subset
        )
        import_library(self.library, self.requirement)
        self.adapter = self._build(weights or self.model.weights)
        self.width = self.adapter.width
        read = [f"{r.sensor.name}: {' '.join(r.bands)}{r.replaced}" for r in self.readings]
        self.adaptation = f"{self.model.adaptation} Reads {'; '.join(read)}." + (
            f" Left out: {'; '.join(excluded)}." if excluded else ""
        )

    @property
    def model(self) -> LibraryModel:
        """Its row of the table. Not an attribute: read-only mappings cannot be copied with the encoder."""
        return self.models[self.model_name]

    def tokens(self, images: Images) -> dict[str, Tensor]:
        """As of the protocol."""
        known = ~images.latlon.isnan().any(dim=1)
        # A model that is given coordinates takes them for all samples of a call or for none; separate calls keep the
        # tokens of a sample independent of the others in its batch.
        if known.all() or not known.any():
            return self._tokens(images, bool(known.all()))
        parts = {with_latlon: torch.nonzero(known == with_latlon)[:, 0] for with_latlon in (True, False)}
        found = {k: self._tokens(_rows(images, rows), k) for k, rows in parts.items()}
        order = torch.cat(list(parts.values())).argsort()
        return {name: torch.cat([found[k][name] for k in parts])[order] for name in found[True]}

    def reinitialise(self) -> None:
        """Replace the weights by initial ones, drawn from torch's generator."""
        self.adapter = self._adapter(None)

    def _tokens(self, images: Images, with_latlon: bool) -> dict[str, Tensor]:
        tokens = {}
        for r in self.readings:
            name = r.sensor.name
            side = r.sensor.grid * self.adapter.patch
            x = model_input(r, images.pixels[name], self.model.statistics[r.unit], side)
            metadata = Metadata(images.dates[name], images.latlon if with_latlon else None)
            tokens[name] = self.adapter(x, r, metadata)
        return tokens

    def _build(self, weights: str) -> Adapter:
        if not weights:
            raise EvaluationError(f"{self.model_name} has no published weights: use @untrained or @FILE")
        path = Path(weights)
        if weights in UNTRAINED or path.is_file():
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                adapter = self._adapter(None)
            if weights not in UNTRAINED:
                load_weights(adapter, path)
            return adapter
        if "/" in weights or path.suffix:
            raise EvaluationError(
                f"{self.model_name}: the weights file {weights} does not exist; check the path"
            )
        try:
            return self._adapter(weights)
        except OSError as error:  # of urllib and of huggingface_hub
            reason = str(error).splitlines()[0]
            raise EvaluationError(
                f"the weights {weights} of {self.model_name} cannot be downloaded ({reason}): use @FILE or @untrained"
            ) from None

    def _adapter(self, weights: str | None) -> Adapter:
        cls = self.model.adapter
        backbone = cls.build(self.model_name, self.model, weights, self.readings)
        return cls(backbone, self.model, self.readings).eval()


def import_library(module: str, requirement: str) -> ModuleType:
    """A module of an optional library. EvaluationError, with the command that installs it, where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        what = "is not installed" if error.name == library else f"cannot be imported ({error})"
        raise EvaluationError(f"{library} {what}: pip install '{requirement}'") from None
    except RuntimeError as error:  # torchvision of another torch build
        reason = str(error).splitlines()[0]
        raise EvaluationError(
            f"{module} cannot be imported ({reason}): torch and torchvision must be of one build"
        ) from None


def vit_tokens(x: Tensor, vit: Any, norm: nn.Module | None) -> Tensor:
    """Embedded patches (N, L, E) through a vision transformer with ``pos_embed``, ``cls_token`` and ``blocks``.

    Its table of positions, whose first row is that of the class token, is resized to the grid of the patches.
    """
    positions = vit.pos_embed
    x = x + resize_positions(positions[:, 1:], round(x.shape[1] ** 0.5))
    first = (vit.cls_token + positions[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([first, x], dim=1)
    for block in vit.blocks:
        x = block(x)
    return (x if norm is None else norm(x))[:, 1:]


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, L, E) of a square grid -> (1, grid², E), by bicubic interpolation."""
    if positions.shape[1] == grid**2:
        return positions
    table = rearrange(positions, "1 (h w) e -> 1 e h w", h=round(positions.shape[1] ** 0.5))
    table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=True)
    return rearrange(table, "1 e h w -> 1 (h w) e")


@torch.no_grad()
def load_weights(adapter: Adapter, path: Path) -> None:
    """Load weights of safetensors, or of ``torch.save``. EvaluationError where a parameter is missing or has another
    shape; names may have a common prefix, and tables of positions may be of another grid."""
    tensors = _read_tensors(path)
    module = getattr(adapter.backbone, adapter.root) if adapter.root else adapter.backbone
    parameters = dict(module.named_parameters())
    prefix = _common_prefix(tensors, parameters)
    for name, parameter in parameters.items():
        value = tensors.get(prefix + name)
        if value is None:
            raise EvaluationError(f"{path}: has no {name}: it is not of this model")
        if name.endswith("pos_embed") and value.dim() == 3 and value.shape[2] == parameter.shape[2]:
            parameter.data = value.to(parameter.dtype)  # resized to the grid of the images when it is used
            continue
        if value.shape != parameter.shape:
            raise EvaluationError(
                f"{path}: {name} is {tuple(value.shape)}, and {tuple(parameter.shape)} in this model"
            )
        parameter.copy_(value)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by dotted name."""
    content = read_file(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return dict(_flatten(content, ""))


def _flatten(content: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """Nested mappings of tensors (CROMA's file is of three) by dotted name; other values are left out."""
    if isinstance(content, Tensor):
        return [(prefix, content)]
    if not isinstance(content, Mapping):
        return []
    return [
        pair
        for k, v in content.items()
        if isinstance(k, str)
        for pair in _flatten(v, f"{prefix}.{k}" if prefix else k)
    ]


def _common_prefix(tensors: Iterable[str], parameters: Collection[str]) -> str:
    """What stands before the names of most parameters in the file (``encoder.``, ``model.``)."""
    prefixes = Counter(
        t.removesuffix(p) for t in tensors for p in parameters if t == p or t.endswith(f".{p}")
    )
    return max(sorted(prefixes), key=prefixes.__getitem__, default="")


def _rows(images: Images, rows: Tensor) -> Images:
    return Images(
        {k: v[rows] for k, v in images.pixels.items()},
        {k: v[rows] for k, v in images.dates.items()},
        images.latlon[rows],
    )
