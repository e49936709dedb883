"""``sbatch slurm/predict.sh``, unchanged, on a real SLURM: two nodes share a scene, also after a requeue."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from services.slurm.cluster import REPO, command
from testkit.valley import make_valley

pytestmark = [pytest.mark.root, pytest.mark.slow]
SCRIPT = REPO / "slurm" / "predict.sh"
OPTIONS = ("--probabilities", "--device", "cpu", "--batch", "1")


def test_two_nodes_and_a_requeue_write_the_map_of_one_process(cluster, tmp_path):
    # A strip, which has five parts of 1024 pixels with few windows.
    valley = make_valley(tmp_path / "a valley", 0, (16, 4500))
    words = (valley.model, valley.description, "--files", valley.scene)
    out = tmp_path / "maps of it"
    job = cluster.submit(SCRIPT, *words[:2], out, *words[2:], *OPTIONS, options=("--nodes=2",))
    job.until(lambda: list((out / ".parts").glob("*.bin")))
    command("scontrol", "requeue", job.id)
    assert not list(out.glob("*.tif"))
    alone = [sys.executable, "-m", "maestro_scale.cli", "predict", *words[:2], tmp_path / "alone", *words[2:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, alone), *OPTIONS], check=True, env=env, cwd=REPO, capture_output=True)
    job.started(2)
    assert job.end() == "COMPLETED", job.text
    assert "2 nodes, 1 tasks each" in job.text
    assert "rank 0's share of 2" in job.text
    assert job.text.splitlines()[-1].endswith(f"maps in {out}")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "alone").rglob("valley.tif*")}
    assert {p.name: p.read_bytes() for p in out.rglob("valley.tif*")} == expected
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "alone").iterdir())
