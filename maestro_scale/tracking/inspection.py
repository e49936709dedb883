"""Tables for the ``inspect`` command: splits, shards, modalities, class balance and dates of a sharded dataset."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maestro_scale.datasets.real_ranges import REAL_RANGES, SOURCES
from maestro_scale.datasets.statistics import UNITS, DatasetStatistics
from maestro_scale.escaping import console_text, printable
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.read.summary import SplitSummary, Summary

_MAX_SHARDS = 12  # of more shards, only the first and last are listed
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_BARS = " ▁▂▃▄▅▆▇█"
_BAR_WIDTH = 20


def tables(summary: Summary) -> RenderableType:
    """All tables of a summary: splits, shards, modalities, class balance, dates by month, notes."""
    parts = [_split_table(summary), _shard_table(summary.manifest.shards), _modality_table(summary)]
    if any(shard.absent for shard in summary.manifest.shards):
        parts.append(_absent_table(summary))
    for target in summary.manifest.spec.targets:
        parts.append(_class_table(summary.splits, target.name, target.kind))
    parts.append(_month_table(summary.splits))
    if summary.manifest.notes:
        parts.append(_note_table(summary))
    # Titles are separate lines: rich would wrap the title of a table at the width of the table.
    return Group(*(line for table in parts for line in (*_titled(table), "")))


def statistics_table(statistics: DatasetStatistics) -> RenderableType:
    """The statistics of a sample of tiles beside those of real tiles, and why the others were not computed."""
    table = _table(
        f"statistics of {statistics.num_tiles:,} tiles (definitions: maestro_scale/datasets/statistics.py)"
    )
    table.add_column("statistic", no_wrap=True)
    for name in ("mean", "10 %", "90 %", "tiles", "real"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("source of the range")
    for name, measured in statistics.measured().items():
        real, unit = REAL_RANGES[name], f" {UNITS[name]}".rstrip()
        values = (f"{v:.{_digits(name)}f}" for v in (measured.mean, measured.low, measured.high))
        recorded = f"{real.low:.{_digits(name)}f}–{real.high:.{_digits(name)}f}{unit}"
        source = f"{real.source} (forest)" if real.of_forest else real.source
        _add_row(table, name, *values, f"{measured.num_tiles:,}", recorded, real.side(measured.mean), source)
    parts: list[RenderableType] = [*_titled(table)]
    without: dict[str, list[str]] = {}
    for name, reason in statistics.reasons().items():
        without.setdefault(reason, []).append(name)
    parts += [Text(printable(f"{reason}: {', '.join(names)}")) for reason, names in without.items()]
    return Group(*parts, Text(SOURCES), "")


def _digits(name: str) -> int:
    return 1 if UNITS[name] == "%" else 2


def _split_table(summary: Summary) -> Table:
    spec, codec = summary.manifest.spec, summary.manifest.codec
    table = _table(f"{spec.title} ({spec.name}): tiles of {spec.tile_m:g} m, codec {codec}")
    _columns(table, "split", "shards", "samples", "MB", "KB/sample")
    for s in summary.splits:
        size = f"{s.num_bytes / 1e6:,.1f}"
        each = f"{s.num_bytes / s.num_samples / 1e3:,.1f}"
        _add_row(table, s.split, f"{s.num_shards:,}", f"{s.num_samples:,}", size, each)
    return table


def _shard_table(shards: Sequence[ShardInfo]) -> Table:
    table = _table("shards")
    _columns(table, "shard", "samples", "MB")
    table.add_column("sha256")
    half = _MAX_SHARDS // 2
    listed = range(len(shards))
    gap = len(shards) > _MAX_SHARDS
    for i in [*listed[:half], *listed[-half:]] if gap else listed:
        if gap and i == len(shards) - half:
            _add_row(table, f"… {len(shards) - 2 * half:,} more", "", "", "")
        shard = shards[i]
        _add_row(
            table, shard.path, f"{shard.samples:,}", f"{shard.bytes / 1e6:,.1f}", f"{shard.sha256[:12]}…"
        )
    return table


def _modality_table(summary: Summary) -> Table:
    table = _table("modalities")
    table.add_column("modality")
    table.add_column("bands")
    for name in ("pixels", "m/pixel", "dtype", "dates/tile"):
        table.add_column(name, justify="right")
    num_samples = sum(s.num_samples for s in summary.splits)
    for m in summary.manifest.spec.modalities:
        dates = sum(sum(s.months[m.name]) for s in summary.splits) / num_samples
        size = f"{m.size}x{m.size}"
        _add_row(table, m.name, " ".join(m.bands), size, f"{m.resolution_m:g}", m.dtype, f"{dates:.1f}")
    return table


def _absent_table(summary: Summary) -> Table:
    table = _table("tiles by the modalities that they lack")
    table.add_column("without")
    for split in summary.splits:
        table.add_column(split.split, justify="right")
    found = {absent for split in summary.splits for absent in split.absent}
    for absent in sorted(found, key=lambda names: (len(names), names)):
        counts = (f"{split.absent.get(absent, 0):,}" for split in summary.splits)
        _add_row(table, ", ".join(absent) or "(complete)", *counts)
    return table


def _class_table(splits: Sequence[SplitSummary], target: str, kind: str) -> Table:
    """Class balance: the fraction of samples with a class (multilabel, classification), or of pixels (segmentation);
    of a regression the fraction of values that are not missing."""
    of_samples = kind in ("multilabel", "classification")
    unit = "samples with the class" if of_samples else "values" if kind == "regression" else "pixels"
    table = _table(f"{target}: {unit}")
    table.add_column("class")
    for split in splits:
        table.add_column(split.split, justify="right")
        table.add_column("", justify="left")
    for name in splits[0].classes[target]:
        cells = []
        for split in splits:
            counts = split.classes[target]
            total = split.num_samples if of_samples else max(sum(counts.values()), 1)
            share = counts[name] / total
            bar = "█" * round(_BAR_WIDTH * min(share, 1))  # the counts of an index are not verified
            cells += [f"{counts[name]:,}", f"{100 * share:5.1f} % {bar}"]
        _add_row(table, name, *cells)
    return table


def _month_table(splits: Sequence[SplitSummary]) -> Table:
    table = _table("dates by month")
    table.add_column("split")
    table.add_column("modality", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=len(_MONTHS))
    for name in _MONTHS:
        table.add_column(name, justify="right")
    for split in splits:
        for modality, counts in split.months.items():
            _add_row(table, split.split, modality, histogram(counts), *map(_abbreviate, counts))
    return table


def _note_table(summary: Summary) -> Table:
    table = _table("notes")
    table.add_column("tiles", justify="right")
    table.add_column("assumption, fix or omission")
    table.add_column("first")
    for note, count in sorted(summary.manifest.notes.items()):
        _add_row(table, f"{count:,}", note, summary.manifest.examples.get(note, ""))
    return table


def histogram(counts: Sequence[int]) -> str:
    """One bar character per count, a blank for zero."""
    top = max(counts, default=0) or 1
    # Rounded up: a small count must not look like zero.
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in counts)


def _titled(table: Table) -> tuple[Text, Table]:
    title, table.title = Text(printable(str(table.title)), style="bold"), None
    return title, table


def _abbreviate(count: int) -> str:
    if count < 10_000:
        return f"{count}"
    return f"{count / 1e3:.0f}k" if count < 10_000_000 else f"{count / 1e6:.0f}M"


def _table(title: str) -> Table:
    return Table(title=title, box=None, pad_edge=False)


def _add_row(table: Table, *cells: str) -> None:
    """Names of classes, bands, tiles and shards come from the dataset."""
    table.add_row(*map(console_text, cells))


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
