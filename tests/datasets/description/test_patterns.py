"""Patterns of paths."""

from __future__ import annotations

import time

import pytest

from maestro_scale.datasets.description.patterns import Pattern, parse_date, parse_date_text, scan_local
from maestro_scale.datasets.spec import DatasetError


def test_names_dates_and_bands():
    pattern = Pattern("s2/{key}/{date:%Y%m%d}_{orbit}_{band}.tif", ["B8", "B8A"])
    found = pattern.match("s2/a_b/20200229_R1_B8A.tif")
    assert (found.key, found.date, found.band, found.names) == (
        "a_b",
        (2020, 60, 0),
        "B8A",
        (("orbit", "R1"),),
    )
    assert pattern.match("s2/a/20200229_R1_B9.tif") is None
    assert pattern.match("s2/a/b/20200229_R1_B8.tif") is None
    assert pattern.match("s2/a/20200230_R1_B8.tif").date is None
    assert pattern.nearly("s2/a/2020-229_R1_B8.tif")
    assert not pattern.nearly("s2/a/20200229_R1_B9.tif")


def test_a_name_that_occurs_twice_is_the_same_text():
    pattern = Pattern("{zone}/{zone}_{n}.tif", key="{zone}-{n}")
    assert pattern.match("a/a_1.tif").key == "a-1"
    assert pattern.match("a/b_1.tif") is None


def test_a_date_may_be_spread_over_the_path():
    pattern = Pattern("{date:%Y}/{key}/{date:%j}.{date:%Y}.tif")
    assert pattern.match("2021/a/032.2021.tif").date == (2021, 32, 0)
    assert pattern.match("2021/a/032.2020.tif") is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("20200102", (2020, 2, 0)),
        ("2020-01-02", (2020, 2, 0)),
        ("2020-01-02T13:40:00Z", (2020, 2, 13)),
        ("20200102T134001", (2020, 2, 13)),
        ("2020-01-02 13:40", (2020, 2, 13)),
    ],
)
def test_dates_without_a_format_are_iso(text, wanted):
    assert parse_date(text, None) == wanted
    assert Pattern("{key}_{date}.tif").match(f"a_{text.removesuffix('Z')}.tif").date == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2020-01-02T13:40:00+02:00", (2020, 2, 11)),
        ("2020-01-01 22:30-05:00", (2020, 2, 3)),
        ("2020-01-01T00:30:00.5+01:00", (2019, 365, 23)),
        ("20200102T134001+0000", (2020, 2, 13)),
    ],
)
def test_times_of_other_zones_become_utc(text, wanted):
    assert parse_date(text, None) == wanted


def test_a_date_in_a_product_name():
    product = "S2A_MSIL2A_20190103T105421_N0211_R051_T31TGL_20190103T122141"
    assert parse_date_text(product, None, 2, "here") == (2019, 3, 0)
    assert parse_date_text(product, "%Y%m%dT%H%M%S", -5, "here") == (2019, 3, 10)
    with pytest.raises(DatasetError, match=r"here: 'S2A_MSIL2A.* is not a date .* in part 7"):
        parse_date_text(product, None, 7, "here")


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("{date:%q}.tif", None, "%q is not supported in a date"),
        ("{a.tif", None, r"\{ is not a name in braces"),
        ("{key:x}.tif", None, r"\{key\} takes no format"),
        ("{date}_{date:%Y}.tif", None, "needs their formats"),
        ("{a}{b}.tif", None, r"\{a\} and \{b\} have no text between them"),
        ("{a}*{b}.tif", None, r"\{a\} and \{b\} have no text between them"),
        ("{key}{band}.tif", None, r"\{key\} and \{band\} have no text between them"),
        ("{a}.tif", "{b}", r"has no \{b\}; it has a"),
        ("{a}.tif", "{a.__class__}", "names in braces only"),
    ],
)
def test_wrong_patterns_are_refused(text, key, message):
    with pytest.raises(DatasetError, match=message):
        Pattern(text, key=key)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{key}{date:%Y%m%d}{band}.tif", "x20200229B8A.tif"),
        ("{key}/{key}{orbit}.tif", "x/xR1.tif"),
        ("{key}*.tif", "x1.tif"),
    ],
)
def test_names_may_follow_dates_bands_and_text_that_occurs_before(text, path):
    assert Pattern(text, ["B8", "B8A"]).match(path).key == "x"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("{a}{date:%Y}{b}{date:%m}{c}{date:%d}{d}.tif", "1"),
        ("{a}{date:%Y}{b}{date:%m}{c}{date:%d}{d}.tif", "x"),
        ("******{a}.tif", "x"),
    ],
)
def test_a_long_path_that_does_not_match_is_told_fast(text, letter):
    """0.01 s; without separators it takes minutes."""
    pattern = Pattern(text)
    started = time.process_time()
    assert pattern.match(letter * 60 + ".png") is None
    assert not pattern.nearly(letter * 60 + ".png")
    assert time.process_time() - started < 1


def test_only_folders_that_can_match_are_listed(tmp_path):
    for name in ("a/x/1.tif", "a/y/2.tif", "a/3.tif", "b/x/4.tif", "a/x/deep/5.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = []
    scan = scan_local(str(tmp_path))

    def spy(folder):
        listed.append(folder)
        return scan(folder)

    assert sorted(p for p, _ in Pattern("a/{z}/{key}.tif").walk(spy)) == ["a/x/1.tif", "a/y/2.tif"]
    assert sorted(listed) == ["a/", "a/x/", "a/y/"]
    found = Pattern("**/{key}.tif").walk(scan)
    assert sorted(m.key for _, m in found) == ["1", "2", "3", "4", "5"]
    assert [p for p, _ in Pattern("a/*/1.tif").walk(scan)] == ["a/x/1.tif"]
    assert list(Pattern("none/{key}.tif").walk(scan)) == []
