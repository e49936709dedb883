"""Cells: the grid, the directories, and which changes make another cell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from testkit.studies import STUDY, write_results, write_study

from maestro_scale.evaluation.baselines.content import content_digest
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.recipe import RecipeError
from maestro_scale.study.cells import distinct, expand, inputs_and_network
from maestro_scale.study.config import load_study
from maestro_scale.study.worker import evaluation_words

TWO = {
    "target": {"patch": {"model.target": "patch"}, "none": {"model.target": "none"}},
    "depth": {"one": {}, "two": {"model.depth": 3}},
}


def cells_of(path: Path, *overrides: str, root: Path | None = None):
    return expand(load_study(path, overrides), "cpu", root or path.parent / "root")


def names(path: Path, *overrides: str, root: Path | None = None) -> list[str]:
    return [cell.name for cell in cells_of(path, *overrides, root=root)]


def test_the_grid_is_all_combinations_with_all_seeds(tmp_path):
    path = write_study(tmp_path, factors=TWO, setup={"seeds": [4, 7], "baselines": ["random"]})
    cells = cells_of(path)
    assert [(c.seed, c.encoder, *c.levels.values()) for c in cells] == [
        (4, None, "patch", "one"),
        (4, None, "patch", "two"),
        (4, None, "none", "one"),
        (4, None, "none", "two"),
        (4, "random"),
        (7, None, "patch", "one"),
        (7, None, "patch", "two"),
        (7, None, "none", "one"),
        (7, None, "none", "two"),
        (7, "random"),
    ]
    assert len({c.name for c in cells}) == 10
    assert [c.recipe.model.target for c in cells[:4]] == ["patch", "patch", "none", "none"]
    assert [c.recipe.model.depth for c in cells[:2]] == [2, 3]
    assert all(c.recipe.seed == c.seed for c in cells)


def test_listed_and_excluded_cells(tmp_path):
    path = write_study(tmp_path, factors=TWO)
    excluded = cells_of(path, "exclude=[{target: none, depth: two}]")
    assert [tuple(c.levels.values()) for c in excluded] == [
        ("patch", "one"),
        ("patch", "two"),
        ("none", "one"),
    ]
    listed = cells_of(
        path, "cells=[{depth: two}, {target: none, dataset: trees}, {target: patch, depth: two}]"
    )
    assert [tuple(c.levels.values()) for c in listed] == [("patch", "two"), ("none", "one")]
    assert cells_of(path, "exclude=[{dataset: trees}]") == []


def test_the_directory_depends_on_what_determines_the_result_alone(tmp_path):
    path = write_study(tmp_path)
    first = names(path)
    assert first[0].startswith("treesatai_ts-group-joint-patch-s0-")
    same = [
        "name=other",
        "claim=other",
        "scales.cpu.datasets.trees.set={tracking.experiment: other, data.workers: 0, checkpoint.keep: 1}",
        "scales.cpu.datasets.trees.evaluations[0].modes=[knn,probe]",
        "questions=[]",
    ]
    for override in same:
        assert names(path, override) == first, override
    assert names(path, root=tmp_path / "elsewhere") == first
    other = [
        "scales.cpu.datasets.trees.seeds=[1]",
        "scales.cpu.datasets.trees.set={train.steps: 7}",
        "scales.cpu.datasets.trees.set={optim.clip: 2.0}",
        "scales.cpu.datasets.trees.data.tiles.train=7",
        "scales.cpu.datasets.trees.data.seed=1",
    ]
    for override in other:
        assert not set(names(path, override)) & set(first), override


def test_another_generator_of_scenes_makes_other_cells(tmp_path, monkeypatch):
    path = write_study(tmp_path)
    first = names(path)
    monkeypatch.setattr("maestro_scale.study.data.generator_digest", lambda dataset: "changed")
    assert not set(names(path)) & set(first)


def test_studies_share_a_cell(tmp_path):
    path = write_study(tmp_path)
    first = names(path)
    other = write_study(tmp_path, factors={"size": {"tiny": {"model.target": "patch"}}}, questions=[])
    assert names(other) == first[:1]


def test_levels_without_effect_are_run_once_with_the_evaluations_of_all(tmp_path):
    path = write_study(tmp_path, factors={"a": {"x": {}, "y": {"model.target": "patch_group"}}}, questions=[])
    cells = cells_of(path)
    assert [c.levels["a"] for c in cells] == ["x", "y"]
    (one,) = distinct(cells)
    assert [e.mode for e in one.evaluations] == ["knn"]
    more = cells_of(path, "scales.cpu.datasets.trees.evaluations[0].modes=[probe]")
    (one,) = distinct([cells[0], more[0]])
    assert [e.mode for e in one.evaluations] == ["knn", "probe"]


def test_the_protocol_of_an_evaluation_does_not_follow_the_optimisation_of_a_level(tmp_path):
    factors = {"optim": {"ours": {}, "other": {"optim.clip": 2.0, "model.fusion": "mod", "train.steps": 9}}}
    evaluations = [{"name": "trees", "modes": ["knn", "finetune"], "set": {"train.epochs": 3}}]
    path = write_study(tmp_path, factors=factors, questions=[], setup={"evaluations": evaluations})
    ours, other = cells_of(path)
    recipes = [cell.evaluations[1].recipe for cell in (ours, other)]
    assert [r.optim.clip for r in recipes] == [1.0, 1.0]
    assert [r.train.epochs for r in recipes] == [3, 3]
    assert [r.train.steps for r in recipes] == [None, None]
    assert [r.model.fusion for r in recipes] == ["group", "mod"]
    assert other.recipe.optim.clip == 2.0
    assert ours.evaluations[0].folder.name == other.evaluations[0].folder.name
    assert not any(r.tracking.enabled for r in recipes)


def test_an_evaluation_shares_the_sensors_and_the_network_of_a_level_and_nothing_else(tmp_path):
    first = "data.mixture[0]."
    level = {
        "data.first_date": "ends",
        "data.flips": False,
        f"{first}split": ["val"],
        f"{first}sensors.s2.patch": 6,
        "data.mixture.0.crop_m": 30.0,
        "model": {"fusion": "mod", "init_from": "weights"},
        "masking.ratio": 0.5,
    }
    assert dict(inputs_and_network(level)) == {
        f"{first}sensors.s2.patch": 6,
        "data.mixture.0.crop_m": 30.0,
        "model.fusion": "mod",
    }
    sections = {
        "data": {"lanes": 2, "mixture": [{"weight": 2, "sensors": {"s2": {"patch": 6}}}, {"crop_m": 9}]}
    }
    assert dict(inputs_and_network(sections)) == {"data.mixture[0].sensors": {"s2": {"patch": 6}}}
    levels = {"dates": {"any": {}, "ends": {"data.first_date": "ends", f"{first}split": ["val"]}}}
    evaluations = [{"name": "trees", "modes": ["finetune"]}]
    path = write_study(tmp_path, factors=levels, questions=[], setup={"evaluations": evaluations})
    cells = cells_of(path)
    assert [c.recipe.data.first_date for c in cells] == ["auto", "ends"]
    assert [c.evaluations[0].recipe.data.first_date for c in cells] == ["auto", "auto"]
    assert cells[0].evaluations[0].folder.name == cells[1].evaluations[0].folder.name


def test_another_protocol_has_another_folder(tmp_path):
    evaluations = [{"name": "trees", "modes": ["knn", "finetune"], "fractions": [1.0, 0.1]}]
    path = write_study(tmp_path, setup={"evaluations": evaluations})
    key = "scales.cpu.datasets.trees.evaluations[0].set"
    first, second = (cells_of(path, f"{key}={{train.epochs: {n}}}")[0] for n in (1, 2))
    paths = [
        [str(e.results.relative_to(cell.directory)) for e in cell.evaluations] for cell in (first, second)
    ]
    assert paths[0][:2] == paths[1][:2]
    assert not set(paths[0][2:]) & set(paths[1][2:])
    assert [p.split("/")[2:] for p in paths[0]] == [
        ["knn", "results.json"],
        ["knn_10pct", "results.json"],
        ["finetune", "results.json"],
        ["finetune_10pct", "results.json"],
    ]


def test_the_overlap_of_maps_changes_no_result(tmp_path):
    evaluations = [{"name": "trees", "modes": ["finetune"]}]
    path = write_study(tmp_path, factors={}, setup={"evaluations": evaluations}, questions=[])

    def folders(change: str) -> set[str]:
        cells = cells_of(path, f"scales.cpu.datasets.trees.evaluations[0].set={{{change}}}")
        return {str(cell.evaluations[0].results) for cell in cells}

    assert folders("evaluation.overlap: 0.25") == folders("")
    assert not folders("evaluation.patience: 7") & folders("")


def test_what_changes_a_result_on_frozen_features_has_another_folder(tmp_path):
    evaluations = [{"name": "trees", "modes": ["knn", "probe", "attentive"]}]
    baselines = ["random", "untrained", "statistics"]
    path = write_study(
        tmp_path, factors={}, setup={"evaluations": evaluations, "baselines": baselines}, questions=[]
    )

    def folders(change: str) -> list[set[str]]:
        """By mode, the paths of all results."""
        cells = cells_of(path, f"scales.cpu.datasets.trees.evaluations[0].set={{{change}}}")
        assert len({cell.name for cell in cells}) == 4
        return [{str(cell.evaluations[i].results) for cell in cells} for i in range(3)]

    knn, probe, attentive = folders("")
    for loss in ("evaluation.class_weights: balanced", "evaluation.class_weights: {Abies: 2.0}"):
        found = folders(loss)
        assert found[0] == knn  # it has no loss
        assert not found[1] & probe
        assert not found[2] & attentive
    assert not folders("evaluation.regression_loss: smooth_l1")[2] & attentive
    for mode, before in zip(folders("model.depth: 3"), (knn, probe, attentive), strict=True):
        assert len(mode & before) == 2  # of the cell and of statistics; the untrained networks are others


def test_the_network_of_every_untrained_baseline_is_part_of_its_cell(tmp_path):
    path = write_study(tmp_path, setup={"baselines": ["random", "untrained"]})
    deeper = "scales.cpu.datasets.trees.set={model.depth: 3}"
    assert not set(names(path)) & set(names(path, deeper))


def test_replaced_files_of_a_baseline_make_another_cell(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    weights, module, model = tmp_path / "w.pt", tmp_path / "edited_module.py", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    baselines = [f"presto:{weights},dates=monthly", f"image:{model}", "python:edited_module:A", "statistics"]
    setup = {"baselines": baselines, "set": {"model.init_from": str(model)}}
    path = write_study(tmp_path, factors={}, questions=[], setup=setup)

    def all_names(content: str) -> list[str]:
        for file in (weights, module, model / "model.safetensors"):
            file.write_text(content)
        return names(path)

    before, after = all_names("a = 1"), all_names("a = 2")
    assert all_names("a = 1") == before
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, False, False, True]


def test_fractions_that_differ_little_have_folders_of_their_own(tmp_path):
    fractions = [0.07, 0.1234567, 0.1234568]
    evaluations = [{"name": "trees", "modes": ["knn"], "fractions": fractions}]
    cell, _ = cells_of(write_study(tmp_path, setup={"evaluations": evaluations}))
    assert [e.results.parent.name for e in cell.evaluations] == [
        "knn_7pct",
        "knn_12.34567pct",
        "knn_12.34568pct",
    ]
    for evaluation in cell.evaluations:
        assert f"--fraction={evaluation.fraction}" in evaluation_words(cell, [evaluation])


def test_encoders_without_pretraining(tmp_path):
    factors = {
        "encoder": {
            "pretrained": {},
            "scratch": {"encoder": "scratch"},
            "statistics": {"encoder": "statistics"},
        },
    }
    evaluations = [{"name": "trees", "modes": ["finetune", "probe"]}]
    path = write_study(tmp_path, factors=factors, questions=[], setup={"evaluations": evaluations})
    cells = cells_of(path)
    modes = [[e.mode for e in c.evaluations] for c in cells]
    assert modes == [["probe", "finetune"], ["scratch"], ["probe"]]
    assert [c.encoder for c in cells] == [None, "scratch", "statistics"]
    # Neither the length of the pretraining nor, for statistics, the network plays a part.
    longer = cells_of(path, "scales.cpu.datasets.trees.set={train.steps: 9, train.micro_batch: 8}")
    assert [a.name == b.name for a, b in zip(cells, longer, strict=True)] == [False, True, True]
    deeper = cells_of(path, "scales.cpu.datasets.trees.set={model.depth: 3}")
    assert [a.name == b.name for a, b in zip(cells, deeper, strict=True)] == [False, False, True]


def test_other_weights_in_the_same_file_are_another_cell(tmp_path):
    weights = tmp_path / "presto,v2.pt"
    found = []
    for content in (b"a", b"bc", b"a"):
        weights.write_bytes(content)
        path = write_study(
            tmp_path, factors={}, questions=[], setup={"baselines": [f"presto:{weights},dates=monthly"]}
        )
        found.append(names(path)[1])
    assert found[0] == found[2] != found[1]
    folder = tmp_path / "vit"
    folder.mkdir()
    assert content_digest(f"image:{folder}") != content_digest(f"presto:{weights}") != ""
    assert content_digest(f"torchgeo:dofa_base_patch16_224@{weights}") == content_digest(f"presto:{weights}")
    assert content_digest("torchgeo:croma_base") == content_digest("statistics") == ""


def test_a_cell_is_finished_when_every_result_can_be_read(tmp_path):
    path = write_study(tmp_path, setup={"evaluations": [{"name": "trees", "modes": ["knn", "probe"]}]})
    cell = cells_of(path)[0]
    assert not cell.is_finished
    write_results(cell, 0.25)
    assert cell.is_finished
    assert EvalResult.load(cell.evaluations[1].results).value == 0.25
    cell.evaluations[1].results.write_text("{")
    assert not cell.is_finished


def test_a_cell_whose_counts_are_damaged_is_evaluated_again(tmp_path):
    cell = cells_of(write_study(tmp_path))[0]
    counts = TileCounts(("a", "b"), np.array([[[1], [0], [0]], [[0], [1], [1]]]))
    path = cell.evaluations[0].results
    EvalResult("treesatai_ts", "wf1", "knn", 0.5, {}, (0.5, 0.5), 2, counts=counts).write(path)
    assert cell.is_finished
    whole = (path.parent / "counts.npz").read_bytes()
    (path.parent / "counts.npz").write_bytes(whole[:-20])
    assert not cell.is_finished
    (path.parent / "counts.npz").unlink()
    assert not cell.is_finished


def test_encoders_are_checked_before_a_cell_is_run(tmp_path):
    path = write_study(tmp_path)
    baselines = "scales.cpu.datasets.trees.baselines=[{}]"
    with pytest.raises(RecipeError, match=r"no baseline is called 'randm' .did you mean 'random'"):
        cells_of(path, baselines.format("randm"))
    with pytest.raises(RecipeError, match="--baseline presto: write presto:WEIGHTS"):
        cells_of(path, baselines.format("presto"))
    with pytest.raises(RecipeError, match=r"oracle is no encoder: run evaluate\.py --baseline oracle"):
        cells_of(path, baselines.format("oracle"))
    with pytest.raises(
        RecipeError, match="trees: no mode of its evaluations is for encoder 'scratch': add finetune"
    ):
        cells_of(path, "factors.target.none={encoder: scratch}")


def test_a_whole_entry_of_a_level_keeps_the_shards_and_the_seed_of_the_study(tmp_path):
    path = write_study(tmp_path, setup={"seeds": [3]})
    entry = {"dataset": "treesatai_ts", "weight": 2.0}
    plain, changed = cells_of(path, f"factors.target.none={json.dumps({'data.mixture': [entry]})}")
    assert changed.recipe.data.mixture[0].weight == 2.0
    assert changed.recipe.data.mixture[0].shards == plain.recipe.data.mixture[0].shards
    assert changed.evaluations[0].recipe.seed == 3


def test_mistakes_in_levels_and_data_name_the_place(tmp_path):
    path = write_study(tmp_path)
    with pytest.raises(RecipeError, match=r"target=patch: .*model\.target: must be"):
        cells_of(path, 'factors.target.patch={"model.target": "pach"}')
    with pytest.raises(RecipeError, match="the data of the study is 'pastis_hd'"):
        cells_of(path, "scales.cpu.datasets.trees.data.dataset=pastis_hd")
    with pytest.raises(RecipeError, match="unknown scale 'gpu'"):
        expand(load_study(path), "gpu", tmp_path)
    assert list(STUDY["scales"]) == ["cpu"]
