"""The error types of YAML documents."""

from __future__ import annotations

from maestro_scale.errors import KeyPath, MaestroError, dotted


class DocumentError(MaestroError, ValueError):
    """A document cannot be used. The message has one line per mistake: ``file: key.path: reason``."""

    same_on_all_ranks = True


class ConflictError(ValueError):
    """Values that are each valid but do not go together: (key path from here, reason) of each mistake."""

    def __init__(self, *problems: tuple[KeyPath, str]) -> None:
        super().__init__("\n".join(f"{dotted(path)}: {reason}" for path, reason in problems))
        self.problems = problems
