"""Every storage format over S3 and HTTP, read in parts, and the table of formats."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import s3fs
import webdataset as wds
import xarray
from datasets.sources.kit import (
    CRS,
    DATES,
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
from datasets.sources.test_parquet import geotiff
from datasets.sources.test_stac import item
from pyarrow import parquet
from rasterio import Affine
from shards.s3 import Fault, Proxy, reset
from testkit.web_server import serve

from maestro_scale.datasets.sources import remote, table
from maestro_scale.datasets.sources.protocol import Window
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.remote import reader
from maestro_scale.remote.retry import RetryPolicy

pytestmark = pytest.mark.filterwarnings("ignore:The data type .* does not have a Zarr V3 specification")
AXES = ["date", "band", "y", "x"]
CONSTANT = {"from": "constant", "date": "2020-01-01"}
FORMATS = {
    "geotiff": {"files": "{key}_{date:%Y-%m-%d}.tif"},
    "netcdf": {"files": "{key}.nc"},
    "zarr 2": {"files": "{key}.zarr"},
    "hdf5": {"files": "{key}.h5", "variable": "cube", "axes": AXES, "dates": CONSTANT},
    "numpy": {"files": "{key}.npy", "axes": AXES, "dates": CONSTANT},
    "npz": {"files": "{key}.npz", "axes": AXES, "dates": CONSTANT, "variable": "cube"},
    "parquet": {"files": "all.parquet", "variable": "image", "keys": "name"},
    "webdataset": {"files": "shard-{0..0}.tar", "variable": "npy", "axes": AXES, "dates": CONSTANT},
    "stac": {"files": "items.json", "variable": "all"},
}
if ZARR_3:
    FORMATS["zarr 3"] = {"files": "{key}.zarr3", "source": "zarr", "variable": "cube"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The cube in every format, of tile k (or a tile per date)."""
    import pystac

    folder = tmp_path_factory.mktemp("formats")
    values = cube()
    data = xarray.Dataset(
        {"cube": (("time", "band", "y", "x"), values)},
        coords={"time": STAMPS.astype("datetime64[ns]"), "band": ["a", "b"], "y": Y, "x": X},
    )
    data.to_netcdf(folder / "k.nc", engine="h5netcdf")
    data.to_zarr(folder / "k.zarr", zarr_format=2)
    if ZARR_3:
        data.to_zarr(folder / "k.zarr3", zarr_format=3, consolidated=False)
    with h5py.File(folder / "k.h5", "w") as file:
        file["cube"] = values
    np.save(folder / "k.npy", values)
    np.savez(folder / "k.npz", cube=values)
    images = [geotiff(v) for v in values]
    for stamp, image in zip(STAMPS, images, strict=True):
        (folder / f"k_{stamp}.tif").write_bytes(image)
    table = pa.table({"name": ["p", "q", "r"], "timestamp": STAMPS.astype("datetime64[s]"), "image": images})
    parquet.write_table(table, folder / "all.parquet", row_group_size=1)
    with wds.TarWriter(str(folder / "shard-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", "npy": (folder / "k.npy").read_bytes()})
    items = [item(i, {"all": f"./k_{stamp}.tif"}) for i, stamp in enumerate(STAMPS)]
    pystac.ItemCollection(items).save_object(str(folder / "items.json"))
    return folder


def check(options, src) -> None:
    files = section(**options)
    refs = sorted(refs_of(files, src), key=lambda r: (r.date or (), r.part))
    assert pickle.loads(pickle.dumps(refs)) == refs
    np.testing.assert_array_equal(stack(files, refs), cube())
    np.testing.assert_array_equal(read(files, refs[1], Window(1, 2, 3, 4)).values, cube()[1, :, 1:4, 2:6])
    if options.get("dates") != CONSTANT:
        assert [r.date[:2] for r in refs] == [d[:2] for d in DATES]


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder(folder, name):
    check(FORMATS[name], folder)


@pytest.fixture(scope="module")
def server(folder):
    """The port of an S3 server with the folder in a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    reset(port)
    with pytest.MonkeyPatch.context() as patch:
        lead_to(patch, f"http://127.0.0.1:{port}")
        fs = s3fs.S3FileSystem()
        fs.mkdir("raw")
        fs.put(f"{folder}/", "raw/data/", recursive=True)
        yield port
    server.stop()


def lead_to(patch, endpoint) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.mark.parametrize("name", ["geotiff", "zarr 2", "hdf5", "parquet", "webdataset", "stac"])
def test_an_object_store(server, name):
    check(FORMATS[name], "s3://raw/data")


def test_transient_failures_are_retried_and_lasting_ones_are_one_line(server, monkeypatch):
    with Proxy(server) as proxy:
        lead_to(monkeypatch, proxy.url)
        proxy.faults = lambda method, path, n: Fault(503) if n % 2 else None
        quick = RetryPolicy(deadline_s=5, initial_wait_s=0.01, max_wait_s=0.02)
        monkeypatch.setattr(remote, "RetryPolicy", lambda: quick)
        files = section(**FORMATS["hdf5"])
        (ref, *_) = refs_of(files, "s3://raw/data")
        np.testing.assert_array_equal(read(files, ref).values, cube()[0])
        proxy.faults = lambda method, path, n: Fault(403) if path.endswith(".tif") else None
        files = section(**FORMATS["geotiff"])
        with pytest.raises(DatasetError, match=r"s3://raw/data/k_.*\.tif: refused .* check credentials"):
            stack(files, refs_of(files, "s3://raw/data"))
    lead_to(monkeypatch, f"http://127.0.0.1:{server}")


@pytest.mark.parametrize(
    "name", ["netcdf", "zarr 3" if ZARR_3 else "zarr 2", "numpy", "npz", "parquet", "webdataset"]
)
def test_a_web_server(folder, name):
    """Whose files are named one by one, because it does not list them."""
    options = {**FORMATS[name]}
    options["files"] = options["files"].replace("{key}", "k")
    with serve(folder) as served:
        check(options, served.url)


def test_a_cog_is_read_in_parts(tmp_path):
    """A window of a remote image of 8 MB: its header and the tiles that it touches."""
    values = np.random.default_rng(0).integers(0, 2**15, (2, 1024, 2048)).astype(np.int16)
    profile = {"width": 2048, "height": 1024, "count": 2, "dtype": "int16", "crs": CRS, "blocksize": 128}
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="COG", transform=Affine(*TRANSFORM), **profile
    ) as raster:
        raster.write(values)
    assert (tmp_path / "x.tif").stat().st_size > 8e6
    with serve(tmp_path) as served:
        files = section("x.tif")
        (ref,) = refs_of(files, served.url)
        assert place(files, ref) == (CRS, TRANSFORM)
        served.sent.clear()
        found = read(files, ref, Window(300, 400, 100, 120)).values
        np.testing.assert_array_equal(found, values[:, 300:400, 400:520])
        assert served.sent["x.tif"] < 2e6


def test_a_server_without_ranges_is_said(tmp_path, monkeypatch):
    np.save(tmp_path / "k.npy", np.zeros((2, 600, 600)))
    with serve(tmp_path) as served:
        files = section("k.npy", dtype="float64")
        (ref,) = refs_of(files, served.url)
        whole = (tmp_path / "k.npy").read_bytes()
        monkeypatch.setattr(reader.RemoteReader, "read_range", lambda *_: whole)
        with pytest.raises(DatasetError, match=r"k\.npy: .*the server ignores range requests"):
            read(files, ref)


def test_credentials_in_addresses_are_refused():
    with pytest.raises(DatasetError, match="cannot carry credentials"):
        remote.open_binary("s3://key:secret@bucket/x.tif")
    with pytest.raises(DatasetError, match="is not the address of a file"):
        remote.open_binary("memory://")


def test_any_address_of_fsspec(folder):
    fs = fsspec.filesystem("memory")
    fs.put(f"{folder}/", "/raw/", recursive=True)
    check(FORMATS["zarr 2"], "memory://raw")
    check({"files": "memory://raw/{key}.nc"}, folder / "elsewhere")
    check({**FORMATS["stac"], "files": "memory://raw/items.json"}, folder / "elsewhere")


def test_a_remote_file_behaves_as_a_file(folder):
    content = (folder / "all.parquet").read_bytes()
    rng = np.random.default_rng(0)
    with serve(folder) as served, remote.open_binary(f"{served.url}/all.parquet") as file:
        for _ in range(50):
            start, size = (int(n) for n in rng.integers(0, len(content), 2))
            file.seek(start)
            assert file.read(size) == content[start : start + size]
        assert file.seek(-4, 2) == len(content) - 4
        assert file.read() == b"PAR1"


def test_the_table_names_modules_that_exist():
    for suffix, kind in table.SUFFIXES.items():
        files = section(f"{{key}}{suffix}")
        assert table.source_kind(files) == kind
        assert callable(table.source_of(files).open_file)
        assert callable(table.source_of(files).list_images)


def test_listing_imports_no_library_of_another_format():
    """Training and other commands start without them."""
    names = ("rasterio", "xarray", "zarr", "h5py", "pystac", "torch", "pyarrow")
    code = "import sys, maestro_scale.datasets.sources.arrays, maestro_scale.datasets.sources.table as table;"
    code += f"print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
