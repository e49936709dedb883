"""Descriptions: keys, errors, loading, and their schema and reference page."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from testkit.described import describe, raster, write_yaml

from maestro_scale.datasets.description import config, reference
from maestro_scale.datasets.description.load import find_description, load_description, shipped
from maestro_scale.datasets.description.spec import dataset_spec
from maestro_scale.datasets.spec import Scale
from maestro_scale.strict_yaml.errors import DocumentError
from maestro_scale.strict_yaml.merge import parse_yaml

DESCRIPTIONS = sorted((Path(__file__).parents[3] / "descriptions").glob("*.yaml"))


def documents(text: str, indent: str) -> list[str]:
    """The indented YAML documents in a text."""
    found = re.findall(rf"\n\n((?:{indent}.*\n|\n)+)", text)
    return [textwrap.dedent(block) for block in found if "tile_m:" in block]


@pytest.mark.parametrize("document", documents(config.__doc__ or "", "    "))
def test_the_examples_of_the_module_are_valid(document, tmp_path):
    (tmp_path / "a.yaml").write_text(document)
    assert dataset_spec(load_description(tmp_path / "a.yaml")).sensors


@pytest.mark.parametrize("document", documents(reference.PAGE.read_text(), "    "))
def test_the_examples_of_the_page_are_valid(document, tmp_path):
    (tmp_path / "a.yaml").write_text(document)
    assert load_description(tmp_path / "a.yaml").rasters


def test_the_page_and_the_schema_are_those_of_the_models():
    again = "run: python -m maestro_scale.datasets.description.reference"
    page = reference.PAGE.read_text().partition(reference.START)
    assert page[2].strip() == reference.tables().strip(), again
    assert json.loads(reference.SCHEMA.read_text()) == reference.schema(), again


def test_the_schema_accepts_what_the_models_accept():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(reference.schema())
    texts = [path.read_text() for path in DESCRIPTIONS]
    texts += [*documents(config.__doc__ or "", "    "), *documents(reference.PAGE.read_text(), "    ")]
    for text in texts:
        assert not [e.message for e in validator.iter_errors(parse_yaml(text))], text
    wrong = {"name": "a", "tile_m": 10, "rasters": {"s2": {"files": "a", "band": "B2"}}}
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rasters.s2.nodat=0", r"rasters\.s2\.nodat: unknown key \(did you mean 'nodata'\?\)"),
        ("rasters.s2.dtype=int17", r"rasters\.s2\.dtype: must be .*did you mean 'int1"),
        ("rasters.s2.resolution_m=ten", r"rasters\.s2\.resolution_m: must be a number, got 'ten'"),
        ("rasters.s2.bands=[B2, B2]", r"rasters\.s2\.bands: 'B2' is given twice"),
        ("rasters.s2.sensor.bands=[B9]", r"rasters\.s2\.sensor\.bands: the raster has no band 'B9'"),
        ("rasters.s2.sensor.patch=3", r"rasters\.s2\.sensor\.patch: 3 does not divide image_size 8"),
        ("rasters.s2.sensor.scale=null", r"rasters\.s2\.sensor\.scale: is needed for uint16 of quantity any"),
        ("rasters.s2.dates={from: name}", r"rasters\.s2\.dates: from name, but files has no \{date\}"),
        ("rasters.s2.dates={from: csv}", r"rasters\.s2\.dates: from csv needs file"),
        ("rasters.s2.masks.cloud={classes: [3], bits: [1]}", r"needs exactly one of classes, bits, above"),
        ("rasters.s2.valid=[5, 1]", r"rasters\.s2\.valid: 5 to 1 is no range"),
        ("sensors.more={source: s3}", r"sensors\.more\.source: no raster is called 's3'"),
        ("ref_date=s3", r"ref_date: no raster is called 's3'"),
        ("targets.t={kind: segmentation}", r"targets\.t: says not where it comes from"),
        (
            "targets.t={kind: classification, classes: [a, b], raster: {files: x.tif}}",
            r"targets\.t\.raster: is not for classification, which is from table or name",
        ),
        (
            "targets.t={kind: segmentation, classes: [a, b], raster: {files: x.tif}}",
            r"targets\.t\.resolution_m: is needed for a raster",
        ),
        (
            "targets.t={kind: multilabel, classes: [a], of: crops}",
            r"targets\.t\.of: no segmentation target is called 'crops'",
        ),
        (
            "targets.t={kind: classification, classes: [a, b], table: {file: x.csv, column: c}, values: {1: c}}",
            r"targets\.t\.values\.1: no class is called 'c'",
        ),
        (
            "grid={stride_m: 77}\ntile_m=77",
            r"rasters\.s2\.resolution_m: a tile of 77 m has 7\.7 pixels of 10 m; with grid, make tile_m a multiple",
        ),
        ("splits={lists: {file: a}, column: {file: b}}", r"splits\.column: excludes lists: keep one"),
    ],
)
def test_mistakes_are_named_by_key(change, message, tmp_path):
    path = write_yaml(tmp_path / "a.yaml", {"s2": raster("{key}.tif")})
    with pytest.raises(DocumentError, match=message):
        load_description(path, change.splitlines())


def test_all_mistakes_are_told_at_once_with_their_file(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", {"s2": raster("{key}.tif", nodat=1, series="yes")})
    with pytest.raises(DocumentError) as error:
        load_description(path, ["tile_m=-1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert sum(line.startswith(f"{path}: rasters.s2.") for line in lines) == 2
    assert sum(line.startswith("--set: tile_m: ") for line in lines) == 1


def test_a_description_extends_another_and_reads_the_environment(tmp_path, monkeypatch):
    write_yaml(tmp_path / "base.yaml", {"s2": raster("{key}.tif"), "dem": raster("dem_{key}.tif")})
    text = "extends: base.yaml\nrasters:\n  dem: null\n  s2: {nodata: '${FILL}', crs: 'EPSG:${CODE:-2154}'}\n"
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(DocumentError, match="environment variable FILL is not set"):
        load_description(tmp_path / "own.yaml")
    monkeypatch.setenv("FILL", "-9999")
    description = load_description(tmp_path / "own.yaml")
    assert [m.name for m in dataset_spec(description).modalities] == ["s2"]
    assert description.rasters["s2"].nodata == (-9999,)
    assert description.rasters["s2"].crs == "EPSG:2154"
    assert description.rasters["s2"].files == "{key}.tif"


def test_a_missing_description_is_named(tmp_path):
    with pytest.raises(DocumentError, match="cannot read the description: No such file"):
        load_description(tmp_path / "none.yaml")
    assert find_description("none") is None
    assert all(find_description(name) for name in shipped())


def test_sensors_follow_from_rasters():
    rasters = {
        "s2": raster(
            "a{key}.tif", ["B2", "B3"], series=True, quantity="reflectance", sensor={"bands": ["B3"]}
        ),
        "s1": raster("b{key}.tif", dtype="float32", quantity="backscatter_linear", sensor={}),
        "photo": raster("c{key}.tif", resolution_m=0.4, dtype="uint8", sensor={}),
        "extra": raster("d{key}.tif", sensor=None),
    }
    spec = dataset_spec(
        describe(rasters, sensors={"again": {"source": "photo", "image_size": 100}}, crop_m=40)
    )
    assert [s.name for s in spec.sensors] == ["s2", "s1", "photo", "again"]
    s2, s1, photo, again = spec.sensors
    assert (s2.bands, s2.band_groups, s2.image_size, s2.patch, s2.num_dates) == ((1,), (1,), 4, 2, 8)
    assert (s2.scale, s1.scale, photo.scale) == (
        Scale("linear", 10_000),
        Scale("log", 5),
        Scale("linear", 255),
    )
    assert (photo.image_size, photo.patch, again.image_size, again.patch) == (100, 5, 100, 5)
    assert [m.size for m in spec.modalities] == [8, 8, 200, 8]
    assert spec.modality("s2").quantity == "reflectance"
    assert spec.modality("s2").mask_bands == ("nodata",)
    assert spec.ref_sensor == "s2"
