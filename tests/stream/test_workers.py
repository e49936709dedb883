"""Loader processes: signals, crashes and exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maestro_scale.stream.source import Source
from maestro_scale.stream.workers import LoaderError, _signals_blocked, start_fork_server

PROGRAM = """
import logging, os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import open_toy
from maestro_scale.stream.loader import TrainLoader

def main():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # Not print: a handler may interrupt the writing of another line, and its stream is not reentrant.
        signal.signal(number, lambda n, f: os.write(1, f"got {signal.Signals(n).name}\\n".encode()))
    shards, cache = Path(sys.argv[2]), Path(sys.argv[3])
    loader = TrainLoader([open_toy(shards, cache)], 0, 4, 16, 4, workers=2)
    steps = loader.steps(0, 10**9)
    print("started", flush=True)
    for line in sys.stdin:
        if line.strip() == "workers":
            print(*(w.pid for p in loader._pipelines for w in p._results._workers), flush=True)
        elif line.strip() == "close":
            loader.close()
            print("closed", flush=True)
            steps = loader.steps(0, 10**9)
        else:
            print("step", next(steps).step, flush=True)

if __name__ == "__main__":
    main()
"""


class Program:
    """The program above, in a process group of its own; told what to do line by line."""

    def __init__(self, path: Path, source: Source) -> None:
        path.write_text(PROGRAM)
        folders = [str(Path(__file__).parent), source.store.url, str(source.store.cache_dir)]
        self.process = subprocess.Popen(
            [sys.executable, str(path), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.read() == "started"

    def read(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.read()
        while answer.startswith("got"):
            answer = self.read()
        return answer

    def workers(self) -> list[int]:
        return [int(p) for p in self.ask("workers").split()]


@pytest.fixture
def program(toy: Source, tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path / "program.py", toy)
    yield program
    program.process.kill()
    program.process.communicate()


def members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, IndexError, ValueError):
            continue
        if entry.name.isdigit() and int(of) == group and state not in "ZX":
            found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


def test_workers_ignore_signals_of_a_scheduler_and_exit_with_their_parent(program: Program):
    group = program.process.pid
    assert program.ask("next") == "step 1"
    workers = program.workers()
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(group, number)
    for step in range(2, 40):
        assert program.ask("next") == f"step {step}"
    assert program.workers() == workers
    program.process.kill()
    wait_until(lambda: not members(group), 30)


@pytest.mark.slow
def test_neither_a_hanging_nor_a_killed_worker_blocks_the_program(program: Program):
    program.ask("next")
    os.kill(program.workers()[1], signal.SIGSTOP)
    started = time.monotonic()
    assert program.ask("close") == "closed"
    assert time.monotonic() - started < 8
    assert program.ask("next") == "step 1"
    os.kill(program.workers()[0], signal.SIGKILL)
    started = time.monotonic()
    while program.ask("next").startswith("step"):
        pass
    _, errors = program.process.communicate(timeout=20)
    assert time.monotonic() - started < 20
    last = errors.strip().splitlines()[-1]
    assert "LoaderError" in last
    assert "a loader process died" in last
    assert program.process.returncode == 1
    wait_until(lambda: not members(program.process.pid), 30)


def test_an_interrupt_at_the_start_of_processes_leaves_no_signal_blocked(monkeypatch):
    real = signal.pthread_sigmask
    before = real(signal.SIG_BLOCK, ())

    def interrupted(how, mask):
        real(how, mask)
        if mask:
            raise KeyboardInterrupt
        return before

    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), _signals_blocked():
            pass
        assert real(signal.SIG_BLOCK, ()) == before
    finally:
        real(signal.SIG_SETMASK, before)


SERVER = """
import multiprocessing
from types import SimpleNamespace
from maestro_scale.stream.workers import start_fork_server

if __name__ == "__main__":
    start_fork_server([SimpleNamespace(store=SimpleNamespace(url=u)) for u in ("/a/folder", "s3://bucket/shards")])
    ask = "import sys; print('s3fs' in sys.modules, 'maestro_scale.stream.workers' in sys.modules)"
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(ask,))
    process.start()
    process.join()
"""


def test_the_client_of_a_store_is_imported_once_for_all_workers(tmp_path: Path):
    (tmp_path / "server.py").write_text(SERVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "server.py"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True True\n", done.stderr


def test_a_temporary_folder_with_too_long_a_path_is_reported(tmp_path: Path, monkeypatch):
    from multiprocessing import forkserver, process

    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(forkserver, "_forkserver", forkserver.ForkServer())  # none is running yet
    monkeypatch.setattr(forkserver, "ensure_running", forkserver._forkserver.ensure_running)
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(folder))
    with pytest.raises(LoaderError, match=r"path too long.*: set TMPDIR to a writable folder"):
        start_fork_server([])
