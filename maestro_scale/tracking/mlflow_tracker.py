"""Asynchronous tracking in MLflow: a bounded queue and a background thread, so that training never waits for a server.

Calls put a record on the queue and return; the thread imports mlflow, opens the run and sends batches. If the store
fails, the records are dropped with one warning and the connection is retried later. Nothing is lost by that: every
metric is in metrics.jsonl, and ``MlflowRun.open`` sends what the store lacks.
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

from maestro_scale.escaping import shell_command
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_run import (
    MetricValues,
    MlflowRun,
    RunMetadata,
    StepMetrics,
    tracking_uri,
)
from maestro_scale.tracking.run_times import STATUS, RunEnd
from maestro_scale.tracking.store import DeletedExperimentError

log = logging.getLogger(__name__)

# MLflow's defaults retry for minutes, send telemetry and print progress on standard error.
_MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
_FINAL_RETRY_S = 1.0  # between attempts to reach a store that is unavailable when the run ends
_MAX_BATCH = 500  # records that are sent together


def configure_mlflow() -> None:
    """Make MLflow fail fast and log little, where the environment does not say otherwise. Call before importing it."""
    for name, value in _MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # It logs a traceback for every database error, which the tracker reports in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def error_summary(error: Exception) -> str:
    """Type and first line of the message of an error, without secrets. The message may be empty."""
    return scrub(f"{type(error).__name__}: {error}".splitlines()[0])


class OpenRun(Protocol):
    """The interface of a run that the background thread uses; every method may raise. Implemented by MlflowRun."""

    def send(self, metrics: Iterable[StepMetrics]) -> None: ...

    def log_picture(self, step: int, path: Path) -> None: ...

    def backfill(self) -> None: ...

    def close(self, end: RunEnd) -> None: ...

    def detach(self) -> None: ...


@dataclass(frozen=True)
class FlushPolicy:
    """When the background thread sends, and how many records it holds."""

    flush_s: float = 2.0
    """Longest time that a record waits to be sent in a batch."""
    retry_s: float = 60.0
    """Time after a failure before the next attempt."""
    capacity: int = 10_000
    """Size of the queue in records; when it is full, further records are dropped."""


DEFAULT_FLUSH_POLICY = FlushPolicy()


@dataclass(frozen=True)
class _Picture:
    step: int
    path: Path


@dataclass(frozen=True)
class _CloseRequest:
    end: RunEnd
    deadline: float


class MlflowTracker:
    """Tracks one run in MLflow, on rank 0. Methods except ``finish`` do not block, and no MLflow error escapes."""

    def __init__(
        self,
        open_run: Callable[[Callable[[str, Exception], None]], OpenRun],
        store: str,
        policy: FlushPolicy = DEFAULT_FLUSH_POLICY,
        sync_command: str = "",
    ) -> None:
        """``open_run(warn)`` connects to the store; ``sync_command``: how to send what is missing, for warnings."""
        self._open_run = open_run
        self._store = store
        self._sync_command = sync_command
        self._policy = policy
        self._queue: queue.Queue[StepMetrics | _Picture | _CloseRequest] = queue.Queue(policy.capacity)
        self._run: OpenRun | None = None
        self._retry_at = 0.0  # monotonic time before which no attempt is made
        self._warned: set[str] = set()
        self._dropped = False  # the queue was full: the store needs a backfill
        self._may_return = False  # the store was connected, and can be again without a user
        # A daemon: a hanging server must not keep the process alive after finish() has timed out.
        self._thread = threading.Thread(target=self._send_records, name="mlflow", daemon=True)

    @classmethod
    def start(cls, metadata: RunMetadata) -> MlflowTracker:
        """Track a run. If its directory already has an MLflow run, that run continues.

        The store is ``MLFLOW_TRACKING_URI``, or ``mlflow.db`` next to the run directory. Whenever the background
        thread connects to it, it reads ``metadata.history`` and sends what the store lacks.
        """
        configure_mlflow()
        return cls(
            lambda warn: MlflowRun.open(metadata, warn),
            scrub(tracking_uri(metadata.run_dir)),
            sync_command=shell_command("maestro-scale", "sync", metadata.run_dir),
        ).start_thread()

    def start_thread(self) -> MlflowTracker:
        """Start the background thread."""
        self._thread.start()
        return self

    def log(self, step: int, metrics: MetricValues, time_s: float | None = None) -> None:
        """Log the metrics of a step. Steps must ascend; None values, and what the store already has, are not sent.

        ``time_s``: when they were measured, seconds since 1970; None: now.
        """
        time_ms = _now_ms() if time_s is None else round(1000 * time_s)
        self._put(StepMetrics(step, time_ms, dict(metrics)))

    def log_picture(self, step: int, path: Path) -> None:
        """Store a picture of a step, a PNG file that must exist until ``finish``."""
        self._put(_Picture(step, path))

    def finish(self, status: str, wait_s: float = 30.0) -> None:
        """Send the remaining records and end the run as ``done``, ``stopped`` or ``failed``; blocks up to ``wait_s``.

        Raises ValueError for another status.
        """
        if status not in STATUS:
            raise ValueError(f"status {status!r} must be one of {', '.join(STATUS)}")
        deadline = time.monotonic() + wait_s
        try:
            self._queue.put(_CloseRequest(RunEnd(status, _now_ms()), deadline), timeout=wait_s)
        except queue.Full:
            self._dropped = True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning(
                "MLflow at %s did not accept all records within %.0f s; metrics.jsonl has them, `%s` sends them",
                self._store,
                wait_s,
                self._sync_command,
            )

    # -- calling thread --------------------------------------------------------------------------------------

    def _put(self, item: StepMetrics | _Picture) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped = True
            self._warn("all records", RuntimeError(f"the queue of {self._policy.capacity} records is full"))

    def _warn(self, what: str, error: Exception) -> None:
        """Log that something is not sent, once per kind; a deleted experiment also after another error of that kind."""
        kind = str(error) if isinstance(error, DeletedExperimentError) else what
        if kind in self._warned:
            return
        self._warned.add(kind)
        log.warning(
            "MLflow at %s did not accept %s (%s); training continues, metrics.jsonl has every metric, `%s` sends what "
            "is missing",
            self._store,
            what,
            error_summary(error),
            self._sync_command,
        )

    # -- background thread -----------------------------------------------------------------------------------

    def _send_records(self) -> None:
        self._send([])  # connects, so that the run appears in the store before the first record
        request = None
        while request is None:
            items, request = self._collect()
            self._send(items)
        self._close(request)

    def _collect(self) -> tuple[list[StepMetrics | _Picture], _CloseRequest | None]:
        """The records that arrive within ``flush_s`` of the first one, and the close request if there is one."""
        items: list[StepMetrics | _Picture] = []
        wait_s = None
        while len(items) < _MAX_BATCH:
            try:
                item = self._queue.get(timeout=wait_s)
            except queue.Empty:
                break
            if isinstance(item, _CloseRequest):
                return items, item
            if not items:
                first_s = time.monotonic()
            items.append(item)
            wait_s = max(0.0, first_s + self._policy.flush_s - time.monotonic())
        return items, None

    def _send(self, items: Sequence[StepMetrics | _Picture]) -> None:
        if time.monotonic() < self._retry_at:
            # Dropped: the next connection sends the metrics from the history; `sync` sends the pictures.
            return
        try:
            if self._run is None:
                self._run = self._open_run(self._warn)
                self._may_return = True
            self._run.send(i for i in items if isinstance(i, StepMetrics))
            for item in items:
                if isinstance(item, _Picture):
                    self._run.log_picture(item.step, item.path)
        except Exception as error:  # noqa: BLE001 - no error of MLflow may end the training
            self._disconnect(error)

    def _close(self, request: _CloseRequest) -> None:
        while True:
            self._retry_at = 0.0
            self._send([])
            if self._run is not None or not self._may_return:
                break
            # A store that was connected may come back before the deadline; one that never was is not waited for.
            if time.monotonic() + _FINAL_RETRY_S > request.deadline:
                break
            time.sleep(_FINAL_RETRY_S)
        if self._run is None:
            return
        try:
            # Records were dropped while connected, and later steps were sent since: only a comparison of the store with
            # the history finds the gaps.
            if self._dropped:
                self._run.backfill()
            self._run.close(request.end)
        except Exception as error:  # noqa: BLE001 - as in _send
            self._disconnect(error)

    def _disconnect(self, error: Exception) -> None:
        # The next open reads what the store has, because a request that failed may have been stored nevertheless.
        if self._run is not None:
            self._run.detach()
        self._run = None
        if isinstance(error, DeletedExperimentError):
            self._may_return = False
        self._retry_at = time.monotonic() + self._policy.retry_s
        self._warn("metrics", error)


def _now_ms() -> int:
    return int(time.time() * 1000)
