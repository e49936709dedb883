"""Retries over whole requests, body included."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from maestro_scale.shards.errors import StoreError, one_line

T = TypeVar("T")
_LOG_AFTER_S = 5.0


@dataclass(frozen=True)
class RetryPolicy:
    """How long a request is tried: waits double from ``initial_wait_s``, with jitter, until ``deadline_s``."""

    deadline_s: float = 120.0
    attempt_timeout_s: float = 30.0  # one attempt, body included
    initial_wait_s: float = 0.2
    max_wait_s: float = 10.0

    @classmethod
    def with_deadline(cls, deadline_s: float) -> RetryPolicy:
        """The usual waits, up to another deadline."""
        return cls(deadline_s, min(cls.attempt_timeout_s, deadline_s))


class TransientError(Exception):
    """An attempt failed in a way that another may not."""


def call_with_retries(
    attempt: Callable[[], T],
    retry: RetryPolicy,
    what: str,
    on_retry: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
) -> T:
    """``attempt()`` again while it raises :class:`TransientError`; StoreError, naming ``what``, at the deadline.

    Anything else that it raises passes at once. ``on_retry`` is called before each further attempt; ``stop``
    ends the waiting early.
    """
    stop = stop or threading.Event()
    jitter = random.Random()  # its own: the global generator belongs to the user
    started = time.monotonic()
    wait_s = retry.initial_wait_s
    attempts = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except TransientError as error:
            spent_s = time.monotonic() - started
            pause_s = wait_s * jitter.uniform(0.5, 1.5)
            if spent_s + pause_s > retry.deadline_s:
                raise StoreError(
                    f"{what}: gave up after {attempts} attempts in {spent_s:.0f} s ({one_line(error)})"
                ) from error
            if spent_s > _LOG_AFTER_S:
                logging.getLogger(__name__).warning(
                    "%s: %s; trying on, %.0f s so far", what, one_line(error), spent_s
                )
            if stop.wait(pause_s):
                raise StoreError(f"{what}: stopped while call_with_retries ({one_line(error)})") from error
        wait_s = min(2 * wait_s, retry.max_wait_s)
        on_retry()
