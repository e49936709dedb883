"""Branch coverage of the package by the test suite, subprocesses and forks included.

    python -m benchmarks.coverage_run [--json F] [PYTEST ARGUMENTS]     # needs pip install -e '.[test]'

Without arguments the whole suite runs, on all cores.
`coverage` starts in every Python process through the settings in pyproject.toml (`[tool.coverage]`);
what a process that is killed had covered is lost. Prints the files below 90 % and writes all to
benchmarks/results/coverage.json, so a run of some folders overwrites the figures of the whole suite: give it --json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "coverage.json"
GOAL = 90.0


def measure(pytest_arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Exit code of pytest, and coverage's JSON report."""
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        environment = {
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **os.environ,
            "COVERAGE_FILE": str(Path(folder) / "coverage"),
            "COVERAGE_RCFILE": str(ROOT / "pyproject.toml"),
        }
        coverage = [sys.executable, "-m", "coverage"]
        command = [*coverage, "run", "-m", "pytest", *pytest_arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        subprocess.run([*coverage, "combine", "--quiet"], cwd=ROOT, env=environment, check=True)
        report = Path(folder) / "report.json"
        subprocess.run(
            [*coverage, "json", "--quiet", "-o", str(report)], cwd=ROOT, env=environment, check=True
        )
        return code, json.loads(report.read_text())


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """{"total", "files"}: per file statements, branches, their covered numbers, percentage, and uncovered lines."""

    def figures(summary: dict[str, Any]) -> dict[str, Any]:
        return {
            "statements": summary["num_statements"],
            "covered_statements": summary["covered_lines"],
            "branches": summary["num_branches"],
            "covered_branches": summary["covered_branches"],
            # Statements and branches together, as coverage reports it.
            "percent": round(summary["percent_covered"], 1),
        }

    files = {
        name: {**figures(entry["summary"]), "missing_lines": entry["missing_lines"]}
        for name, entry in sorted(report["files"].items())
    }
    total = figures(report["totals"])
    total["branch_percent"] = round(100 * total["covered_branches"] / max(total["branches"], 1), 1)
    return {"total": total, "files": files}


def main() -> None:
    """Measure, print what is below the goal, write the JSON file; exit code of pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments, pytest_arguments = parser.parse_known_args()
    code, report = measure(pytest_arguments)
    summary = summarise(report)
    arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    for name, figures in sorted(summary["files"].items(), key=lambda item: item[1]["percent"]):
        if figures["percent"] < GOAL:
            print(f"{figures['percent']:6.1f} %  {name}  lines {figures['missing_lines']}")
    total = summary["total"]
    print(f"{total['percent']} % of statements and branches, {total['branch_percent']} % of branches")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
