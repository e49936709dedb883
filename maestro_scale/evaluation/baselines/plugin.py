"""Runs an external encoder as a baseline: checks it once, converts its inputs and describes its tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import did_you_mean
from maestro_scale.evaluation.baselines.baseline import BaselineConfig, TrainableBaseline, token_sensor
from maestro_scale.evaluation.baselines.coordinates import latlon
from maestro_scale.evaluation.baselines.inputs import PhysicalUnits
from maestro_scale.evaluation.baselines.protocol import JOINT, ExternalEncoder
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.config import DatasetView
from maestro_scale.model.maestro import Embedding
from maestro_scale.stream.batch import Batch

VECTOR = "vector"
"""Name of the only token grid of an encoder that returns one vector per sample."""

_SAMPLES = 2  # of the synthetic batch that an encoder is checked with


@dataclass(frozen=True)
class PluginConfig(BaselineConfig):
    """Also the options of the encoder, as they are part of the key of its cached features."""

    options: tuple[tuple[str, str], ...] = ()
    adaptation: str = ""


class _TokenGrid(NamedTuple):
    rows: int
    grid: int


class PluginBaseline(TrainableBaseline):
    """An external encoder with the interface of Maestro.

    ``name``: of the encoder in results and in the key of cached features; ``options``: part of that key. The encoder is
    run once on a synthetic batch, so that one that does not keep the protocol is refused before hours of work.
    EvaluationError says what is wrong.
    """

    encodes_each_sensor = False

    def __init__(self, name: str, spec: DatasetSpec, encoder: nn.Module, options: Mapping[str, str]) -> None:
        super().__init__(name, spec)
        self.encoder = encoder.eval()
        self._spec = spec
        self._units = PhysicalUnits(spec)
        problem = _interface_problem(encoder)
        if problem is not None:
            raise EvaluationError(f"{name}: {problem}")
        self.width = self._external.width
        self.adaptation = " ".join(self._external.adaptation.split())
        self.config = PluginConfig(
            name, self.config.view, options=tuple(sorted(options.items())), adaptation=self.adaptation
        )
        self._grids: dict[str, _TokenGrid] = {}  # of the check; of every batch after it
        with torch.no_grad():
            self._grids = _token_grids(self.encode(_synthetic_batch(spec)))

    @property
    def _external(self) -> ExternalEncoder:
        return cast(ExternalEncoder, self.encoder)  # checked by _interface_problem

    def train(self, mode: bool = True) -> PluginBaseline:
        """The encoder stays in eval mode: dropout would draw random numbers that no checkpoint has."""
        super().train(mode)
        self.encoder.eval()
        return self

    def token_view(self) -> DatasetView:
        """As of Baseline."""
        view = self.config.view
        by_name = {s.name: s for s in view.sensors}
        sensors = [
            token_sensor(by_name.get(key, view.sensors[0]), key, *grid) for key, grid in self._grids.items()
        ]
        return dataclasses.replace(view, sensors=tuple(sensors))

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Token grids {sensor: (B, R, L, E)}, in the order of the sensors. EvaluationError where they are not real
        floating-point numbers, or have another shape than the protocol says or the check found."""
        some = next(iter(batch.pixels.values()))
        found = self._external.tokens(
            self._units.convert(batch, latlon(batch, self._spec.tile_m, some.device))
        )
        tokens = {VECTOR: found[:, None, None]} if isinstance(found, Tensor) and found.dim() == 2 else found
        if not isinstance(tokens, Mapping) or not tokens:
            raise EvaluationError(
                f"{self.config.kind}: tokens() returned {type(found).__name__}: return a dict of sensors, or (B, E)"
            )
        for key, grid in tokens.items():
            if (problem := self._problem(key, grid, len(batch))) is not None:
                raise EvaluationError(f"{self.config.kind}: tokens() returned {problem}")
        order = [*(s.name for s in self.config.view.sensors), JOINT, VECTOR]
        tokens = {key: tokens[key] for key in order if key in tokens}
        if self._grids and (grids := _token_grids(tokens)) != self._grids:
            raise EvaluationError(
                f"{self.config.kind}: tokens() returned {_listed(grids)}, where the check with a synthetic batch had "
                f"{_listed(self._grids)}: return the same sensors, R and L for every batch"
            )
        return tokens

    def embed(self, batch: Batch) -> Embedding:
        """Token grids, and the concatenated means of each sensor's tokens."""
        tokens = self.encode(batch)
        return Embedding(tokens, torch.cat([t.mean(dim=(1, 2)) for t in tokens.values()], dim=1))

    def check_trainable(self, modes: Collection[str]) -> None:
        """EvaluationError where no parameter can be trained, or where mode scratch cannot re-initialise the encoder."""
        if "finetune" in modes:
            self.prepared_for_training()
        if "scratch" in modes:
            self.reinitialised(0)

    def reinitialised(self, seed: int) -> PluginBaseline:
        """The same encoder with random initial weights: of its method ``reinitialise()``, or of ``reset_parameters()``
        of all its modules. EvaluationError where parameters have neither."""
        fresh = copy.deepcopy(self)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            if hasattr(fresh.encoder, "reinitialise"):
                cast(Any, fresh.encoder).reinitialise()
            else:
                _reset_parameters(fresh.encoder, self.config.kind)
        return fresh._freeze_unused()

    def prepared_for_training(self) -> PluginBaseline:
        """As of TrainableBaseline. EvaluationError where no parameter can be trained."""
        return copy.deepcopy(self)._freeze_unused()

    def _freeze_unused(self) -> PluginBaseline:
        """Turn parameters that the tokens do not depend on, such as mask tokens, and frozen ones into buffers.

        They would never get a gradient, and the optimizer would decay them to 0; DeepSpeed expects that every parameter
        is trained.
        """
        tokens = self.encode(_synthetic_batch(self._spec))
        trainable = [p for p in self.encoder.parameters() if p.requires_grad]
        total = torch.stack([t.float().sum() for t in tokens.values()]).sum()
        if not trainable or not total.requires_grad:
            raise EvaluationError(
                f"{self.config.kind}: no parameter of the encoder can be trained: use --mode knn, probe or attentive"
            )
        gradients = torch.autograd.grad(total, trainable, allow_unused=True)
        used = {id(p) for p, gradient in zip(trainable, gradients, strict=True) if gradient is not None}
        for module in self.encoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in used:
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
        return self

    def _problem(self, key: str, tokens: object, size: int) -> str | None:
        """What is wrong with tokens of a key; None if they are as the protocol says."""
        names = [s.name for s in self.config.view.sensors]
        if key not in (*names, JOINT, VECTOR):
            return f"the key {key!r}, which is not a sensor{did_you_mean(key, [*names, JOINT])}"
        if not isinstance(tokens, Tensor) or tokens.dim() != 4:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            return f"{shape} for {key}, where (B, R, L, E) is expected"
        if tokens.shape[0] != size or tokens.shape[3] != self.width:
            return (
                f"{tuple(tokens.shape)} for {key}, where ({size}, R, L, {self.width}) is expected "
                f"(width = {self.width})"
            )
        if round(tokens.shape[2] ** 0.5) ** 2 != tokens.shape[2]:
            return f"{tokens.shape[2]} tokens for {key}, which are not a square grid"
        if not tokens.is_floating_point():
            return (
                f"{tokens.dtype} for {key}: convert it to real floating-point numbers, such as torch.float32"
            )
        return None


def _token_grids(tokens: Mapping[str, Tensor]) -> dict[str, _TokenGrid]:
    return {key: _TokenGrid(t.shape[1], round(t.shape[2] ** 0.5)) for key, t in tokens.items()}


def _listed(grids: Mapping[str, _TokenGrid]) -> str:
    return ", ".join(f"{key} (R = {g.rows}, L = {g.grid**2})" for key, g in grids.items())


def _interface_problem(encoder: object) -> str | None:
    """What an encoder lacks of the protocol."""
    if not isinstance(encoder, nn.Module):
        return f"{type(encoder).__name__} is not a torch.nn.Module"
    if not callable(getattr(encoder, "tokens", None)):
        return f"{type(encoder).__name__} has no method tokens(images)"
    width = getattr(encoder, "width", None)
    if not isinstance(width, int) or width < 1:
        return f"{type(encoder).__name__} has no attribute width: the integer E of its tokens"
    if not isinstance(getattr(encoder, "adaptation", None), str):
        return (
            f"{type(encoder).__name__} has no attribute adaptation: "
            "a text that says how bands, resolution and dates are adapted"
        )
    return None


def _reset_parameters(encoder: nn.Module, name: str) -> None:
    for path, module in encoder.named_modules():
        own = [p for p, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is None:
            raise EvaluationError(
                f"{name}: {path or type(encoder).__name__} has parameters and no reset_parameters(): give the encoder "
                "a method reinitialise() for --mode scratch"
            )
        reset()


def _synthetic_batch(spec: DatasetSpec) -> Batch:
    """A batch of constant pixels, a date per month, somewhere in Europe."""
    pixels, dates = {}, {}
    for s in spec.sensors:
        modality = spec.modality(s.source)
        values = torch.ones(_SAMPLES, s.num_dates, len(s.bands), s.image_size, s.image_size)
        pixels[s.name] = values if modality.dtype.startswith("float") else values.to(torch.int32)
        days = 15 + 30 * (torch.arange(s.num_dates) % 12)
        date = torch.stack([torch.full_like(days, 2020), days, torch.full_like(days, 11)], dim=1)
        dates[s.name] = date.to(torch.int16).expand(_SAMPLES, -1, -1)
    ref_date = torch.tensor([2020, 180, 11], dtype=torch.int16).expand(_SAMPLES, -1)
    keys = tuple(f"synthetic/{i}" for i in range(_SAMPLES))
    return Batch(spec.name, pixels, dates, ref_date, {}, {}, keys)
