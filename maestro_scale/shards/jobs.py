"""Jobs on worker processes: results in any order, progress as it comes, no worker outlives its parent."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.shards.errors import ShardsError

Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)
ReportFunction = Callable[[int, int], None]


class JobFunction(Protocol[Job, Result]):
    """What a worker does with one job; pickles. ``report(samples, bytes)``: what was done since last time."""

    def __call__(self, job: Job, report: ReportFunction) -> Result: ...


class WorkerError(ShardsError):
    """A worker process was killed, or failed in a way that nobody foresaw."""


def run_jobs(
    work: JobFunction, jobs: Sequence[Any], workers: int, report: ReportFunction
) -> Iterator[tuple[int, Any]]:
    """``(index, work(jobs[index]))`` as they finish, on up to ``workers`` processes; one: here, in order.

    The first failure stops everything and is raised: DatasetError and ShardsError as they are, any other as
    WorkerError with its traceback.
    """
    if min(workers, len(jobs)) <= 1:
        for index, job in enumerate(jobs):
            yield index, work(job, report)
        return
    # spawn: a forked child would share clients and locks with threads it does not have.
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker_loop, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = process
        yield from _distribute(pipes, jobs, report)
    finally:
        for pipe, process in pipes.items():
            pipe.close()
            process.terminate()
        for process in pipes.values():
            process.join()


def _distribute(
    pipes: dict[Connection, BaseProcess], jobs: Sequence[Any], report: ReportFunction
) -> Iterator[tuple[int, Any]]:
    queue = iter(enumerate(jobs))
    for pipe, item in zip(pipes, queue, strict=False):
        pipe.send(item)
    num_left = len(jobs)
    while num_left:
        for pipe in wait(list(pipes)):
            try:
                kind, *content = pipe.recv()
            except (EOFError, ConnectionResetError):
                process = pipes[pipe]
                process.join()
                raise WorkerError(_exit_message(process.exitcode)) from None
            if kind == "report":
                report(*content)
            elif kind == "failed":
                raise content[0]
            else:
                num_left -= 1
                following = next(queue, None)
                if following is not None:
                    pipe.send(following)
                yield content[0], content[1]


def _worker_loop(work: JobFunction, pipe: Connection) -> None:
    # Ctrl-C reaches the whole group; the parent decides, and its end of the pipe closes when it dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(samples: int, num_bytes: int) -> None:
        pipe.send(("report", samples, num_bytes))

    try:
        while True:
            index, job = pipe.recv()
            pipe.send(("done", index, work(job, report)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (DatasetError, ShardsError) as error:
        pipe.send(("failed", error))
    except Exception:  # noqa: BLE001 # it is told to the parent, which raises it
        pipe.send(("failed", WorkerError(f"a worker failed:\n{traceback.format_exc()}")))


def _exit_message(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        hint = "that is often the system, out of memory: use fewer workers"
    else:
        hint = "its own words are above; a script that starts workers must do so under `if __name__ == '__main__':`"
    return f"a worker process ended with exit code {exitcode}; {hint}"
