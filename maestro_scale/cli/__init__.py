"""The ``maestro-scale`` command line: registration of all commands and the console entry point.

A command's function imports what it needs when it runs: ``maestro-scale --help`` must not import torch (seconds).
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from maestro_scale import __version__
from maestro_scale.cli import data, launch, models, predict, recipes, runs, study
from maestro_scale.entry import empty_argument, launched_rank, run_command
from maestro_scale.launcher_death import watch_launcher
from maestro_scale.secrets_filter import hide_secrets


class _Commands(TyperGroup):
    """The commands, none of which accepts an empty argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if problem := empty_argument(args):
            raise typer.BadParameter(problem)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="maestro-scale",
    help="Pretrain MAESTRO on clusters: write and verify shards, plan and track runs, export and evaluate models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options of the program itself."""


_SETTINGS: dict[object, dict[str, object]] = {
    launch.train: launch.SETTINGS,
    launch.evaluate: launch.SETTINGS,
    predict.search: {"ignore_unknown_options": True},  # a place west of Greenwich begins with a hyphen
}
# In the order of `maestro-scale --help`.
for _command in (
    runs.quickstart,
    data.synth,
    data.describe,
    data.shard,
    data.verify,
    data.inspect,
    recipes.recipes,
    recipes.init,
    runs.plan,
    launch.train,
    launch.evaluate,
    models.models,
    models.export,
    models.convert_ign,
    models.push,
    models.embed,
    predict.predict,
    predict.search,
    runs.sync,
    runs.dashboard,
    runs.report,
    study.study,
    runs.doctor,
):
    app.command(context_settings=_SETTINGS.get(_command))(_command)


def main() -> None:
    """Run a command and exit. An expected error is printed in one line and gives exit code 2 (see ``entry``)."""
    hide_secrets()
    watch_launcher()  # of `embed` and `predict`, which run on several ranks
    sys.exit(run_command(app, launched_rank()))
