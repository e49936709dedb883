"""The whole description of a model: enough to build it, to count it and to load its weights anywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from maestro_scale.datasets.spec import Scale, Sensor, Target
from maestro_scale.model.sizes import Size

Fusion = Literal["group", "mod", "monotemp", "shared"]


@dataclass(frozen=True)
class ModelConfig:
    """Sensors in, architecture, targets out. Frozen, comparable, and plain JSON through ``to_dict``/``from_dict``."""

    sensors: tuple[Sensor, ...]
    size: Size
    pos_grid: int
    fusion: Fusion = "group"
    inter_depth: int = 3
    spectral: Literal["joint", "token"] = "joint"
    norm: Literal["group", "token"] = "group"
    target: Literal["patch_group", "patch", "none"] = "patch_group"
    loss: Literal["l1", "l2"] = "l1"
    checkpointing: Literal["none", "blocks"] = "none"
    ref_sensor: str | None = None
    heads: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        if self.fusion in ("monotemp", "shared") and self.inter_depth:
            raise ValueError(
                f"fusion {self.fusion!r} has no inter-group blocks: set model.inter_depth=0 (it is {self.inter_depth})"
            )
        if not 0 <= self.inter_depth < self.size.depth:
            raise ValueError(
                f"inter_depth {self.inter_depth} must leave at least one of the {self.size.depth} blocks to the groups"
            )
        for s in self.sensors:
            if s.image_size % s.patch:
                raise ValueError(
                    f"sensor {s.name}: patch {s.patch} does not divide image_size {s.image_size}"
                )
            if sum(s.band_groups) != len(s.bands):
                raise ValueError(
                    f"sensor {s.name}: band_groups {s.band_groups} do not add up to {len(s.bands)} bands"
                )
            if s.token_groups and sum(s.token_groups) != len(s.bands):
                raise ValueError(
                    f"sensor {s.name}: token_groups {s.token_groups} do not add up to {len(s.bands)} bands"
                )

    def token_groups(self, sensor: Sensor) -> tuple[int, ...]:
        """Bands per token: one entry when all bands share a token (joint), the sensor's token groups otherwise."""
        return (
            sensor.token_groups if self.spectral == "token" and sensor.token_groups else (len(sensor.bands),)
        )

    def rows(self, sensor: Sensor) -> int:
        """Token grids per tile: dates times token groups (group-major)."""
        return sensor.num_dates * len(self.token_groups(sensor))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``; a TypeError names an unknown field."""
        sensors = tuple(Sensor(**{**_tuples(s), "scale": Scale(**s["scale"])}) for s in data["sensors"])
        heads = tuple(Target(**_tuples(t)) for t in data.get("heads", ()))
        return ModelConfig(**{**data, "sensors": sensors, "size": Size(**data["size"]), "heads": heads})


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
