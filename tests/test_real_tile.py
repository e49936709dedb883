"""The real TreeSatAI-TS tile, from the command line: raw files to shards to two ranks of training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from testkit.runs import REPO, Trainer

TILE = Path(os.environ.get("MAESTRO_TREESATAI_DIR", REPO.parent / "shared" / "data" / "treesatai_ts"))

pytestmark = pytest.mark.skipif(
    not TILE.is_dir(), reason=f"no real tile at {TILE}; set MAESTRO_TREESATAI_DIR to a folder with one"
)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    """``maestro-scale`` with these arguments, as a user would run it."""
    program = Path(sys.executable).parent / "maestro-scale"
    return subprocess.run([str(program), *args], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_shard_verify_train(tmp_path):
    shards = tmp_path / "shards"
    made = command("shard", "treesatai_ts", str(TILE), str(shards), "--split", "train")
    assert made.returncode == 0, made.stderr
    assert "1 samples in 1 shards" in made.stdout
    checked = command("verify", str(shards))
    assert checked.returncode == 0, checked.stderr

    lines = Trainer(REPO / "recipes" / "treesatai_ts.yaml", "deepspeed").train(
        tmp_path / "run",
        2,
        "--set",
        f"data.mixture[0].shards={shards}",
        "data.mixture[0].split=train",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.workers=0",
        "data.lanes=2",
        "model.size=tiny",
        "train.steps=2",
        "train.global_batch=4",
        "train.micro_batch=1",
        "train.log_every=1",
        "tracking.pictures_every=2",
        "tracking.enabled=false",
    )
    assert [line["samples"] for line in lines] == [4, 8]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_damaged_shard_is_named(tmp_path):
    shards = tmp_path / "shards"
    assert command("shard", "treesatai_ts", str(TILE), str(shards), "--split", "train").returncode == 0
    shard = shards / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    checked = command("verify", str(shards))
    assert checked.returncode == 1
    assert "train-000000.tar" in checked.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("shard", "treesatai_ts", "/nowhere", "{tmp}/s", "--split", "train"), "/nowhere"),
        (("shard", "treesatai", "{tile}", "{tmp}/s", "--split", "train"), "treesatai_ts"),
        (("shard", "treesatai_ts", "{tile}", "{tmp}/s", "--split", "tarin"), "tarin"),
        (("verify", "{tmp}/nothing"), "nothing"),
        (("export", "{tmp}/nothing", "{tmp}/out"), "nothing"),
    ],
)
def test_errors_are_one_line(tmp_path, args, words):
    done = command(*(a.format(tmp=tmp_path, tile=TILE) for a in args))
    assert done.returncode != 0
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "s" / "manifest.json").exists()
