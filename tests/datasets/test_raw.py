"""Reading of raw files: declared nodata, and files whose content is not what is expected."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from maestro_scale.datasets.raw import Field, read_h5, read_npy, read_stack, read_tif
from maestro_scale.datasets.spec import DatasetError


def write(path: Path, values: np.ndarray, **profile: object) -> Path:
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, **profile}
    profile["transform"] = rasterio.Affine(10, 0, 6e5, 0, -10, 6e6)
    with rasterio.open(path, "w", dtype=values.dtype.name, **profile) as raster:
        raster.write(values)
    return path


def pixels(dtype: str, num_bands: int = 2) -> np.ndarray:
    """(C, 2, 3): 100 + 10 band + 3 row + column."""
    b, r, c = np.ogrid[:num_bands, :2, :3]
    return (100 + 10 * b + 3 * r + c).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "nodata", "stored"),
    [
        ("uint8", 0, 0),
        ("uint16", 65_535, 65_535),
        ("int16", -10_000, -10_000),
        ("float32", -9999, -9999),
        ("float32", np.nan, np.nan),
        ("float32", -3.4028234663852886e38, np.finfo(np.float32).min),
        ("float32", np.inf, np.inf),
    ],
)
def test_a_nodata_value_is_found(tmp_path, dtype, nodata, stored):
    values = pixels(dtype)
    values[1, 0, 2] = stored
    path = write(tmp_path / "a.tif", values, nodata=nodata)
    expected = np.zeros((2, 2, 3), bool)
    expected[1, 0, 2] = True
    file = read_tif(path, (2, 2, 3), dtype)
    np.testing.assert_array_equal(file.values, values)
    np.testing.assert_array_equal(file.invalid, expected)


def test_a_nodata_value_that_does_not_occur_declares_nothing(tmp_path):
    file = read_tif(write(tmp_path / "a.tif", pixels("int16"), nodata=-10_000), (2, 2, 3), "int16")
    assert file.invalid is None


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_band_is_found_within_the_file_and_beside_it(tmp_path, internal):
    path = tmp_path / "a.tif"
    valid = np.array([[255, 0, 255], [255, 255, 0]], np.uint8)
    values = pixels("uint16")
    values[0, 0, 0] = 7  # the nodata value holds beside the mask
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        profile = {"driver": "GTiff", "count": 2, "height": 2, "width": 3, "dtype": "uint16", "nodata": 7}
        with rasterio.open(path, "w", **profile) as raster:
            raster.write(values)
            raster.write_mask(valid)
    assert (tmp_path / "a.tif.msk").exists() != internal
    expected = np.stack([valid == 0] * 2)
    expected[0, 0, 0] = True
    np.testing.assert_array_equal(read_tif(path, (2, 2, 3), "uint16").invalid, expected)


@pytest.mark.parametrize(
    ("dtype", "tags", "marked"),
    [
        ("int16", ("nan", "nan"), []),  # NaN, and numbers beyond the dtype, do not occur in integers
        ("uint8", ("-9999", "300"), []),
        ("int16", ("100", "110"), [(0, 0, 0), (1, 0, 0)]),
        ("float32", ("nan", "110"), [(0, 1, 1), (1, 0, 0)]),
    ],
)
def test_each_band_has_its_nodata_value(tmp_path, dtype, tags, marked):
    """In a file beside the image, since TIFF has one for all bands."""
    values = pixels(dtype)
    if dtype == "float32":
        values[0, 1, 1] = np.nan
    path = write(tmp_path / "a.tif", values)
    bands = "".join(
        f'<PAMRasterBand band="{i}"><NoDataValue>{tag}</NoDataValue></PAMRasterBand>'
        for i, tag in enumerate(tags, 1)
    )
    (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    invalid = read_tif(path, (2, 2, 3), dtype).invalid
    assert ([] if invalid is None else [tuple(i) for i in np.argwhere(invalid).tolist()]) == marked


def test_an_alpha_channel_beside_the_bands_is_a_mask(tmp_path):
    values = pixels("uint8", 4)
    values[3] = [[255, 0, 255], [255, 255, 255]]
    path = write(tmp_path / "a.tif", values, photometric="RGB", alpha="yes")
    file = read_tif(path, (3, 2, 3), "uint8")
    np.testing.assert_array_equal(file.values, values[:3])
    np.testing.assert_array_equal(file.invalid, np.stack([values[3] == 0] * 3))


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
def test_near_infrared_that_is_tagged_as_alpha_is_data(tmp_path, driver):
    """GDAL tags the fourth of four uint8 bands as alpha; TreeSatAI-TS, FLAIR-HUB and NAIP have measurements there."""
    values = pixels("uint8", 4)
    values[3] = 0
    path = write(tmp_path / "a.img", values, driver=driver)
    with rasterio.open(path) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    file = read_tif(path, (4, 2, 3), "uint8")
    np.testing.assert_array_equal(file.values, values)
    assert file.invalid is None


def test_nodata_tags_that_are_a_class_of_labels_are_ignored(tmp_path):
    values = np.array([[[0, 1, 2], [255, 1, 0]]], np.uint8)
    path = write(tmp_path / "a.tif", values, nodata=0)
    assert read_tif(path, (1, 2, 3), "uint8", num_classes=3).invalid is None
    path = write(tmp_path / "b.tif", values, nodata=255)
    file = read_tif(path, (1, 2, 3), "uint8", num_classes=3)
    np.testing.assert_array_equal(file.invalid, values == 255)


def test_nodata_of_a_stack_is_by_date_and_band(tmp_path):
    values = np.arange(1, 25, dtype=np.int16).reshape(6, 2, 2)
    values[5, 1, 0] = -1
    stack = read_stack(write(tmp_path / "a.tif", values, nodata=-1), 2, 2)
    assert stack.values.shape == (3, 2, 2, 2)
    assert stack.invalid is not None
    assert np.argwhere(stack.invalid).tolist() == [[2, 1, 1, 0]]
    with pytest.raises(DatasetError, match="is 6×2×2, expected a multiple of 4 bands of 2×2"):
        read_stack(tmp_path / "a.tif", 4, 2)


SERIES = {"data": Field("numbers", (None, 2)), "names": Field("text", (None,))}


def h5(path: Path, **content: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in {"data": np.ones((3, 2)), "names": [b"a", b"bc", b"d"], **content}.items():
            if isinstance(value, str):
                file.create_group(name)
            elif isinstance(value, dict):
                file.create_dataset(name, **value)
            elif value is not None:
                file[name] = value
    return path


@pytest.mark.parametrize("names", [[b"a", b"bc"], np.array(["a", "bc"], h5py.string_dtype("utf-8"))])
def test_h5_numbers_and_text(tmp_path, names):
    content = read_h5(h5(tmp_path / "a.h5", names=names), SERIES, optional=("names",))
    assert content["names"].tolist() == [b"a", b"bc"]
    assert content["data"].shape == (3, 2)
    content = read_h5(h5(tmp_path / "b.h5", names=None), SERIES, optional=("names",))
    assert list(content) == ["data"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": np.array([[b"a"], [b"b"], [b"c"]])}, "names: is text 3×1, expected text T"),
        ({"names": "group"}, "names is a group, expected text T"),
        ({"names": np.arange(3)}, "names: is int64 3, expected text T"),
        ({"names": b"a"}, "names: is text scalar, expected text T"),
        ({"names": None}, "has no dataset 'names'"),
        ({"names": h5py.Empty("f4")}, "names: is float32 scalar, expected text T"),
        ({"names": {"shape": (3,), "dtype": h5py.ref_dtype}}, "names: is object 3, expected text T"),
        ({"names": {"shape": (3,), "dtype": h5py.vlen_dtype(np.int8)}}, "names: is object 3"),
        ({"data": "group"}, "data is a group, expected numbers T×2"),
        ({"data": np.array([[b"1", b"2"]])}, "data: is text 1×2, expected numbers T×2"),
        ({"data": np.ones((3, 2), complex)}, "data: is complex128 3×2"),
        ({"data": np.ones((3, 2), [("x", "f4")])}, "data: is .*3×2, expected numbers T×2"),
        ({"data": np.ones((3, 5))}, "data: is float64 3×5, expected numbers T×2"),
        ({"data": np.ones(3)}, "data: is float64 3, expected numbers T×2"),
        (
            {"data": {"shape": (2**40, 2), "dtype": "f4", "chunks": (1, 2)}},
            "has 1099511627776 dates, more than",
        ),
    ],
)
def test_other_content_in_an_h5_file_is_named_in_one_line(tmp_path, content, message):
    path = h5(tmp_path / "a.h5", **content)
    with pytest.raises(DatasetError, match=message) as error:
        read_h5(path, SERIES)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_text_that_is_not_ascii_is_bytes(tmp_path):
    """So that product names with other letters reach the check of dates, which names them."""
    path = h5(tmp_path / "a.h5", names=np.array(["ä", "b"], h5py.string_dtype("utf-8")))
    assert read_h5(path, SERIES)["names"].tolist() == ["ä".encode(), b"b"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2**40, 10), "has 1099511627776 dates, more than|cannot be read"), ((3, 10), "cannot be read")],
)
def test_an_npy_header_cannot_claim_more_than_the_file_has(tmp_path, shape, message):
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(bytes(8))
    with pytest.raises(DatasetError, match=message) as error:
        read_npy(path, (None, 10), "float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 9), np.float32), "is float32 3×9, expected float32 T×10"),
        (np.ones((3, 10)), "is float64 3×10, expected float32 T×10"),
        (np.array(["a"] * 10, object), "cannot be read"),
        (np.ones((), np.float32), "is float32 scalar, expected float32 T×10"),
    ],
)
def test_other_arrays_are_named(tmp_path, array, message):
    path = tmp_path / "a.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(DatasetError, match=message):
        read_npy(path, (None, 10), "float32")


def vrt(source: Path) -> str:
    return (
        '<VRTDataset rasterXSize="3" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{source}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def test_a_file_that_names_another_one_is_not_an_image(tmp_path):
    """GDAL would also fetch it from an address (/vsicurl/http://…)."""
    other = write(tmp_path / "other.tif", pixels("uint8", 1))
    (tmp_path / "a.tif").write_text(vrt(other))
    with pytest.raises(DatasetError, match=r"a\.tif: cannot be read \(.*not recognized"):
        read_tif(tmp_path / "a.tif", (1, 2, 3), "uint8")
    (tmp_path / "other.tif.msk").write_text(vrt(other))
    with pytest.raises(DatasetError, match=r"other\.tif: cannot be read"):
        read_tif(other, (1, 2, 3), "uint8")


def external(path: Path, other: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (6,), "uint8", external=[(str(other), 0, 6)])


def virtual(path: Path, other: Path) -> None:
    layout = h5py.VirtualLayout((6,), "uint8")
    layout[:] = h5py.VirtualSource(str(other), "b", (6,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("a", layout)


def external_link(path: Path, other: Path) -> None:
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(str(other), "b")
        file["a"] = h5py.SoftLink("/link")


@pytest.mark.parametrize(
    ("make", "message"),
    [(external, "values in another file"), (virtual, "values in another file"), (external_link, "is a link")],
)
def test_an_hdf5_file_does_not_read_others(tmp_path, make, message):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["b"] = np.arange(6, dtype="uint8")
    make(tmp_path / "a.h5", tmp_path / "other.h5")
    with pytest.raises(DatasetError, match=message):
        read_h5(tmp_path / "a.h5", {"a": Field("numbers", (None,), "uint8")})


def test_tiles_and_chunks_are_limited(tmp_path):
    """The libraries allocate one at once, also for an image of a few pixels."""
    tiles = {"tiled": True, "blockxsize": 16_384, "blockysize": 4096 + 16, "compress": "deflate"}
    path = write(tmp_path / "a.tif", pixels("uint8", 1), **tiles)
    with pytest.raises(DatasetError, match="tiles of 16384×4112 pixels, which exceed 64 MiB"):
        read_tif(path, (1, 2, 3), "uint8")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunks = {"maxshape": (None, None), "chunks": (2**13, 2**13 + 1)}
        file.create_dataset("a", (2, 2), "uint8", **chunks)
    with pytest.raises(DatasetError, match="chunks of 8192×8193, which exceed 64 MiB"):
        read_h5(tmp_path / "a.h5", {"a": Field("numbers", (None, 2), "uint8")})


def test_texts_are_limited_in_sum(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = [["x" * 300, "y" * 300]] * 2
    field = {"a": Field("text", (None, 2))}
    (whole,) = read_h5(tmp_path / "a.h5", field).values()
    monkeypatch.setattr("maestro_scale.datasets.raw.MAX_TEXT_BYTES", 1200)
    (one_by_one,) = read_h5(tmp_path / "a.h5", field).values()
    assert one_by_one.dtype == whole.dtype
    assert one_by_one.tolist() == whole.tolist() == [[b"x" * 300, b"y" * 300]] * 2
    monkeypatch.setattr("maestro_scale.datasets.raw.MAX_TEXT_BYTES", 1199)
    with pytest.raises(DatasetError, match="texts of more than 64 MiB"):
        read_h5(tmp_path / "a.h5", field)
