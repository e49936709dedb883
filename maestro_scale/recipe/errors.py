"""The error types of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maestro_scale.strict_yaml.errors import ConflictError, DocumentError

__all__ = ["ConflictError", "RecipeError", "recipe_errors"]


class RecipeError(DocumentError):
    """A recipe cannot be used. The message has one line per mistake: ``file: key.path: reason``."""


@contextmanager
def recipe_errors() -> Iterator[None]:
    """Within the block, errors of YAML documents in general are raised as errors of a recipe."""
    try:
        yield
    except RecipeError:
        raise
    except DocumentError as error:
        raise RecipeError(*error.args) from None
