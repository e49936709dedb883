"""MLflow beside the training, never in its way.

Calls put records on a bounded queue and return; a background thread imports mlflow, opens the run and sends
batches. A store that is down costs a warning and is tried again later: metrics.jsonl stays the truth, and
what it holds is sent when the store is back.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_run import (
    STATUS,
    MetricValues,
    MlflowRun,
    RunMetadata,
    StepMetrics,
    tracking_uri,
)

log = logging.getLogger(__name__)

# mlflow's defaults are made for scripts that wait: minutes of retries, telemetry, and news on standard error.
_QUIET_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
_LAST_TRIES_S = 1.0  # between attempts to reach a store that is away when the run ends
_MAX_BATCH = 500  # records collected before they are sent


def configure_mlflow() -> None:
    """Have mlflow fail fast and keep silent, where the user did not say otherwise. Before it is imported."""
    for name, value in _QUIET_MLFLOW.items():
        os.environ.setdefault(name, value)


def error_summary(error: Exception) -> str:
    """The kind of an error and the first line of what it says, which may be nothing, without secrets."""
    return scrub(f"{type(error).__name__}: {error}".splitlines()[0])


class OpenRun(Protocol):
    """What the background thread needs of a run; any method may raise."""

    def send(self, points: Iterable[StepMetrics]) -> None: ...

    def log_picture(self, path: Path) -> None: ...

    def backfill(self, time_ms: int) -> None: ...

    def close(self, reason: str) -> None: ...

    def detach(self) -> None: ...


@dataclass(frozen=True)
class FlushPolicy:
    """How the background thread works, in seconds and records."""

    flush_s: float = 2.0
    """Longest time that a record waits for company."""
    retry_s: float = 60.0
    """Time without attempts after a failure."""
    capacity: int = 10_000
    """Records held while the store is slow; more are dropped."""


DEFAULT_FLUSH_POLICY = FlushPolicy()


@dataclass(frozen=True)
class _Picture:
    path: Path


@dataclass(frozen=True)
class _Close:
    reason: str
    deadline: float


class Tracker:
    """One run in MLflow, for rank 0. Every method but ``finish`` returns at once; MLflow's errors stay in."""

    def __init__(
        self,
        open_run: Callable[[Callable[[str, Exception], None]], OpenRun],
        store: str,
        policy: FlushPolicy = DEFAULT_FLUSH_POLICY,
        later: str = "",
    ) -> None:
        """``later``: the command that sends what this one cannot, for warnings."""
        self._open_run = open_run
        self._store = store
        self._later = later
        self._policy = policy
        self._queue: queue.Queue[StepMetrics | _Picture | _Close] = queue.Queue(policy.capacity)
        self._run: OpenRun | None = None
        self._quiet_until = 0.0
        self._warned: set[str] = set()
        self._gaps = False
        self._was_open = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @classmethod
    def start(cls, card: RunMetadata) -> Tracker:
        """Track a run, continuing the MLflow run that its directory already has.

        The store is ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` beside the run directory. The card's history is read on
        the background thread whenever the store is connected, for what it missed.
        """
        configure_mlflow()
        return cls(
            lambda warn: MlflowRun.open(card, _now_ms(), warn),
            scrub(tracking_uri(card.run_dir)),
            later=f"maestro-scale sync {card.run_dir}",
        ).start_thread()

    def start_thread(self) -> Tracker:
        """Start the background thread."""
        self._thread.start()
        return self

    def log(self, step: int, metrics: MetricValues) -> None:
        """Log metrics of a step. Steps come in order; None values, and what the store has, are left out."""
        self._put(StepMetrics(step, _now_ms(), dict(metrics)))

    def log_picture(self, step: int, path: Path) -> None:
        """Store a picture of a step; its name should tell the step, and it must stay until ``finish``."""
        del step  # MLflow artifacts have none; kept so that a store with one can use it
        self._put(_Picture(path))

    def finish(self, status: str, wait_s: float = 30.0) -> None:
        """Send what is left and end the run: ``done``, ``stopped`` or ``failed``. Waits ``wait_s`` at most.

        ValueError for another status.
        """
        if status not in STATUS:
            raise ValueError(f"status {status!r} must be one of {', '.join(STATUS)}")
        deadline = time.monotonic() + wait_s
        try:
            self._queue.put(_Close(status, deadline), timeout=wait_s)
        except queue.Full:
            self._gaps = True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning(
                "MLflow at %s did not take everything within %.0f s; metrics.jsonl has it, `%s` sends it",
                self._store,
                wait_s,
                self._later,
            )

    # -- calling thread --------------------------------------------------------------------------------------

    def _put(self, item: StepMetrics | _Picture) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._gaps = True
            self._warn("all records", RuntimeError(f"more than {self._policy.capacity} are waiting"))

    def _warn(self, what: str, error: Exception) -> None:
        """Say once per kind of trouble that something is not sent."""
        if what in self._warned:
            return
        self._warned.add(what)
        log.warning(
            "MLflow at %s does not take %s (%s); training goes on, metrics.jsonl has every metric, `%s` sends what is "
            "missing then",
            self._store,
            what,
            error_summary(error),
            self._later,
        )

    # -- background thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        closing = None
        self._deliver([])  # connect without waiting for a first record
        while closing is None:
            items, closing = self._collect()
            self._deliver(items)
        self._close(closing)

    def _collect(self) -> tuple[list[StepMetrics | _Picture], _Close | None]:
        """Whatever arrives within ``flush_s`` of the first record, and the request to close if it came."""
        items: list[StepMetrics | _Picture] = []
        wait_s = None
        while len(items) < _MAX_BATCH:
            try:
                item = self._queue.get(timeout=wait_s)
            except queue.Empty:
                break
            if isinstance(item, _Close):
                return items, item
            if not items:
                first = time.monotonic()
            items.append(item)
            wait_s = max(0.0, first + self._policy.flush_s - time.monotonic())
        return items, None

    def _deliver(self, items: Sequence[StepMetrics | _Picture]) -> None:
        if time.monotonic() < self._quiet_until:
            return  # dropped: history has the numbers
        try:
            if self._run is None:
                self._run = self._open_run(self._warn)
                self._was_open = True
            self._run.send(i for i in items if isinstance(i, StepMetrics))
            for item in items:
                if isinstance(item, _Picture):
                    self._run.log_picture(item.path)
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, the training goes on
            self._lose(error)

    def _close(self, closing: _Close) -> None:
        while True:
            self._quiet_until = 0.0
            self._deliver([])
            if self._run is not None or not self._was_open:
                break
            # A store that was there may come back while there is time; one that never was is not waited for.
            if time.monotonic() + _LAST_TRIES_S > closing.deadline:
                break
            time.sleep(_LAST_TRIES_S)
        if self._run is None:
            return
        try:
            if self._gaps:
                self._run.backfill(_now_ms())
            self._run.close(closing.reason)
        except Exception as error:  # noqa: BLE001 - as above
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if self._run is not None:
            self._run.detach()
        self._run = None
        self._quiet_until = time.monotonic() + self._policy.retry_s
        self._warn("metrics", error)


class NullTracker:
    """Tracks nothing, with the methods of ``Tracker``."""

    def log(self, step: int, metrics: MetricValues) -> None:
        """Nothing."""

    def log_picture(self, step: int, path: Path) -> None:
        """Nothing."""

    def finish(self, status: str, wait_s: float = 30.0) -> None:
        """Nothing."""


def _now_ms() -> int:
    return int(time.time() * 1000)
