"""``sbatch slurm/pretrain_multinode.sh``, unchanged, on a real SLURM."""

from __future__ import annotations

import pytest
from services.slurm.cluster import REPO
from testkit.runs import Trainer, curve, metrics

pytestmark = [pytest.mark.root, pytest.mark.slow]
SCRIPT = REPO / "slurm" / "pretrain_multinode.sh"
SMALL = ("--set", "train.micro_batch=2")


def test_two_nodes_of_two_tasks_train_the_curve_of_one(cluster, recipe, tmp_path):
    run_dir = tmp_path / "run of four"
    # As if submitted from a shell that is itself a rank.
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    options = ("--ntasks-per-node=2",)
    job = cluster.submit(SCRIPT, recipe, "--run-dir", run_dir, *SMALL, options=options, **stale)
    alone = Trainer(recipe).train(tmp_path / "alone", 1, *SMALL)
    assert job.end() == "COMPLETED", job.text + job.ranks()
    assert curve(metrics(run_dir)) == pytest.approx(curve(alone), rel=1e-5)
    assert "all 2 nodes passed the health check" in job.text
    assert len(list((run_dir / "logs").glob("*/rank-*.log"))) == 4
    assert len(list((run_dir / "audit").glob("rank*.jsonl"))) == 4
    assert job.text.splitlines()[-1].startswith("done: 6 steps")
