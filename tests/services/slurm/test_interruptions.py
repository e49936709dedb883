"""Interruptions of SLURM jobs: the job saves or falls back, requeues, and ends with the uninterrupted run's curve."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from services.s3.forward import Forward
from services.s3.server import BUCKET
from services.slurm.cluster import GATEWAY, REPO, Submitted, command
from testkit.runs import Trainer, curve, metrics, write_recipe

from maestro_scale.shards.write.writer import write_shards

pytestmark = [pytest.mark.root, pytest.mark.slow]
SCRIPT = REPO / "slurm" / "pretrain_multinode.sh"
STEPS = 150
LONG = (
    "--set",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=10",
    "train.log_every=1",
    "train.audit=false",
)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> list[float]:
    """The curve of one process without interruption."""
    return curve(Trainer(recipe).train(tmp_path_factory.mktemp("alone") / "run", 1, *LONG))


def reach(job: Submitted, run_dir: Path, step: int) -> None:
    job.until(lambda: any(m["step"] >= step for m in metrics(run_dir)))


def newest(run_dir: Path) -> int:
    return max((m["step"] for m in metrics(run_dir)), default=0)


def test_requeue_and_time_limit_and_signal(cluster, recipe, uninterrupted, tmp_path):
    """One job: the signal before its time limit, `scontrol requeue`, `scancel --signal=USR1 --batch`."""
    run_dir = tmp_path / "run dir"
    options = ("--time=30",)
    job = cluster.submit(SCRIPT, recipe, "--run-dir", run_dir, *LONG, options=options, MAESTRO_HEALTH="0")
    reach(job, run_dir, 5)
    # --signal=B:USR1@180 of the script: three minutes before the limit; SLURM checks it twice a minute.
    for node in ("node1", "node2", "node3"):
        cluster.send(signal.SIGSTOP, node, "train.py")
    command("scontrol", "update", f"JobId={job.id}", "TimeLimit=3")
    job.until(lambda: "stop requested: saving a checkpoint" in job.text)
    command("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    for node in ("node1", "node2", "node3"):
        cluster.send(signal.SIGCONT, node, "train.py")
    job.started(2)
    assert "saved at step" in job.text
    reach(job, run_dir, newest(run_dir) + 3)
    command("scontrol", "requeue", job.id)
    job.started(3)
    reach(job, run_dir, newest(run_dir) + 3)
    command("scancel", "--signal=USR1", "--batch", job.id)
    job.started(4)
    assert job.text.count("stop requested: saving a checkpoint") == 2
    assert job.end(300) == "COMPLETED", job.text + job.ranks()
    assert curve(metrics(run_dir)) == pytest.approx(uninterrupted, rel=1e-5)
    assert f"done: {STEPS} steps" in job.text.splitlines()[-1]


def test_a_node_that_dies_is_replaced(cluster, ceph, recipe, uninterrupted, synthetic_raw, tmp_path):
    """Streams from S3; the crashed node loses its cached shards."""
    from maestro_scale import datasets

    url = f"s3://{BUCKET}/slurm"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ceph.env.items():
            patch.setenv(name, value)
        write_shards(datasets.open_raw("treesatai_ts", synthetic_raw, "train"), url, "train", shard_mb=4)
    remote = write_recipe(tmp_path, url)
    run_dir, port = tmp_path / "run", ceph.port
    way = Forward(GATEWAY, port)
    env = {**ceph.env, "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{port}"}
    job = cluster.submit(SCRIPT, remote, "--run-dir", run_dir, *LONG, **env)
    reach(job, run_dir, 25)
    (lost, *_) = command("scontrol", "show", "hostnames", job.show("NodeList")).split()[::-1]
    cluster.crash(lost)
    try:
        job.started(2)
        assert job.end(300) == "COMPLETED", job.text + job.ranks()
    finally:
        cluster.revive(lost)
        way.close()
    assert curve(metrics(run_dir)) == pytest.approx(uninterrupted, rel=1e-5)
    assert lost not in command("scontrol", "show", "hostnames", job.show("NodeList")).split()


def test_a_failing_job_gives_up(cluster, recipe, tmp_path):
    run_dir = tmp_path / "run"
    bad = ("--set", "data.mixture[0].sensors.aerial.source=s3")
    job = cluster.submit(
        SCRIPT, recipe, "--run-dir", run_dir, *bad, MAESTRO_HEALTH="0", MAESTRO_MAX_FAILURES="2"
    )
    assert job.end() == "FAILED"
    assert "giving up" in job.text.splitlines()[-1]
    assert "error: " in job.text
