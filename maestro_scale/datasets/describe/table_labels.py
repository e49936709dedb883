"""Targets, dates and splits from tables and lists whose rows name tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from maestro_scale.datasets.describe import labels, words
from maestro_scale.datasets.describe.draft import Draft, TargetDraft, class_fields, counts_text, unique_name
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.raster_draft import Note
from maestro_scale.datasets.describe.split_drafts import split_names


def draft_tables(findings: Findings, draft: Draft) -> None:
    """Add what the tables say of tiles: splits, dates and targets."""
    paths = [
        p
        for p in findings.listing.paths
        if p.lower().endswith(labels.TABLE_SUFFIXES) and p not in findings.used
    ]
    keys = set().union(*(r.keys for r in draft.rasters))
    keys = _with_prefix(findings, draft, paths[:20], keys)
    _split_lists(findings, draft, keys)
    for path in paths[:20]:
        table = findings.read(labels.read_table, path, keys)
        if isinstance(table, str):
            findings.messages.append(f"{path}: cannot be read ({table}); left out")
            continue
        if table.key is None or table.num_matched * 2 < min(len(keys), table.num_rows):
            if Path(path).stem.lower() not in words.SPLITS:
                findings.remarks.append(f"Not used: {path}, none of its columns has the keys of tiles.")
            continue
        if (
            table.split is not None
            and draft.splits is None
            and not any("{split}" in r.files for r in draft.rasters)
        ):
            draft.splits = {"column": {"file": path, "key": table.key, "column": table.split.name}}
            draft.splits_note = f"found: {counts_text(table.split.values)}"
            draft.splits |= split_names(table.split.values)
        _table_dates(draft, table)
        if draft.grid is None:
            _table_targets(findings, table)


def _with_prefix(findings: Findings, draft: Draft, paths: Sequence[str], keys: set[str]) -> set[str]:
    """The keys as tables call them: if these contain the constant text before ``{key}``, so do all keys."""
    match = re.search(r"([^/{}*]+)\{key\}", draft.rasters[0].files)
    if match is None or any(r.key for r in draft.rasters):
        return keys
    prefixed = {match[1] + key for key in keys}
    lists = [
        p
        for p in findings.listing.paths
        if Path(p).stem.lower() in words.SPLITS and p.endswith((".txt", ".lst"))
    ]
    listed: set[str] = set().union(*(findings.list_keys(p) for p in lists))
    tables = [findings.read(labels.read_table, p, prefixed) for p in paths]
    matched = max((t.num_matched for t in tables if isinstance(t, labels.Table)), default=0)
    if not matched and not prefixed & {Path(k).stem for k in listed}:
        return keys
    for r in draft.rasters:
        r.key, r.keys = f"{match[1]}{{key}}", frozenset(match[1] + key for key in r.keys)
    for target in findings.targets:
        raster = target.fields.get("raster")
        if isinstance(raster, dict):
            raster["key"] = f"{match[1]}{{key}}"
    return prefixed


def _split_lists(findings: Findings, draft: Draft, keys: set[str]) -> None:
    """``train.txt``, ``val.csv`` and so on, with the keys of tiles."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in findings.listing.paths:
        stem, suffix = Path(path).stem, Path(path).suffix
        if stem.lower() in words.SPLITS and suffix.lower() in (".txt", ".csv", ".lst"):
            groups.setdefault((str(Path(path).parent), suffix), []).append(path)
    for (folder, suffix), paths in sorted(groups.items()):
        lists = {Path(p).stem: findings.list_keys(p) for p in paths}
        if any(set(found) & keys for found in lists.values()) and draft.splits is None:
            pattern = f"{{split}}{suffix}" if folder == "." else f"{folder}/{{split}}{suffix}"
            draft.splits = {"lists": {"file": pattern}, **split_names(lists)}
            draft.splits_note = f"found: {', '.join(f'{len(v)} tiles of {n}' for n, v in lists.items())}"


def _table_dates(draft: Draft, table: labels.Table) -> None:
    if table.date is None:
        return
    for r in draft.rasters:
        note = r.notes.get("dates")
        if (
            isinstance(r.dates, dict)
            and r.dates.get("from") == "constant"
            and note is not None
            and note.assumed
        ):
            r.dates = {
                "from": "csv",
                "file": table.path,
                "key": str(table.key),
                "column": table.date.name,
            }
            r.assume("dates", "a table that names dates; set format if they are not YYYYMMDD or YYYY-MM-DD")


def _table_targets(findings: Findings, table: labels.Table) -> None:
    found = table.labels
    shares = [
        c for c in found if c.kind in ("number", "classes") and not c.is_text and c.low >= 0 and c.high <= 1
    ]
    taken = [t.name for t in findings.targets]
    where: dict[str, object] = {"file": table.path, "key": table.key}
    if len(shares) >= 3:
        names = [c.name for c in shares]
        target = TargetDraft(
            unique_name("shares", taken),
            {
                "kind": "multilabel",
                "table": {**where, "columns": names},
                "classes": names,
                "threshold": 0.0,
            },
            f"{table.num_rows} rows",
        )
        target.notes["kind"] = Note(
            "numbers from 0 to 1 in several columns: shares of classes, or 0 and 1", True
        )
        findings.targets.append(target)
        found = [c for c in found if c not in shares]
    for column in found[:10]:
        name = unique_name(column.name.lower(), [t.name for t in findings.targets])
        here = {**where, "column": column.name}
        if column.kind == "classes":
            target = TargetDraft(
                name, {"kind": "classification", "table": here}, f"{counts_text(column.values)}"
            )
            target.fields |= class_fields(column.values, column.is_text)
            target.notes["classes"] = Note("the values of the column", True)
        else:
            target = TargetDraft(
                name,
                {"kind": "regression", "table": here, "units": ""},
                f"{table.num_rows} rows, {column.low:g} to {column.high:g}",
            )
            target.notes["kind"] = Note("a number a tile; write its units", True)
        findings.targets.append(target)
