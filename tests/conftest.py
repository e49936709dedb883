"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]
# Only one SLURM cluster can run per machine: two files of its tests at a time would wait for each other.
ONE_AT_A_TIME = {Path(__file__).parent / "services" / "slurm": "slurm"}


GIB_PER_WORKER = 2.0


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Number of xdist's worker processes where none is given: as many as there are cores, and memory for.

    None for a single file, whose tests are one group, and with ``-s``, which workers ignore: the tests then run in this
    process, which starts faster and in which a debugger stops.
    """
    if config.option.capture == "no" or config.option.collectonly:
        return 0
    cores = len(os.sched_getaffinity(0))  # SLURM and containers restrict it
    memory = int(psutil.virtual_memory().available / 2**30 / GIB_PER_WORKER)
    files = {file for word in config.args for file in _test_files(Path(word.partition("::")[0]))}
    num_workers = min(cores, max(memory, 1), len(files))
    return num_workers if num_workers > 1 else 0


def _test_files(place: Path) -> list[Path]:
    return list(place.rglob("test_*.py")) if place.is_dir() else [place]


class FileScheduling(LoadFileScheduling):
    """The tests of a file run in one process, which sets up its fixtures once, and so do all tests of SLURM.

    Not by xdist's ``loadgroup``: with pytest 9.2, xdist 3.8 ignores groups (pytest-xdist issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(ROOT / nodeid.split("::")[0])


def group_of(file: Path) -> str:
    """Name of the tests that run in one process."""
    return ONE_AT_A_TIME.get(file.parent, str(file))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileScheduling | None:
    """The scheduler of xdist, unless another one was asked for by ``--dist``."""
    return FileScheduling(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In xdist's workers: groups with most slow tests come first.

    A long group that starts last would keep one process busy while the other has nothing left to do.
    """
    if not hasattr(config, "workerinput"):
        return
    slow = Counter(
        group_of(item.path) for item in items if {"slow", "root"} & {m.name for m in item.iter_markers()}
    )
    items.sort(key=lambda item: (-slow[group_of(item.path)], group_of(item.path)))


@pytest.fixture(scope="session")
def synthetic_raw(tmp_path_factory) -> Path:
    """40 synthetic TreeSatAI-TS tiles in their raw layout (28 train, 4 val, 8 test)."""
    from maestro_scale import datasets

    folder = tmp_path_factory.mktemp("raw")
    datasets.synth("treesatai_ts", folder, 40, 7)
    return folder


@pytest.fixture(scope="session")
def synthetic_shards(synthetic_raw, tmp_path_factory) -> Path:
    """The same as shards of a few tiles each."""
    from maestro_scale import datasets
    from maestro_scale.shards.write.writer import write_shards

    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val", "test"):
        raw = datasets.open_raw("treesatai_ts", synthetic_raw, split)
        write_shards(raw, str(folder), split, workers=1, codec="raw", shard_mb=4, seed=0)
    return folder
