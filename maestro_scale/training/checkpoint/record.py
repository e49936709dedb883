"""What a checkpoint records besides tensors: the position of the run, its identity, and the states of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.training.checkpoint import commit


class CheckpointError(MaestroError):
    """A checkpoint is missing, damaged or of another run; the message names it and says what to do."""


@dataclass(frozen=True)
class Position:
    """The progress of a run. ``samples`` (consumed) is the position in the data; ``step`` counts optimizer steps, of
    which ``skipped_steps`` did not update the weights."""

    samples: int = 0
    step: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint stores besides tensors: the position, and the states of the guard and the hooks.

    ``guard`` None: there was no checkpoint.
    """

    position: Position
    guard: dict[str, Any] | None = None
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointRecord:
    """What the marker of a checkpoint says of it."""

    position: Position
    identity: dict[str, Any]
    guard: dict[str, Any]
    hooks: dict[str, dict[str, Any]]


def read_record(folder: Path) -> CheckpointRecord:
    """The record in a committed checkpoint. ValueError if its marker is missing, damaged or malformed."""
    content = commit.read(folder)
    position = untrusted.from_builtins(Position, untrusted.field_of(content, dict, "position"))
    if min(vars(position).values()) < 0:
        raise untrusted.InputError("position: contains a negative number")
    hooks = untrusted.field_of(content, dict, "hooks") if "hooks" in content else {}
    for name in hooks:
        untrusted.field_of(hooks, dict, name)
    identity, guard = (untrusted.field_of(content, dict, name) for name in ("identity", "guard"))
    return CheckpointRecord(position, identity, guard, hooks)
