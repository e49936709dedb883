"""Validates the ``deepspeed:`` section with DeepSpeed's own parser, before anything starts."""

from __future__ import annotations

import os
from typing import Any

import pydantic
import torch

from maestro_scale.recipe import RecipeError
from maestro_scale.secrets_filter import scrub_tree
from maestro_scale.training.deepspeed_import import import_deepspeed

_SECTION = {
    "DeepSpeedZeroConfig": "zero_optimization."
}  # prefix of the keys that a class validates; its errors do not name it


def check_deepspeed(config: dict[str, Any]) -> None:
    """RecipeError, a line per error, unless DeepSpeed accepts the complete ``config``."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except pydantic.ValidationError as error:
        at = _SECTION.get(error.title, "")
        wrong = {f"deepspeed.{at}{'.'.join(map(str, e['loc']))}": e for e in error.errors()}
        raise RecipeError(
            "\n".join(
                f"{key}: {scrub_tree(e['input'], key)!r}: {e['msg'].lower()}" for key, e in wrong.items()
            )
        ) from None
    except (DeepSpeedConfigError, AssertionError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"deepspeed: {' '.join(str(error).split()) or type(error).__name__}") from None
