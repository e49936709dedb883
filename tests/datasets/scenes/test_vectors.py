"""Vector files in each format give the same features; areas and labels from them; damaged and hostile files."""

from __future__ import annotations

import pickle

import fsspec
import geopandas
import numpy as np
import pandas
import pytest
import shapely

from maestro_scale.datasets.description import vectors
from maestro_scale.datasets.description.assemble import Place
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.description.vector_targets import VectorLabels
from maestro_scale.datasets.description.vectors import VectorFile, read_area
from maestro_scale.datasets.scenes.grid import Box
from maestro_scale.datasets.spec import DatasetError, Target

CRS = "EPSG:32631"
BOX = Box(500_000, 5_000_000, 500_100, 5_000_100)
SHAPES = [
    shapely.box(500_000, 5_000_050, 500_050, 5_000_100),
    shapely.box(500_028, 5_000_000, 500_100, 5_000_072),
    shapely.box(600_000, 5_000_000, 600_100, 5_000_075),
]
FRAME = geopandas.GeoDataFrame(
    {"kind": [3, 7, 3], "name": ["oak", "pine", None], "rank": [2.0, 1.0, 0.0]}, geometry=SHAPES, crs=CRS
)


def write(path, frame=FRAME):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return str(path)


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.parquet", "a.shp"])
@pytest.mark.parametrize("stored", [CRS, "EPSG:4326"])
def test_every_format_gives_the_same_features(tmp_path, name, stored):
    path = write(tmp_path / name, FRAME.to_crs(stored))
    found = VectorFile(path, CRS, column="kind").within(BOX)
    assert found.labels.tolist() == [3, 7]
    assert shapely.hausdorff_distance(found.geometries[1], SHAPES[1]) < 0.01


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.shp"])
@pytest.mark.parametrize("stored", [CRS, "EPSG:4326"])
def test_the_extent_of_a_file_is_compared_with_a_box(tmp_path, name, stored):
    file = VectorFile(write(tmp_path / name, FRAME.to_crs(stored)), CRS)  # from 500,000 to 600,100 east
    assert file.reaches(BOX)
    assert not file.reaches(Box(499_000, 5_000_000, 499_900, 5_000_100))
    assert not file.reaches(Box(500_000, 5_100_000, 500_100, 5_100_100))


def test_features_outside_of_the_system_do_not_take_the_labels_of_others(tmp_path):
    far = geopandas.GeoDataFrame({"kind": [9]}, geometry=[shapely.box(9, 95, 10, 96)], crs="EPSG:4326")
    frame = pandas.concat([far, FRAME.to_crs(4326)[["kind", "geometry"]]], ignore_index=True)
    found = VectorFile(write(tmp_path / "a.gpkg", frame), CRS, column="kind").within(BOX)
    assert found.labels.tolist() == [3, 7]


@pytest.mark.parametrize("ranks", [["b", None, "a"], [2.0, None, 1.0]])
def test_features_without_a_rank_are_drawn_first(tmp_path, ranks):
    frame = FRAME.assign(kind=[1, 2, 3], rank=ranks, geometry=SHAPES[:1] * 3)
    found = VectorFile(write(tmp_path / "a.gpkg", frame), CRS, column="kind", order="rank").within(BOX)
    assert found.labels.tolist() == [2, 3, 1]


def test_a_large_geopackage_is_read_by_rectangles(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "IN_MEMORY_BYTES", 0)
    file = VectorFile(write(tmp_path / "a.gpkg", FRAME.to_crs(4326)), CRS, column="name", order="rank")
    assert file.within(BOX).labels.tolist() == ["pine", "oak"]
    file.prepare(BOX.buffered(1000))
    assert len(file.within(BOX)) == 2
    assert len(file.within(Box(599_000, 5_000_000, 601_000, 5_000_100))) == 1


def labels(tmp_path, kind="segmentation", resolution_m=10, classes=("oak", "pine", "none"), **keys):
    write(tmp_path / "a.gpkg")
    vector = {"files": "a.gpkg", "column": keys.pop("column", "name"), **keys.pop("vector", {})}
    section = TargetKeys.model_validate(
        {"kind": kind, "classes": list(classes), "vector": vector, "resolution_m": resolution_m, **keys}
    )
    ignored = tuple(classes.index(c) for c in section.ignored)
    target = Target("cover", kind, tuple(classes), ignored, resolution_m=resolution_m)
    place = Place("a.tif", CRS, BOX.west, BOX.north, 10)
    return VectorLabels(target, section, str(tmp_path), 100.0)("tile", place, [])


def test_labels_are_burned_in_order(tmp_path):
    expected = np.full((10, 10), 2)
    expected[:5, :5] = 0
    expected[3:, 3:] = 1  # pixels whose centre lies inside
    found = labels(tmp_path, ignored=["none"])
    np.testing.assert_array_equal(found, expected)
    touched = labels(tmp_path, ignored=["none"], vector={"all_touched": True})
    assert (touched != 2).sum() > (found != 2).sum()
    ordered = labels(tmp_path, ignored=["none"], vector={"order": "rank"})
    assert ordered[4, 4] == 0
    assert labels(tmp_path, outside="none")[9, 0] == 2


def test_labels_of_whole_tiles_and_numbers(tmp_path):
    assert labels(tmp_path, "classification").tolist() == [1]
    assert labels(tmp_path, "multilabel").tolist() == pytest.approx([0.21, 0.49, 0])
    numbers = labels(tmp_path, "regression", classes=(), column="rank", scale=10.0)
    assert np.nanmax(numbers) == 20
    assert np.isnan(numbers[9, 0])
    values = labels(tmp_path, column="kind", values={"3": "oak", "7": "pine"}, outside="none")
    assert set(np.unique(values)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": ("oak", "none"), "ignored": ["none"]}, "cover is 'pine'.*add it to values or classes"),
        (
            {},
            "pixels lie outside of all features, and cover has no class for them; set targets.cover.outside",
        ),
        ({"column": "colour"}, "has no column 'colour'; there are: kind, name, rank"),
        ({"vector": {"layer": "b"}}, "has no layer 'b'; there are: a"),
        ({"kind": "regression", "classes": ()}, "has a label that is not a number"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, keys, message):
    with pytest.raises(DatasetError, match=message):
        labels(tmp_path, **keys)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_a_file_of_another_kind_is_not_opened(tmp_path):
    (tmp_path / "a.gpkg").write_text(
        "<OGRVRTDataSource><SrcDataSource>/etc/passwd</SrcDataSource></OGRVRTDataSource>"
    )
    (tmp_path / "b.geojson").write_text("<kml/>")
    (tmp_path / "c.csv").write_text("x,y")
    (tmp_path / "d.gpkg").write_bytes(b"SQLite format 3\0" + bytes(100))
    FRAME.drop(columns="geometry").to_parquet(tmp_path / "e.parquet")
    for name in ("a.gpkg", "b.geojson", "c.csv", "d.gpkg", "e.parquet", "f.gpkg"):
        with pytest.raises(DatasetError, match=name) as caught:
            VectorFile(str(tmp_path / name), CRS)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["a.gpkg", "a.parquet", "a.shp"])  # GeoJSON is in longitude and latitude
def test_a_missing_coordinate_system_can_be_given(tmp_path, name):
    path = write(tmp_path / name, FRAME.set_crs(None, allow_override=True))
    with pytest.raises(
        DatasetError, match="has no coordinate system; give it by crs, beside the name of the file"
    ):
        VectorFile(path, CRS)
    assert VectorFile(path, CRS, column="kind", file_crs=CRS).within(BOX).labels.tolist() == [3, 7]
    assert read_area(path, CRS, file_crs=CRS).area == pytest.approx(shapely.union_all(SHAPES).area)
    if name == "a.shp":
        kept = labels(tmp_path, outside="none", vector={"files": "a.shp", "crs": CRS})
        np.testing.assert_array_equal(kept, labels(tmp_path, outside="none"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_drawing_has_no_place_on_the_ground(tmp_path):
    local = 'ENGCRS["of a drawing",EDATUM["x"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'
    path = write(tmp_path / "a.gpkg", FRAME.set_crs(local, allow_override=True))
    with pytest.raises(DatasetError, match="is in a local coordinate system"):
        VectorFile(path, CRS)


@pytest.mark.parametrize("name", ["a.gpkg", "a.geojson", "a.parquet", "a.shp"])
def test_files_at_an_address_are_read_as_local_ones(tmp_path, name):
    write(tmp_path / name)
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/vectors/", recursive=True)
    file = VectorFile(f"memory://vectors/{name}", CRS, column="kind")
    assert file.within(BOX).labels.tolist() == [3, 7]
    copy = file._file.path
    there = pickle.loads(pickle.dumps(file))  # of a process that writes, which copies the file for itself
    assert there.within(BOX).labels.tolist() == [3, 7]
    assert there._file.path != copy
    assert copy.exists()
    del file
    assert not copy.parent.exists()
    with pytest.raises(DatasetError, match=f"memory://vectors/x{name}: is missing"):
        VectorFile(f"memory://vectors/x{name}", CRS)


def test_an_area_is_the_union_of_its_polygons(tmp_path):
    area = read_area(write(tmp_path / "a.geojson", FRAME.to_crs(4326)), CRS)
    assert area.area == pytest.approx(shapely.union_all(SHAPES).area, rel=1e-4)
    points = geopandas.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs=CRS)
    with pytest.raises(DatasetError, match="has no polygon among 1 features"):
        read_area(write(tmp_path / "b.gpkg", points), CRS)
