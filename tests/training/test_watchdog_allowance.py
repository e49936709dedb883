"""The watchdog gives compilation more time than a step."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import torch.distributed as dist

from maestro_scale.training.watchdog import Watchdog


def test_a_note_can_extend_the_time_until_the_next_one(monkeypatch, tmp_path):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(
        dist, "TCPStore", lambda *args, **kwargs: SimpleNamespace(set=lambda *pair: None, add=lambda *pair: 0)
    )
    ended = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.set())
    watchdog = Watchdog(SimpleNamespace(rank=0, size=1), 0.5, tmp_path)  # type: ignore[arg-type]  # not a World
    watchdog.note(0, "starting", extra_s=600)
    watchdog.start()
    try:
        time.sleep(1.5)
        assert not ended.is_set()
        # The next note ends the extension.
        watchdog.note(0, "starting")
        assert ended.wait(20)
    finally:
        watchdog.stop()
