"""Options that several commands have, and the check of a choice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

Choice = TypeVar("Choice", bound=str)

CacheDir = Annotated[Path, typer.Option(help="Folder for downloaded shards.", envvar="MAESTRO_CACHE")]
CACHE_DIR = Path("~/.cache/maestro-scale")

Device = Annotated[
    str, typer.Option(help="auto: the GPU of this rank, or the CPU on a node without GPUs; cpu.")
]
Precision = Annotated[
    str, typer.Option(help="bf16 (autocast) or fp32; auto: bf16 on a GPU. A CPU always computes in fp32.")
]


def check_choice(option: str, value: str, choices: tuple[Choice, ...]) -> Choice:
    """``value`` as one of ``choices``; BadParameter (exit code 2) if it is not."""
    for choice in choices:
        if choice == value:
            return choice
    raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)
