"""Tars in the layout of WebDataset: written by the library, read by key, as the library reads them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
import xarray
from datasets.sources.kit import (
    CRS,
    DATES,
    DAYS,
    STAMPS,
    TRANSFORM,
    X,
    Y,
    cube,
    place,
    read,
    refs_of,
    section,
    stack,
)
from datasets.sources.test_parquet import geotiff
from datasets.sources.test_stac import item
from pyarrow import parquet
from testkit.corpora import zarr_zip
from testkit.web_server import serve

from maestro_scale.datasets.sources import webdataset_tars
from maestro_scale.datasets.sources.protocol import Window
from maestro_scale.datasets.spec import DatasetError


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def cube_zip(values: np.ndarray) -> bytes:
    coords = {"time": STAMPS.astype("datetime64[ns]"), "y": Y, "x": X, "band": ["a", "b"]}
    return zarr_zip({"bands": (("time", "band", "y", "x"), values)}, coords, (1, 2, 6, 7))


def samples() -> list[dict]:
    """A tile per date of the cube, with every kind of member."""
    tiles = []
    for i, values in enumerate(cube()):
        tiles.append(
            {
                "__key__": f"site/t{i}",
                "tif": geotiff(values),
                "a.tif": geotiff(values[:1]),
                "b.tif": geotiff(values[1:]),
                "s2.npy": npy(values),
                "npz": npz(s2=values, other=np.zeros(2)),
                "json": json.dumps({"properties": {"date": DAYS[i], "all": list(DAYS)}}).encode(),
                "day.txt": DAYS[i].encode(),
                "zarr.zip": cube_zip(cube() + i),
                "series.npy": npy(cube() + i),
            }
        )
    return tiles


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for i, tile in enumerate(samples()):
        with wds.TarWriter(str(folder / f"train-{i:03d}.tar"), encoder=False) as writer:
            writer.write(tile)
    return folder


JSON = {"from": "coordinate", "coordinate": "json/properties/date"}
TEXT = {"from": "coordinate", "coordinate": "day.txt"}
IMAGES = {
    "tif": {"variable": "tif", "dates": JSON},
    "a tif per band": {"variable": "{band}.tif", "dates": TEXT},
    "npy": {"variable": "s2.npy", "dates": JSON},
    "npz": {"variable": "npz/s2", "dates": TEXT},
}


@pytest.mark.parametrize("name", IMAGES)
def test_members_are_read_by_key(tars, name):
    files = section("{split}-{000..002}.tar", **IMAGES[name])
    refs = refs_of(files, tars)
    assert [(r.key, r.split) for r in refs] == [(f"site/t{i}", "train") for i in range(3)]
    assert pickle.loads(pickle.dumps(refs)) == refs
    np.testing.assert_array_equal(stack(files, refs[::-1]), cube()[::-1])
    np.testing.assert_array_equal(read(files, refs[1], Window(1, 2, 3, 4)).values, cube()[1, :, 1:4, 2:6])
    with webdataset_tars.open_file(refs[2].address, files) as file:
        assert (refs[2].date or file.image(refs[2]).date) == DATES[2]
    if "tif" in name:
        assert place(files, refs[0]) == (CRS, TRANSFORM)


@pytest.mark.parametrize(
    ("variable", "dates"),
    [
        ("zarr.zip/bands", "time"),
        ("series.npy", "json/properties/all"),
        ("zarr.zip/bands", "json/properties/all"),
    ],
)
def test_members_with_a_series(tars, variable, dates):
    dates = {"from": "coordinate", "coordinate": dates}
    files = section("train-00{0,2}.tar", variable=variable, axes=["date", "band", "y", "x"], dates=dates)
    refs = refs_of(files, tars)
    assert [(r.key, r.date) for r in refs] == [(f"site/t{i}", d) for i in (0, 2) for d in DATES]
    np.testing.assert_array_equal(stack(files, refs), np.concatenate([cube(), cube() + 2]))


def test_the_index_is_what_the_library_reads(tars):
    stock = list(wds.WebDataset(str(tars / "train-{000..002}.tar"), shardshuffle=False))
    for sample, path in zip(stock, sorted(tars.iterdir()), strict=True):
        content = path.read_bytes()
        ((key, members),) = webdataset_tars.index(str(path)).items()
        assert key == sample["__key__"]
        found = {suffix: content[start : start + size] for suffix, (start, size) in members.items()}
        assert found == {k: v for k, v in sample.items() if not k.startswith("__")}


def test_texts_of_members_are_a_table(tars):
    found = webdataset_tars.read_table("train-{000..002}.tar", str(tars), ["day.txt", "json/properties/all"])
    assert found["__key__"] == ["site/t0", "site/t1", "site/t2"]
    assert found["day.txt"] == list(DAYS)
    assert found["json/properties/all"] == [",".join(DAYS)] * 3
    for name, message in (("cls", "no sample has cls"), ("tif", r"t0: tif is no image|tif: is no text")):
        with pytest.raises(DatasetError, match=message):
            webdataset_tars.read_table("train-{000..002}.tar", str(tars), [name])
    with pytest.raises(DatasetError, match="matches no tar with samples"):
        webdataset_tars.read_table("x-{n}.tar", str(tars), ["cls"])


def test_shards_over_http(tars):
    with serve(tars) as served:
        files = section("train-{000..002}.tar", **IMAGES["a tif per band"])
        refs = refs_of(files, served.url)
        np.testing.assert_array_equal(stack(files, refs), cube())
        files = section("train-{003..004}.tar", variable="tif")
        with pytest.raises(DatasetError, match=r"http://.*/train-003.tar: is missing"):
            refs_of(files, served.url)
        with pytest.raises(DatasetError, match="a web server does not list its files"):
            refs_of(section("train-*.tar", variable="tif"), served.url)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("{a,b}}.tar", "has braces that do not match"),
        ("{0..99999999999}.tar", "stands for more than 1000000 tars"),
        ("{a,b}{0..999}{0..999}.tar", "stands for more than 1000000 tars"),
    ],
)
def test_wrong_braces_are_one_line(tars, files, message):
    with pytest.raises(DatasetError, match=message):
        list(webdataset_tars.list_images(section(files), str(tars)))


def test_wrong_suffixes_and_shards_are_one_line(tars, tmp_path):
    def message(files="train-*.tar", src=tars, **options):
        with pytest.raises(DatasetError) as caught:
            refs_of(section(files, **options), src)
        return str(caught.value)

    assert "no tile has jpg; set variable to one of the suffixes: a.tif, b.tif, day.txt, json" in message(
        variable="jpg"
    )
    assert "set variable to a suffix (there are a.tif, b.tif, npz, s2.npy" in message()
    missing = message("train-{000..009}.tar", variable="tif")
    assert missing.startswith(f"{tars}/train-003.tar: is missing (7 of 10 shards of train-{{000..009}}.tar)")
    assert "t0: has no array 'npz/s3' (did you mean 'npz/s2'?); set variable" in message(
        "train-000.tar", variable="npz/s3", axes=["band", "y", "x"]
    )
    content = (tars / "train-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    assert f"{tmp_path}/cut.tar: is not a complete tar" in message("cut.tar", tmp_path)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tars / "train-000.tar", "x.tif")
    assert "unpack it if it is compressed" in message("z.tar", tmp_path)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name in ("a.tif", "b.tif", "a.TIF"):
            tar.add(tars / "train-000.tar", name)
    assert "has the member a.TIF twice" in message("twice.tar", tmp_path)
    files = section("train-000.tar", variable="tif", dates={"from": "coordinate", "coordinate": "json/day"})
    with (
        webdataset_tars.open_file(str(tars / "train-000.tar"), files) as file,
        pytest.raises(DatasetError, match=r"t0: has no json/day; set dates\.coordinate"),
    ):
        file.image(refs_of(files, tars)[0])


def test_zarr_in_a_tar_is_that_of_xarray(tars):
    content = next(iter(wds.WebDataset(str(tars / "train-001.tar"), shardshuffle=False)))["zarr.zip"]
    (tars / "x.zarr.zip").write_bytes(content)
    import zarr

    opened = xarray.open_zarr(zarr.storage.ZipStore(str(tars / "x.zarr.zip")))
    np.testing.assert_array_equal(opened.bands.values, cube() + 1)
    (tars / "x.zarr.zip").unlink()


def test_damaged_pixels_are_one_line(tmp_path):
    """The header of the GeoTIFF is right, its pixels are not: in a tar, a table and a catalog."""
    values = np.random.default_rng(0).integers(0, 99, (2, 64, 64)).astype(np.int16)
    content = bytearray(geotiff(values, compress="deflate", tiled=True, blockxsize=16, blockysize=16))
    content[5000:5200] = bytes(200)
    (tmp_path / "x.tif").write_bytes(content)
    with wds.TarWriter(str(tmp_path / "t.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", "tif": bytes(content)})
    parquet.write_table(pa.table({"tif": [bytes(content)]}), tmp_path / "t.parquet")
    (tmp_path / "c.json").write_text(json.dumps(item(0, {"tif": "x.tif"}).to_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name in ("x.tif", "t.tar", "t.parquet", "c.json"):
            files = section(name, variable=None if name == "x.tif" else "tif")
            (ref,) = refs_of(files, ".")
            with pytest.raises(DatasetError, match=r"(x\.tif|t\.tar: k\.tif|tif of 0): cannot be read \("):
                read(files, ref)
