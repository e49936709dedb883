"""Array jobs write the same output as single commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from services.slurm.cluster import REPO, Cluster, Submitted
from testkit.runs import Trainer

from maestro_scale.shards.format.manifest import Manifest

pytestmark = [pytest.mark.root, pytest.mark.slow]
SLURM = REPO / "slurm"


def test_shards_of_an_array_are_those_of_one_command(cluster, synthetic_raw, tmp_path):
    words = ("--split", "train", "--shard-mb", "1")
    dst = tmp_path / "of an array"
    options = ("--array=1-3",)
    job = cluster.submit(
        SLURM / "shard_dataset.sh", "treesatai_ts", synthetic_raw, dst, *words, options=options
    )
    program = Path(sys.executable).parent / "maestro-scale"
    command = [program, "shard", "treesatai_ts", synthetic_raw, tmp_path / "alone", *words]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert job.end() == "COMPLETED"
    assert Manifest.load(str(dst)) == Manifest.load(str(tmp_path / "alone"))
    for shard in Manifest.load(str(dst)).shards:
        assert (dst / shard.path).read_bytes() == (tmp_path / "alone" / shard.path).read_bytes()


def evaluate(cluster: Cluster, *words: str | Path) -> list[Submitted]:
    """The array and the report that ``slurm/evaluate.sh`` submits, as jobs."""
    env = {**os.environ, "MAESTRO_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SLURM / "evaluate.sh"), *map(str, words)]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    ids = [words[words.index(word) + 1].rstrip(":") for word in ("array", "report")]
    return [Submitted(i, Path("/dev/null")) for i in ids]


def test_evaluations_of_an_array_and_their_report(cluster, recipe, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "results of it"
    Trainer(recipe).train(run_dir, 1, "--set", "checkpoint.keep_every=6")
    _, report = evaluate(
        *(cluster, "--checkpoint", run_dir, "--out", out, "--recipes", recipe),
        *("--modes", "knn probe", "--", "--ntasks-per-node=1"),
    )
    assert report.end(300) == "COMPLETED", "".join(p.read_text() for p in out.glob("*.log"))
    made = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/*/results.json")}
    made |= {p.parent.parent.name: json.loads(p.read_text()) for p in out.glob("*/*/*/results.json")}
    assert {n.split("-")[0] for n in made} == {"knn", "probe"}
    program = str(REPO / "maestro_scale" / "evaluate.py")
    words = [
        "--recipe",
        str(recipe),
        "--checkpoint",
        str(run_dir),
        "--mode",
        "knn",
        "--out",
        str(tmp_path / "alone"),
    ]
    subprocess.run(
        [sys.executable, program, *words, "--set", "seed=0"], check=True, capture_output=True, timeout=200
    )
    (alone,) = (json.loads(p.read_text()) for p in (tmp_path / "alone").rglob("results.json"))
    (of_array,) = (r for n, r in made.items() if n.startswith("knn"))
    assert of_array["value"] == alone["value"]
    html = (out / "report.html").read_text()
    assert "knn" in html
    assert "probe" in html
