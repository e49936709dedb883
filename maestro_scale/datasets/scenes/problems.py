"""Problems of many files, told in one line per kind: how many, the first, and what to do."""

from __future__ import annotations

from maestro_scale.datasets.spec import DatasetError


class Problems:
    """Collects problems by kind; :meth:`check` raises them together."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._advice: dict[str, str] = {}

    def add(self, kind: str, example: str, advice: str = "") -> None:
        """Count one; ``kind`` reads on after a number: ``files have no coordinate system``."""
        self._found.setdefault(kind, []).append(example)
        self._advice.setdefault(kind, advice)

    def check(self, where: str) -> None:
        """DatasetError with a line per kind, if there are any."""
        if not self._found:
            return
        lines = []
        for kind, examples in self._found.items():
            advice = f"; {self._advice[kind]}" if self._advice[kind] else ""
            lines.append(f"{where}: {len(examples)} {kind}, the first: {min(examples)}{advice}")
        raise DatasetError("\n".join(lines), next(iter(self._found)))
