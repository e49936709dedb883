"""Mutation testing of the modules whose errors would be silent: sample order, masks, targets, scores, formats.

    python -m benchmarks.mutation [MODULE …] [--survivors]     # needs pip install -e '.[test,mutation]'

Mutants come from the operators of cosmic-ray, without those whose mutants say little (eleven replacements of every
binary operator; annotations), and from swaps of functions (``round`` for ``int``, ``min`` for ``max``). A mutant is
killed if a test of the module's files in ``TESTS`` fails, or, counted apart, if they exceed the time limit. The tests
run in a copy of the checkout, each mutant in a fork of a process that has imported torch and numpy before
(benchmarks/mutation_worker.py), which takes about a second.

``benchmarks/mutation_survivors.json`` states why a survivor cannot be killed; one without a reason is reported.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
REASONS = ROOT / "benchmarks" / "mutation_survivors.json"

TESTS: dict[str, list[str]] = {
    "stream/plan": ["tests/stream/test_plan.py"],
    "stream/rng": ["tests/stream/test_rng.py"],
    "stream/crops": ["tests/stream/test_crops.py"],
    "stream/dates": ["tests/stream/test_dates.py"],
    "stream/mixture": ["tests/stream/test_mixture.py"],
    "model/masking": ["tests/model/test_masking.py"],
    "model/targets": ["tests/model/test_targets.py"],
    "evaluation/metrics": ["tests/evaluation/test_metrics.py"],
    "evaluation/bootstrap": ["tests/evaluation/test_bootstrap.py"],
    "evaluation/probes/knn": ["tests/evaluation/test_knn.py"],
    "training/optimizer": ["tests/training/test_optimizer.py"],
    "shards/format/codec": ["tests/shards/test_codec_layout.py", "tests/shards/test_codec.py"],
    "training/checkpoint/commit": ["tests/training/test_commit.py"],
}
"""Module → the test files that must kill its mutants: below 10 s each, no training run."""

# (operator, replacement) of cosmic-ray's ReplaceBinaryOperator: one replacement for each operator.
_BINARY = (
    ("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"), ("FloorDiv", "Mul"), ("Mod", "FloorDiv"),
    ("Pow", "Mul"), ("LShift", "RShift"), ("RShift", "LShift"), ("BitAnd", "BitOr"), ("BitOr", "BitAnd"),
    ("BitXor", "BitOr"),
)  # fmt: skip
# Of ReplaceComparisonOperator: the boundary and the opposite.
_COMPARISON = (
    ("Lt", "LtE"), ("Lt", "GtE"), ("LtE", "Lt"), ("LtE", "Gt"), ("Gt", "GtE"), ("Gt", "LtE"), ("GtE", "Gt"),
    ("GtE", "Lt"), ("Eq", "NotEq"), ("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is"),
)  # fmt: skip
_OPERATORS = (
    *(f"ReplaceBinaryOperator_{old}_{new}" for old, new in _BINARY),
    *(f"ReplaceComparisonOperator_{old}_{new}" for old, new in _COMPARISON),
    *(
        "ReplaceUnaryOperator_USub_UAdd",
        "ReplaceUnaryOperator_Delete_Invert",
        "ReplaceUnaryOperator_Delete_Not",
    ),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot"),
    *("NumberReplacer", "ExceptionReplacer", "RemoveDecorator", "ZeroIterationForLoop"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
)
_SWAPS = {
    "round": "int", "min": "max", "max": "min", "argmin": "argmax", "argmax": "argmin", "any": "all", "all": "any",
    "ceil": "floor", "floor": "ceil", "zeros": "ones", "ones": "zeros", "sum": "max", "sorted": "list",
    "minimum": "maximum", "maximum": "minimum", "sqrt": "abs", "rsqrt": "abs",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """``change``: the changed lines as "before → after", which names the mutant together with ``line``."""

    operator: str
    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's source."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    skipped = _ranges_without_behaviour(source)
    for name in _OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        positions = [p for node in ast_nodes(get_ast(source)) for p in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            if any(first <= start < last for first, last in skipped):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is not None and _compiles(changed):
                yield Mutant(name, start[0], _change(source, changed), changed)
    yield from _swaps(source)


def _swaps(source: str) -> Iterator[Mutant]:
    """Calls of one function replaced by another, see ``_SWAPS``."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in _SWAPS:
            continue
        assert function.end_lineno is not None
        assert function.end_col_offset is not None
        line = lines[function.end_lineno - 1].encode()
        end = function.end_col_offset
        new = line[: end - len(name)] + _SWAPS[name].encode() + line[end:]
        changed = "".join([*lines[: function.end_lineno - 1], new.decode(), *lines[function.end_lineno :]])
        yield Mutant("SwapFunction", function.end_lineno, _change(source, changed), changed)


def _ranges_without_behaviour(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of annotations and type aliases, which are never evaluated or have no effect."""
    nodes: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            nodes.append(node.annotation)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes if n is not None
    ]


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _change(before: str, after: str) -> str:
    changed = [
        line
        for line in difflib.ndiff(before.splitlines(), after.splitlines())
        if line.startswith(("- ", "+ "))
    ]
    old = " ".join(line[2:].strip() for line in changed if line[0] == "-")
    return f"{old} → {' '.join(line[2:].strip() for line in changed if line[0] == '+')}"


def run_module(
    module: str, copy: Path, reasons: dict[str, str], jobs: int, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The entry of one module in the result. SystemExit if its tests fail without a mutation.

    ``before``: an earlier entry, of which only the survivors are run again, unless the module has changed since.
    """
    path = Path("maestro_scale") / f"{module}.py"
    source = (ROOT / path).read_text()
    start = time.monotonic()
    workers = [_Worker(copy, path, TESTS[module]) for _ in range(jobs)]
    outcome, baseline_s = workers[0].ask(source, 120.0)
    if outcome != "survived":
        raise SystemExit(f"{module}: {' '.join(TESTS[module])} must pass without a mutation: {outcome}")
    limit_s = 10.0  # of processor time; the tests take below 2 s
    queue = list(mutants(source))
    counts: Counter[str] = Counter()
    digest = hashlib.sha256(source.encode()).hexdigest()
    if before is not None and before["source_sha256"] == digest:
        again = {(s["operator"], s["change"]) for s in before["survivors"]}
        counts.update(killed=len(queue) - before["timeouts"], timeout=before["timeouts"])
        queue = [m for m in queue if (m.operator, m.change) in again]
        counts["killed"] -= len(queue)

    def share(number: int) -> list[tuple[Mutant, str]]:
        return [(m, workers[number].ask(m.source, limit_s)[0]) for m in queue[number::jobs]]

    with ThreadPoolExecutor(jobs) as pool:
        found = [pair for part in pool.map(share, range(jobs)) for pair in part]
    for worker in workers:
        worker.close()
    counts.update(outcome for _, outcome in found)
    total = counts.total()
    survivors = []
    for mutant, outcome in sorted(found, key=lambda pair: (pair[0].line, pair[0].operator)):
        if outcome == "survived":
            entry = {key: value for key, value in asdict(mutant).items() if key != "source"}
            survivors.append({**entry, "reason": reasons.get(f"{module}: {mutant.change}", "")})
    return {
        "tests": TESTS[module],
        "source_sha256": digest,
        "mutants": total,
        "killed": counts["killed"],
        "timeouts": counts["timeout"],
        "survived": counts["survived"],
        "killed_share": round((counts["killed"] + counts["timeout"]) / total, 4),
        "tests_s": round(baseline_s, 2),
        "wall_s": round(time.monotonic() - start, 1),
        "survivors": survivors,
    }


class _Worker:
    """One ``benchmarks.mutation_worker`` process."""

    def __init__(self, copy: Path, path: Path, tests: list[str]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "benchmarks.mutation_worker", str(path), *tests]
        self._process = subprocess.Popen(
            command, cwd=copy, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, source: str, limit_s: float) -> tuple[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"source": source, "limit_s": limit_s}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("benchmarks.mutation_worker ended; its error is above")
        outcome, seconds = json.loads(line)
        return outcome, seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def copy_checkout(target: Path) -> None:
    """Copy tracked and new files, as tests write beside their sources (caches, results)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def main() -> None:
    """Run the modules named, print a table and update their entries in the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all of them")
    parser.add_argument("--survivors", action="store_true", help="only those of the recorded result")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    arguments = parser.parse_args()
    unknown = set(arguments.modules) - set(TESTS)
    if unknown:
        parser.error(f"unknown module {', '.join(sorted(unknown))}; choose from {', '.join(TESTS)}")
    reasons = {
        f"{module}: {change}": reason
        for module, entries in (json.loads(REASONS.read_text())).items()
        for change, reason in entries.items()
    }
    result = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"modules": {}}
    print(
        f"{'module':28} {'mutants':>8} {'killed':>7} {'timeout':>8} {'survived':>9} {'share':>7} {'wall':>7}"
    )
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_checkout(Path(folder))
        for module in arguments.modules or TESTS:
            before = result["modules"].get(module) if arguments.survivors else None
            entry = run_module(module, Path(folder), reasons, arguments.jobs, before)
            result["modules"][module] = entry
            print(
                f"{module:28} {entry['mutants']:8} {entry['killed']:7} {entry['timeouts']:8} "
                f"{entry['survived']:9} {entry['killed_share']:7.1%} {entry['wall_s']:6.0f}s",
                flush=True,
            )
            _save(result, arguments.json)
    unexplained = [
        f"{module}:{s['line']}: {s['change']}"
        for module in arguments.modules or TESTS
        for s in result["modules"][module]["survivors"]
        if not s["reason"]
    ]
    print("\n".join([f"{len(unexplained)} survivors without a reason in {REASONS.name}", *unexplained]))


def _save(result: dict, path: Path) -> None:
    modules = {name: result["modules"][name] for name in TESTS if name in result["modules"]}
    total = {
        key: sum(m[key] for m in modules.values()) for key in ("mutants", "killed", "timeouts", "survived")
    }
    total["killed_share"] = round((total["killed"] + total["timeouts"]) / total["mutants"], 4)
    path.write_text(json.dumps({"total": total, "modules": modules}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
