"""The recipe: YAML → frozen, validated objects."""

from maestro_scale.recipe.data import MixtureEntry
from maestro_scale.recipe.errors import RecipeError
from maestro_scale.recipe.loading import load_recipe, parse_recipe
from maestro_scale.recipe.schema import Recipe, check_world
from maestro_scale.recipe.sensors import resolve_sensors, resolve_spec

__all__ = [
    "MixtureEntry",
    "Recipe",
    "RecipeError",
    "check_world",
    "load_recipe",
    "parse_recipe",
    "resolve_sensors",
    "resolve_spec",
]
