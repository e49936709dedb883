"""Records of the simulated device: mixed operations, host synchronisations, copies, kernels and data races."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

_KIT = str(Path(__file__).parent)
_PACKAGES = ("maestro_scale", "deepspeed")

# Kinds of records. A kernel is any operation on device tensors that is not a copy between host and device.
KERNEL, COPY, SYNC, MIX, RACE, STREAM, MARK = "kernel", "copy", "sync", "mix", "race", "stream", "mark"


@dataclass(frozen=True)
class Record:
    """One thing that happened, in program order.

    ``op``: the operation. ``phase``: see :meth:`Recorder.phase`. ``site``: "package/file.py:line" of the innermost
    frame in maestro_scale or DeepSpeed, "" where there is none (autograd's own thread). ``caller``: the innermost frame
    in maestro_scale. ``function``: the name of the function at ``site``. ``stream``: number of the current stream, 0 is
    the default one. ``detail``: for people.
    """

    kind: str
    op: str
    phase: str
    site: str
    caller: str
    function: str
    stream: int
    detail: str

    @property
    def package(self) -> str:
        """``maestro_scale``, ``deepspeed``, or "" for other code."""
        return self.site.partition("/")[0]

    @property
    def file(self) -> str:
        """The file of ``site``."""
        return self.site.rpartition(":")[0]

    def __str__(self) -> str:
        return (
            f"{self.phase}: {self.kind} {self.op} at {self.site or '?'} (stream {self.stream}) {self.detail}"
        )


class Recorder:
    """The records of a simulation. ``strict``: raise at a mixed operation, as a GPU would, instead of recording it."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.strict = False
        self.enabled = True
        self.open_phases: set[str] | None = None
        """Phases within which another one can begin; None: all."""
        self._phases: list[str] = ["setup"]

    def add(self, kind: str, op: str, stream: int = 0, detail: str = "") -> None:
        """Append a record with the phase and the place in the code."""
        if not self.enabled:
            return
        # A walk over the stack for every kernel would dominate the time of a run; a kernel's place is not asserted.
        where = ("", "", "") if kind == KERNEL else _sites(sys._getframe(1))
        self.records.append(Record(kind, op, self._phases[-1], *where, stream, detail))
        if kind == MIX and self.strict:
            raise RuntimeError(f"host and device tensors in one operation: {self.records[-1]}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything within is recorded under ``name``, unless a phase has begun that is not in ``open_phases``.

        On all threads: the backward pass has its own.
        """
        outer = self._phases[-1]
        self._phases.append(name if self.open_phases is None or outer in self.open_phases else outer)
        try:
            yield
        finally:
            self._phases.pop()

    def wrapped(
        self, function: Callable[..., Any], phase: str, mark: Callable[..., str] | None = None
    ) -> Callable[..., Any]:
        """``function`` in ``phase``. ``mark``: also record its begin, with this function of its arguments as detail."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                if mark is not None:
                    self.add(MARK, phase, detail=mark(*args, **kwargs))
                return function(*args, **kwargs)

        return call

    def dump(self) -> list[dict[str, Any]]:
        """All records, for a JSON file; :func:`load` reads it. Of kernels only AdamW's, which the tests need."""
        chosen = [r for r in self.records if r.kind != KERNEL or "fused_adamw" in r.op]
        return [dict(vars(record)) for record in chosen]


def load(rows: list[dict[str, Any]]) -> list[Record]:
    """Records from :meth:`Recorder.dump`."""
    return [Record(**row) for row in rows]


def _sites(frame: FrameType | None) -> tuple[str, str, str]:
    """The innermost frame in a package of ``_PACKAGES`` and the innermost in the first of them, as
    "package/…/file.py:line", and the function of the former."""
    site = caller = function = ""
    while frame is not None and not (function and caller):
        path = frame.f_code.co_filename
        if not path.startswith(_KIT):
            for package in _PACKAGES:
                before, found, inside = path.rpartition(f"/{package}/")
                if found and not before.endswith("/tests"):
                    place = f"{package}/{inside}:{frame.f_lineno}"
                    site = site or place
                    if not frame.f_code.co_name.startswith("<"):  # a comprehension or a lambda
                        function = function or frame.f_code.co_name
                    if package == _PACKAGES[0]:
                        caller = caller or place
        frame = frame.f_back
    return site, caller, function
