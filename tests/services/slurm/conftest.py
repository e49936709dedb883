"""A SLURM cluster for the tests of a file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.slurm.cluster import Cluster, why_not
from testkit.runs import write_recipe


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes: one more than the jobs use. Only one cluster can run per machine: other test files wait for it."""
    if reason := why_not():
        pytest.skip(reason)
    with Path("/tmp/slurm.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cluster = Cluster(3, tmp_path_factory.mktemp("jobs with spaces"))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def recipe(synthetic_shards, tmp_path_factory) -> Path:
    """The tiny recipe, in a folder with a space in its name."""
    return write_recipe(tmp_path_factory.mktemp("recipe of slurm"), synthetic_shards)
