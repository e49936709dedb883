"""``python -m tests.fuzz TARGET --seconds N``: run one target on mutations of its corpus.

With atheris (extra ``fuzz``) coverage guides the mutations, and new inputs are added to ``--corpus``; without it, or
with ``--driver mutations``, they are random. Both end with status 1 at an exception that is not expected, at an input
that takes over five seconds, and when the memory exceeds 1 GiB above that of the idle process. The input is written to
``--artifacts``. ``--json`` adds the figures of the run to a file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, expected_errors, folder

CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT = 64 * 1024
MAX_ADDED = 16 * 1024  # bytes of an input that is added to the corpus
MAX_SECONDS = 5.0
MAX_MIB = 1024


class Runner:
    """Runs a target on inputs, and keeps the figures."""

    def __init__(self, target: Callable[[bytes], None], artifacts: Path) -> None:
        self._target, self._artifacts = target, artifacts
        self._base = _peak_mib()
        self.executions, self.slowest, self.finding = 0, 0.0, ""
        self.max_seconds, self.max_mib = MAX_SECONDS, MAX_MIB

    def __call__(self, data: bytes) -> None:
        # Processor time: other processes must not make an input slow. The timeout of libFuzzer and of the tests is wall
        # time.
        started = time.process_time()
        try:
            with expected_errors():
                self._target(data)
        except BaseException as error:
            self.finding = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
            self._keep(data)
            raise
        self.executions += 1
        taken = time.process_time() - started
        if taken > self.slowest:
            self.slowest = taken
            if taken > self.max_seconds:
                self.finding = f"took {taken:.1f} s"
                self._keep(data)
                raise TimeoutError(self.finding)
        if self.used_mib > self.max_mib:
            self.finding = f"used {self.used_mib} MiB"
            self._keep(data)
            raise MemoryError(self.finding)

    @property
    def used_mib(self) -> int:
        """Peak memory above that of the process before the first input."""
        return _peak_mib() - self._base

    def figures(self, seconds: float) -> dict[str, Any]:
        return {
            "executions": self.executions,
            "seconds": round(seconds),
            "peak_mib": _peak_mib(),
            "peak_above_idle_mib": self.used_mib,
            "slowest_input_s": round(self.slowest, 3),
            "finding": self.finding,
        }

    def _keep(self, data: bytes) -> None:
        self._artifacts.mkdir(parents=True, exist_ok=True)
        path = self._artifacts / f"finding-{abs(hash(data)):016x}"
        path.write_bytes(data)
        print(f"finding: {self.finding}; input in {path}", file=sys.stderr, flush=True)


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_corpus(*folders: Path) -> list[bytes]:
    """The inputs in folders, in a fixed order."""
    return [p.read_bytes() for folder in folders if folder.is_dir() for p in sorted(folder.iterdir())]


def run_mutations(runner: Runner, inputs: list[bytes], seconds: float, seed: int) -> None:
    """The corpus, then random mutations of it until ``seconds`` have passed."""
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    for data in inputs:
        runner(data)
    while time.monotonic() < deadline:
        data = rng.choice(inputs)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = mutate(data, rng, rng.choice(inputs))
        runner(data[:MAX_INPUT])


def run_atheris(
    name: str, artifacts: Path, new: Path, seconds: float, report: Callable[[Runner, float], None]
) -> None:
    """libFuzzer's loop; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["maestro_scale"]):
        for data in read_corpus(CORPUS / name):  # imports what the target imports, instrumented
            with expected_errors():
                TARGETS[name](data)
    runner = Runner(TARGETS[name], artifacts)
    started = time.monotonic()

    def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 3 == 0:
            return atheris.Mutate(data, max_size)
        return mutate(data, random.Random(seed))[:max_size]

    def on_input(data: bytes) -> None:
        runner(data)
        # libFuzzer's own end skips Python's, and with it the report; an exit in here counts as a crash.
        if time.monotonic() - started > seconds:
            report(runner, time.monotonic() - started)
            shutil.rmtree(folder(), ignore_errors=True)
            os._exit(0)

    new.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    options = [
        sys.argv[0],
        str(new),
        str(CORPUS / name),
        f"-max_len={MAX_INPUT}",
        "-timeout=10",
        f"-rss_limit_mb={_peak_mib() + 2 * MAX_MIB}",
        f"-artifact_prefix={artifacts}/",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(options, on_input, custom_mutator=custom_mutator)
    try:
        atheris.Fuzz()
    finally:
        if runner.finding:
            report(runner, time.monotonic() - started)


def minimise(name: str, inputs: list[bytes], max_bytes: int) -> list[bytes]:
    """Inputs, the smallest first, that together execute every line of the package that all of them execute."""
    seen: set[tuple[str, int]] = set()
    chosen = []
    for data in sorted(inputs, key=len):
        lines: set[tuple[str, int]] = set()

        def trace(frame: Any, event: str, _: Any, lines: set[tuple[str, int]] = lines) -> Any:
            if "maestro_scale" not in frame.f_code.co_filename:
                return None
            lines.add((frame.f_code.co_filename, frame.f_lineno))
            return trace  # the function of this iteration

        sys.settrace(trace)
        try:
            with expected_errors():
                TARGETS[name](data)
        finally:
            sys.settrace(None)
        if lines - seen and len(data) <= max_bytes:
            seen |= lines
            chosen.append(data)
    return chosen


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--driver", choices=("atheris", "mutations"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="folder for new inputs (atheris)")
    parser.add_argument("--artifacts", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--json", type=Path, help="file of figures by target, to update")
    parser.add_argument(
        "--add", type=Path, help="add inputs of a folder that reach new lines to the corpus, and end"
    )
    args = parser.parse_args(argv)
    if args.add:
        known = read_corpus(CORPUS / args.target)
        for data in minimise(args.target, [*known, *read_corpus(args.add)], MAX_ADDED):
            if data not in known:
                (CORPUS / args.target / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        return 0
    has_atheris = importlib.util.find_spec("atheris") is not None
    driver = args.driver or ("atheris" if has_atheris else "mutations")

    def report(runner: Runner, seconds: float) -> None:
        figures = {"driver": driver, **runner.figures(seconds)}
        print(json.dumps({args.target: figures}), flush=True)
        if args.json:
            known = json.loads(args.json.read_text()) if args.json.exists() else {}
            args.json.write_text(json.dumps({**known, args.target: figures}, indent=1, sort_keys=True) + "\n")

    if driver == "atheris":
        new = args.corpus or args.artifacts / "corpus" / args.target
        run_atheris(args.target, args.artifacts / args.target, new, args.seconds, report)
        return 0
    inputs = read_corpus(CORPUS / args.target)
    for data in inputs[:3]:  # imports belong to the idle process
        with expected_errors():
            TARGETS[args.target](data)
    runner = Runner(TARGETS[args.target], args.artifacts / args.target)
    started = time.monotonic()
    try:
        run_mutations(runner, inputs, args.seconds, args.seed)
    finally:
        report(runner, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
