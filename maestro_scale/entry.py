"""The error handler of all entry points: an expected error becomes one line on standard error and an exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from maestro_scale.errors import MaestroError, message_text, shorten
from maestro_scale.escaping import printable_lines

USAGE = 2
"""Exit code of an expected error; argparse and typer use the same for a wrong command line."""
_BUG = 1  # exit code of Python after an exception
_FULL = (errno.ENOSPC, errno.EDQUOT)


def error_line(error: BaseException) -> str | None:
    """The line that explains an expected error to a user; None where ``error`` is a bug.

    An OSError that names a file is expected: a folder is missing, read-only or full. So are a full disk in any case,
    and a machine without a home or temporary folder.
    """
    if isinstance(error, MaestroError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or error
        return message_text(
            f"{error.filename}: {reason}; use another path, or fix its permissions and free space"
        )
    if isinstance(error, OSError) and is_disk_full(error):
        return f"{error.strerror}: free space on the disks of the output, the cache and TMPDIR"
    if isinstance(error, OSError) and "No usable temporary directory" in str(error):
        return "no temporary folder can be written: set TMPDIR to one, or free space in /tmp"
    # By pathlib, pwd and getpass: they have no exception of their own for it.
    if (isinstance(error, RuntimeError) and "determine home directory" in str(error)) or (
        isinstance(error, (KeyError, OSError))
        and ("getpwuid" in str(error) or "No username set" in str(error))
    ):
        return f"user {os.getuid()} has no home folder or name on this machine: export HOME=… and USER=…"
    return None


def empty_argument(words: Sequence[str]) -> str | None:
    """What is wrong if an argument of a command line is empty; None if none is.

    No command has a meaning for an empty one: it is what the shell makes of ``"$OUT"`` where OUT is not set, and as a
    path it would be the working directory.
    """
    for number, word in enumerate(words):
        if word and not _EMPTY_OPTION.fullmatch(word):
            continue
        before = words[number - 1] if number else ""
        place = f"the argument after {shorten(before)}" if before else "the first argument"
        name = word.rstrip("=") or (before if before.startswith("--") else place)
        return f"{name} is empty: give a value (is a variable of the command not set?)"
    return None


_EMPTY_OPTION = re.compile(r"--[\w-]+=")


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line, which has no empty argument; ``words``: None for those of the process."""
    words = sys.argv[1:] if words is None else words
    if problem := empty_argument(words):
        parser.error(problem)
    return parser.parse_args(words)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or the quota of a user on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


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
    """The exit code of ``command()``: its own, 0 for None, or ``USAGE`` after an expected error was printed.

    With several ranks, the others learn that this one ends, an error that is the same on several ranks is printed by
    the lowest of them, and a bug is printed here, because the interpreter's exit could wait for the other ranks.
    """
    if logging.lastResort is not None:  # the handler of warnings, unless the caller has configured logging
        logging.lastResort.setFormatter(_PrintableFormatter())
    try:
        return command() or 0
    except Exception as error:
        line = error_line(error)
        if _has_peers():
            from maestro_scale.training.failure import end_rank  # imports torch

            if line is None:
                traceback.print_exc()
            code = getattr(error, "exit_code", _BUG if line is None else USAGE)
            end_rank(error, line, rank, code, lambda: print_error(line, rank) if line is not None else None)
            return code
        if line is None:
            raise
        if rank == 0 or not getattr(error, "same_on_all_ranks", False):
            print_error(line, rank)
        return USAGE


def _has_peers() -> bool:
    """Whether this process is one of several ranks that can meet."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"
