"""Comparison of a disturbed run with an undisturbed one: state, metrics, samples, results, shards, output."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.chaos.findings import LOST, REPEATED, UNCLEAR, WRONG, Finding

MEASURED = (
    "time",
    "samples_per_s",
    "tokens_per_s",
    "data_wait_s",
    "step_s",
    "tflops",
    "mfu",
    "peak_memory_gib",
)
"""Fields of metrics.jsonl that are measured, besides data/…, system/… and eval/delay_s."""
RELATIVE_LOSS, RELATIVE_NORM, ABSOLUTE_WEIGHT = 1e-5, 1e-3, 1e-4
"""Tolerances on another number of ranks or ZeRO stage, as in tests/training/test_runs.py; weights after 24 steps."""
_TRACEBACK = re.compile(r"^.*Traceback \(most recent call last\).*$", re.MULTILINE)
_ERROR = re.compile(r"^error( \(rank \d+[^)]*\))?: .+$", re.MULTILINE)


def compare_runs(run: Path, reference: Path, exact: bool) -> list[Finding]:
    """Findings of a complete training against the reference; ``exact``: it had the same ranks and ZeRO stage."""
    findings = compare_samples(run, reference, in_order=exact)
    findings += compare_metrics(run, reference, exact)
    findings += compare_states(run, reference, exact)
    return findings


def compare_samples(run: Path, reference: Path, in_order: bool) -> list[Finding]:
    """Samples of each step that were lost or repeated, by the keys in ``audit/``; ``in_order``: also the order of keys
    on each rank, and the digests of the samples' pixels."""
    ours, theirs = audit_lines(run), audit_lines(reference)
    findings = []
    for step in sorted({line["step"] for lines in (*ours.values(), *theirs.values()) for line in lines}):
        have, want = _keys(ours, step), _keys(theirs, step)
        if lost := (want - have).total():
            findings.append(Finding(LOST, f"step {step} lacks {sorted((want - have).elements())[:4]}", lost))
        if more := (have - want).total():
            findings.append(
                Finding(REPEATED, f"step {step} has {sorted((have - want).elements())[:4]} too often", more)
            )
    if in_order and not findings and ours != theirs:
        findings.append(Finding(WRONG, "audit/ has another order or other digests of the samples"))
    return findings


def audit_lines(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of every file in ``audit/``."""
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run / "audit").glob("*.jsonl"))
    }


def compare_metrics(run: Path, reference: Path, exact: bool) -> list[Finding]:
    """Every step is logged once, with the same values."""
    ours, theirs = _metric_lines(run), _metric_lines(reference)
    steps, wanted = Counter(m["step"] for m in ours), Counter(m["step"] for m in theirs)
    findings = [
        Finding(WRONG, f"metrics.jsonl has step {s} {steps[s]} times")
        for s in steps | wanted
        if steps[s] != wanted[s]
    ]
    if not findings and [m["step"] for m in ours] != [m["step"] for m in theirs]:
        findings.append(Finding(WRONG, "the steps of metrics.jsonl are not in order"))
    by_step = {m["step"]: m for m in theirs}
    for line in ours:
        other = by_step.get(line["step"], {})
        different = [
            k for k in sorted(set(line) | set(other)) if not _same(k, line.get(k), other.get(k), exact)
        ]
        if other and different:
            values = ", ".join(f"{k} {line.get(k)} instead of {other.get(k)}" for k in different[:3])
            findings.append(Finding(WRONG, f"metrics of step {line['step']}: {values}"))
    return findings


def _metric_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _same(name: str, ours: Any, theirs: Any, exact: bool) -> bool:
    if name in MEASURED or name.startswith(("data/", "system/")) or name.endswith("delay_s"):
        return True
    if exact or not isinstance(ours, float) or not isinstance(theirs, float):
        return ours == theirs
    relative = RELATIVE_NORM if name == "grad_norm" else RELATIVE_LOSS
    return math.isclose(ours, theirs, rel_tol=relative, abs_tol=1e-12)


def compare_states(run: Path, reference: Path, exact: bool) -> list[Finding]:
    """The newest checkpoint: its position, guard and identity, and all tensors (weights, moments, average)."""
    ours, theirs = (sorted((r / "checkpoints").glob("step_*")) for r in (run, reference))
    # One more than the reference: a checkpoint is not pruned while it is copied to a mirror.
    if not ours or ours[-1].name != theirs[-1].name or len(ours) > len(theirs) + 1:
        return [Finding(WRONG, f"checkpoints {[p.name for p in ours]} instead of {[p.name for p in theirs]}")]
    findings = []
    marks = [json.loads((p[-1] / "COMMIT.json").read_text()) for p in (ours, theirs)]
    for key in ("position", "hooks") + (("guard",) if exact else ()):
        if marks[0].get(key) != marks[1].get(key):
            findings.append(
                Finding(WRONG, f"{key} of the checkpoint: {marks[0].get(key)}, not {marks[1].get(key)}")
            )
    have, want = full_tensors(ours[-1] / "state"), full_tensors(theirs[-1] / "state")
    if have.keys() != want.keys():
        return [*findings, Finding(WRONG, "the checkpoint has other tensors")]
    for key, tensor in want.items():
        difference = abs(have[key] - tensor).max() if tensor.size else 0.0
        limit = 0.0 if exact else ABSOLUTE_WEIGHT
        if (exact and have[key].tobytes() != tensor.tobytes()) or not difference <= limit:
            findings.append(Finding(WRONG, f"tensor {' of '.join(key)} differs by {difference:.3g}"))
    return findings


def full_tensors(state: Path) -> dict[tuple[str, str], Any]:
    """(kind, parameter): values as a flat array, put together from the files of all ranks."""
    from maestro_scale.interop.sharded_state import StateReader

    with StateReader(state) as reader:
        return {
            (kind, name): reader.read_full(kind, name).numpy().ravel()
            for kind in reader.kinds
            for name in reader.shapes
        }


def compare_json(
    path: Path, reference: Path, ignored: tuple[str, ...] = ("timings", "recipe")
) -> list[Finding]:
    """Two results.json, without times and paths."""
    if not path.exists():
        return [Finding(WRONG, f"{path.name} is missing")]
    ours, theirs = (json.loads(p.read_text()) for p in (path, reference))
    keys = sorted(k for k in set(ours) | set(theirs) if k not in ignored and ours.get(k) != theirs.get(k))
    return [
        Finding(WRONG, f"{path.name}: {k} is {str(ours.get(k))[:80]}, not {str(theirs.get(k))[:80]}")
        for k in keys
    ]


def compare_safetensors(path: Path, reference: Path) -> list[Finding]:
    """Two files of tensors, bit by bit."""
    if not path.exists():
        return [Finding(WRONG, f"{path.name} is missing")]
    ours, theirs = load_file(path), load_file(reference)
    same = ours.keys() == theirs.keys() and all(ours[k].tobytes() == theirs[k].tobytes() for k in ours)
    return [] if same else [Finding(WRONG, f"{path.name} has other tensors")]


def compare_files(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[Finding]:
    """Two folders or prefixes, byte by byte: missing, additional and different files."""
    findings = [Finding(WRONG, f"{name} is missing") for name in sorted(theirs.keys() - ours.keys())]
    findings += [Finding(WRONG, f"{name} is additional") for name in sorted(ours.keys() - theirs.keys())]
    both = sorted(ours.keys() & theirs.keys())
    return findings + [
        Finding(WRONG, f"{name} has other content") for name in both if ours[name] != theirs[name]
    ]


def files_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files directly in a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob(pattern)) if p.is_file()}


def check_success(code: int | None, output: str) -> list[Finding]:
    """A start that must succeed: exit code 0, no error, no traceback."""
    if code != 0:
        return [Finding(UNCLEAR, f"exit code {code} instead of 0: {_last_line(output)}")]
    return [
        Finding(UNCLEAR, f"exit code 0, but: {line}") for line in (*_tracebacks(output), *_errors(output))[:1]
    ]


def check_error(code: int | None, output: str, codes: tuple[int, ...], words: str) -> list[Finding]:
    """A start that must fail: one of the documented exit codes, a line ``error: …`` that matches the regular expression
    ``words``, no traceback."""
    findings = [Finding(UNCLEAR, f"traceback: {_after_traceback(output)}") for _ in _tracebacks(output)[:1]]
    if code not in codes:
        findings.append(Finding(UNCLEAR, f"exit code {code} instead of {codes}: {_last_line(output)}"))
    errors = _errors(output)
    if not any(re.search(words, line) for line in errors):
        findings.append(
            Finding(UNCLEAR, f"no error line matches {words!r}: {errors[:2] or _last_line(output)}")
        )
    return findings


def check_killed(output: str) -> list[Finding]:
    """A start of which a process was killed: the others end without a traceback."""
    return [Finding(UNCLEAR, f"traceback: {_after_traceback(output)}") for _ in _tracebacks(output)[:1]]


def _keys(lines: dict[str, list[dict[str, Any]]], step: int) -> Counter[str]:
    return Counter(
        key for records in lines.values() for line in records if line["step"] == step for key in line["keys"]
    )


def _tracebacks(output: str) -> list[str]:
    return _TRACEBACK.findall(output)


def _errors(output: str) -> list[str]:
    return [match.group(0) for match in _ERROR.finditer(output)]


def _after_traceback(output: str) -> str:
    """The line of the exception: the first one after the traceback that is not indented."""
    after = output.split("Traceback (most recent call last)", 1)[-1].splitlines()[1:]
    return next((line for line in after if line and not line.startswith((" ", "["))), "")[:200]


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
