"""Forked child processes of a study and of quickstart: output to a log, end with the parent, forwarded signals.

A cell trains for minutes, and importing torch, DeepSpeed and MLflow takes tens of seconds of CPU time. So the command
imports them once and forks: one process per cell, and in it one per stage, so that each training and evaluation starts
from the same state as in a process of its own. The parents never compute: they start no threads and use no GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from maestro_scale.entry import error_line, print_error
from maestro_scale.parent_death import request_signal

STOPPED = 143
"""Exit code of a process that ended because it was asked to."""
_GRACE_S = 120.0  # for a training to save a checkpoint, before SIGKILL
_POLL_S = 0.05
_CALL_S = 5.0  # between calls of ``while_running``
_CODE = Path(__file__).parents[1]


class StopFlag:
    """Set by SIGTERM, SIGINT and SIGUSR1; forwards SIGTERM to the current children."""

    def __init__(self) -> None:
        self.is_set = False
        self.children: set[int] = set()

    def install(self) -> StopFlag:
        """Install the handlers."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        for pid in tuple(self.children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def preload(threads: int) -> None:
    """Import what the stages need, once, before the forks. On the CPU only: DeepSpeed's import may use a GPU, which a
    forked process could not use again."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from maestro_scale.training.deepspeed_import import import_deepspeed

    import_deepspeed()
    from maestro_scale.tracking.mlflow_tracker import configure_mlflow

    configure_mlflow()
    import mlflow.tracking  # noqa: F401


def fork(work: Callable[[], int], log: Path | None, session: bool = False) -> int:
    """Start ``work()`` in a child process, whose exit code it returns; returns the process id.

    ``log``: file to append its output to; ``session``: in a session of its own, so that Ctrl-C in the terminal reaches
    the parent alone, which forwards it once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        request_signal(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(STOPPED)  # it ended before the request
        if session:
            os.setsid()
        if log is not None:
            _redirect(log)
        code = work()
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into its parent's code
        line = error_line(error)
        if line is None:
            traceback.print_exc()
        else:
            print_error(line)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no atexit handlers: they are those of the parent


def run_entry(name: str, words: list[str], threads: int) -> NoReturn:
    """Run train.py or evaluate.py (``name`` without suffix) with ``words`` in this process, and end it."""
    from maestro_scale import evaluate, train

    sys.argv = [str(_CODE / f"{name}.py"), *words]
    print(f"== {name}.py {' '.join(words)}", flush=True)
    import torch

    torch.set_num_threads(threads)
    code = train.main(words) if name == "train" else evaluate.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as training.distributed.hard_exit: DeepSpeed's threads must not delay the end


def device_kind() -> str:
    """Name of the GPU of this process, or CPU. Only in a process that trains or evaluates: it may initialise CUDA."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def wait(pid: int, stop: StopFlag, while_running: Callable[[], None] = lambda: None) -> int:
    """Exit code of a child (128 + signal if it was killed). A child that ignores the stop request for two minutes is
    killed. ``while_running`` is called every few seconds."""
    stop.children.add(pid)
    if stop.is_set:  # the signal came between fork and add
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline, called = None, time.monotonic()
    try:
        while (code := poll(pid)) is None:
            if stop.is_set and deadline is None:
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            if time.monotonic() - called > _CALL_S:
                while_running()
                called = time.monotonic()
            time.sleep(_POLL_S)
        return code
    finally:
        stop.children.discard(pid)


def poll(pid: int) -> int | None:
    """Exit code of a child; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def num_gpus() -> int:
    """Number of GPUs that torch can use."""
    # In a process of its own: counting may initialise CUDA, which the forked cells could not use again.
    script = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return int(found.stdout) if found.stdout.strip().isdigit() else 0


def last_error(log: Path) -> str:
    """The last error in a log, else its last line, for a message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            lines = [s for raw in file.read().decode(errors="replace").splitlines() if (s := raw.strip())]
    except OSError:
        return "no output"
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["no output"])[-1][:500]


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # The objects of the parent may write elsewhere than to the descriptors.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115 - stays open
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115 - stays open
