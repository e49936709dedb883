"""The node-local cache that the SLURM scripts create: a folder of this user, whatever is at its path before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def prepare(local: Path) -> subprocess.CompletedProcess[str]:
    """Run ``prepare`` of slurm/env.sh with a Python that can import everything; prints the cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "SLURM_"))}
    env |= {"MAESTRO_HOME": os.getcwd(), "MAESTRO_LOCAL": str(local), "MAESTRO_PYTHON": "true"}
    env |= {"SLURM_JOB_ID": "7", "USER": "ada"}
    script = '. slurm/env.sh; prepare; echo "$MAESTRO_CACHE"'
    return subprocess.run(["bash", "-uc", script], env=env, capture_output=True, text=True, timeout=30)


def test_the_cache_is_created_for_this_user_alone_and_used_again(tmp_path):
    for _ in range(2):  # a requeued job has the same id
        assert prepare(tmp_path).stdout == f"{tmp_path}/maestro-ada-7\n"
    assert (tmp_path / "maestro-ada-7").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "owner",
    ["link", pytest.param("other", marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can chown"))],
)
def test_a_folder_that_another_user_prepared_is_refused(tmp_path, owner):
    """Its name can be guessed. Records in a cache say which shards were verified."""
    cache = tmp_path / "local" / "maestro-ada-7"
    cache.parent.mkdir()
    if owner == "link":
        (tmp_path / "other").mkdir()
        cache.symlink_to(tmp_path / "other")
    else:
        cache.mkdir()
        os.chown(cache, 65534, 65534)
    done = prepare(cache.parent)
    assert done.returncode == 2
    assert "belongs to another user: set MAESTRO_LOCAL" in done.stderr
