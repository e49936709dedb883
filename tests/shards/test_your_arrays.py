"""The commands of docs/your_arrays.md run in real processes, from arrays to scores."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from testkit.runs import REPO, curve, metrics

from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store

PAGE = (REPO / "docs" / "your_arrays.md").read_text()
BIN = Path(sys.executable).parent


def block(name: str) -> str:
    return re.search(rf"<!-- test: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def run(command: list[str], folder: Path) -> str:
    # An earlier test in this process may have set the variables of a rank.
    ours = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    env = {
        **ours,
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MAESTRO_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def commands(name: str) -> list[list[str]]:
    """The commands of a block, with entry points run by this Python instead of a launcher, from any folder."""
    found = []
    for line in block(name).splitlines():
        program, *rest = shlex.split(line)
        if program == "deepspeed":
            found.append([sys.executable, str(REPO / rest[0]), *rest[1:]])
        else:
            found.append([str(BIN / program), *rest])
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name in ("write.py", "orchards.yaml"):
        (folder / name).write_text(block(name))
    run([sys.executable, "write.py"], folder)
    return folder


def test_the_page_writes_its_arrays(written):
    lines = [line for line in block("write.py").splitlines() if line.strip()]
    assert len(lines) < 45, "the page promises thirty lines or so"
    shards = written / "shards" / "orchards"
    manifest = Manifest.load(str(shards))
    assert {s.split: s.samples for s in manifest.shards} == {"train": 48, "val": 16, "test": 16}
    assert manifest.spec.pos_grid == 6
    with Store(str(shards), written / "cache", 0).shard(manifest.shards_of(["val"])[0]) as shard:
        assert sorted(shard.keys) == sorted(f"orchard-1-{i}" for i in range(16))
        sample = shard[0]
        assert sample.array("s2").shape == (12, 2, 6, 6)
        assert sample.array("s2.dates")[1].tolist() == [2021, 41, 0]
        assert sample.array("aerial.dates").tolist() == [[2021, 182, 0]]
        assert sample.array("ref_date").tolist() == [2021, 10, 0]
        # Trees are 100 brighter than the ground.
        trees, aerial = sample.array("target.trees"), sample.array("aerial")[0].astype(float).mean(axis=0)
        means = aerial.reshape(12, 10, 12, 10).mean(axis=(1, 3))
        np.testing.assert_allclose(means, 60 + 100 * trees, atol=5)


@pytest.mark.slow
def test_the_page_inspects(written):
    verified, inspected = (run(command, written) for command in commands("look"))
    assert "3 shards, 80 samples, all valid" in verified
    for word in ("train-000000.tar", "apple", "plum", "bare", "s2", "aerial", "Jan"):
        assert word in inspected
    assert imread(written / "orchard.png").std() > 0.1


@pytest.mark.slow
def test_the_page_trains_and_evaluates(written):
    train, evaluate = commands("train")
    run(train, written)
    losses = curve(metrics(written / "runs" / "orchards"))
    assert losses[-1] < losses[0]
    run(evaluate, written)
    results = json.loads((written / "results" / "knn" / "results.json").read_text())
    assert results["benchmark"] == "orchards"
    assert 0.5 < results["value"] <= 100
