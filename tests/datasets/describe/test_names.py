"""Patterns that are found in file names."""

from __future__ import annotations

from datetime import datetime

import pytest

from maestro_scale.datasets.describe.names import Family, families
from maestro_scale.datasets.description.patterns import Pattern

DAYS = ("20210603", "20210613")


def found(paths: list[str], header=lambda path: None) -> dict[str, Family]:
    """Families by pattern; each pattern matches its files, with the key, band and day that the family gives."""
    result = {f.pattern: f for f in families(sorted(paths), header)}
    for family in result.values():
        pattern = Pattern(family.pattern, family.bands, family.key_template)
        for file in family.files:
            match = pattern.match(file.path)
            assert match is not None, (family.pattern, file.path)
            assert match.key == file.key
            assert match.band == file.band
            assert match.date == (None if file.date is None else _triple(file.date))
    assert sum(len(f.files) for f in result.values()) == len(paths)
    return result


def _triple(date: datetime) -> tuple[int, int, int]:
    day = date.timetuple()
    return day.tm_year, day.tm_yday, day.tm_hour


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        ("20210603", "{date:%Y%m%d}"),
        ("2021-06-03", "{date:%Y-%m-%d}"),
        ("2021_06_03", "{date:%Y_%m_%d}"),
        ("20210603T103021", "{date:%Y%m%dT%H%M%S}"),
        ("20210603_103021", "{date:%Y%m%d_%H%M%S}"),
        ("A2021154", "A{date:%Y%j}"),
        ("2021/06/03", "{date:%Y}/{date:%m}/{date:%d}"),
    ],
)
def test_dates_in_usual_formats(written, pattern):
    other = written.replace("2021", "2022").replace("154", "155").replace("103021", "113022")
    keys = ("north", "south")
    assert list(found([f"{d}/{k}.tif" for d in (written, other) for k in keys])) == [f"{pattern}/{{key}}.tif"]


def test_sentinel_2_products():
    def path(day: str, orbit: str, tile: str, resolution: int, band: str) -> str:
        folder = (
            f"S2A_MSIL2A_{day}T103021_N0300_{orbit}_T{tile}_{day}T140000.SAFE/L2A_T{tile}_A03107{orbit[-1]}"
        )
        return f"{folder}/IMG_DATA/R{resolution}m/T{tile}_{day}T103021_{band}_{resolution}m.jp2"

    bands = [(10, "B02"), (10, "B08"), (20, "B05"), (20, "SCL"), (20, "B8A")]
    days = [("20210603", "R108"), ("20210613", "R065")]
    result = found([path(d, o, t, r, b) for d, o in days for t in ("32UMD", "32UME") for r, b in bands])
    assert [(f.keys, f.bands, f.words[-2:]) for f in result.values()] == [
        (["T32UMD", "T32UME"], ["B02", "B08"], ("R10m", "10m")),
        (["T32UMD", "T32UME"], [], ("SCL", "20m")),
        (["T32UMD", "T32UME"], ["B05", "B8A"], ("R20m", "20m")),
    ]


def test_landsat_products():
    products = [("LC08", "196026", "20210603", "20210610"), ("LC09", "196026", "20210611", "20210613")]
    bands = ("SR_B2", "SR_B5", "QA_PIXEL", "QA_RADSAT")
    result = found([f"{s}_L2SP_{place}_{d}_{p}_02_T1_{b}.TIF" for s, place, d, p in products for b in bands])
    assert list(result) == [
        "*_L2SP_196026_{date:%Y%m%d}_*_02_T1_QA_PIXEL.TIF",
        "*_L2SP_196026_{date:%Y%m%d}_*_02_T1_QA_RADSAT.TIF",
        "*_L2SP_196026_{date:%Y%m%d}_*_02_T1_{band}.TIF",
    ]


def test_folders_of_dates_with_satellites_and_times():
    paths = [
        f"{d[:4]}-{d[4:6]}-{d[6:]}/{d}_10153{i}_103{i}_3B_{kind}.tif"
        for i, d in enumerate(DAYS)
        for kind in ("AnalyticMS_SR", "udm2")
    ]
    result = found(paths)
    assert [p.rpartition("_3B_")[2] for p in result] == ["AnalyticMS_SR.tif", "udm2.tif"]
    assert all("{key}" not in p and "{date:%Y%m%d_%H%M%S}" in p for p in result)


def test_splits_and_kinds_are_folders():
    paths = [
        f"{s}/{kind}/tile_{k}.tif" for s in ("train", "valid") for kind in ("images", "masks") for k in "ab"
    ]
    result = found(paths)
    assert list(result) == ["{split}/images/tile_{key}.tif", "{split}/masks/tile_{key}.tif"]
    assert {f.split for f in result["{split}/images/tile_{key}.tif"].files} == {"train", "val"}


@pytest.mark.parametrize(
    ("paths", "patterns"),
    [
        # known words divide files into rasters, others are keys
        ([f"{m}_{k}.tif" for m in ("s2", "dem") for k in ("paris_1", "lyon_2")], ["dem_{key}.tif", "s2_{key}.tif"]),
        ([f"{c}/tile_{k}.tif" for c in ("berlin", "paris") for k in "123"], ["{part1}/tile_{part2}.tif"]),
        ([f"{k}/{k}_{b}.tif" for k in ("x", "y") for b in ("vv", "vh")], ["{key}/{key}_{band}.tif"]),
        ([f"{c}/{c}_{k}.tif" for c in ("Forest", "River") for k in "123"], ["{class}/{key}.tif"]),
        ([f"a{{1}}/{k}.tif" for k in "xy"], ["a*1*/{key}.tif"]),
        ([f"{n}.tif" for n in ("a", "b_c", "d-e", "f g", "h__i", "j.k", "l_m_n", "o--p", "q r s")], ["{key}.tif"]),
    ],
)  # fmt: skip
def test_keys(paths, patterns):
    assert list(found(paths)) == patterns


def test_numbers_are_dates_only_where_something_else_is_a_key():
    assert list(found(["tile_2001.tif", "tile_2002.tif"])) == ["tile_{key}.tif"]
    assert list(found([f"{y}/{k}.tif" for y in ("2001", "2002") for k in "ab"])) == ["{date:%Y}/{key}.tif"]
    assert list(found(["12345678.tif", "99999999.tif"])) == ["{key}.tif"]  # no days


def test_unknown_words_divide_files_where_their_headers_differ():
    paths = [f"{m}/{k}.tif" for m in ("left", "right") for k in ("aa", "bb", "cc")]
    assert list(found(paths)) == ["{part1}/{part2}.tif"]
    assert list(found(paths, lambda path: path.partition("/")[0])) == ["left/{key}.tif", "right/{key}.tif"]
