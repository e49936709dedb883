"""The error handler of all entry points: an expected error becomes one line on standard error and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from maestro_scale.errors import MaestroError, message_text
from maestro_scale.escaping import printable_lines

USAGE = 2
"""Exit code of an expected error; argparse and typer use the same for a wrong command line."""


def error_line(error: BaseException) -> str | None:
    """The line that explains an expected error to a user; None where ``error`` is a bug.

    An OSError that names a file is expected: a folder is missing, read-only or full.
    """
    if isinstance(error, MaestroError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or error
        return message_text(
            f"{error.filename}: {reason}; use another path, or fix its permissions and free space"
        )
    return None


def print_error(line: str, rank: int = 0) -> None:
    """Print ``error: …`` to standard error; a rank above 0 says which it is, and on which host."""
    where = f" (rank {rank} on {os.uname().nodename})" if rank else ""
    # Messages name keys and classes of the data, which may contain control characters.
    print(f"error{where}: {printable_lines(line)}", file=sys.stderr, flush=True)


class _PrintableFormatter(logging.Formatter):
    """The message of a log record without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def launched_rank() -> int:
    """The rank that the launcher gave to this process, known before the ranks have joined; 0 without a launcher."""
    names = (
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "SLURM_PROCID",
    )  # as training.binding.Launch, without its checks
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def run_command(command: Callable[[], int | None], rank: int = 0) -> int:
    """The exit code of ``command()``: its own, 0 for None, or ``USAGE`` after an expected error was printed."""
    if logging.lastResort is not None:  # the handler of warnings, unless the caller has configured logging
        logging.lastResort.setFormatter(_PrintableFormatter())
    try:
        return command() or 0
    except Exception as error:
        if (line := error_line(error)) is None:
            raise
        if rank == 0 or not getattr(error, "same_on_all_ranks", False):
            print_error(line, rank)
        return USAGE
