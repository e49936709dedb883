"""The memory of a loader process is small and does not grow with the number of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source

BATCH = 100


def own_mb(pid: int) -> float:
    """Anonymous memory of a process: shards are mapped files, which the system takes back when it needs to."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


@pytest.mark.slow
def test_the_memory_of_a_loader_process_is_flat(write_toy: Callable[..., Source]):
    toy = write_toy(400, per_shard=40)
    loader = TrainLoader([toy], 0, lanes=1, global_batch=BATCH, micro_batch=BATCH, workers=1)
    seen = {}
    try:
        for step in loader.steps(0, 20_000 // BATCH):
            if step.samples in (4_000, 12_000, 20_000):
                (worker,) = loader._pipelines[0]._results._workers
                seen[step.samples] = own_mb(worker.pid)
    finally:
        loader.close()
    assert seen.keys() == {4_000, 12_000, 20_000}
    assert max(seen.values()) < 250
    assert seen[20_000] - seen[4_000] < 4, seen
