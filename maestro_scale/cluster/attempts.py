"""Whether a SLURM job is requeued after its tasks exited; used by ``slurm/pretrain_multinode.sh``.

Imports no torch: it runs in the batch script after a failure, where seconds count and torch may be what fails.

``python -m maestro_scale.cluster.attempts decide --run_dir …``: exit code 0 finished, 10 requeue, 1 gave up.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from maestro_scale import untrusted

FINISHED, GAVE_UP, REQUEUE = 0, 1, 10
_STEP = re.compile(r"step_(\d{8,})")
_ERROR_LINE = re.compile(r"^(error|\w*(Error|Exception)\b)|No space left|Killed|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Attempt:
    """One start of a job that exited before the run was finished; a line of ``attempts.jsonl``.

    ``start``: number of earlier starts of the job; ``step``: of the newest checkpoint at the exit, 0 if there is none;
    ``status``: exit status of srun; ``asked``: whether the job was asked to stop (time limit, preemption, signal).
    """

    job: str
    start: int
    step: int
    status: int
    asked: bool


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; 0 if there is none."""
    folders = (run_dir / "checkpoints").glob("step_*/COMMIT.json")
    return max((int(m[1]) for f in folders if (m := _STEP.fullmatch(f.parent.name))), default=0)


def consecutive_failures(attempts: list[Attempt], job: str, step: int) -> int:
    """Number of latest attempts that the job failed in a row without a checkpoint after ``step``."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job != job or attempt.asked or attempt.step != step:
            break
        count += 1
    return count


def find_errors(logs: Path, max_lines: int = 6) -> list[str]:
    """Lines of the ranks' logs that explain the exit, as "LOG: LINE"; lines that begin with "error" come first, and
    those of ranks that only lost another rank last."""
    first_log: dict[str, str] = {}  # all ranks often fail with the same line: keep the first
    for log in sorted(logs.glob("rank-*.log")):
        for line in log.read_text(errors="replace").splitlines():
            line = line.strip()
            if _ERROR_LINE.search(line):
                first_log.setdefault(line[:400], log.name)
    lines = sorted(first_log, key=lambda line: (": lost " in line, not line.startswith("error")))
    return [f"{first_log[line]}: {line}" for line in lines[:max_lines]]


def decide(run_dir: Path, logs: Path, attempt: Attempt, max_failures: int) -> tuple[int, str]:
    """(exit code, message) after the tasks exited. An unfinished attempt is added to ``run_dir/attempts.jsonl``.

    The job gives up after ``max_failures`` failures in a row without a newer checkpoint: requeueing such a failure
    (bad input, a bug) would loop for ever, whereas one failure after progress is probably a node.
    """
    try:
        outcome = untrusted.read_record(run_dir / "outcome.json")
    except (OSError, ValueError):
        outcome = {}
    if outcome.get("reason") == "done":
        return FINISHED, f"done: {outcome.get('step')} steps, in {run_dir}"
    file = run_dir / "attempts.jsonl"
    earlier = _read_attempts(file)
    stopped = outcome.get("reason") == "stopped"
    # STOP is a user's request to end the run. Any other stop is the signal before the time limit or a preemption, after
    # which the run must resume, also where the signal reached the ranks but not the batch script.
    if stopped and not attempt.asked and "STOP" in str(outcome.get("why")):
        return (
            FINISHED,
            f"stopped by {outcome.get('why')} after step {outcome.get('step')}; "
            "submit the same command again to resume",
        )
    attempt = Attempt(**{**asdict(attempt), "asked": attempt.asked or stopped})
    with file.open("a") as sink:
        sink.write(json.dumps(asdict(attempt)) + "\n")
    if attempt.asked:  # not a failure: a long run has any number of time limits
        return REQUEUE, f"saved at step {attempt.step}; the run will resume"
    errors = (
        "\n".join(f"  {line}" for line in find_errors(logs)) or f"  no error message in the logs; see {logs}"
    )
    num_failures = consecutive_failures([*earlier, attempt], attempt.job, attempt.step)
    if num_failures >= max_failures:
        return GAVE_UP, (
            f"{errors}\nerror: failed {num_failures} times without a checkpoint after step {attempt.step}: giving up. "
            f"Fix the errors above (complete logs: {logs}) and submit again to resume from step {attempt.step}"
        )
    return (
        REQUEUE,
        f"{errors}\nfailed {num_failures} of {max_failures} times after step {attempt.step} (status {attempt.status})",
    )


def _read_attempts(file: Path) -> list[Attempt]:
    """The attempts in a file; empty if there is none. Damaged lines are skipped: the job must be requeued anyway."""
    attempts = []
    for line in untrusted.read_json_lines(file) if file.exists() else ():
        with contextlib.suppress(untrusted.InputError):
            attempts.append(untrusted.from_builtins(Attempt, line))
    return attempts


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    action: Annotated[Literal["decide"], typer.Argument()],
    run_dir: Annotated[Path, typer.Option("--run_dir")],
    logs: Annotated[Path, typer.Option()],
    status: Annotated[int, typer.Option()],
    asked: Annotated[int, typer.Option()],
    max_failures: Annotated[int, typer.Option("--max_failures")],
) -> None:
    """The command line, see the module docstring."""
    attempt = Attempt(
        job=os.environ.get("SLURM_JOB_ID", ""),
        start=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        step=newest_step(run_dir),
        status=status,
        asked=bool(asked),
    )
    code, message = decide(run_dir, logs, attempt, max_failures)
    print(message, flush=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
