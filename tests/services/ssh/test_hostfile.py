"""``deepspeed --hostfile`` on two hosts, by ssh and pdsh: the losses of a run on one host, and a stop by a signal."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.ssh.hosts import hosts, on, why_not
from testkit.runs import REPO, TRAIN, Trainer, metrics

pytestmark = [pytest.mark.slow, pytest.mark.root]
FIXTURES = REPO / "tests" / "fixtures"
LONG = ("--set", "train.steps=100000")


@pytest.fixture
def names(tmp_path) -> Iterator[tuple[str, ...]]:
    """The names of two hosts."""
    if reason := why_not():
        pytest.skip(reason)
    with Path("/tmp/maestro-ssh.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with hosts(tmp_path) as names:
            yield names


def test_two_hosts_train_as_one_and_save_at_a_signal(names, tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "shards", tmp_path / "data" / "shards")
    recipe = tmp_path / "recipe.yaml"
    text = (FIXTURES / "pretrain.yaml").read_text()
    recipe.write_text(text.replace("shards: shards", "shards: '${MAESTRO_DATA}/shards'"))
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    # The launcher passes on few variables by itself; these it reads from a file.
    (tmp_path / ".deepspeed_env").write_text(f"MAESTRO_DATA={tmp_path / 'data'}\nOMP_NUM_THREADS=1\n")
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--hostfile=hosts", str(TRAIN), f"--recipe={recipe}", "--run-dir=run", *LONG]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    log, run_dir = tmp_path / "log.txt", tmp_path / "run"
    with log.open("w") as sink:
        process = subprocess.Popen(on(names[0], command), cwd=tmp_path, env=env, stdout=sink, stderr=sink)
    try:
        wait_for(lambda: len(metrics(run_dir)) >= 2 or process.poll() is not None, log)
        process.send_signal(signal.SIGTERM)  # as Ctrl-C: the launcher ends the ranks of all hosts
        wait_for(lambda: (run_dir / "outcome.json").exists() and process.poll() is not None, log)
    finally:
        process.kill()
    found = metrics(run_dir)
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome == {"reason": "stopped", "why": "SIGTERM", "step": len(found)}
    assert (run_dir / "checkpoints" / f"step_{len(found):08}" / "COMMIT.json").exists()
    setup = json.loads((run_dir / "environment.json").read_text())["setup"]
    assert (setup["ranks"], setup["nodes"], setup["launcher"]) == (2, 2, "deepspeed")

    monkeypatch.setenv("MAESTRO_DATA", str(tmp_path / "data"))
    Trainer(recipe).kill_at(tmp_path / "local", 2, 2, *LONG)
    local = metrics(tmp_path / "local")
    assert [line["loss"] for line in found[:2]] == [line["loss"] for line in local[:2]]


def wait_for(true, log: Path, timeout_s: float = 240) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
