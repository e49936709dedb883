"""Compares the identity of a checkpoint, nested plain values, with that of the run that resumes from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def precision_identity(precision: str) -> dict[str, str]:
    """The part of an identity that describes the arithmetic.

    ``weights_dtype`` tells bf16 (fp32 weights under autocast) from the "bf16" of earlier revisions, which computed with
    bf16 weights and stored the precision alone. fp32 is stored as it always was.
    """
    return {"precision": precision} | ({"weights_dtype": "fp32"} if precision == "bf16" else {})


def changed_arithmetic(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What changes where a checkpoint of an earlier revision is resumed with other arithmetic; else empty."""
    if not _is_earlier_bf16(theirs) or _precision_of(ours).get("precision") != "bf16":
        return ""
    return (
        "the checkpoint is of an earlier revision, whose precision bf16 computed with bf16 weights: this run continues "
        "from its fp32 master weights with bf16 by autocast (train.precision=bf16_weights keeps the arithmetic)"
    )


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The values in which two identities differ, side by side; empty if they are equal.

    A checkpoint of an earlier revision in bf16 fits a run in bf16 and in bf16_weights: its state is the fp32 master
    weights, which both start from.
    """
    left, right = _flat(theirs), _flat(ours)
    if _is_earlier_bf16(theirs) and _precision_of(ours).get("precision") in ("bf16", "bf16_weights"):
        for values in (left, right):
            for key in ("precision", "weights_dtype"):
                values.pop(key if "engine" not in theirs else f"engine.{key}", None)
    return "; ".join(
        f"{k}: checkpoint {left.get(k)!r}, now {right.get(k)!r}"
        for k in sorted({*left, *right})
        if left.get(k) != right.get(k)
    )


def _precision_of(identity: dict[str, Any]) -> dict[str, Any]:
    """Of a pretraining in a section of its own, of a finetuning among the other values."""
    section = identity.get("engine", identity)
    return section if isinstance(section, dict) else {}


def _is_earlier_bf16(identity: dict[str, Any]) -> bool:
    stored = _precision_of(identity)
    return stored.get("precision") == "bf16" and "weights_dtype" not in stored


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
