"""Fork server of benchmarks/mutation.py: runs the tests of one module against each of its mutants, in memory.

Third-party packages (torch, numpy, scikit-learn, …) are imported once; each mutant is a fork that imports the project
with the mutated source in place of the module, and runs pytest. The source on disk is never changed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OWN = {"maestro_scale", "tests", "testkit", "conftest", "benchmarks", "__main__", "__mp_main__"}
_WALL_FACTOR = 10
Outcome = tuple[str, float]  # "killed", "survived" or "timeout"; seconds


class _MutatedModule(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Import hook that compiles ``source`` when module ``name`` is imported."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)


class Server:
    """Runs ``tests`` (files) against sources of one module of the checkout in the current folder."""

    def __init__(self, path: Path, tests: Sequence[str]) -> None:
        self._path, self._tests = path.resolve(), list(tests)
        self._name = ".".join(path.with_suffix("").parts)

    def preload(self) -> None:
        """Import here what the tests import from other packages, so that forks need not."""
        # A fork finds out, because the project itself must not be imported in this process: each fork imports it anew.
        # It runs the tests, since some modules are imported by a call only (sympy by torch.testing.assert_close).
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            self._run_tests(None, [])
            names = [n for n in sys.modules if n.partition(".")[0] not in OWN]
            with os.fdopen(writer, "w") as file:
                json.dump(names, file)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            names = json.load(file)
        os.waitpid(pid, 0)
        for name in names:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - modules that pytest creates; a fork imports or creates them itself
                continue
        gc.freeze()  # else every fork walks, and copies, what is imported here

    def outcome(self, source: str, limit_s: float) -> Outcome:
        """Result of the tests with ``source`` as the module; RuntimeError if pytest cannot run them at all.

        ``limit_s``: of processor time, so that a busy machine gives the same result; ten times that of wall time.
        """
        start = time.monotonic()
        if (pid := os.fork()) == 0:
            os.setpgid(0, 0)
            cpu_limit = math.ceil(limit_s)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
            os._exit(self._run_tests(source, ["--exitfirst", "--hypothesis-seed=0"]))
        while time.monotonic() - start < _WALL_FACTOR * limit_s:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                if code == 5:
                    raise RuntimeError(f"no test in {self._tests}")
                if code in (-signal.SIGXCPU, -signal.SIGKILL):
                    break
                return ("survived" if code == 0 else "killed"), time.monotonic() - start
            time.sleep(0.01)
        else:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return "timeout", limit_s

    def _run_tests(self, source: str | None, options: list[str]) -> int:
        import hypothesis
        import pytest

        for stream in (1, 2):
            os.dup2(
                os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT),
                stream,
            )
        if source is not None:
            sys.meta_path.insert(0, _MutatedModule(self._name, self._path, source))
        # Examples are the same for every mutant; a failing one is not reduced, which may take minutes.
        hypothesis.settings.register_profile(
            "mutation",
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
        hypothesis.settings.load_profile("mutation")
        try:
            return int(
                pytest.main(
                    [
                        "-q",
                        "-p",
                        "no:cacheprovider",
                        "--numprocesses=0",
                        "-p",
                        "no:unraisableexception",
                        *options,
                        *self._tests,
                    ]
                )
            )
        except BaseException:  # noqa: BLE001 - the mutant broke pytest itself
            return 1


def main() -> None:
    """Requests from stdin, one JSON object per line: {"source", "limit_s"}; replies: [outcome, seconds]."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    server = Server(Path(sys.argv[1]), sys.argv[2:])
    server.preload()
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(server.outcome(request["source"], request["limit_s"])) + "\n")


if __name__ == "__main__":
    main()
