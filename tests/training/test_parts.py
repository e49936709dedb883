"""Unit tests of schedules, optimizer, guard, average, retention, markers and rank discovery."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import pytest
import torch

from maestro_scale.training.binding import Launch
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.checkpoints import CheckpointError, Position, newest
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.fragments import Fragment
from maestro_scale.training.guard import Guard
from maestro_scale.training.hooks.garbage_collection import GarbageCollectionHook
from maestro_scale.training.optimizer import build_optimizer, cosine, one_cycle, set_lr
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


def test_one_cycle_by_hand():
    # 11 steps, a warm-up of 5 of them: the peak is at step 4, the end at step 10.
    factor = one_cycle(11, 5 / 11, 0.01, 0.001)
    assert factor(0) == pytest.approx(0.01)
    assert factor(1) == pytest.approx(0.154982, abs=1e-6)  # 1 + (0.01 - 1) * (1 + cos(pi / 4)) / 2
    assert factor(2) == pytest.approx((0.01 + 1) / 2)
    assert factor(4) == pytest.approx(1.0)
    assert factor(7) == pytest.approx((1 + 0.001) / 2)
    assert factor(10) == pytest.approx(0.001)
    assert factor(11) == factor(50) == pytest.approx(0.001)
    # Without a warm-up the first step is the peak.
    assert [one_cycle(5, 0.0, 0.01, 0.001)(s) for s in (0, 2, 4)] == pytest.approx([1.0, 0.5005, 0.001])


def test_cosine_by_hand():
    # 21 steps, a warm-up of 4 of them: linear to step 4, then cosine to step 20.
    factor = cosine(21, 4 / 21, 0.2, 0.1)
    assert [factor(s) for s in (0, 1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(8) == pytest.approx(0.868198, abs=1e-6)  # 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
    assert factor(12) == pytest.approx(0.55)
    assert [factor(s) for s in (20, 21, 99)] == pytest.approx([0.1, 0.1, 0.1])


def test_learning_rates_of_groups_by_hand():
    model = torch.nn.ModuleDict(
        {
            "patch_embed": torch.nn.Linear(2, 2),
            "encoders": torch.nn.ModuleDict(
                {"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])}
            ),
            "heads": torch.nn.Linear(2, 2),
        }
    )
    optimizer = build_optimizer(model, 8.0, (0.9, 0.99), 1e-8, 0.1, layer_decay=0.5)
    # The head learns at 8, the upper block at 4, the lower one at 2, the patch embedding at 1; each with a group of
    # weights, which decay, and one of biases, which do not.
    assert [(g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (8.0, 0.1), (8.0, 0.0), (4.0, 0.1), (4.0, 0.0), (2.0, 0.1), (2.0, 0.0), (1.0, 0.1), (1.0, 0.0)
    ]  # fmt: skip
    assert set_lr(optimizer, 0.25) == 2.0
    assert [g["lr"] for g in optimizer.param_groups] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups[2:6]] == [
        ["encoders.blocks.1.weight"],
        ["encoders.blocks.1.bias"],
        ["encoders.blocks.0.weight"],
        ["encoders.blocks.0.bias"],
    ]


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(tmp_path):
    later = tmp_path / "step_00000005"
    (later / "state").mkdir(parents=True)
    (later / "state" / "weights").write_bytes(b"0123456789")
    files = {"state/weights": commit.entry(later / "state" / "weights")}
    commit.commit(later, {"format_version": 2}, files)
    with pytest.raises(
        commit.NewerFormatError, match=r"step_00000005: COMMIT.json has format version 2, .* up to 1"
    ):
        commit.problem(later)
    commit.commit(later, {}, files)
    assert commit.problem(later, hashes=True) is None
    assert json.loads((later / "COMMIT.json").read_text())["format_version"] == 1


def test_retention_by_hand():
    assert Retention(2).superseded([10, 2, 4, 8]) == [2, 4]
    assert Retention(2).superseded([8, 10]) == []
    # Permanent ones do not count among the last ``keep``.
    assert Retention(1, keep_every=4).superseded([2, 4, 6, 8]) == [2]
    assert Retention(2, keep_every=5).superseded([3, 5, 6, 9, 10, 12]) == [3, 6]
    assert [Retention(1, 4).is_permanent(step) for step in (4, 6, 8)] == [True, False, True]
    assert not Retention(1).is_permanent(4)


def test_garbage_is_collected_only_at_multiples_of_the_interval(monkeypatch):
    calls: list[tuple[int, bool]] = []
    number = 0
    monkeypatch.setattr(gc, "collect", lambda: calls.append((number, gc.isenabled())))
    assert gc.isenabled()
    hook = GarbageCollectionHook(3)
    hook.on_start(Position(), 7)
    for number in range(1, 8):
        hook.after_step(SimpleNamespace(position=Position(step=number)))
    hook.on_end("done")
    assert calls == [(0, True), (3, False), (6, False)]
    assert gc.isenabled()


def test_a_spike_exceeds_a_multiple_of_the_running_mean_after_100_steps():
    guard = Guard(spike=2.0)
    for _ in range(99):
        guard.record_step(1.0, 10.0)
    assert guard.skip_reason(2.1, 10.0) is None
    guard.record_step(1.0, 10.0)
    assert (guard.seen, guard.mean_loss, guard.mean_norm) == (100, pytest.approx(1.0), pytest.approx(10.0))
    guard.mean_loss, guard.mean_norm = 1.0, 10.0
    assert guard.skip_reason(2.0, 20.0) is None
    assert guard.skip_reason(2.0001, 20.0) == "the loss 2 is over 2 times its running mean 1"
    assert guard.skip_reason(2.0, 20.01) == "the gradient norm 20.01 is over 2 times its running mean 10"
    # From step 100 on a step moves the mean by a hundredth of its distance.
    guard.record_step(3.0, 10.0)
    assert guard.mean_loss == pytest.approx(1 + 0.01 * 2)


def test_the_running_mean_is_a_plain_one_at_first():
    guard = Guard(spike=2.0)
    for loss in (1.0, 3.0, 8.0):
        guard.record_step(loss, 1.0)
    assert guard.mean_loss == pytest.approx(4.0)


def test_a_spike_limit_of_zero_disables_the_check():
    guard = Guard(spike=0.0)
    for _ in range(200):
        guard.record_step(1.0, 1.0)
    assert guard.skip_reason(1e9, 1e9) is None
    assert guard.skip_reason(float("nan"), 1.0) == "the loss is nan"


def test_the_average_moves_by_one_minus_the_decay():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Elements 1 and 2 of the fragment are this rank's.
    fragment = Fragment("w", (4,), 0, weights, (1, 2), weights, 0)
    ema = WeightEMA(0.75, [fragment])
    assert ema.averages[0].tolist() == [2.0, 3.0]
    weights += 4.0
    ema.update(1)
    assert ema.averages[0].tolist() == [3.0, 4.0]  # 0.75 * 2 + 0.25 * 6, 0.75 * 3 + 0.25 * 7
    ema.update(2)
    assert ema.averages[0].tolist() == [3.75, 4.75]


def test_the_decay_of_a_short_training_grows_from_one_tenth():
    weights = torch.tensor([0.0])
    ema = WeightEMA(0.25, [Fragment("w", (1,), 0, weights, (0, 1), weights, 0)], warmup=True)
    weights += 1.0
    remaining = []
    for step in (1, 2, 3, 4, 5):
        ema.update(step)
        remaining.append(1 - ema.averages[0].item())
    # What remains of the start: times 1 / 10, 2 / 11, 3 / 12, and 0.25 from then on instead of 4 / 13 and 5 / 14.
    assert remaining == pytest.approx([0.1, 0.2 / 11, 0.05 / 11, 0.0125 / 11, 0.003125 / 11], abs=1e-6)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1)
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0


def test_matrices_that_are_not_weights_of_linear_maps_do_not_decay():
    model = torch.nn.ParameterDict({"queries": torch.zeros(3, 4), "linear_weight": torch.zeros(2, 2)})
    decayed, plain = build_optimizer(model, 1.0, (0.9, 0.99), 1e-8, 0.1).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 2)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3, 4)]


def test_skipped_steps_are_counted_until_one_is_taken():
    guard = Guard(spike=0.0)
    counts = []
    for skipped in (True, True, False, True, False, False, True, True, True):
        guard.record_skip() if skipped else guard.record_step(1.0, 1.0)
        counts.append(guard.in_a_row)
    assert counts == [1, 2, 0, 1, 0, 0, 1, 2, 3]


def test_lines_past_the_step_and_incomplete_lines_are_dropped(tmp_path):
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
    commit.commit(folder, {"position": {"samples": 48}}, {"state/weights": commit.entry(weights)})
    return folder


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    good, changed, truncated = (_checkpoint(tmp_path, step) for step in (5, 8, 9))
    (truncated / "state" / "weights").write_bytes(b"x" * 9)
    (changed / "state" / "weights").write_bytes(b"x" * 9 + b"y")
    (tmp_path / "checkpoints" / "step_00000012" / "state").mkdir(parents=True)  # no commit marker
    (tmp_path / "checkpoints" / ".staging_step_00000013").mkdir()
    assert "9 bytes instead of 10" in commit.problem(truncated)
    assert commit.problem(changed) is None
    assert "sha256" in commit.problem(changed, hashes=True)
    assert commit.problem(good, hashes=True) is None
    assert newest(tmp_path) == good


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', "{", "null"])
def test_an_unreadable_marker_is_a_damaged_checkpoint(tmp_path, text):
    folder = _checkpoint(tmp_path, 5)
    (folder / commit.MARKER).write_text(text)
    assert "unreadable COMMIT.json" in commit.problem(folder)


def test_a_changed_marker_is_detected(tmp_path):
    marker = _checkpoint(tmp_path, 5) / commit.MARKER
    marker.write_text(marker.read_text().replace('"samples": 48', '"samples": 40'))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        newest(tmp_path)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
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
def test_rank_discovery(env, place):
    launch = Launch.from_env(env)
    assert (launch.rank, launch.size, launch.local_rank) == place
