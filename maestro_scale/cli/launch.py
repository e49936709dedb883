"""Commands that train and evaluate, in this process, or on several ranks by the DeepSpeed launcher.

Their options are those of ``train.py`` and ``evaluate.py``, which cluster launchers start directly.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Settings of these commands: the scripts parse their own options, ``--help`` too."""

Nproc = Annotated[int, typer.Option(min=1, help="Number of ranks on this machine, e.g. one per GPU.")]


def train(context: typer.Context, nproc: Nproc = 1) -> None:
    """Pretrain: --recipe RECIPE [--nproc RANKS] …; the same command resumes. Options: train --help."""
    _launch("train", context.args, nproc)


def evaluate(context: typer.Context, nproc: Nproc = 1) -> None:
    """Score an encoder: --recipe RECIPE --checkpoint RUN --out DIR [--nproc RANKS] …. Options: evaluate --help."""
    _launch("evaluate", context.args, nproc)


def _launch(name: str, words: Sequence[str], nproc: int) -> None:
    """Run a script with the options ``words``, and exit."""
    script, prog = importlib.import_module(f"maestro_scale.{name}"), f"maestro-scale {name} [--nproc RANKS]"
    if nproc == 1:
        status = script.main(words, prog)
        from maestro_scale.training.distributed import hard_exit

        hard_exit(status)
    script.parse(words, prog)  # --help and wrong options end here, once rather than on every rank
    from maestro_scale.training.distributed import free_port

    # On this machine alone, whatever hostfile it has.
    options = ["--hostfile=", f"--master_port={free_port()}", _devices(nproc)]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, str(script.__file__), *words]
    os.execv(sys.executable, command)


def _devices(nproc: int) -> str:
    """The launcher's option for the devices: the first of CUDA_VISIBLE_DEVICES, which --num_gpus would ignore."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(visible) < nproc or not all(number.isdecimal() for number in visible):
        return f"--num_gpus={nproc}"
    return f"--include=localhost:{','.join(visible[:nproc])}"
