"""What to do when the tasks of a job have ended: finished, requeue and go on, or give up. Imports no torch.

``run-dir`` prints where a run lives, or refuses its recipe; ``decide`` reads what the run left. Exit codes of
``decide``: 0 over, 10 requeue, 1 given up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FINISHED, GAVE_UP, REQUEUE = 0, 1, 10
_STEP = re.compile(r"step_(\d{8,})")
_ERROR_LINE = re.compile(r"^(error|\w*(Error|Exception)\b)|No space left|Killed|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Attempt:
    """One start of a job that ended without the run being over. ``step``: of the newest checkpoint then, 0 if none."""

    job: str
    start: int
    step: int
    status: int
    asked: bool


def newest_step(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 if there is none."""
    folders = (run_dir / "checkpoints").glob("step_*/COMMIT.json")
    return max((int(m[1]) for f in folders if (m := _STEP.fullmatch(f.parent.name))), default=0)


def consecutive_failures(attempts: list[Attempt], job: str, step: int) -> int:
    """How often in a row, lately, the job failed with no newer checkpoint than ``step``."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job != job or attempt.asked or attempt.step != step:
            break
        count += 1
    return count


def find_errors(logs: Path, most: int = 6) -> list[str]:
    """The telling lines of the ranks' logs, each with its log, those that say the most first."""
    found: dict[str, str] = {}
    for log in sorted(logs.glob("rank-*.log")):
        for line in log.read_text(errors="replace").splitlines():
            line = line.strip()
            if _ERROR_LINE.search(line):
                found.setdefault(line[:400], log.name)
    ours_first = sorted(found, key=lambda line: not line.startswith("error"))
    return [f"{found[line]}: {line}" for line in ours_first[:most]]


def decide(run_dir: Path, logs: Path, attempt: Attempt, max_failures: int) -> tuple[int, str]:
    """(exit code, what to tell) after the tasks ended; the attempt is noted in ``run_dir/attempts.jsonl``."""
    try:
        outcome = json.loads((run_dir / "outcome.json").read_text())
    except (OSError, ValueError):
        outcome = {}
    if outcome.get("reason") == "done":
        return FINISHED, f"done: {outcome['step']} steps, in {run_dir}"
    file = run_dir / "attempts.jsonl"
    earlier = [Attempt(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    stopped = outcome.get("reason") == "stopped"
    if stopped and not attempt.asked and "STOP" in outcome["why"]:
        return FINISHED, f"stopped by {outcome['why']} after step {outcome['step']}; submit again to go on"
    attempt = Attempt(**{**asdict(attempt), "asked": attempt.asked or stopped})
    with file.open("a") as sink:
        sink.write(json.dumps(asdict(attempt)) + "\n")
    if attempt.asked:
        return REQUEUE, f"saved at step {attempt.step}; to be continued"
    told = "\n".join(f"  {line}" for line in find_errors(logs)) or f"  nothing was said; see {logs}"
    failed = consecutive_failures([*earlier, attempt], attempt.job, attempt.step)
    if failed >= max_failures:
        return GAVE_UP, (
            f"{told}\nerror: failed {failed} times with no checkpoint after step {attempt.step}: given up. "
            f"Mend what the lines above say (all of it: {logs}) and submit again; it goes on from step {attempt.step}"
        )
    return (
        REQUEUE,
        f"{told}\nfailed {failed} of {max_failures} times after step {attempt.step} (status {attempt.status})",
    )


def _run_dir(arguments: list[str], num_ranks: int) -> int:
    from maestro_scale.recipe import RecipeError, check_world, load_recipe
    from maestro_scale.train import parse

    args = parse(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        check_world(recipe, num_ranks)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.run_dir or Path("runs") / recipe.name).absolute())
    return 0


def main(argv: list[str]) -> int:
    """The command line; see above."""
    if argv[:1] == ["run-dir"]:
        return _run_dir(argv[2:], int(argv[1]))
    parser = argparse.ArgumentParser(prog="attempts", allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--asked", type=int, required=True)
    parser.add_argument("--max_failures", type=int, required=True)
    args = parser.parse_args(argv[1:])
    attempt = Attempt(
        job=os.environ.get("SLURM_JOB_ID", ""),
        start=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        step=newest_step(args.run_dir),
        status=args.status,
        asked=bool(args.asked),
    )
    code, message = decide(args.run_dir, args.logs, attempt, args.max_failures)
    print(message, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
