"""Check and measure maestro_scale on a machine with a GPU, in at most eight minutes, without network or data.

    python -m benchmarks.gpu                          # all sections, on a GPU
    python -m benchmarks.gpu --only machine parity    # some of them
    python -m benchmarks.gpu --rehearse               # all of them at tiny size on a CPU, as in CI
    python -m benchmarks.gpu --pack DIR --wheels .whl # copy what a bare machine needs

Each section runs in its own process with a time limit (benchmarks/gpu_sections), so a crash or a hang loses only that
section. Writes JSON after each section and prints tables. Exit code 1 if a required section
failed or was not reached in time, 2 if the files cannot be written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_sections import SECTIONS
from benchmarks.gpu_sections.pack import PackError, files_to_pack, list_files, pack
from benchmarks.gpu_sections.runner import Runner
from benchmarks.gpu_sections.table import print_report
from maestro_scale.entry import run_command

_RESULTS = Path(__file__).parent / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; nothing is measured")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[s.name for s in SECTIONS], metavar="SECTION"
    )
    parser.add_argument("--out", type=Path, help="JSON to write; default: benchmarks/results/gpu.json")
    parser.add_argument("--work", type=Path, help="folder for data, runs and logs; default: a temporary one")
    parser.add_argument(
        "--budget-s", type=float, help="seconds for all sections; default: 470, in a rehearsal 1800"
    )
    parser.add_argument(
        "--list-files", action="store_true", help="list what must travel, with its size, and exit"
    )
    parser.add_argument("--pack", type=Path, metavar="DIR", help="copy what must travel to DIR, and exit")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels that travel, too")
    args = parser.parse_args(argv)
    if args.out and args.out.is_dir():
        parser.error(f"--out {args.out} is a folder: name a file in it")
    if args.budget_s is not None and not args.budget_s > 0:
        parser.error(f"--budget-s {args.budget_s:g}: must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse(argv)
    if args.list_files or args.pack:
        try:
            files = files_to_pack(args.wheels)
            list_files(files)
            if args.pack:
                pack(files, args.pack)
        except PackError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    work = args.work or Path(tempfile.mkdtemp(prefix="maestro-gpu-"))
    # A rehearsal must not replace measurements.
    out = args.out or (work if args.rehearse else _RESULTS) / "gpu.json"
    try:
        runner = Runner(work, out, args.rehearse, args.budget_s or (1800.0 if args.rehearse else 470.0))
        report = runner.run(args.only)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print_report(report)
    print(f"{report['seconds']:.0f} s; {out}")
    return 0 if runner.passed else 1


if __name__ == "__main__":
    sys.exit(main())
