"""Scripts that start processes must do so under ``if __name__ == "__main__":``.

New processes that are not forked import the script again, to find its functions. A script that starts processes at its
top level would start them in each of these again; Python ends such processes with a long traceback, and the
process that waits for their results waits until its time limit.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType

from maestro_scale.errors import MaestroError


class MainGuardError(MaestroError):
    """A script starts processes at its top level; the message names the line, and what to write."""


def check_main_guard(option: str) -> None:
    """MainGuardError if the call comes from the top level of the main script. ``option``: what avoids processes.

    Scripts without a file, such as notebooks, are not imported again.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    line = _top_level_line(vars(main)) if file is not None else None
    if line is None:
        return
    try:
        tree = ast.parse(Path(str(file)).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and _names_main(node))
    if not any(guard.lineno <= line <= (guard.end_lineno or line) for guard in guards):
        raise MainGuardError(
            f'{file}: line {line} starts processes, which import this script again: write `if __name__ == "__main__":` '
            f"before what it does, or set {option}"
        )


def _top_level_line(of_main: dict[str, object]) -> int | None:
    """The line of the main module that the current call comes from; None if it comes from no top level."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is of_main and frame.f_code.co_name == "<module>":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _names_main(node: ast.If) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test))
