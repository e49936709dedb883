"""Differences of results that were scored on the same tiles, in pairs: see :mod:`..paired`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.evaluation.paired import Estimate, Run, difference, load_runs
from maestro_scale.evaluation.report.groups import ResultGroup
from maestro_scale.evaluation.results import EvaluationError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DifferenceRow:
    """A score minus another one. ``value``, ``interval``: as shown; ``covers``: what the interval is over."""

    first: str
    second: str
    value: str
    interval: str
    covers: str


def difference_rows(groups: Sequence[ResultGroup]) -> list[DifferenceRow]:
    """The first of the results of a benchmark minus each of the others that was scored on the same tiles.

    Without the oracle and results that have no counts per tile, as those of earlier revisions.
    """
    members = [group for group in groups if not group.is_oracle]
    if len(members) < 2 or (first := _runs(members[0])) is None:
        return []
    rows = []
    for other in members[1:]:
        if (runs := _runs(other)) is None:
            continue
        try:
            found = difference(first, runs)
        except EvaluationError:  # other runs are missing, e.g. a fold of a seed
            continue
        if found.pairs_tiles:
            rows.append(_row(members[0], other, found))
    return rows


def _row(first: ResultGroup, second: ResultGroup, found: Estimate) -> DifferenceRow:
    kind = first.first.kind
    seeds = " and ".join(map(str, found.num_seeds))
    over = f"{seeds} seeds{'' if found.pairs_seeds else ', not in pairs'}, " if found.covers_seeds else ""
    return DifferenceRow(
        _name(first),
        _name(second),
        kind.difference(found.value),
        f"{kind.difference(found.low)} to {kind.difference(found.high)}",
        f"{over}{found.num_tiles} tiles",
    )


def _name(group: ResultGroup) -> str:
    fraction = group.first.fraction
    return group.name if fraction == 1 else f"{group.name}, {100 * fraction:g} % of labels"


def _runs(group: ResultGroup) -> list[Run] | None:
    """The counts of every run; None where one has none."""
    try:
        return [run for f in group.files for run in load_runs(f.path, f.result)]
    except EvaluationError as error:
        # Files of earlier revisions have none; of others, the reader must not take the missing row for no difference.
        if any(f.result.counts_sha256 or f.result.runs for f in group.files):
            log.warning("no differences of %s: %s", _name(group), error)
        return None
