"""The command ``python -m tests.chaos``: rounds of fault injection until the time is up, and a report.

Exit code 1 if any sample was lost or repeated, a result was wrong, a start did not end, or ended without a clear cause.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from maestro_scale.training.run_dir import git_revision
from tests.chaos.findings import WRONG, Finding, NotRun, Outcome
from tests.chaos.report import Invocation, tables, write_page
from tests.chaos.round import Round
from tests.chaos.rounds import ROUNDS
from tests.chaos.site import Site

_CLONE_NEWNS = 0x20000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="no round starts after this time")
    parser.add_argument("--seed", type=int, help="all random choices; default: drawn, and printed")
    parser.add_argument("--kinds", nargs="+", choices=sorted(ROUNDS), help="kinds of rounds; default: all")
    parser.add_argument("--round", type=int, help="run this round of each kind only, to repeat a failure")
    parser.add_argument("--out", type=Path, help="page to write the figures into, e.g. docs/reliability.md")
    parser.add_argument(
        "--limit", type=float, default=180.0, help="seconds after which a start counts as a hang"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the folders of all rounds, not only of failed ones"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run rounds, print and write the figures; the exit code."""
    args = parse(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    if args.out is not None and not args.out.exists():
        raise SystemExit(f"{args.out} does not exist")
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell has ignored SIGINT, as it does for jobs
        signal.signal(number, _interrupt)
    _isolate_shared_memory()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {seed}, in {folder}", flush=True)
    started, site = time.monotonic(), Site(folder, args.limit)
    outcomes: list[Outcome] = []
    try:
        for kind, number in _schedule(args.kinds or sorted(ROUNDS), args.round, seed):
            if outcomes and time.monotonic() - started > 60 * args.minutes:
                break
            outcomes.append(run_round(site, kind, number, seed, args.keep))
    except KeyboardInterrupt:
        print("interrupted: the figures so far follow", flush=True)
    finally:
        site.close()
    again = shlex.join(["python", "-m", "tests.chaos", f"--minutes={args.minutes:g}", f"--seed={seed}"])
    again += f" --kinds {' '.join(args.kinds)}" if args.kinds else ""
    minutes = (time.monotonic() - started) / 60
    invocation = Invocation(again, seed, minutes, site.num_reference_starts, git_revision())
    print(tables(invocation, outcomes))
    if args.out is not None:
        write_page(args.out, invocation, outcomes)
    failed = [o for o in outcomes if o.findings]
    if not failed and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{len(failed)} of {len(outcomes)} rounds failed"
        + (f"; their folders are in {folder}" if failed else "")
    )
    return 1 if failed else 0


def run_round(site: Site, kind: str, number: int, seed: int, keep: bool) -> Outcome:
    """One round, which never raises; prints its outcome, and for a failure the command that repeats it."""
    r = Round(site, kind, number, seed)
    began = time.monotonic()
    try:
        ROUNDS[kind](r)
        r.close()
    except NotRun as reason:
        r.outcome.not_run = str(reason)
    except Exception as error:  # noqa: BLE001  # a mistake of the round itself must not end the invocation
        traceback.print_exc()
        r.found([Finding(WRONG, f"the round itself failed: {type(error).__name__}: {error}")])
    finally:
        r.abort()
    outcome = r.outcome
    outcome.seconds = time.monotonic() - began
    injected = ", ".join(f"{n} {name}" for name, n in sorted(outcome.injected.items())) or "no fault"
    state = f"not run: {outcome.not_run}" if outcome.not_run else "FAILED" if outcome.findings else "ok"
    print(
        f"{kind} {number}: {state}, {outcome.seconds:.0f} s, {outcome.starts} starts, {injected}", flush=True
    )
    for finding in outcome.findings:
        print(f"    {finding.kind}: {finding.text}")
    if outcome.findings:
        print(f"    repeat: python -m tests.chaos --seed={seed} --kinds {kind} --round={number}", flush=True)
    elif not keep:
        shutil.rmtree(r.folder, ignore_errors=True)
    return outcome


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _schedule(kinds: list[str], only: int | None, seed: int) -> Iterator[tuple[str, int]]:
    """(kind, number) of the rounds: every kind once in a random order, and again."""
    rng, number = random.Random(seed), only or 0
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            yield kind, number
        if only is not None:
            return
        number += 1


def _isolate_shared_memory() -> None:
    """Give this process and its children a /dev/shm of their own, where that is permitted: semaphores of other programs
    would look like leftovers."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        print(
            "/dev/shm is shared with other programs: their new files would count as left behind",
            file=sys.stderr,
        )
        return
    subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=False, capture_output=True)
