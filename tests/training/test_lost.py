"""Checkpoints that are lost, damaged or of another run: no silent restart, and no intact checkpoint is removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from testkit.runs import Trainer, metrics, write_recipe

from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.folder import newest

LIMITED = Path(__file__).parents[1] / "testkit" / "limited.py"
SHORT = ("--set", "train.micro_batch=8")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer(synthetic_shards, tmp_path_factory) -> Trainer:
    return Trainer(write_recipe(tmp_path_factory.mktemp("recipe"), synthetic_shards, workers=0))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return tmp_path_factory.mktemp("mirror")


@pytest.fixture(scope="module")
def done(trainer, mirror, tmp_path_factory):
    """Six steps, checkpoints of 4 and 6, both mirrored."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    trainer.train(run_dir, 1, *SHORT, f"checkpoint.mirror=file://{mirror}")
    return run_dir


def refused(trainer, run_dir, *args):
    code, output = trainer.run(run_dir, 1, *args)
    assert code == 2, output[-3000:]
    (line,) = [x for x in output.splitlines() if x.startswith("error")]
    assert "Traceback" not in output
    return line


@pytest.mark.parametrize("lost", ["checkpoints", "markers", "all but the outcome"])
def test_a_run_that_lost_its_checkpoints_does_not_start_over(trainer, done, tmp_path, lost):
    run_dir = tmp_path / "copy"
    shutil.copytree(done, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        (path / commit.MARKER).unlink() if lost == "markers" else shutil.rmtree(path)
    if lost == "all but the outcome":
        (run_dir / "latest").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    line = refused(trainer, run_dir, *SHORT, "train.steps=8")
    evidence = (
        "says that the run ended" if lost == "all but the outcome" else "names the checkpoint step_00000006"
    )
    assert evidence in line
    assert "refusing to start over" in line
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert len(list((run_dir / "checkpoints").glob("*/state/rank*.safetensors"))) == 2 * (lost == "markers")


def test_damaged_checkpoints_do_not_count_towards_retention(trainer, done, tmp_path):
    run_dir = tmp_path / "copy"
    shutil.copytree(done, run_dir)
    marker = newest(run_dir) / commit.MARKER
    marker.write_text(marker.read_text().replace('"samples": 48', '"samples": 40'))
    (run_dir / "STOP").touch()
    code, output = trainer.run(run_dir, 1, *SHORT, "checkpoint.keep=1", "checkpoint.every_steps=100")
    assert code == 0, output[-3000:]
    assert "step_00000006: COMMIT.json has changed since it was written" in output
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == ["damaged_step_00000006", "step_00000005"]
    assert [m["step"] for m in metrics(run_dir)] == [1, 2, 3, 4, 5, 6], (
        "lines of steps to be taken again stay"
    )
    assert trainer.train(run_dir, 1, *SHORT) == metrics(done)


def test_the_newest_intact_checkpoint_of_the_mirror_replaces_damaged_ones(trainer, done, mirror, tmp_path):
    run_dir, second = tmp_path / "run", tmp_path / "mirror"
    shutil.copytree(done, run_dir)
    shutil.copytree(mirror, second)
    for path in (*run_dir.glob("checkpoints/*"), second / "run" / "step_00000006"):
        next(path.glob("state/rank*.safetensors")).write_bytes(b"")
    code, output = trainer.run(run_dir, 1, *SHORT, f"checkpoint.mirror=file://{second}")
    assert code == 0, output[-3000:]
    assert "step_00000004 was restored from" in output
    assert metrics(run_dir) == metrics(done)
    assert commit.problem(newest(run_dir), hashes=True) is None


def test_a_full_disk_is_reported_in_one_line_and_the_last_checkpoint_is_kept(trainer, tmp_path):
    code, output = trainer.run(tmp_path / "run", 1, *SHORT, "train.steps=2", "checkpoint.every_steps=1")
    assert code == 0, output[-3000:]
    # No file may grow past what a step leaves: the next state does not fit.
    largest = max(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file())
    limited = Trainer(trainer.recipe, entry=LIMITED, env={"MOST_BYTES": str(largest - 1)})
    more = ["train.steps=4", "checkpoint.every_steps=1", "data.workers=0"]
    line = refused(limited, tmp_path / "run", *SHORT, *more)
    assert "cannot be written: File too large; the last committed checkpoint is kept" in line
    assert newest(tmp_path / "run").name == "step_00000002"


def test_the_mirror_is_checked_before_training_starts(trainer, done, mirror, tmp_path):
    mirrored = f"checkpoint.mirror=file://{mirror}"
    assert "--fresh starts over" in refused(trainer, tmp_path / "run", "--fresh", *SHORT, mirrored)
    line = refused(trainer, tmp_path / "run", *SHORT, mirrored, "seed=4")
    assert f"file://{mirror}/run/step_00000006 is of another run: seed: checkpoint 3, now 4" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    away = refused(trainer, tmp_path / "run", *SHORT, "checkpoint.mirror=nowhere:///at/all")
    assert "checkpoint.mirror: nowhere:///at/all/run cannot be read" in away
    assert sorted(p.name for p in (mirror / "run").iterdir()) == ["step_00000004", "step_00000006"]
