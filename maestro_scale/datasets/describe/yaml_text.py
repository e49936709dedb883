"""YAML with comments: what a value was found from, or that it is assumed, stands beside it or in the lines above."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence

from maestro_scale.escaping import printable

_WIDTH = 120
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.]*|\d{4}-\d{2}-\d{2}")
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "inf", "nan"}


class Document:
    """Lines of block mappings; values within a line are in flow style."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def comment(self, text: str, indent: int = 0) -> None:
        """A comment of its own, wrapped."""
        start = " " * indent + "# "
        wrapped = textwrap.wrap(
            printable(text), _WIDTH - len(start), break_long_words=False, break_on_hyphens=False
        )
        self._lines += [(start + line).rstrip() for line in wrapped or [""]]

    def blank(self) -> None:
        """An empty line."""
        self._lines.append("")

    def put(self, indent: int, key: str, value: object = None, note: str = "") -> None:
        """``key: value``, or the beginning of a mapping without ``value``; ``note`` becomes a comment."""
        line = f"{' ' * indent}{scalar(key)}:"
        line += "" if value is None else f" {flow(value)}"
        note = printable(note)
        if note and len(line) + len(note) + 4 <= _WIDTH:
            line += f"  # {note}"
        elif note:
            self.comment(note, indent)
        self._lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def flow(value: object) -> str:
    """A value in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: object) -> str:
    """Null, a truth value, a number or a text, quoted where YAML would read something else."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    text = text.replace("${", "$${")  # ${…} would be the environment
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if quoted.isprintable() else json.dumps(text)
