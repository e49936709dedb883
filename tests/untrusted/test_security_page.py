"""The table of limits in SECURITY.md has the numbers of the code, and all of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from maestro_scale import errors
from maestro_scale.evaluation import counts
from maestro_scale.interop import pickled, restricted
from maestro_scale.study import config
from maestro_scale.untrusted import limits

PAGE = Path("SECURITY.md").read_text()
ROW = re.compile(r"^\| .+ \| ([\d,]+)( MiB)?[^|]* \| `([\w.]+)` \|$", re.MULTILINE)


def test_the_table_has_the_numbers_of_the_code():
    modules = {
        "pickled": pickled,
        "restricted": restricted,
        "errors": errors,
        "counts": counts,
        "config": config,
    }
    rows = ROW.findall(PAGE)
    assert len(rows) == 33
    for number, unit, path in rows:
        head, *rest = path.split(".")
        value = modules.get(head) or getattr(limits, head)
        for part in rest:
            value = getattr(value, part)
        assert value == int(number.replace(",", "")) * (2**20 if unit else 1), path


def test_every_limit_is_in_the_table():
    listed = {path for _, _, path in ROW.findall(PAGE)}
    for name, value in vars(limits).items():
        if isinstance(value, limits.Limits):
            assert value.depth == limits.MANIFEST.depth  # one row for all
            fields = {f"{name}.{f.name}" for f in dataclasses.fields(value)} - {
                f"{name}.depth",
                "HEADER.text",
            }
            assert fields <= listed
        elif isinstance(value, int) and name not in ("KIB", "MIB"):
            assert name in listed
