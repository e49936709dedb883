"""Prints the report of the benchmark as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_sections.record import FAILED, PASSED

_COLOURS = {PASSED: "green", "skipped": "dim"}


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The sections, the checks that failed, errors, and the speeds."""
    console = console or Console(width=150)
    sections = {s["name"]: s for s in report["sections"]}
    machine = sections.get("machine", {}).get("data", {})
    device = machine.get("device", "unknown device")
    title = f"{'Rehearsal' if report['rehearsal'] else 'GPU check'} on {device}"
    table = Table(title=title, title_justify="left")
    for column in ("section", "status", "checks", "seconds", "largest value / limit"):
        table.add_column(column)
    for s in report["sections"]:
        colour = _COLOURS.get(s["status"], "red")
        status = f"[{colour}]{s['status']}[/{colour}]" + ("" if s["required"] else " (not required)")
        checks = s.get("checks", [])
        made = [c for c in checks if c["passed"] is not None]
        number = f"{sum(c['passed'] for c in made)} of {len(made)}" if made else "-"
        note = s.get("skipped") or s.get("error") or s.get("note") or _closest(made)
        table.add_row(s["title"], status, number, f"{s['seconds']:.1f}", note)
    console.print(table)
    for s in report["sections"]:
        for c in s.get("checks", []):
            if c["passed"] is False:
                value = (
                    "" if c["limit"] is None else f": {_number(c['value'])}, at most {_number(c['limit'])}"
                )
                console.print(f"[red]{FAILED}[/red] {s['name']}: {c['name']}{value} {c['note']}")
        if s.get("stderr"):
            console.print(f"[red]{s['name']}[/red]: {s['error']}; the last lines of its output:")
            console.print("\n".join(f"    {line}" for line in s["stderr"]), markup=False, highlight=False)
    _print_speeds(sections, console)


def _closest(checks: list[dict[str, Any]]) -> str:
    """The check that is nearest to its limit."""
    measured = [c for c in checks if c["limit"] and c["value"] is not None]
    if not measured:
        return ""
    worst = max(measured, key=lambda c: c["value"] / c["limit"])
    return f"{worst['name']}: {_number(worst['value'])} / {_number(worst['limit'])}"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _print_speeds(sections: dict[str, Any], console: Console) -> None:
    rows = [{"section": "", **r} for r in _rows(sections, "speed")]
    rows += [{"mode": "fp16, authors", **r} for r in _rows(sections, "reference")]
    if loader := sections.get("loader", {}).get("data", {}).get("row"):
        rows.append({"mode": f"none, {loader['workers']} workers", **loader})
    if not rows:
        return
    table = Table(title="A step of one micro-batch", title_justify="left")
    table.add_column("case (micro-batch)")
    table.add_column("compile")
    columns = ("samples/s", "from", "to", "MFU", "of plan", "data wait", "GiB", "first steps (s)")
    for column in columns:
        table.add_column(column, justify="right")
    for r in rows:
        if "skipped" in r:
            table.add_row(r["case"], r["mode"], r["skipped"])
            continue
        low, high = r["samples_per_s_range"]
        planned, peak = r.get("plan_samples_per_s"), r.get("peak_bytes")
        wait = r.get("data_wait_s")
        table.add_row(
            r["case"],
            r["mode"],
            f"{r['samples_per_s']:.1f}",
            f"{low:.1f}",
            f"{high:.1f}",
            f"{r['mfu']:.1%}" if r.get("mfu") else "",
            f"{r['samples_per_s'] / planned:.0%}" if planned else "",
            f"{wait / r['step_s']:.1%}" if wait is not None else "",
            f"{peak / 2**30:.1f}" if peak else "",
            f"{r['warmup_s']:.1f}" if "warmup_s" in r else "",
        )
    console.print(table)


def _rows(sections: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sections.get(name, {}).get("data", {}).get("rows", [])
