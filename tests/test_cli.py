"""The command line: help is fast and complete, and works as a module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import maestro_scale
from maestro_scale.cli import app

COMMANDS = {
    "describe",
    *("quickstart", "synth", "shard", "verify", "inspect", "plan", "export", "convert-ign"),
    *("models", "push"),
    *("embed", "sync", "dashboard", "report", "study", "doctor"),
    *("train", "evaluate", "recipes", "init"),
    *("predict", "search"),
}


def test_help_imports_no_torch():
    code = (
        "import sys, typer.testing, maestro_scale.cli as cli\n"
        "done = typer.testing.CliRunner().invoke(cli.app, ['--help'])\n"
        "assert done.exit_code == 0 and 'quickstart' in done.output, done.output\n"
        "print(*{'torch', 'mlflow', 'deepspeed', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


def test_help_lists_all_commands_and_describes_all_parameters():
    group = typer.main.get_command(app)
    assert set(group.commands) == COMMANDS
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(("option", "value"), [("--what", "pixels"), ("--format", "csv")])
def test_an_invalid_choice_is_a_usage_error(option, value):
    done = CliRunner().invoke(app, ["embed", "MODEL", "SHARDS", "OUT", option, value])
    assert done.exit_code == 2
    assert f"'{value}' is not one of" in done.output


def test_it_prints_its_version():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"{maestro_scale.__version__}\n")


def test_the_cache_of_a_job_is_used_by_predict_and_embed():
    for name in ("predict", "embed"):
        done = CliRunner().invoke(app, [name, "--help"])
        assert "MAESTRO_CACHE" in done.output


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "maestro_scale.cli", "synth", "no_dataset", "OUT"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no_dataset" in done.stderr
