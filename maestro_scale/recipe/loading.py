"""Loads and validates recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_scale.recipe.errors import recipe_errors
from maestro_scale.recipe.schema import Recipe
from maestro_scale.strict_yaml import loading, merge


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, ``section.key=value`` overrides and the environment.

    ``path``: a file, or the name of a recipe that comes with the package: ``vitl``, ``eval/treesatai_ts``.

    Raises:
        RecipeError: one line per mistake, each with its file, its key and the nearest valid name.
    """
    return validated(read_tree(path, overrides), Recipe)


def parse_recipe(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain data, as ``load_recipe`` would validate it; no ``extends``, no environment."""
    return validated(merge.Tree(dict(data), {(): source}), Recipe)


def read_tree(path: str | Path, overrides: Sequence[str], kind: str = "recipe") -> merge.Tree:
    """As :func:`.merge.read_tree`; RecipeError if the file, what it extends or an override is invalid."""
    with recipe_errors():
        return merge.read_tree(path, overrides, kind)


def validated(tree: merge.Tree, schema: type[loading.Document]) -> loading.Document:
    """As :func:`.strict_yaml.loading.validated`; RecipeError if ``tree`` is not a document of ``schema``."""
    with recipe_errors():
        return loading.validated(tree, schema)
