"""Process pool: runs jobs on worker processes, yields results as they finish, and leaves no process behind.

``concurrent.futures`` is not used because it cannot report progress from inside a job, nor stop a running one.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar, cast

from maestro_scale.datasets.spec import DatasetError
from maestro_scale.launcher_death import exit_with_parent
from maestro_scale.main_guard import check_main_guard
from maestro_scale.shards.errors import ShardsError

Job = TypeVar("Job")
Result = TypeVar("Result")
JobType = TypeVar("JobType", contravariant=True)
ResultType = TypeVar("ResultType", covariant=True)
ReportFunction = Callable[[int, int], None]
"""Called with the number of samples and bytes processed since the last call."""


class JobFunction(Protocol[JobType, ResultType]):
    """What a worker runs for one job. It is pickled to the worker and calls ``report`` with its progress."""

    def __call__(self, job: JobType, report: ReportFunction, /) -> ResultType: ...


class WorkerError(ShardsError):
    """A worker process was killed or raised an unexpected exception."""


def run_jobs(
    function: JobFunction[Job, Result], jobs: Sequence[Job], workers: int, report: ReportFunction
) -> Iterator[tuple[int, Result]]:
    """``(index, function(jobs[index]))`` in order of completion, on up to ``workers`` processes.

    With one worker, or one job, everything runs in this process, in order. The first failure stops all workers and
    is raised: DatasetError and ShardsError unchanged, any other exception as WorkerError with its traceback.
    """
    num_workers = min(workers, len(jobs))
    if num_workers <= 1:
        for index, job in enumerate(jobs):
            yield index, function(job, report)
        return
    check_main_guard("workers=1")
    # spawn, not fork: a forked child would inherit store clients and locks, but not the threads that serve them.
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(num_workers):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_worker_loop, args=(function, child_end), daemon=True)
            process.start()
            # Only the worker may hold its end: otherwise its death does not show as EOF at ours.
            child_end.close()
            pipes[parent_end] = process
        yield from _distribute(pipes, jobs, report)
    finally:
        for pipe, started in pipes.items():
            pipe.close()
            started.terminate()
        for started in pipes.values():
            started.join()


def _distribute(
    pipes: dict[Connection, BaseProcess], jobs: Sequence[Any], report: ReportFunction
) -> Iterator[tuple[int, Any]]:
    queue = iter(enumerate(jobs))
    for pipe, item in zip(pipes, queue, strict=False):
        pipe.send(item)
    num_left = len(jobs)
    while num_left:
        # A cast: wait() may also return sockets and descriptors, but it returns only what it was given.
        for pipe in cast(list[Connection], wait(list(pipes))):
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


def _worker_loop(function: JobFunction[Any, Any], pipe: Connection) -> None:
    # Ctrl-C is delivered to the whole process group. Only the parent handles it; workers end when its pipe closes, and
    # also within a long read if the parent is killed.
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(samples: int, num_bytes: int) -> None:
        pipe.send(("report", samples, num_bytes))

    try:
        while True:
            index, job = pipe.recv()
            pipe.send(("done", index, function(job, report)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (DatasetError, ShardsError) as error:
        pipe.send(("failed", error))
    except Exception:  # noqa: BLE001 # the parent raises it
        pipe.send(("failed", WorkerError(f"a worker failed:\n{traceback.format_exc()}")))


def _exit_message(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        hint = "often the system killed it because memory ran out: use fewer workers"
    else:
        hint = (
            "see its output above; a script that starts workers must do so under `if __name__ == '__main__':`"
        )
    return f"a worker process ended with exit code {exitcode}; {hint}"
