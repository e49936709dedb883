"""Compares the identity of a checkpoint, nested plain values, with that of the run that resumes from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from maestro_scale.recipe import Recipe
from maestro_scale.training.distributed import World

log = logging.getLogger(__name__)

# What earlier revisions did, which had no setting for it and did not record it, by key of the identity: of a
# pretraining (in sections) and of a finetuning.
_EARLIER: dict[str, Any] = {
    "data.order.first_date": "ends",
    "train.masking.structure": True,
    "optim.decay": "matrices",
    "optim.ema_epochs": 0,
    "first_date": "ends",
    "ema_epochs": 0,
}


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


def with_recorded_draws(recipe: Recipe, recorded: dict[str, Any] | None, world: World) -> Recipe:
    """The recipe with what ``auto`` means for dates and masks: as the run's checkpoints were trained with, if it has
    any, so that a run of an earlier revision continues with the numbers that it would have drawn.

    ``recorded``: identity of the newest checkpoint. A value that the recipe states is kept; the resume refuses one that
    differs.
    """
    if recorded is None:
        return recipe
    found = {**_EARLIER, **_flat(recorded)}
    data, masking = recipe.data, recipe.masking
    is_pretraining = isinstance(recorded.get("data"), dict)  # of a finetuning it is a digest
    first_date = found["data.order.first_date" if is_pretraining else "first_date"]
    structure = found["train.masking.structure"]
    if data.first_date == "auto" and first_date in ("any", "ends"):
        data = data.model_copy(update={"first_date": first_date})
    if masking.structure == "auto" and is_pretraining and isinstance(structure, bool):
        masking = masking.model_copy(update={"structure": structure})
    continued = recipe.model_copy(update={"data": data, "masking": masking})
    if world.is_main and (kept := _kept(recipe, continued)):
        log.warning(
            "this run continues as an earlier revision began it, with %s; a new run has %s",
            ", ".join(now for now, _ in kept),
            ", ".join(new for _, new in kept),
        )
    return continued


def _kept(new: Recipe, continued: Recipe) -> list[tuple[str, str]]:
    """(setting of a continued run, of a new one) where they differ."""
    pairs = {
        "data.first_date": (continued.first_date, new.first_date),
        "masking.structure": (continued.has_structural_masks, new.has_structural_masks),
    }
    return [(f"{key}={str(a).lower()}", f"{key}={str(b).lower()}") for key, (a, b) in pairs.items() if a != b]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The values in which two identities differ, side by side; empty if they are equal.

    Of a checkpoint that lacks settings which came later, what it did is compared. One of an earlier revision in bf16
    fits a run in bf16 and in bf16_weights: its state is the fp32 master weights, which both start from.
    """
    left, right = _flat(theirs), _flat(ours)
    left = {**{key: value for key, value in _EARLIER.items() if key in right}, **left}
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
