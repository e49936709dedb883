"""Report of a weight transfer: which parts of a model were loaded, resized, initialised or not used, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from maestro_scale.escaping import console_text

TransferStatus = Literal["loaded", "resized", "initialised", "unused"]
"""``initialised``: not in the other model, so the random initial values stay. ``unused``: only in the other model."""


@dataclass(frozen=True)
class TransferredPart:
    """Parameters of one module with the same status. ``name``: for example ``encoders.s2``.

    ``why``: the reason, unless the parameters were simply loaded.
    """

    name: str
    status: TransferStatus
    num_tensors: int
    num_values: int
    why: str = ""


def summarize_transfer(
    statuses: Iterable[tuple[str, TransferStatus, int, str]],
) -> tuple[TransferredPart, ...]:
    """Group parameters (name, status, number of values, why) by part and status, in the order of first occurrence."""
    merged: dict[tuple[str, TransferStatus, str], tuple[int, int]] = {}
    for name, status, values, why in statuses:
        key = (_part_name(name), status, why)
        tensors, total = merged.get(key, (0, 0))
        merged[key] = (tensors + 1, total + values)
    return tuple(TransferredPart(n, status, t, v, why) for (n, status, why), (t, v) in merged.items())


def _part_name(parameter: str) -> str:
    """``encoders.s2.blocks.0.up.weight`` -> ``encoders.s2``."""
    first, second, *_ = (*parameter.split("."), "")
    return first if second in ("", "blocks", "layers", "norm") else f"{first}.{second}"


def transfer_table(parts: Iterable[TransferredPart], title: str) -> Table:
    """One row per part, for the terminal."""
    found = Table(title=console_text(title), title_justify="left")
    for column in ("part", "", "tensors", "parameters", "why"):
        found.add_column(column, justify="right" if column in ("tensors", "parameters") else "left")
    for p in parts:
        # The names are those of the tensors in the file.
        name, why = console_text(p.name), console_text(p.why)
        found.add_row(name, p.status, str(p.num_tensors), f"{p.num_values:,}", why)
    return found
