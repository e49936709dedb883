"""Blocks of commands in README and docs, and the markers before them.

A marker is the line before a block: ``<!-- test: NAME -->`` or ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    *("maestro-scale", "deepspeed", "torchrun", "python", "python3", "pip", "sbatch", "srun", "bash"),
    *("docker", "apptainer", "git", "hf", "curl", "mlflow", "mkdocs", "ruff", "evaluate.py", "train.py"),
)
_COMMAND = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, PROGRAMS))}) ")
_MARKER = re.compile(r"<!-- (test|not run): (.+) -->")


@dataclass(frozen=True)
class Block:
    """``line``: number of its first line, from 0; ``commands``: its lines, continued ones joined; ``marker``: (kind,
    name or reason), None where it has none."""

    line: int
    commands: tuple[str, ...]
    marker: tuple[str, str] | None


def blocks(text: str) -> Iterator[Block]:
    """Indented and fenced blocks with at least one command of a program that the project documents."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start, body = number, []
        if lines[number].lstrip().startswith("```"):
            number += 1
            while number < len(lines) and not lines[number].lstrip().startswith("```"):
                body.append(lines[number])
                number += 1
            number += 1
        elif lines[number].startswith("    ") and not (start and lines[start - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                body.append(lines[number])
                number += 1
        else:
            number += 1
            continue
        joined = "\n".join(line.strip() for line in body).replace("\\\n", " ").splitlines()
        if any(_COMMAND.match(line.removeprefix("env/bin/")) for line in joined):
            yield Block(start, tuple(line for line in joined if line), _marker_before(lines, start))


def _marker_before(lines: list[str], start: int) -> tuple[str, str] | None:
    before = next((line for line in reversed(lines[:start]) if line.strip()), "")
    found = _MARKER.fullmatch(before.strip())
    return (found[1], found[2]) if found else None


def all_blocks() -> list[tuple[Path, Block]]:
    """(page, block) of all pages, in order."""
    return [(page, block) for page in PAGES for block in blocks(page.read_text())]
