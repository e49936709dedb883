"""metrics.jsonl across kills: one line per step, replaced only if the repeated step differs."""

from __future__ import annotations

import pytest

from maestro_scale.training.metrics.metrics_file import MetricsFile


def line(step, loss=1.0, **more):
    return {"step": step, "loss": loss, "lr": 0.1, "samples_per_s": 5.0, **more}


@pytest.fixture
def killed(tmp_path):
    """Six steps and an incomplete line, to resume after step 4 of 8."""
    path = tmp_path / "metrics.jsonl"
    before = MetricsFile(path)
    before.resume_from(0, 8)
    for step in range(1, 7):
        assert before.append_step(line(step, 1 / step)) == line(step, 1 / step)
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    after = MetricsFile(path)
    after.resume_from(4, 8)
    return after


def test_a_repeated_step_keeps_its_first_line(killed):
    assert killed.append_step(line(5, 1 / 5, samples_per_s=9.0)) == line(5, 1 / 5)
    assert killed.append_step(line(6, 1 / 6 * (1 + 1e-6), samples_per_s=9.0)) == line(6, 1 / 6)
    assert killed.append_step(line(7, 1 / 7, samples_per_s=9.0)) == line(7, 1 / 7, samples_per_s=9.0)
    assert [x["step"] for x in killed.read()] == [1, 2, 3, 4, 5, 6, 7]
    assert [x["samples_per_s"] for x in killed.read()] == [5.0] * 6 + [9.0]


@pytest.mark.parametrize("other", [{"loss": 0.3}, {"loss": None}, {"loss": 1 / 5, "lr": 0.05}])
def test_a_repeated_step_that_differs_warns_and_replaces_the_lines(killed, caplog, other):
    repeated = {**line(5), **other}
    assert killed.append_step(repeated) == repeated
    assert "step 5 was repeated with" in caplog.text
    killed.append_step(line(6, 0.2))
    assert killed.read() == [*(line(s, 1 / s) for s in range(1, 5)), repeated, line(6, 0.2)]


def test_lines_past_the_end_of_a_shorter_run_are_dropped(killed):
    shorter = MetricsFile(killed.path)
    shorter.resume_from(4, 5)
    assert [x["step"] for x in shorter.read()] == [1, 2, 3, 4, 5]


def test_repeated_steps_between_kept_lines_write_none(killed):
    killed.rewind(6)
    other = MetricsFile(killed.path)
    other.resume_from(2, 9)
    assert other.append_step(line(3, 1 / 3)) == line(3, 1 / 3)
    other._before = {6: line(6, 1 / 6)}  # as if every third had been logged
    assert other.append_step(line(5, 1 / 5, lr=0.2)) is None
    assert other.append_step(line(6, 1 / 6)) == line(6, 1 / 6)
    assert other.append_step(line(7, 1 / 7)) == line(7, 1 / 7)
    steps = [x["step"] for x in other.read()]
    assert steps == sorted(steps)
