"""Commands on recipes: list those that come with the package, copy one for editing, print the JSON schema."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from maestro_scale.escaping import shell_command

_EDITOR = "# yaml-language-server: $schema="


def recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors, and exit.")
    ] = False,
) -> None:
    """List the recipes that come with the package; their names are accepted wherever a recipe is."""
    if schema:
        from maestro_scale.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    from maestro_scale.strict_yaml import shipped

    names = [name for name in shipped.names("recipe") if not name.startswith("study/")]
    width = max(map(len, names), default=0)
    for name in names:
        comment = _comment(shipped.find("recipe", name) or Path()).splitlines()
        print(f"{name:{width}}  {comment[0].removeprefix('# ') if comment else ''}")
    print(f"next: {shell_command('maestro-scale', 'init', 'vitb', 'my.yaml')}")


def init(
    recipe: Annotated[str, typer.Argument(help="Name of the recipe, see maestro-scale recipes.")],
    out: Annotated[Path | None, typer.Argument(help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe for editing, with all that it extends, and its JSON schema, by which editors complete and check
    keys."""
    from maestro_scale.recipe import Recipe, RecipeError
    from maestro_scale.strict_yaml.merge import dump_yaml, locate, read_layers
    from maestro_scale.training.run_dir import write_atomically

    source = locate(recipe, "recipe")
    file = out or Path(f"{source.stem}.yaml")
    schema = file.with_name("recipe.schema.json")
    if file.exists():
        raise RecipeError(f"{file}: exists; choose another name, or remove it")
    layers = read_layers(source, "recipe")
    if "scales" in layers:
        raise RecipeError(
            f"{recipe} is a study, not a recipe: copy {source} to edit it, maestro-scale study runs it"
        )
    text = dump_yaml(layers)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(schema, json.dumps(Recipe.model_json_schema(), indent=1))
    write_atomically(file, f"{_EDITOR}{schema.name}\n{_comment(source)}{text}")
    command = shell_command("maestro-scale", "train", "--recipe", file, "--dry-run")
    print(f"{file}: a copy of {recipe}, with its schema in {schema}; next: {command}")


def _comment(recipe: Path) -> str:
    """The comment at the top of a recipe."""
    lines = recipe.read_text().splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))
