"""Checks at every checkpoint whether the manifests have changed since the training started."""

from __future__ import annotations

from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.distributed import World
from maestro_scale.training.hooks.hook import Hook
from maestro_scale.training.manifests import ManifestMonitor


class ManifestHook(Hook):
    """Runs the check on rank 0, which alone logs its result."""

    def __init__(self, monitor: ManifestMonitor, world: World) -> None:
        self._monitor, self._world = monitor, world

    def after_commit(self, position: Position) -> None:
        """Check: a resume from this checkpoint would read the manifests again."""
        if self._world.is_main:
            self._monitor.check()
