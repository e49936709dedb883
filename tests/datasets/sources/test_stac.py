"""STAC: catalogs and item collections written by pystac."""

from __future__ import annotations

import datetime
import json
import pickle
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from datasets.sources.kit import CRS, DATES, DAYS, TRANSFORM, cube, place, read, refs_of, section, stack
from datasets.sources.test_parquet import geotiff
from testkit.web_server import serve

from maestro_scale.datasets.spec import DatasetError


def item(number: int, hrefs: dict[str, str]) -> pystac.Item:
    when = datetime.datetime.fromisoformat(f"{DAYS[number]}T10:20:30+00:00")
    found = pystac.Item(f"scene-{number}", {"type": "Point", "coordinates": [9, 45]}, [9, 45, 9, 45], when,
                        {"grid:code": "MGRS-32TMM"})  # fmt: skip
    for name, href in hrefs.items():
        bands = {"bands": [{"name": name.upper()}]} if len(name) == 1 else {}
        found.add_asset(name, pystac.Asset(href, extra_fields=bands))
    return found


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """``data/``: images; ``catalog/``: a static catalog with a child; ``items.json``: an ItemCollection."""
    folder = tmp_path_factory.mktemp("stac")
    (folder / "data").mkdir()
    items = []
    for i, values in enumerate(cube()):
        (folder / "data" / f"{i}.tif").write_bytes(geotiff(values))
        for band, name in enumerate("ab"):
            (folder / "data" / f"{i}_{name}.tif").write_bytes(geotiff(values[band : band + 1], nodata=84))
        items.append(
            item(i, {"all": f"data/{i}.tif", "a": f"./data/{i}_a.tif", "b": f"{folder}/data/{i}_b.tif"})
        )
    collection = pystac.ItemCollection(items).to_dict()
    collection["features"].append(item(0, {"vv": "data/radar.tif"}).to_dict())  # of another sensor
    (folder / "items.json").write_text(json.dumps(collection))
    top, child = pystac.Catalog("top", "d"), pystac.Catalog("child", "d")
    top.add_child(child)
    for i in range(3):
        child.add_item(item(i, {n: str(folder / "data" / f"{i}_{n}.tif") for n in "ab"}))
    top.normalize_hrefs(str(folder / "catalog"))
    top.make_all_asset_hrefs_relative()
    top.save(pystac.CatalogType.SELF_CONTAINED)
    return folder


@pytest.mark.parametrize("name", ["items.json", "catalog/catalog.json"])
@pytest.mark.parametrize("bands", ["ab", "BA"])
def test_items_are_images(src, name, bands):
    files = section(name, bands=list(bands))
    refs = refs_of(files, src)
    found = {r.key: r.date for r in refs}
    assert found == {f"scene-{i}": (y, d, 10) for i, (y, d, _) in enumerate(DATES)}
    refs = sorted(pickle.loads(pickle.dumps(refs)), key=lambda r: r.key)
    np.testing.assert_array_equal(stack(files, refs), cube() if bands == "ab" else cube()[:, ::-1])
    assert place(files, refs[0]) == (CRS, TRANSFORM)
    assert read(files, refs[1]).invalid.sum() == 1


def test_one_asset_with_all_bands(src):
    dates = {"from": "constant", "date": "2020-01-01"}
    files = section(
        "items.json", bands=[{"name": "q", "from": 2}], variable="all", keys="grid:code", dates=dates
    )
    refs = refs_of(files, src)
    assert [(r.key, r.date) for r in refs] == [("MGRS-32TMM", None)] * 3
    np.testing.assert_array_equal(stack(files, refs), cube()[:, 1:])


def test_a_remote_catalog(src):
    with serve(src) as served:
        files = section("catalog/catalog.json")
        refs = sorted(refs_of(files, served.url), key=lambda r: r.key)
        assert all(r.address.startswith(served.url) for r in refs)
        np.testing.assert_array_equal(stack(files, refs), cube())
        with pytest.raises(DatasetError, match=r"nowhere\.json: is missing"):
            refs_of(section("nowhere.json"), served.url)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_the_projection_extension_places_files_that_do_not_say(tmp_path):
    path = tmp_path / "x.tif"
    with rasterio.open(path, "w", driver="GTiff", width=7, height=6, count=1, dtype="int16") as raster:
        raster.write(cube()[0, :1])
    scene = item(0, {"a": "x.tif"})
    scene.properties["proj:code"] = CRS
    scene.assets["a"].extra_fields["proj:transform"] = [*TRANSFORM, 0, 0, 1]
    (tmp_path / "item.json").write_text(json.dumps(scene.to_dict()))
    files = section("item.json", bands=["a"])
    (ref,) = refs_of(files, tmp_path)
    assert place(files, ref) == (CRS, TRANSFORM)


def test_bad_catalogs_are_one_line(src, tmp_path):
    def message(change, **options):
        collection = json.loads((src / "items.json").read_text())
        collection["features"] = collection["features"][:3]
        change(collection["features"])
        (tmp_path / "c.json").write_text(json.dumps(collection))
        files = section("c.json", **options)
        with pytest.raises(DatasetError) as caught:
            read(files, refs_of(files, tmp_path)[0])
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    def set_all(path, value):
        def change(features):
            for feature in features:
                at = feature
                for step in path[:-1]:
                    at = at[step]
                at[path[-1]] = value

        return change

    only_a = set_all(["assets"], {"a": {"href": "a.tif"}})
    assert "a.tif: item scene-0 lacks an asset of a, b; leave it out" in message(only_a)
    assert "a.tif: is missing; fetch it" in message(only_a, bands=["a"])
    assert message(only_a, variable="B02").startswith(
        "c.json: none of 3 items has the asset; set variable, or from of the bands (assets are a)"
    )
    assert "c.json: names '/etc/passwd', which is not below" in message(
        set_all(["assets", "a"], {"href": "/etc/passwd"})
    )
    assert "c.json: names '/etc/passwd', which is not below" in message(
        set_all(["assets", "a"], {"href": "file:///etc/passwd"})
    )
    assert "names 'pipe://x'; addresses are http" in message(set_all(["assets", "a"], {"href": "pipe://x"}))
    assert "features[0]: is no STAC item (" in message(
        set_all(["properties", "datetime"], "soon"), bands=["a"]
    )
    dates = {"from": "coordinate", "coordinate": "day"}
    days = set_all(["properties", "day"], "soon")
    assert message(lambda f: (only_a(f), days(f)), bands=["a"], dates=dates).endswith("(3 of 3 items)")
    assert "features[1]: the document is 7, expected an object" in message(
        lambda features: (only_a(features), features.__setitem__(1, 7)), bands=["a"]
    )
    (tmp_path / "c.json").write_text('{"type": "Topology"}')
    with pytest.raises(DatasetError, match=r"c\.json: is no STAC document \(type 'Topology'\)"):
        refs_of(section("c.json"), tmp_path)
    link = {"rel": "child", "href": "./c.json"}
    (tmp_path / "c.json").write_text(
        json.dumps({"type": "Catalog", "links": [link, {"rel": "next", "href": "x"}]})
    )
    with pytest.raises(DatasetError, match="none of 0 items has the asset"):
        refs_of(section("c.json"), tmp_path)
