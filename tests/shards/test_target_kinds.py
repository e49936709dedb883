"""Classification and regression targets in shards and batches: forms of labels, checks, counts, crops."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from maestro_scale.datasets.spec import DatasetError, Target
from maestro_scale.datasets.spec_check import spec_problems
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.format.values import checked_tile
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.read.summary import summarize
from maestro_scale.shards.write.from_arrays import make_tile
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.crops import Crop
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.orientation import Orientation
from maestro_scale.stream.source import Source
from maestro_scale.stream.transform import Transform
from maestro_scale.tracking.tile_picture import panels
from tests.testkit.stands import SPEC, stand, write_stands


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_stands(tmp_path_factory.mktemp("stands"))


def tile(**targets):
    given = stand(1)
    return make_tile(
        SPEC, given["key"], given["arrays"], given["dates"], targets={**given["targets"], **targets}
    )


def test_labels_in_all_accepted_forms():
    for value, stored in (("pine", 1), (2, 2), (None, -1), (-1, -1), (np.int64(3), 3)):
        assert tile(genus=value).targets["genus"].tolist() == [stored]
    assert tile(genus="oak").targets["genus"].dtype == np.int16
    for value in (12.5, np.float64(12.5), [12.5]):
        assert tile(biomass=value).targets["biomass"].tolist() == [12.5]
    assert np.isnan(tile(biomass=None).targets["biomass"]).all()
    for value in ("palm", 4, 1.0):
        with pytest.raises(DatasetError, match="genus has no class"):
            tile(genus=value)
    with pytest.raises(DatasetError, match="give numbers"):
        tile(biomass="heavy")


def test_values_that_are_no_measurements_are_refused():
    checked_tile(tile(vigour=np.full((6, 6), np.nan)), SPEC)  # every value is missing
    with pytest.raises(DatasetError, match=r"target\.biomass has 1 values that are infinite or too large"):
        checked_tile(tile(biomass=np.inf), SPEC)
    wrong = dataclasses.replace(tile(), targets={**tile().targets, "genus": np.array([7], np.int16)})
    with pytest.raises(
        DatasetError, match=r"target\.genus contains the value 7, which is neither one of the 4"
    ):
        checked_tile(wrong, SPEC)
    with pytest.raises(DatasetError, match=r"target\.vigour is float32 \(5, 5\), expected float32 \(6, 6\)"):
        checked_tile(tile(vigour=np.zeros((5, 5))), SPEC)


def test_counts_of_classes_and_missing_values(shards):
    (train, *_) = summarize(str(shards)).splits
    genus = train.classes["genus"]
    assert sum(genus.values()) == 60
    assert genus["missing"] == 8  # numbers 0, 8 … 56
    assert train.classes["biomass"] == {"value": 52, "missing": 8}
    assert train.classes["vigour"] == {"value": 60 * 35, "missing": 60}


def test_a_crop_cuts_and_turns_a_map_and_keeps_the_label_of_the_tile(shards, tmp_path):
    manifest = Manifest.load(str(shards))
    store = Store(str(shards), tmp_path / "cache", 2**20)
    source = Source(SPEC, manifest.shards_of(["val"]), store)
    (batch,) = EvalLoader(source, 80)
    with store.shard(manifest.shards_of(["val"])[0]) as shard:
        sample = shard[0]
        whole = sample.array("target.vigour")
        transform = Transform(SPEC)
        field = next(f for f, t in transform._targets if t.name == "vigour")
        out = {f: np.zeros((1, *f.shape), f.dtype) for f in transform.fields}
        transform._write_targets(sample, Crop(20.0, 10.0, Orientation(True, False, True)), out, 0)
    np.testing.assert_array_equal(batch.targets["vigour"][0].numpy(), whole[:4, :4])
    np.testing.assert_array_equal(out[field][0], whole[2:6, 1:5][::-1].T)
    assert batch.targets["genus"].shape == batch.targets["biomass"].shape == (80, 1)
    assert len(set(batch.targets["biomass"][:4, 0].tolist())) == 1  # four crops of a tile


def test_a_picture_shows_the_map_and_names_the_labels(shards, tmp_path):
    with Store(str(shards), tmp_path, 2**20).shard(Manifest.load(str(shards)).shards[0]) as shard:
        from maestro_scale.tracking.tile_picture import _subtitle

        assert any(p.title == "vigour" for row in panels(shard[0], SPEC) for p in row)
        assert "biomass: " in _subtitle(shard[0], SPEC)


def test_new_fields_are_written_only_where_they_are_used(shards, tmp_path):
    """Else the digests of all older manifests, features and checkpoints would change."""
    written = json.loads((shards / "manifest.json").read_text())
    assert written["synthetic"] is True
    assert ["units" in t for t in written["spec"]["targets"]] == [False, True, True]
    assert Manifest.load(str(shards)).spec == SPEC
    plain = dataclasses.replace(SPEC, targets=(Target("m", "multilabel", ("a",)),))
    with Writer(str(tmp_path / "plain"), plain, "train") as writer:
        writer.add_arrays("a", stand(0)["arrays"], stand(0)["dates"], targets={"m": [1.0]})
    written = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert "synthetic" not in written
    assert "units" not in written["spec"]["targets"][0]
    assert "units" not in repr(SPEC.target("biomass"))  # part of the key of cached features


@pytest.mark.parametrize(
    ("target", "field", "reason"),
    [
        (Target("x", "regression", ("a",)), "classes", "a regression target has none"),
        (Target("x", "regression", units="t" * 41), "units", "at most 40 printable characters"),
        (Target("x", "regression", resolution_m=-1.0), "resolution_m", "must be a positive number"),
        (Target("x", "classification", ("a",), units="m"), "units", "only a regression target has units"),
        (
            Target("x", "classification", ("a",), resolution_m=5.0),
            "resolution_m",
            "use a segmentation target",
        ),
        (Target("x", "classification", ("a", "b"), ignored=(-1,)), "ignored", "is not a stored value"),
        (Target("x", "classification", ("a",), ignored=(0,)), "ignored", "nothing is left to predict"),
        (Target("x", "classification"), "classes", "is empty"),
    ],
)
def test_contradictions_of_a_target_are_named(target, field, reason):
    problems = list(spec_problems(dataclasses.replace(SPEC, targets=(target,))))
    assert [path for path, _ in problems] == [("targets", 0, field)]
    assert reason in problems[0][1]
