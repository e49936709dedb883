"""Fusion modes, described as attention sequences.

A :class:`Sequence` lists the sensors whose tokens attend to each other and names the encoder that processes them. To
add a fusion mode, add a list of sequences to :func:`sequences` and its name to ``config.Fusion``; apart from
``config.inter_depth_problem``, no other code depends on the names of the modes.

Shapes: B batch, R token grids per tile (dates x token groups), L tokens per grid, E width, N tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig


@dataclass(frozen=True)
class Sequence:
    """Sensors whose tokens form one attention sequence. ``per_date``: one sequence per token grid (B*R rows)."""

    name: str
    encoder: str
    sensors: tuple[Sensor, ...]
    per_date: bool = False


def sequences(config: ModelConfig) -> tuple[Sequence, ...]:
    """The sequences of a model, in the order of its sensors."""
    if config.fusion == "group":
        names = dict.fromkeys(s.group for s in config.sensors)
        return tuple(Sequence(n, n, tuple(s for s in config.sensors if s.group == n)) for n in names)
    # "monotemp" and "shared": each date is a sequence of its own.
    per_date = config.fusion != "mod"
    return tuple(
        Sequence(s.name, "shared" if config.fusion == "shared" else s.name, (s,), per_date)
        for s in config.sensors
    )


def num_tokens(config: ModelConfig, sequence: Sequence) -> int:
    """N: tokens of one row of the sequence."""
    if sequence.per_date:
        return sequence.sensors[0].grid ** 2
    return sum(config.rows(s) * s.grid**2 for s in sequence.sensors)


def num_rows(config: ModelConfig, sequence: Sequence) -> int:
    """Rows per tile: 1, or R where every token grid is its own sequence."""
    return config.rows(sequence.sensors[0]) if sequence.per_date else 1


def has_equal_patches(config: ModelConfig, sequence: Sequence) -> bool:
    """Whether every token of the sequence reconstructs a patch of the same pixels, bands and normalisation groups."""
    shapes = {(s.patch, len(s.bands), s.band_groups) for s in sequence.sensors}
    return len(shapes) == 1 and all(len(config.token_groups(s)) == 1 for s in sequence.sensors)


def pack(sequence: Sequence, grids: dict[str, Tensor]) -> Tensor:
    """{sensor: (B, R, L, ...)} -> (B, N, ...), or (B*R, L, ...) per date."""
    parts = [grids[s.name] for s in sequence.sensors]
    if sequence.per_date:
        return parts[0].flatten(0, 1)
    return torch.cat([p.flatten(1, 2) for p in parts], dim=1)


def unpack(config: ModelConfig, sequence: Sequence, packed: Tensor) -> dict[str, Tensor]:
    """The inverse of ``pack``."""
    if sequence.per_date:
        sensor = sequence.sensors[0]
        return {sensor.name: packed.unflatten(0, (-1, config.rows(sensor)))}
    lengths = [config.rows(s) * s.grid**2 for s in sequence.sensors]
    parts = packed.split(lengths, dim=1)
    return {
        s.name: p.unflatten(1, (config.rows(s), s.grid**2))
        for s, p in zip(sequence.sensors, parts, strict=True)
    }


def by_sensor(config: ModelConfig, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """{sequence: (rows, N, …)} -> {sensor: (B, R, L, …)}, of the sequences given."""
    given = [q for q in sequences(config) if q.name in packed]
    return {name: x for q in given for name, x in unpack(config, q, packed[q.name]).items()}
