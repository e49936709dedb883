"""Mask bands of a raster, by the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping

from maestro_scale.datasets.describe import words
from maestro_scale.datasets.describe.names import Family
from maestro_scale.datasets.describe.probe import Prober, Values
from maestro_scale.datasets.describe.raster_draft import Mask, Note, RasterDraft


def attach_mask(draft: RasterDraft, family: Family, prober: Prober) -> None:
    """Add the masks of the files of ``family`` to the raster that they belong to."""
    rule = words.mask_rule(family.words) or "cloud"
    values = prober.values([f.path for f in family.files])
    files = {} if family.pattern == draft.files else {"files": family.pattern}
    key = {"key": family.key_template} if family.key_template and family.pattern != draft.files else {}
    headers = prober.headers([family.files[0].path])
    add_masks(draft, rule, {**files, **key}, values, headers[0].count if headers else 1)


def add_masks(
    draft: RasterDraft, rule: str, where: Mapping[str, object], values: Values | None, count: int = 1
) -> None:
    """Add the mask bands of a rule of ``words.MASKS``. ``where``: fields of the files; ``count``: their bands."""
    high = 0.0 if values is None else values.high
    found: dict[str, tuple[dict[str, object], str]] = {}
    if rule == "scl":
        found["cloud"] = (
            {"classes": [3, 8, 9, 10]},
            "cloud shadow, clouds of medium and high probability, cirrus",
        )
        found["snow"] = {"classes": [11]}, "snow"
    elif rule == "qa_pixel":
        found["cloud"] = {"bits": [1, 2, 3, 4]}, "dilated cloud, cirrus, cloud, cloud shadow"
        found["snow"] = {"bits": [5]}, "snow"
    elif rule == "fmask" and high <= 4:
        found["cloud"] = {"classes": [2, 4]}, "cloud shadow and cloud of Fmask"
        found["snow"] = {"classes": [3]}, "snow of Fmask"
    elif rule == "fmask":
        found["cloud"] = {"bits": [0, 1, 2, 3]}, "cirrus, cloud, beside a cloud, cloud shadow of HLS"
        found["snow"] = {"bits": [4]}, "snow of HLS"
    elif rule == "qa60":
        found["cloud"] = {"bits": [10, 11]}, "opaque clouds and cirrus"
    elif rule == "udm2" and count >= 6:
        found["cloud"] = {"band": 1, "above": 0, "invert": True}, "what Planet's UDM2 does not call clear"
        found["snow"] = {"band": 2, "above": 0}, "snow"
    elif rule in ("udm2", "udm"):
        found["cloud"] = {"above": 0}, "any bit of Planet's UDM"
    elif rule == "cloud_percent" or (1 < high <= 100):
        found["cloud"] = {"percent": True}, "cloud in percent"
    else:
        found["cloud"] = {"above": 0}, "what is not 0"
    for name, (fields, text) in found.items():
        draft.masks[name] = Mask(
            {**where, **fields}, Note(f"marks {text}", assumed=rule in ("cloud", "fmask", "udm"))
        )
