"""The small parts around the loop."""

from __future__ import annotations

import pytest
import torch

from maestro_scale.training.checkpoint import committed
from maestro_scale.training.checkpoint.checkpoints import CheckpointError, newest
from maestro_scale.training.distributed import place as distributed_place
from maestro_scale.training.optimizer import build_optimizer, cosine, one_cycle
from maestro_scale.training.run_dir import JsonLines, RunDirError, lock


def test_one_cycle_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours = torch.optim.AdamW([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, one_cycle(100, 0.2, 1e-3, 1e-7))
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        theirs, 2.0, 100, pct_start=0.2, div_factor=1e3, final_div_factor=1e4, cycle_momentum=False
    )
    for _ in range(99):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for optimizer, schedule in ((ours, scheduler), (theirs, reference)):
            optimizer.step()
            schedule.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(2e-7, rel=1e-3)


def test_cosine_rises_then_falls():
    factor = cosine(100, 0.1, 1e-3, 1e-7)
    values = [factor(s) for s in range(100)]
    assert values[0] == pytest.approx(1e-3)
    assert max(values) == pytest.approx(1.0)
    assert values.index(max(values)) == 10
    assert values[-1] == pytest.approx(1e-7, abs=1e-6)


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
def test_schedules_survive_runs_of_few_steps(schedule):
    for steps in (1, 2, 3, 5):
        factor = schedule(steps, 0.2, 1e-3, 1e-7)
        assert all(0 < factor(s) <= 1 for s in range(steps + 1))


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1)
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0


def test_lines_past_the_step_and_torn_lines_are_dropped(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for step in range(1, 6):
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in lines.read()] == [1, 2, 3, 4, 5]
    lines.rewind(3)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_run_directory_has_one_owner(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(RunDirError, match="in use by another run"):
        lock(tmp_path)
    held.release()
    lock(tmp_path).release()


def _checkpoint(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    (folder / "state").mkdir(parents=True)
    weights = folder / "state" / "weights"
    weights.write_bytes(b"x" * 10)
    committed.commit(folder, {"position": {"samples": 48}}, {"state/weights": committed.entry(weights)})
    return folder


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    good, changed, truncated = (_checkpoint(tmp_path, step) for step in (5, 8, 9))
    (truncated / "state" / "weights").write_bytes(b"x" * 9)
    (changed / "state" / "weights").write_bytes(b"x" * 9 + b"y")
    (tmp_path / "checkpoints" / "step_00000012" / "state").mkdir(parents=True)  # no commit marker
    (tmp_path / "checkpoints" / ".staging_step_00000013").mkdir()
    assert "9 bytes instead of 10" in committed.problem(truncated)
    assert committed.problem(changed) is None
    assert "sha256" in committed.problem(changed, hashes=True)
    assert committed.problem(good, hashes=True) is None
    assert newest(tmp_path) == good


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', "{", "null"])
def test_a_marker_that_is_not_ours_is_a_damaged_checkpoint(tmp_path, text):
    folder = _checkpoint(tmp_path, 5)
    (folder / committed.MARKER).write_text(text)
    assert "unreadable COMMIT.json" in committed.problem(folder)


def test_what_a_marker_says_is_what_was_written(tmp_path):
    marker = _checkpoint(tmp_path, 5) / committed.MARKER
    marker.write_text(marker.read_text().replace('"samples": 48', '"samples": 40'))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        newest(tmp_path)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "RANK": "0", "WORLD_SIZE": "1"},
            (0, 1, 0),
        ),
    ],
)
def test_place_among_the_ranks(env, place):
    assert distributed_place(env) == place
