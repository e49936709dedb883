"""maestro-scale inspect: the tables agree with what was written, and the picture shows the tile."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from shards.kit import Toy, tile, toy_keys
from testkit.hostile import NAMES
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.datasets.patterns import evenly
from maestro_scale.datasets.spec import DatasetSpec, Modality, Target, Tile
from maestro_scale.datasets.statistics import tile_statistics
from maestro_scale.escaping import printable
from maestro_scale.shards.errors import BadShard, ManifestError
from maestro_scale.shards.format.codec import Sample, encode
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read import measure
from maestro_scale.shards.read.preview import read_first_sample, read_samples
from maestro_scale.shards.write.writer import Writer, write_shards
from maestro_scale.tracking.inspection import histogram
from maestro_scale.tracking.tile_picture import panels

TOY = Toy(40)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for split in ("train", "val"):
        write_shards(TOY, str(folder), split, shard_mb=0.02)
    return folder


def row(text: str, start: str) -> list[str]:
    """The words of the first line that starts with ``start``."""
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_the_tables(shards, tmp_path):
    picture = tmp_path / "tile.png"
    result = CliRunner().invoke(app, ["inspect", str(shards), "--png", str(picture)])
    assert result.exit_code == 0, result.output
    assert f"{picture}: one tile; next: maestro-scale describe {shards} --recipe" in result.output
    tiles = [tile(key) for key in toy_keys(40)]
    manifest = Manifest.load(str(shards))
    of_train = manifest.shards_of(["train"])
    size = sum(s.bytes for s in of_train) / 1e6
    assert row(result.output, "val ")[1:3] == [str(len(of_train)), "40"]
    assert row(result.output, "train ")[3] == f"{size:.1f}"
    assert of_train[0].path in result.output
    assert f"… {len(manifest.shards) - 12} more" in result.output
    dates = sum(len(t.arrays["s2"]) for t in tiles)
    assert row(result.output, "s2  ")[-1] == f"{dates / 40:.1f}"
    with_oak = sum(t.targets["kinds"][0] > 0.1 for t in tiles)
    assert row(result.output, "oak")[1:3] == [str(with_oak), f"{100 * with_oak / 40:.1f}"]
    water = np.mean([np.mean(t.targets["cover"] == 1) for t in tiles])
    assert row(result.output, "water")[2] == f"{100 * water:.1f}"
    counts = [int(n) for n in row(result.output, "train  s2")[-12:]]
    january = sum(int((t.dates["s2"][:, 1] <= 31).sum()) for t in tiles)
    assert (counts[0], sum(counts)) == (january, dates)
    assert str(sum(2 for t in tiles if t.notes)) in row(result.output, "   ")
    assert imread(picture).std() > 0.1


def test_statistics_of_a_sample_of_tiles(shards, tmp_path, monkeypatch):
    """Tiles are spread over the shards; the numbers are those of the tiles, with and without an index."""
    read = []
    monkeypatch.setattr(
        measure, "read_samples", lambda *a: (read.append(s.key) or s for s in read_samples(*a))
    )
    found = measure.measure(str(shards), 10)
    tiles = [tile(key) for key in read]
    assert found.num_tiles == len(set(read)) == 10
    manifest = Manifest.load(str(shards))
    assert len(manifest.shards) >= 10  # so at most one tile of each
    values = [tile_statistics(TOY.spec, t.arrays, t.dates, t.masks).values for t in tiles]
    want = np.mean([v["radar_autocorrelation"] for v in values if "radar_autocorrelation" in v])
    assert found.measured()["radar_autocorrelation"].mean == pytest.approx(want)
    assert found.reasons()["season_ndvi"].startswith("no series with bands of known visible")

    bare = tmp_path / "bare"
    shutil.copytree(shards, bare, ignore=shutil.ignore_patterns("*.index.json"))
    assert measure.measure(str(bare), 10).measured() == found.measured()
    few = measure.measure(str(shards), 1000)
    assert few.num_tiles == sum(manifest.shards[i].samples for i in evenly(len(manifest.shards), 16))

    result = CliRunner().invoke(app, ["inspect", str(shards), "--statistics", "--max-tiles", "10"])
    assert result.exit_code == 0, result.output
    assert "statistics of 10 tiles" in result.output
    words = row(result.output, "radar_autocorrelation")
    assert words[1] == f"{want:.2f}"
    assert words[4:7] == ["10", "0.34–0.48", "below"]
    assert (
        "no series with bands of known visible and near-infrared wavelengths: optical_auto" in result.output
    )


def test_a_sample_that_differs_from_the_spec_is_named(tmp_path):
    write_shards(Toy(2), str(tmp_path), "train")
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"VV"', '"VV", "VH"'))
    (tmp_path / "manifest.sha256").unlink()
    with pytest.raises(BadShard, match=r"train-000000.tar: bad shard: tile .*: s1 is float16"):
        measure.measure(str(tmp_path), 2)


def test_counts_of_an_index_are_not_trusted(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "train-000000.index.json"
    index = json.loads(path.read_text())
    for count, message in ((2**62, "oak"), (-1, "tally: contains a negative number")):
        path.write_text(json.dumps({**index, "tally": {"class/kinds/0": count}}))
        result = CliRunner().invoke(app, ["inspect", str(folder)])
        assert message in f"{result.output} {result.exception}"
        assert len(result.output) < 100_000


def test_verify_prints_its_progress_and_the_next_command(shards):
    result = CliRunner().invoke(app, ["verify", str(shards)])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"verify {shards}: 80/80 samples")
    assert result.stdout.endswith(
        f"80 samples, all valid; next: maestro-scale inspect {shards} --png tile.png\n"
    )


def test_bars():
    assert histogram([0, 1, 50, 100]) == " ▁▄█"
    assert histogram([0, 0]) == "  "


def test_the_picture_shows_the_clearest_dates_and_the_classes():
    made = tile("a")
    mask = np.full((6, 2, 8, 8), 90, np.uint8)
    mask[[1, 2, 4]] = 0
    s2 = np.zeros((6, 2, 8, 8), np.int16) + np.arange(6, dtype=np.int16)[:, None, None, None]
    days = np.array([[2019, 40 * i + 1, 0] for i in range(6)], np.int16)
    cover = np.zeros((8, 8), np.uint8)
    cover[0] = 1
    cover[1:3] = 2
    changed = dataclasses.replace(
        made,
        arrays={**made.arrays, "s2": s2},
        masks={"s2": mask},
        dates={**made.dates, "s2": days},
        targets={**made.targets, "cover": cover},
    )
    (aerial, classes), s2_row, _ = panels(Sample(encode(changed)), TOY.spec)
    assert aerial.image.shape == (40, 40, 3)
    assert [p.caption.split()[0] for p in s2_row] == ["2019-02-10", "2019-03-22", "2019-06-10", "2019-07-20"]
    assert s2_row[0].image.mean() < s2_row[3].image.mean()  # one stretch for all dates
    assert classes.caption == "soil 62 %, water 12 %"
    assert len(np.unique(classes.image.reshape(-1, 3), axis=0)) == 3


def test_a_tile_is_read_with_or_without_an_index_and_a_wrong_index_is_named(shards, tmp_path):
    info = Manifest.load(str(shards)).shards[0]
    (tmp_path / info.path).write_bytes((shards / info.path).read_bytes())
    assert read_first_sample(str(tmp_path), info).key == read_first_sample(str(shards), info).key
    name = info.path.replace(".tar", ".index.json")
    other = Manifest.load(str(shards)).shards[1].path.replace(".tar", ".index.json")
    (tmp_path / name).write_text((shards / other).read_text())
    with pytest.raises(ManifestError, match=r"is not the index of train-000000\.tar"):
        read_first_sample(str(tmp_path), info)


MATHTEXT, ESCAPE = r"$\frac{a}$", "\x1b[2J\x1b]0;title\x07"
HOSTILE = DatasetSpec(
    "hostile",
    MATHTEXT + ESCAPE,
    60.0,
    60.0,
    6,
    (
        Modality("s2", (MATHTEXT, ESCAPE, *NAMES[:2]), 10.0, 6, "int16", series=True),
        Modality("dem", (MATHTEXT,), 10.0, 6, "float32"),
    ),
    (
        Target("cover", "segmentation", NAMES, resolution_m=10.0),
        Target("kinds", "multilabel", NAMES),
    ),
    (),
)


@pytest.mark.parametrize("key", [MATHTEXT, ESCAPE])
def test_names_of_the_dataset_are_shown_and_do_nothing(tmp_path, key):
    arrays = {"s2": np.ones((2, 4, 6, 6), np.int16), "dem": np.zeros((1, 1, 6, 6), np.float32)}
    dates = {
        "s2": np.array([[2020, 1, 12], [2020, 200, 12]], np.int16),
        "dem": np.array([[2020, 1, 12]], np.int16),
    }
    cover = np.arange(36).reshape(6, 6).astype(np.uint8) % len(NAMES)
    kinds = np.full(len(NAMES), 1 / len(NAMES), np.float32)
    for number, name in enumerate((key, "other")):
        targets = {"cover": cover, "kinds": kinds}
        one = Tile(name, arrays, dates, {}, targets, np.array([2020, 1, 12], np.int16), notes=(ESCAPE,))
        with Writer(str(tmp_path / "shards"), HOSTILE, f"split{number}") as writer:
            writer.add(one)
    picture = tmp_path / "tile.png"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "shards"), "--png", str(picture)])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    words = "".join(result.output.split())
    for name in NAMES:
        assert "".join(printable(name[:20]).split()) in words
    assert imread(picture).std() > 0


@pytest.fixture
def inspect_error(capsys, monkeypatch):
    """Runs a command that must fail; returns its one line on standard error."""
    from maestro_scale import cli

    def run(*words) -> str:
        monkeypatch.setattr("sys.argv", ["maestro-scale", "inspect", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        return line

    return run


def test_a_missing_dataset_is_one_line(tmp_path, inspect_error):
    assert "manifest.json: not found" in inspect_error(tmp_path)


def test_a_picture_must_be_a_png_file(shards, tmp_path, inspect_error):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert inspect_error(shards, "--png", folder) == (
        f"error: {folder} is a folder: give a file name, such as {folder}/tile.png"
    )
    other = tmp_path / "tile.jpg"
    assert (
        inspect_error(shards, "--png", other)
        == f"error: {other}: pictures are PNG files, use {tmp_path}/tile.png"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]
