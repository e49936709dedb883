"""Runs the sections one after the other, each in its own process with a time limit, and collects their records."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections import SECTIONS, Section
from benchmarks.gpu_sections.record import ERROR, PASSED, SKIPPED, TIMEOUT, load_record

_REPO = Path(__file__).parents[2]
_STDERR_LINES = 25
_REHEARSAL_TIMES = 5
_MIN_S = 15.0  # a section is not started with less time
_NO_TIME = "no time left"


@dataclass
class Runner:
    """One run of the benchmark. ``budget_s``: of all sections together. ``out``: the JSON, rewritten after each."""

    work: Path
    out: Path
    rehearse: bool
    budget_s: float
    report: dict[str, Any] = field(default_factory=dict)

    def run(self, names: list[str]) -> dict[str, Any]:
        """Run the named sections, all if none is named; returns the report."""
        started = time.monotonic()
        wanted = [s for s in SECTIONS if not names or s.name in names]
        self.report = {"format": 1, "rehearsal": self.rehearse, "budget_s": self.budget_s, "sections": []}
        background: list[_Process] = []
        reason = ""
        self._save()  # a path that cannot be written should not show after the first section
        try:
            for section in wanted:
                left_s = self.budget_s - (time.monotonic() - started)
                if section.timed:
                    self._end(background)
                if reason or left_s < _MIN_S:
                    self._add(section, {"status": SKIPPED, "skipped": reason or _NO_TIME}, 0.0)
                    continue
                # A rehearsal runs on whatever cores a CI job has.
                limit_s = section.limit_s * (_REHEARSAL_TIMES if self.rehearse else 1)
                process = _Process.start(self, section, min(limit_s, left_s))
                # A rehearsal is not timed, and has one core.
                if section.background and not self.rehearse:
                    background.append(process)
                    continue
                self._collect(process)
                if section.name == "machine" and self.report["sections"][-1]["status"] == ERROR:
                    reason = "the section machine failed"
        finally:
            self._end(background)
            self.report["seconds"] = round(time.monotonic() - started, 1)
            self._save()
        return self.report

    @property
    def passed(self) -> bool:
        """Whether every required section passed, or does not apply here; in a rehearsal all are required."""
        required = [s for s in self.report["sections"] if s["required"]]
        return all(s["status"] in (PASSED, SKIPPED) and s.get("skipped") != _NO_TIME for s in required)

    def _collect(self, process: _Process) -> None:
        status, record = process.wait()
        found = load_record(process.record) or {"checks": [], "data": {}}
        self._add(process.section, {**found, **record, "status": status or found["status"]}, process.seconds)

    def _end(self, background: list[_Process]) -> None:
        """End what runs in the background; what it has measured so far counts."""
        while background:
            process = background.pop()
            if process.running:
                process.kill()
                found = load_record(process.record) or {"checks": [], "data": {}}
                note = {"status": PASSED, "skipped": "", "note": "ended before the timed sections"}
                self._add(process.section, {**found, **note}, process.seconds)
            else:
                self._collect(process)

    def _add(self, section: Section, record: dict[str, Any], seconds: float) -> None:
        head = {"name": section.name, "title": section.title, "required": section.required or self.rehearse}
        self.report["sections"].append({**head, "seconds": round(seconds, 1), **record})
        self._save()
        print(
            f"{section.name}: {record['status']} {record.get('skipped', '')}", f"{seconds:.1f} s", flush=True
        )

    def _save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.out.with_name(f".{self.out.name}.tmp")
        fresh.write_text(json.dumps(self.report, indent=1) + "\n")
        fresh.replace(self.out)


@dataclass
class _Process:
    """A running section, the leader of a session with its children."""

    section: Section
    process: subprocess.Popen[bytes]
    record: Path
    log: Path
    started: float
    limit_s: float
    seconds: float = 0.0

    @staticmethod
    def start(runner: Runner, section: Section, limit_s: float) -> _Process:
        record = (runner.work / "records" / f"{section.name}.json").resolve()
        record.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        log = record.with_suffix(".log")
        command = [sys.executable, "-m", "benchmarks.gpu_sections.child", section.entry, str(record)]
        command += [str(runner.work.resolve()), str(limit_s), *(["rehearse"] if runner.rehearse else [])]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                cwd=_REPO,
                env=_environment(runner),
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Process(section, process, record, log, time.monotonic(), limit_s)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> tuple[str, dict[str, Any]]:
        """(status, what to add to the record); status is empty where the record has it."""
        try:
            code = self.process.wait(max(0.0, self.started + self.limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            return TIMEOUT, {"error": f"not done after {self.limit_s:.0f} s", "stderr": self._tail()}
        self.kill()  # its children
        if code:
            return ERROR, {"error": f"exit code {code}", "stderr": self._tail()}
        return "", {}

    def kill(self) -> None:
        """Kill the process and its children."""
        self.seconds = time.monotonic() - self.started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _tail(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[-_STDERR_LINES:]


def _environment(runner: Runner) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_REPO), os.environ.get("PYTHONPATH", "")))),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DS_SKIP_CUDA_CHECK": "1",
        # Kept for the sections of one run: a section finds what `precompile` compiled.
        "TORCHINDUCTOR_CACHE_DIR": str((runner.work / "inductor").resolve()),
    }
    if runner.rehearse:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env
