"""NetCDF, HDF5, Zarr and NumPy: images of one cube, written by the formats' own libraries, read by description."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
import zarr
from datasets.sources.kit import (
    CRS,
    DATES,
    DAYS,
    STAMPS,
    TRANSFORM,
    ZARR_3,
    X,
    Y,
    cube,
    place,
    read,
    refs_of,
    section,
    stack,
)
from rasterio.crs import CRS as RasterioCRS

from maestro_scale.datasets.sources.protocol import Window
from maestro_scale.datasets.spec import DatasetError

AXES = ["date", "band", "y", "x"]
pytestmark = pytest.mark.filterwarnings("ignore:The data type .* does not have a Zarr V3 specification")


def labelled(values: np.ndarray, **attributes: object) -> xarray.Dataset:
    """A cube with coordinates as rioxarray writes them."""
    dims = ("time", "band", "y", "x")
    data = xarray.Dataset(
        {"cube": (dims, values, {"grid_mapping": "spatial_ref", **attributes})},
        coords={
            "time": STAMPS.astype("datetime64[ns]"),
            "band": ["a", "b"],
            "y": Y,
            "x": X,
            "spatial_ref": 0,
        },
    )
    data.spatial_ref.attrs["crs_wkt"] = RasterioCRS.from_string(CRS).to_wkt()
    return data


def write_netcdf(folder: Path) -> dict:
    labelled(cube()).to_netcdf(folder / "k1.nc", engine="h5netcdf")
    return {"files": "{key}.nc"}


def write_netcdf3(folder: Path) -> dict:
    labelled(cube()).to_netcdf(folder / "k1.nc", engine="scipy")
    return {"files": "{key}.nc", "variable": "cube"}


def write_zarr(folder: Path, version: int = 2) -> dict:
    labelled(cube()).to_zarr(folder / "k1.zarr", zarr_format=version, consolidated=version == 2)
    return {"files": "{key}.zarr", "variable": "cube"}


def write_zarr_zip(folder: Path) -> dict:
    labelled(cube()).to_zarr(folder / "tmp", zarr_format=2)
    with zipfile.ZipFile(folder / "k1.zarr.zip", "w") as archive:
        for path in sorted((folder / "tmp").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder / "tmp"))
    return {"files": "{key}.zarr.zip"}


def write_hdf5(folder: Path) -> dict:
    with h5py.File(folder / "k1.h5", "w") as file:
        item = file.create_dataset("site/cube", data=cube(), chunks=(1, 2, 4, 4), compression="gzip")
        item.attrs["grid_mapping"] = "spatial_ref"
        file.create_dataset("spatial_ref", data=0).attrs["crs_wkt"] = CRS
        file["site/products"] = [f"S2A_MSIL2A_{d.replace('-', '')}T101010_N9_R1".encode() for d in DAYS]
        file["y"], file["x"] = Y, X
    dates = {"from": "coordinate", "coordinate": "products", "part": -3}
    return {"files": "{key}.h5", "variable": "site/cube", "axes": AXES, "dates": dates}


WRITERS = {
    "netcdf 4": write_netcdf,
    "netcdf 3": write_netcdf3,
    "zarr 2": write_zarr,
    "zarr zip": write_zarr_zip,
    "hdf5": write_hdf5,
}
if ZARR_3:
    WRITERS["zarr 3"] = lambda folder: write_zarr(folder, 3)


@pytest.mark.parametrize("name", WRITERS)
def test_a_cube_is_read_value_for_value(tmp_path, name):
    files = section(**WRITERS[name](tmp_path))
    refs = refs_of(files, tmp_path)
    assert [(r.key, r.date) for r in refs] == [("k1", d) for d in DATES]
    assert pickle.loads(pickle.dumps(refs)) == refs
    found = stack(files, refs)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, cube())
    part = read(files, refs[2], Window(1, 2, 3, 4))
    np.testing.assert_array_equal(part.values, cube()[2, :, 1:4, 2:6])
    assert part.invalid is None
    assert place(files, refs[1]) == (CRS, TRANSFORM)


@pytest.mark.parametrize("fortran", [False, True])
def test_numpy_arrays(tmp_path, fortran):
    values = np.asfortranarray(cube()) if fortran else cube()
    np.save(tmp_path / "S2_k1.npy", values)
    np.savez_compressed(tmp_path / "k2.npz", s2=values, other=np.zeros(3))
    for files in (
        section("S2_{key}.npy", axes=AXES, dates={"from": "constant", "date": "2020-01-01"}),
        section("{key}.npz", axes=AXES, variable="s2", dates={"from": "constant", "date": "2020-01-01"}),
    ):
        refs = refs_of(files, tmp_path)
        assert [(r.part, r.date) for r in refs] == [((0,), None), ((1,), None), ((2,), None)]
        np.testing.assert_array_equal(stack(files, refs), cube())
        np.testing.assert_array_equal(read(files, refs[1], Window(2, 1, 3, 5)).values, cube()[1, :, 2:5, 1:6])
        np.testing.assert_array_equal(read(files, refs[1], Window(2, 0, 3, 7)).values, cube()[1, :, 2:5])
        assert place(files, refs[0]) == (None, None)
    single = section("S2_{key}.npy", bands=["x"], axes=["band", "date", "y", "x"], dates="name")
    with pytest.raises(DatasetError, match="has 3 bands"):
        refs_of(
            section("S2_{key}.npy", bands=[{"name": "q", "from": 4}], axes=["band", "date", "y", "x"]),
            tmp_path,
        )
    with pytest.raises(DatasetError, match=r"array is 3×2×6×7, but axes are y, x; set axes"):
        refs_of(section("S2_{key}.npy", axes=["y", "x"]), tmp_path)
    assert single.series


def test_many_tiles_in_one_file(tmp_path):
    """As in MMEarth: an axis of the tiles, keys in a table, one date each."""
    values = cube(3, 4)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["s2"] = values
        file["day"] = [20210301, 20210410, 20211231]
        meta = np.array([(b"t7", 1), (b"t8", 2), (b"t9", 3)], [("id", "S5"), ("n", "i4")])
        file["metadata"] = meta
    dates = {"from": "coordinate", "coordinate": "day"}
    files = section("*.h5", bands=[{"name": "B", "from": 3}, {"name": "A", "from": 1}], variable="s2",
                    axes=["key", "band", "y", "x"], keys="metadata", dates=dates)  # fmt: skip
    refs = refs_of(files, tmp_path)
    assert [(r.key, r.part, r.date) for r in refs] == [(f"t{i + 7}", (i,), d) for i, d in enumerate(DATES)]
    np.testing.assert_array_equal(stack(files, refs), values[:, [2, 0]])
    by_index = refs_of(files.model_copy(update={"keys": None}), tmp_path)
    assert [r.key for r in by_index] == ["0", "1", "2"]
    with pytest.raises(DatasetError, match=r"has no array 'metdata' \(did you mean 'metadata'"):
        refs_of(files.model_copy(update={"keys": "metdata"}), tmp_path)


def test_tiles_with_dates_and_places_of_their_own(tmp_path):
    """As in SSL4EO-S12: times and positions per tile, an EPSG code per tile."""
    values = np.stack([cube(), cube() + 500])
    stamps = np.stack([STAMPS, STAMPS + 1]).astype("datetime64[ns]")
    data = xarray.Dataset(
        {
            "bands": (("sample", "time", "band", "y", "x"), values),
            "crs": ("sample", [32632, 32633]),
            "time_": (("sample", "time"), stamps),
            "x_": (("sample", "x"), np.stack([X, X + 1000])),
            "y_": (("sample", "y"), np.stack([Y, Y])),
        },
        coords={"sample": ["p", "q"], "band": ["A", "B"], "x": range(7), "y": range(6)},
    )
    data.to_zarr(tmp_path / "c.zarr", zarr_format=2)
    files = section("c.zarr", variable="bands", axes=["key", *AXES], keys="sample",
                    dates={"from": "coordinate", "coordinate": "time_"})  # fmt: skip
    refs = refs_of(files, tmp_path)
    assert [(r.key, r.part) for r in refs] == [(k, (i, t)) for i, k in enumerate("pq") for t in range(3)]
    assert [r.date for r in refs[3:]] == [(2021, 61, 0), (2021, 101, 0), (2022, 1, 0)]
    np.testing.assert_array_equal(stack(files, refs), values.reshape(6, 2, 6, 7))
    assert place(files, refs[0]) == ("EPSG:32632", TRANSFORM)
    assert place(files, refs[5]) == ("EPSG:32633", (10.0, 0.0, 501_000.0, *TRANSFORM[3:]))


def test_south_up_and_degrees(tmp_path):
    """Latitudes that ascend, longitudes, a grid mapping without WKT, a variable per band, packed values."""
    values = cube()
    lat, lon = 45 + 0.25 * np.arange(6), 7 + 0.25 * np.arange(7, dtype=np.float32)
    packed = {"grid_mapping": "crs: lat lon", "scale_factor": 0.5, "add_offset": 1.0, "valid_min": 2}
    data = xarray.Dataset(
        {n: (("time", "lat", "lon"), values[:, i], packed) for i, n in enumerate("ab")},
        coords={"time": [0, 40, 305.75], "lat": lat, "lon": lon},
    )
    data["crs"] = ((), 0, {"grid_mapping_name": "latitude_longitude", "semi_major_axis": 6378137.0,
                           "inverse_flattening": 298.257223563})  # fmt: skip
    data.time.attrs = {"units": "days since 2021-03-01", "calendar": "standard"}
    for name in "ab":
        data[name].attrs["_FillValue"] = np.int16(5)
    data.to_netcdf(tmp_path / "k.nc", engine="h5netcdf")
    files = section("{key}.nc", bands=["b", "a"])
    refs = refs_of(files, tmp_path)
    assert [r.date for r in refs] == [(2021, 60, 0), (2021, 100, 0), (2021, 365, 18)]
    np.testing.assert_array_equal(stack(files, refs), values[:, ::-1, ::-1])
    crs, transform = place(files, refs[0])
    assert RasterioCRS.from_string(crs).is_geographic
    np.testing.assert_allclose(transform, (0.25, 0, 6.875, 0, -0.25, 46.375), atol=1e-6)
    found = read(files, refs[0], Window(5, 0, 1, 7))  # the southernmost row is stored first
    assert found.values.tolist() == [[[*range(42, 49)]], [[*range(7)]]]
    assert found.invalid.tolist() == [[[False] * 7], [[True, True, False, False, False, True, False]]]
    unpacked = read(section("{key}.nc", bands=["b", "a"], unpack=True), refs[0], Window(5, 0, 1, 7))
    assert unpacked.values.dtype == np.float32
    np.testing.assert_array_equal(unpacked.values[1, 0], np.arange(7) / 2 + 1)
    np.testing.assert_array_equal(unpacked.invalid, found.invalid)
    by_template = section("{key}.nc", variable="{band}", bands=["a"])
    (ref, *_) = refs_of(by_template, tmp_path)
    np.testing.assert_array_equal(read(by_template, ref).values, values[0, :1, ::-1])


@pytest.mark.skipif(ZARR_3, reason="zarr 3 reads format 3")
def test_format_3_without_zarr_3_is_one_line(tmp_path):
    folder = tmp_path / "k.zarr"
    folder.mkdir()
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    files = section("k.zarr", bands=["a"], variable="x", axes=["y", "x"])
    with pytest.raises(DatasetError, match=r"is Zarr format 3, which needs zarr 3 \(Python 3\.11 or later\)"):
        refs_of(files, tmp_path)


def test_missing_values_of_zarr(tmp_path):
    group = zarr.open_group(tmp_path / "k.zarr", mode="w", **({"zarr_format": 2} if ZARR_3 else {}))
    create = group.create_array if ZARR_3 else group.create_dataset
    create("plain", data=cube(1, 1)[0, 0].astype("uint16"))  # a fill value of 0, by default
    create("filled", data=cube(1, 1)[0, 0], fill_value=-9999)
    for name, marked in (("plain", None), ("filled", 7)):
        files = section("k.zarr", bands=["a"], variable=name, axes=["y", "x"])
        if marked is not None:
            group[name][0, :] = -9999
        pixels = read(files, refs_of(files, tmp_path)[0])
        assert (None if pixels.invalid is None else pixels.invalid.sum()) == marked


@pytest.mark.parametrize("name", [*WRITERS, "numpy"])
def test_damaged_and_missing_files_are_one_line(tmp_path, name):
    if name == "numpy":
        np.save(tmp_path / "k1.npy", cube())
        options = {"files": "{key}.npy", "axes": AXES}
    else:
        options = WRITERS[name](tmp_path)
    files = section(**options)
    (ref, *_) = refs_of(files, tmp_path)
    path = Path(ref.address)
    with pytest.raises(DatasetError, match=r"nowhere.*: is missing"):
        read(files, ref.__class__(str(tmp_path / ("nowhere" + "".join(path.suffixes))), None, None, (0,)))
    if path.is_dir():
        for document in [*path.glob("cube/zarr.json"), *path.glob("cube/.zarray"), *path.glob(".zmetadata")]:
            document.write_text('{"shape": [3], ')
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if "3" not in name else b"CDF\1" + b"\xff" * 100)
    with pytest.raises(DatasetError) as caught:
        _read_again(files, tmp_path, ref)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _read_again(files, folder, ref):
    refs_of(files, folder)
    read(files, ref)


def test_what_is_missing_in_a_file_is_named(tmp_path):
    labelled(cube()).to_netcdf(tmp_path / "k.nc", engine="h5netcdf")

    def message(**options):
        with pytest.raises(DatasetError) as caught:
            refs_of(section(**{"files": "{key}.nc", **options}), tmp_path)
        return str(caught.value).removeprefix(f"{tmp_path}/k.nc: ")

    assert message(variable="cub") == "has no array 'cub' (did you mean 'cube'?); set variable"
    assert "none called c; say which by from: NUMBER" in message(bands=["a", "c"])
    assert "and no coordinate" not in message(variable="time")
    assert message(dates={"from": "coordinate", "coordinate": "tim"}).startswith("has no coordinate tim;")
    with h5py.File(tmp_path / "k.nc", "r+") as file:
        file["time"].attrs["calendar"] = "360_day"
    assert "time: times in " in message()
    with h5py.File(tmp_path / "k.nc", "r+") as file:
        del file["time"].attrs["units"]
        file["time"][1] = 7
    assert message().endswith("(3 of 3 dates)")
    with h5py.File(tmp_path / "k.nc", "r+") as file:
        file["spatial_ref"].attrs["crs_wkt"] = "/etc/passwd"
    files = section("{key}.nc", dates={"from": "constant", "date": "2020-01-01"})
    with pytest.raises(DatasetError, match="crs_wkt: is no coordinate system: '/etc/passwd'; set crs"):
        place(files, refs_of(files, tmp_path)[0])


def test_links_and_external_values_of_hdf5_are_refused(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["g/cube"] = cube()
    with h5py.File(tmp_path / "k.h5", "w") as file:
        file["g"] = h5py.ExternalLink("secret.h5", "/g")
        file["soft"] = h5py.SoftLink("/g/cube")
        file.create_dataset("raw", (3, 2, 6, 7), "int16", external=[(str(tmp_path / "secret.h5"), 0, 504)])
    for name in ("g/cube", "soft", "raw"):
        files = section("k.h5", variable=name, axes=AXES)
        with pytest.raises(DatasetError, match=r"k.h5: '.*' (is a link|has values in another file)"):
            refs_of(files, tmp_path)


@pytest.mark.parametrize("place_of_codec", [".zarray", ".zmetadata"])
def test_zarr_metadata_cannot_run_code(tmp_path, place_of_codec):
    """numcodecs has a codec for pickles."""
    array = '{"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": 0, "order": "C", '
    array += '"compressor": null, "filters": [{"id": "pickle"}]}'
    folder = tmp_path / "k.zarr" / "cube"
    folder.mkdir(parents=True)
    (tmp_path / "k.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    if place_of_codec == ".zarray":
        (folder / ".zarray").write_text(array)
    else:
        text = f'{{"zarr_consolidated_format": 1, "metadata": {{"cube/.zarray": {array}}}}}'
        (tmp_path / "k.zarr" / ".zmetadata").write_text(text)
    (folder / "0").write_bytes(pickle.dumps(print))
    files = section("k.zarr", variable="cube", axes=["y", "x"])
    with pytest.raises(DatasetError, match="has the codec 'pickle', which is not read"):
        refs_of(files, tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A window of a cube of 2 GB that is mostly not there."""
    import tracemalloc

    with h5py.File(tmp_path / "big.h5", "w") as file:
        file.create_dataset("s2", (100, 2, 3200, 3200), "int16", chunks=(1, 1, 256, 256), fillvalue=3)
        file["s2"][50, 1, 1000:1010, 1000:1010] = 9
    files = section("big.h5", variable="s2", axes=AXES, dates={"from": "constant", "date": "2020-01-01"})
    ref = refs_of(files, tmp_path)[50]
    tracemalloc.start()
    values = read(files, ref, Window(1000, 1000, 256, 256)).values
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert values[0].min() == values[0].max() == 3
    assert values[1, :10, :10].min() == 9
    assert peak < 4e6
