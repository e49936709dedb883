"""Run benchmarks, check their aims, and write docs/performance.md.

    python -m benchmarks [NAME …]            # run all that need neither a GPU nor data, or those named
    python -m benchmarks [NAME …] --check    # exit code 1 where an aim is missed, or a run failed
    python -m benchmarks --recorded --check  # the same for the results in benchmarks/results, without a run
    python -m benchmarks --page              # write docs/performance.md from benchmarks/results, without a run
    python -m benchmarks NAME -- --rounds 5  # further options of one benchmark
    python -m benchmarks --list

Each benchmark is a command of its own (benchmarks/catalogue), runs in a process of its own and writes its result to
benchmarks/results. Exit code 2 if one could not run; the others still do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.catalogue import BENCHMARKS, FURTHER
from benchmarks.page import render, results_of
from benchmarks.protocol import Benchmark, Figure, missed, number
from benchmarks.record import write_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def run(benchmark: Benchmark, further: Sequence[str], work: Path, venv: Path, results: Path) -> bool:
    """Run one benchmark; whether it wrote a result. Its exit code is not asked: it may tell of a missed aim."""
    out = results / f"{benchmark.name}.json"
    before = out.stat().st_mtime_ns if out.exists() else None
    folder = work / (benchmark.folder or benchmark.name)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*benchmark.words(str(folder), str(out), str(venv)), *further]
    load, started = os.getloadavg()[0], time.monotonic()
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=False)
    if not out.exists() or out.stat().st_mtime_ns == before:
        print(f"{benchmark.name}: ended with {done.returncode} and without a result", file=sys.stderr)
        return False
    # Without the paths of this machine.
    command = " ".join([benchmark.shown(), *(Path(w).name if Path(w).is_absolute() else w for w in further)])
    write_run(results, benchmark.name, command, time.monotonic() - started, load)
    return True


def show(name: str, figures: Sequence[Figure]) -> None:
    """Print the figures of a result."""
    table = Table(title=name, title_justify="left")
    for column in ("figure", "median", "lowest", "highest", "aim"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for f in figures:
        aim = "" if f.aim is None else f"at {f.aim.at} {number(f.aim.bound)}{'' if f.met else ', missed'}"
        table.add_row(
            f"{f.name} {f.unit and f'({f.unit})'}", *map(number, (f.value, min(f.runs), max(f.runs))), aim
        )
    Console(width=150).print(table)


def show_list(benchmarks: Sequence[Benchmark]) -> None:
    """Print the catalogue."""
    table = Table()
    for column in ("name", "what", "minutes", "command"):
        table.add_column(column, justify="right" if column == "minutes" else "left")
    for b in benchmarks:
        table.add_row(b.name, b.title, f"{b.minutes:g}{'' if b.by_default else ', by name only'}", b.shown())
    Console(width=170).print(table)


def main(
    arguments: Sequence[str] | None = None,
    benchmarks: Sequence[Benchmark] = BENCHMARKS,
    results: Path = RESULTS,
    page: Path = PAGE,
) -> int:
    """Entry point; the exit code."""
    by_name = {b.name: b for b in benchmarks}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="print the benchmarks, and exit")
    parser.add_argument("--check", action="store_true", help="exit code 1 where an aim is missed")
    parser.add_argument("--recorded", action="store_true", help="take the recorded results, run nothing")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md, run nothing")
    parser.add_argument("--work", type=Path, help="folder for data, kept; default: a temporary one")
    parser.add_argument("--venv", type=Path, help="environment for other projects' loaders; default: in WORK")
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)
    args, further = parser.parse_args(given[:own]), given[own + 1 :]
    if further and len(args.names) != 1:
        parser.error("options after -- are of one benchmark: name it")
    if unknown := [name for name in args.names if name not in by_name]:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are: {', '.join(by_name)}")
    if args.list:
        show_list(benchmarks)
        return 0
    chosen = [by_name[n] for n in args.names] or [b for b in benchmarks if b.by_default or args.recorded]
    failed: list[str] = []
    if not (args.recorded or args.page):
        with tempfile.TemporaryDirectory() as temporary:
            work = (args.work or Path(temporary)).resolve()
            venv = (args.venv or work / "venv-peers").resolve()
            failed = [b.name for b in chosen if not run(b, further, work, venv, results)]
    if args.page:
        page.write_text(render(benchmarks, results, FURTHER))
        print(f"wrote {page}")
        return 0
    found = results_of(chosen, results)
    wrong = []
    for benchmark in chosen:
        if benchmark.name in found and (figures := list(benchmark.figures(found[benchmark.name]))):
            show(benchmark.name, figures)
            wrong += [f"{benchmark.name}: {line}" for line in missed(figures)]
    print("\n".join([f"missed: {line}" for line in wrong] or ["every aim is met"]))
    if failed:
        print(f"could not run: {', '.join(failed)}", file=sys.stderr)
        return 2
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
