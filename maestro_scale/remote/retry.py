"""Retries of whole requests, body included, until a deadline."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from maestro_scale.remote.errors import StoreError, one_line

T = TypeVar("T")
_LOG_AFTER_S = 5.0
MIN_ATTEMPTS = 3  # also within a short deadline: one lost packet must not end a job


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter: waits double from ``initial_wait_s`` to ``max_wait_s``, until ``deadline_s``.

    ``attempt_timeout_s`` and ``initial_wait_s`` are lowered where needed, so that at least MIN_ATTEMPTS attempts fit.
    """

    deadline_s: float = 120.0
    attempt_timeout_s: float = 30.0  # of one attempt, body included
    initial_wait_s: float = 0.2
    max_wait_s: float = 10.0

    def __post_init__(self) -> None:
        # Three timeouts are 3/4 of the deadline; the two waits between them, with jitter, at most 1.5 · 3/20.
        object.__setattr__(self, "attempt_timeout_s", min(self.attempt_timeout_s, self.deadline_s / 4))
        object.__setattr__(self, "initial_wait_s", min(self.initial_wait_s, self.deadline_s / 20))

    @classmethod
    def with_deadline(cls, deadline_s: float) -> RetryPolicy:
        """The default waits with another deadline."""
        return cls(deadline_s)


class TransientError(Exception):
    """An attempt failed in a way that may not repeat: timeout, connection reset, HTTP 408, 429 or 5xx."""


def call_with_retries(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    what: str,
    on_retry: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> T:
    """Call ``attempt()`` again while it raises :class:`TransientError`; StoreError, naming ``what``, at the deadline.

    Any other exception is raised at once. ``on_retry`` is called before each further attempt; setting ``stop`` ends
    the wait between attempts early, with StoreError.
    """
    stop = stop or threading.Event()
    jitter = random.Random()  # not the global generator, whose state belongs to the user
    started = time.monotonic()
    wait_s = policy.initial_wait_s
    attempts = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except TransientError as error:
            spent_s = time.monotonic() - started
            # Jitter: after an outage thousands of readers must not all come back at the same moment.
            pause_s = wait_s * jitter.uniform(0.5, 1.5)
            # An upload has no timeout per attempt, so its first attempts may take longer than the deadline.
            if attempts >= MIN_ATTEMPTS and spent_s + pause_s > policy.deadline_s:
                raise StoreError(
                    f"{what}: gave up after {attempts} attempts in {spent_s:.0f} s ({one_line(error)})"
                ) from error
            if spent_s > _LOG_AFTER_S:
                logging.getLogger(__name__).warning(
                    "%s: %s; retrying, %.0f s so far", what, one_line(error), spent_s
                )
            if stop.wait(pause_s):
                raise StoreError(f"{what}: stopped while retrying ({one_line(error)})") from error
        wait_s = min(2 * wait_s, policy.max_wait_s)
        on_retry()
