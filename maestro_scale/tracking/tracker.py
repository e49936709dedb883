"""The interface of trackers, which receive what a run logs: MLflow, TensorBoard, or a package of your own.

A package offers a tracker as an entry point of the group ``maestro_scale.trackers``: a function that takes a
:class:`RunStart` and returns a :class:`Tracker`. The recipe names those to use in ``tracking.plugins``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from maestro_scale.errors import MaestroError
from maestro_scale.secrets_filter import scrub

log = logging.getLogger(__name__)

GROUP = "maestro_scale.trackers"


class TrackerError(MaestroError):
    """A tracker that the recipe names is not installed; the message says what to install."""


@dataclass(frozen=True)
class RunStart:
    """What a tracker gets when a run starts or resumes.

    ``step``: finished steps, 0 for a new run; steps after it may be logged a second time. ``params``: the resolved
    recipe as ``section.key: value``; ``tags``: as in MLflow (device, ranks, precision, …); both without secrets.
    """

    run_dir: Path
    name: str
    step: int
    params: Mapping[str, Any]
    tags: Mapping[str, str]


class Tracker(Protocol):
    """Receives what one run logs, on rank 0. Methods should return at once; what they raise is logged once, and the
    training continues without the tracker."""

    def log(self, step: int, metrics: Mapping[str, float | None], time_s: float | None = None) -> None:
        """The metrics of a step, named as in MLflow (``loss/total``, ``speed/samples_per_s`` …); None: not finite.

        ``time_s``: when it was logged, seconds since 1970; None: now.
        """

    def log_picture(self, step: int, path: Path) -> None:
        """A picture of a step, a PNG file. Called on another thread than ``log``."""

    def finish(self, status: str) -> None:
        """The run is over: ``done``, ``stopped`` or ``failed``."""


class GuardedTracker:
    """A tracker whose errors are logged once and end it, not the training."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._call(lambda: setattr(self, "_tracker", start()))

    def log(self, step: int, metrics: Mapping[str, float | None], time_s: float | None = None) -> None:
        """See ``Tracker``."""
        if (tracker := self._tracker) is not None:
            self._call(lambda: tracker.log(step, metrics, time_s))

    def log_picture(self, step: int, path: Path) -> None:
        """See ``Tracker``."""
        if (tracker := self._tracker) is not None:
            self._call(lambda: tracker.log_picture(step, path))

    def finish(self, status: str) -> None:
        """See ``Tracker``."""
        if (tracker := self._tracker) is not None:
            self._call(lambda: tracker.finish(status))

    def _call(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - of other libraries
            self._tracker = None
            log.warning(
                "the tracker %s failed (%s: %s); training continues without it, metrics.jsonl has every metric",
                self._name,
                type(error).__name__,
                scrub(str(error)),
            )


def find_plugins(names: tuple[str, ...]) -> dict[str, Callable[[RunStart], Tracker]]:
    """The functions that start the trackers of these names. TrackerError if one is not installed."""
    installed = {point.name: point for point in metadata.entry_points(group=GROUP)}
    for name in names:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "there is none"
            raise TrackerError(
                f"tracking.plugins: no installed package offers the tracker {name!r} (installed: {known})"
            )
    return {name: installed[name].load() for name in names}
