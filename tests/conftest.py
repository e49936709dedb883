"""Fixtures shared by all tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

# Only one SLURM cluster can run per machine: two files of its tests at a time would wait for each other.
ONE_AT_A_TIME = {Path(__file__).parent / "services" / "slurm": "slurm"}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For xdist with --dist=loadgroup: the tests of a file form a group; groups with most slow tests come first.

    A long group that starts last would keep one process busy while the other has nothing left to do.
    """
    if not hasattr(config, "workerinput"):
        return
    groups = {item.path: ONE_AT_A_TIME.get(item.path.parent, item.nodeid.split("::")[0]) for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item.path]))
    slow = Counter(
        groups[item.path] for item in items if {"slow", "root"} & {m.name for m in item.iter_markers()}
    )
    items.sort(key=lambda item: -slow[groups[item.path]])


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
