"""Bad nodes and bad input on a real SLURM: the last lines of the batch log name the node and say what to do."""

from __future__ import annotations

import pytest
from services.slurm.cluster import REPO, command
from testkit.runs import metrics

pytestmark = [pytest.mark.root, pytest.mark.slow]
SCRIPT = REPO / "slurm" / "pretrain_multinode.sh"


def test_a_disconnected_node_is_excluded(cluster, recipe, tmp_path):
    """No route from node2 to node1, which SLURM itself does not notice."""
    route = ("route", "add", "unreachable", "10.77.0.11")
    command("ip", "-n", "node2", *route)
    try:
        run_dir = tmp_path / "run"
        job = cluster.submit(SCRIPT, recipe, "--run-dir", run_dir, MAESTRO_HEALTH_TIMEOUT_S="20")
        assert job.end(300) == "COMPLETED", job.text + job.ranks()
    finally:
        command("ip", "-n", "node2", "route", "del", *route[2:])
    assert "bad node node2: " in job.text
    assert sorted(command("scontrol", "show", "hostnames", job.show("NodeList")).split()) == [
        "node1",
        "node3",
    ]
    assert metrics(run_dir)[-1]["step"] == 6


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ((), {}, "no recipe: sbatch slurm/pretrain_multinode.sh"),
        (("train.steps=none",), {}, "the recipe cannot be used"),
        (("data.mixture[0].shards=/nowhere",), {}, "no node is at fault"),
        ((), {"MAESTRO_MIN_FREE_GIB": "1e6"}, "fix the problems above and submit again"),
        ((), {"MAESTRO_LOCAL": "/proc"}, "set MAESTRO_LOCAL to a folder on its local disk"),
    ],
    ids=["no recipe", "bad recipe", "no data", "full disk", "no local disk"],
)
def test_a_job_that_no_node_can_run_ends_with_advice(cluster, recipe, tmp_path, request, words, env, message):
    arguments = [] if "no recipe" in request.node.callspec.id else [recipe, "--run-dir", tmp_path / "run"]
    job = cluster.submit(
        SCRIPT, *arguments, *(("--set", *words) if words else ()), options=("--nodes=1",), **env
    )
    assert job.end() == "FAILED"
    assert message in job.text.splitlines()[-1]
    if words and "shards" in words[0]:
        assert "bad node" not in job.text
        assert "/nowhere/manifest.json: not found" in job.text
