"""Recipes: YAML files, validated into frozen objects, and resolved against the datasets they name."""

from maestro_scale.recipe.data import MixtureEntry
from maestro_scale.recipe.errors import RecipeError
from maestro_scale.recipe.loading import load_recipe, parse_recipe
from maestro_scale.recipe.resolve import build_masking, build_model_config, resolve_spec
from maestro_scale.recipe.schema import Recipe, check_world

__all__ = [
    "MixtureEntry",
    "Recipe",
    "RecipeError",
    "build_masking",
    "build_model_config",
    "check_world",
    "load_recipe",
    "parse_recipe",
    "resolve_spec",
]
