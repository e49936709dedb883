"""The configuration of a model: builds it, counts its parameters and is stored beside its weights.

``to_dict`` is the format of config.json and of the model in a checkpoint's identity: fields keep their names and order.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from maestro_scale import untrusted
from maestro_scale.datasets.sensor_sets import split_name
from maestro_scale.datasets.spec import DatasetSpec, Sensor, Target
from maestro_scale.datasets.spec_check import sensor_problems, sharing_problems
from maestro_scale.datasets.spec_limits import MAX_ITEMS
from maestro_scale.errors import dotted
from maestro_scale.model.sizes import Size

# The choices of a model; recipes (``recipe/sections.py``) offer the same ones.
Fusion = Literal["group", "mod", "monotemp", "shared"]
Spectral = Literal["joint", "token"]
Norm = Literal["group", "token"]
TargetNorm = Literal["patch_group", "patch", "none"]
Loss = Literal["l1", "l2"]
AttentionChoice = Literal["auto", "flash", "cudnn", "efficient", "math", "flash_attn"]
CompileMode = Literal["none", "blocks", "step"]
DecoderName = Literal["attentive", "linear", "upernet"]
CHECKPOINTING = r"none|blocks|every_([2-9]|[1-9]\d+)"
OVERLAP, MAX_OVERLAP = 0.5, 0.9  # share of a window of a map that the next one covers again: default, maximum


@dataclass(frozen=True)
class DatasetView:
    """What a model's config records of one dataset that it serves; part of the format of config.json and checkpoints.

    ``pos_grid``: cells per side of the ground grid; ``ref_sensor``: the sensor that maps are predicted on;
    ``crop_m``: ground extent that the sensors share (None: a map has the pixels of ``ref_sensor``).
    """

    dataset: str
    sensors: tuple[Sensor, ...]
    pos_grid: int
    ref_sensor: str | None = None
    crop_m: float | None = None

    @classmethod
    def of_spec(cls, spec: DatasetSpec, name: str | None = None) -> DatasetView:
        """The view that a resolved spec describes. ``name``: in a mixture, where it is not the dataset's own."""
        return cls(name or spec.name, spec.sensors, spec.pos_grid, spec.ref_sensor, spec.crop_m)

    def rows(self, sensor: Sensor) -> int:
        """Token grids per tile of an encoder without token groups: dates."""
        return sensor.num_dates


@dataclass(frozen=True)
class ModelConfig:
    """Input sensors, architecture and heads. Frozen, comparable, and plain JSON through ``to_dict``/``from_dict``.

    ``sensors``, ``pos_grid``, ``ref_sensor``, ``crop_m`` and ``dataset`` are the view of the first dataset; ``others``:
    views of further datasets of a mixture. Weights are shared by name: patch embeddings by ``Sensor.embed``, encoders
    by ``Sensor.group`` (or by sensor, depending on the fusion), mask tokens by sensor.
    ``RUNTIME_FIELDS``: fields that change how the model is computed, but not its result.
    """

    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("checkpointing", "attention")

    sensors: tuple[Sensor, ...]
    size: Size
    pos_grid: int
    fusion: Fusion = "group"
    inter_depth: int = 3
    spectral: Spectral = "joint"
    norm: Norm = "group"
    target: TargetNorm = "patch_group"
    loss: Loss = "l1"
    checkpointing: str = "none"
    attention: AttentionChoice = "auto"
    pool: Literal["attentive", "mean"] = "attentive"
    ref_sensor: str | None = None
    crop_m: float | None = None
    heads: tuple[Target, ...] = ()
    dataset: str = ""
    others: tuple[DatasetView, ...] = ()
    decoder: DecoderName = "attentive"
    """Of the heads: a key of ``decoders.DECODERS``."""

    def __post_init__(self) -> None:
        for name, items in (("sensors", self.sensors), ("heads", self.heads), ("others", self.others)):
            if len(items) > MAX_ITEMS:
                raise ValueError(f"{name}: has {len(items)} entries; at most {MAX_ITEMS} are supported")
        if (reason := inter_depth_problem(self.inter_depth, self.fusion, self.size.depth)) is not None:
            raise ValueError(f"inter_depth: {reason}")
        if not re.fullmatch(CHECKPOINTING, self.checkpointing):
            raise ValueError(
                f"checkpointing {self.checkpointing!r}: use none, blocks, or every_2, every_3, …"
            )
        if self.attention not in get_args(AttentionChoice):
            raise ValueError(
                f"attention {self.attention!r}: use one of {', '.join(get_args(AttentionChoice))}"
            )
        for path, reason in sharing_problems([(v.dataset, v.sensors) for v in self.views]):
            raise ValueError(f"{dotted(path)}: {reason}")
        for target in self.heads:
            if target.is_map:
                self.target_side(target)
            elif self.decoder == "upernet":
                raise ValueError(
                    f"decoder: upernet predicts maps, and {target.name} is a label of the whole tile: use attentive or "
                    "linear"
                )
        for s in self.all_sensors:
            for path, reason in sensor_problems(s):
                raise ValueError(f"sensor {s.name}: {dotted(path)}: {reason}")

    @property
    def views(self) -> tuple[DatasetView, ...]:
        """The views of all datasets that the weights serve."""
        return (
            DatasetView(self.dataset, self.sensors, self.pos_grid, self.ref_sensor, self.crop_m),
            *self.others,
        )

    @property
    def all_sensors(self) -> tuple[Sensor, ...]:
        """The sensors of all views in order; a name can occur more than once."""
        return tuple(s for view in self.views for s in view.sensors)

    def adapted_to(self, images: Mapping[str, tuple[int, ...]], crop_m: float | None = None) -> ModelConfig:
        """The same model for images of these shapes (B, D, C, H, W) of some of its sensors, with any number of dates.

        ``crop_m``: ground extent of the images, if not the model's: token grids and positions are scaled with it.

        Raises:
            ValueError: a sensor that the model does not have, another number of bands, or an extent that is not a whole
                number of patches; the message says what fits.
        """
        known = {s.name: s for s in self.sensors}
        unknown = [name for name in images if name not in known]
        if unknown or not images:
            what = f"has no sensor {unknown[0]!r}" if images else "was given no sensor"
            raise ValueError(f"the model {what}; it has: {', '.join(known)}")
        used = [s for s in self.sensors if s.name in images]
        scale = self._scale_to(used, crop_m)
        sensors = []
        for s in used:
            _, num_dates, num_bands, *_ = images[s.name]
            if num_bands != len(s.bands):
                raise ValueError(
                    f"sensor {s.name}: {num_bands} bands were given, the model has {len(s.bands)}"
                )
            sensors.append(replace(s, num_dates=num_dates, image_size=round(s.grid * scale) * s.patch))
        names = {s.name for s in sensors}
        return replace(
            self,
            sensors=tuple(sensors),
            pos_grid=round(self.pos_grid * scale),
            crop_m=crop_m or self.crop_m,
            ref_sensor=self.ref_sensor if self.ref_sensor in names else None,
            heads=(),
        )

    def _scale_to(self, sensors: Iterable[Sensor], crop_m: float | None) -> float:
        """Extent ``crop_m`` as a multiple of the model's; ValueError if that is not a whole number of patches."""
        if crop_m is None or crop_m == self.crop_m:
            return 1.0
        if self.crop_m is None:
            raise ValueError(
                "the model's config has no crop_m to scale another extent from: leave crop_m out"
            )
        scale = crop_m / self.crop_m
        for s in sensors:
            grid = s.grid * scale
            if abs(grid - round(grid)) > 1e-6 or grid < 1:
                raise ValueError(
                    f"sensor {s.name}: {crop_m:g} m are {grid:g} patches; use a multiple of "
                    f"{self.crop_m / math.gcd(*(x.grid for x in self.sensors)):g} m"
                )
        return scale

    def for_dataset(self, dataset: str) -> ModelConfig:
        """The same model for one dataset only, or for its tiles that lack sensors (``sensor_sets.without``), which has
        no heads. A model with a single view uses it for any dataset.

        Raises:
            KeyError: none of several views has this name; the message lists them.
        """
        dataset, absent = split_name(dataset)
        if absent:
            whole = self.for_dataset(dataset)
            sensors = tuple(s for s in whole.sensors if s.name not in absent)
            ref = whole.ref_sensor if whole.ref_sensor in {s.name for s in sensors} else None
            return replace(whole, sensors=sensors, ref_sensor=ref, heads=())
        if not self.others:
            return self
        for view in self.views:
            if dataset in (view.dataset, view.dataset.partition("#")[0]):
                return replace(self, **vars(view), others=())
        raise KeyError(
            f"the model has no dataset {dataset!r}; it has: {', '.join(v.dataset for v in self.views)}"
        )

    @property
    def recompute_every(self) -> int:
        """Activation checkpointing of every n-th block; 0: of none."""
        if self.checkpointing == "none":
            return 0
        return 1 if self.checkpointing == "blocks" else int(self.checkpointing.removeprefix("every_"))

    def token_groups(self, sensor: Sensor) -> tuple[int, ...]:
        """Bands per token: one entry when all bands share a token (joint), the sensor's token groups otherwise."""
        return (
            sensor.token_groups if self.spectral == "token" and sensor.token_groups else (len(sensor.bands),)
        )

    def rows(self, sensor: Sensor) -> int:
        """Token grids per tile: dates times token groups (group-major)."""
        return sensor.num_dates * len(self.token_groups(sensor))

    def target_side(self, target: Target) -> int:
        """Pixels per side, per token of the reference sensor's grid, that the head of a map predicts.

        Raises:
            ValueError: there is no reference sensor, or its tokens do not divide the target's pixels.
        """
        ref = next((s for s in self.sensors if s.name == self.ref_sensor), None)
        if ref is None:
            raise ValueError(
                f"target {target.name}: {target.kind} is predicted on the tokens of ref_sensor, which is "
                f"{self.ref_sensor!r}; set it to one of {', '.join(s.name for s in self.sensors)}"
            )
        if self.crop_m is None or target.resolution_m is None:
            return ref.patch
        pixels = round(self.crop_m / target.resolution_m)
        if pixels % ref.grid:
            raise ValueError(
                f"target {target.name}: {pixels} pixels per side are not a multiple of the {ref.grid} tokens of "
                f"{ref.name}: change its image_size or patch, or the crop"
            )
        return pixels // ref.grid

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = dataclasses.asdict(self)
        for head in data["heads"]:  # spec.OMIT_DEFAULT: digests of weights contain this
            if not head["units"]:
                del head["units"]
        if self.decoder == "attentive":
            del data["decoder"]
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``. ValueError, naming the field, for one that is unknown, missing or invalid."""
        return untrusted.from_builtins(ModelConfig, data)


def inter_depth_problem(inter_depth: int, fusion: str, depth: int) -> str | None:
    """Why ``inter_depth`` of ``depth`` blocks cannot be inter-group blocks under ``fusion``."""
    if inter_depth and fusion in ("monotemp", "shared"):
        return f"{inter_depth}, but fusion {fusion} has no inter-group blocks: set it to 0"
    if not 0 <= inter_depth < depth:
        return f"{inter_depth} leaves no block to the groups: at most {depth - 1} of depth {depth}"
    return None
