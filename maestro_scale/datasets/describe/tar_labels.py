"""Targets and dates from the text members of tars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from maestro_scale.datasets.describe.draft import TargetDraft, class_fields, counts_text, unique_name
from maestro_scale.datasets.describe.findings import Findings
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.tars import TarTexts, read_texts
from maestro_scale.datasets.spec import DatasetError


def give_tar_dates(findings: Findings, rasters: Sequence[RasterDraft]) -> dict[str, TarTexts]:
    """What the text members of tars say, by the pattern of the tars. Gives rasters the dates that are there."""
    found: dict[str, TarTexts] = {}
    for raster in rasters:
        if raster.family is None or not raster.files.endswith(".tar"):
            continue
        if raster.files not in found:
            files = raster.family.files
            path = files[len(files) // 2].path
            try:
                found[raster.files] = read_texts(findings.src, path)
            except DatasetError as error:
                findings.messages.append(str(error).removeprefix(f"{findings.src}/"))
                continue
        if raster.dates is None and (dates := found[raster.files].dates) is not None:
            raster.dates = {"from": "coordinate", "coordinate": dates}
            raster.assume("dates", "text members of the tars that are dates")
    return found


def draft_tar_targets(findings: Findings, tars: Mapping[str, TarTexts]) -> None:
    """Add a target for each pattern of tars with a label."""
    for pattern, texts in tars.items():
        if texts.label is None:
            continue
        column = texts.label
        name = unique_name(re.split(r"[./]", column.name)[-1], [t.name for t in findings.targets])
        values = dict(column.values)
        if not column.is_text and min(map(int, values)) >= 0 and max(map(int, values)) < 2 * len(values) + 8:
            values = {str(i): values.get(str(i), 0) for i in range(max(map(int, values)) + 1)}
        target = TargetDraft(
            name,
            {
                "kind": "classification",
                "table": {"file": pattern, "column": column.name},
                **class_fields(values, column.is_text),
            },
            f"{column.name} of {texts.num_tiles} tiles of a tar: {counts_text(column.values)}",
        )
        target.notes["classes"] = Note("those of one tar; write the names, and any others", True)
        findings.targets.append(target)
