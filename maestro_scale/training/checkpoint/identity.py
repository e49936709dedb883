"""Compares the identity of a checkpoint, nested plain values, with that of the run that resumes from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The values in which two identities differ, side by side; empty if they are equal."""
    left, right = _flat(theirs), _flat(ours)
    return "; ".join(
        f"{k}: checkpoint {left.get(k)!r}, now {right.get(k)!r}"
        for k in sorted({*left, *right})
        if left.get(k) != right.get(k)
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> {dotted name: plain value}."""
    items: Iterable[tuple[str, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}
