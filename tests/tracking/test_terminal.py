"""A bar on a terminal, plain lines in a log or under SLURM, and nothing on other ranks."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from maestro_scale.tracking.terminal import TerminalProgress, progress
from maestro_scale.training.observer import RunInfo

CURSOR = "\x1b["


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def shown(monkeypatch, request):
    """Runs an action; returns what it writes to standard error, a terminal or not, in a SLURM job or not."""
    is_terminal, in_job = request.param
    for name in ("SLURM_JOB_ID", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if in_job:
        monkeypatch.setenv("SLURM_JOB_ID", "77")

    def show(action) -> str:
        with redirect_stderr(Stream(is_terminal)) as stream:
            action()
        return stream.getvalue()

    return show


terminal = pytest.mark.parametrize("shown", [(True, False)], ids=["terminal"], indirect=True)
plain = pytest.mark.parametrize("shown", [(False, False), (True, True)], ids=["log", "slurm"], indirect=True)


def train(tmp_path, losses, first=0, step_s=0.1):
    def run() -> None:
        observer, last = TerminalProgress("tiny"), first + len(losses)
        observer.started(RunInfo(tmp_path, first, last, 8))
        for step, loss in enumerate(losses, first + 1):
            observer.logged({"step": step, "loss": loss, "samples_per_s": 12.0, "step_s": step_s})
        observer.finished("done")

    return run


def command(rank=0):
    def run() -> None:
        with progress("shard", "samples", rank) as update:
            for done in range(1, 11):
                update(done, 10, done * 1_000_000)

    return run


@terminal
def test_a_bar_on_a_terminal(shown, tmp_path):
    for text, words in (
        (shown(train(tmp_path, [0.5, None])), ("2/2", "12.0 samples/s")),
        (shown(command()), ("10/10", "10 MB")),
    ):
        assert CURSOR in text
        for word in words:
            assert word in text


@plain
def test_lines_of_a_run(shown, tmp_path):
    assert shown(train(tmp_path, [0.5, None], first=2, step_s=90.0)).splitlines() == [
        f"tiny: from step 2 to step 4, in {tmp_path}",
        "step 3/4  loss 0.5000  12.0 samples/s  1:30 left",
        "step 4/4  skipped  12.0 samples/s  0:00 left",
    ]
    many = shown(train(tmp_path, [0.5] * 100)).splitlines()
    assert [line.split()[1] for line in many[1:]] == ["1/100", "100/100"]  # seconds apart, and the last


@plain
def test_lines_of_a_command(shown):
    (line,) = shown(command()).splitlines()
    assert line.startswith("shard: 10/10 samples, 10 MB, ")
    assert line.endswith(" 0:00 left")


@pytest.mark.parametrize("shown", [(False, False), (True, False), (True, True)], indirect=True)
def test_other_ranks_show_nothing(shown):
    assert shown(command(rank=1)) == ""
