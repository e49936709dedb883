"""Unit tests of schedules, optimizer, guard, average, retention, markers and rank discovery."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from maestro_scale.training.binding import Launch
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.ema import WeightEMA
from maestro_scale.training.fragments import Fragment
from maestro_scale.training.guard import Guard
from maestro_scale.training.hooks.garbage_collection import GarbageCollectionHook
from maestro_scale.training.run_dir import JsonLines, RunDirError, lock


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


def test_an_average_of_epochs_takes_in_the_last_weights_of_each():
    weights = torch.tensor([0.0])
    ema = WeightEMA(0.75, [Fragment("w", (1,), 0, weights, (0, 1), weights, 0)], every=3)
    found = []
    for step in range(1, 8):
        weights += 4.0
        ema.update(step)
        found.append(ema.averages[0].item())
    # After step 3 the weight is 12, after step 6 it is 24: 0.25 * 12 = 3, then 0.75 * 3 + 0.25 * 24 = 8.25.
    assert found == [0, 0, 3, 3, 3, 8.25, 8.25]


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
