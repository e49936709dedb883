"""The configuration of a study: strict, with the nearest valid name in messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from testkit.runs import REPO
from testkit.studies import STUDY, write_study

from maestro_scale.recipe import RecipeError
from maestro_scale.study.cells import expand
from maestro_scale.study.command import Request, StudyRun
from maestro_scale.study.config import load_study

STUDIES = REPO / "recipes" / "study"
SHIPPED = sorted(STUDIES.glob("*.yaml"))
FURTHER = sorted((STUDIES / "further").glob("*.yaml"))  # cells that are no conclusion of the paper


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_study(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", [*SHIPPED, *FURTHER], ids=lambda p: f"{p.parent.name}-{p.stem}")
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_question_of_a_shipped_study_has_an_answer(path, scale, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    StudyRun(Request(path, scale, tmp_path)).check()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_at_the_scale_of_the_paper_finetuned_encoders_are_compared(path, tmp_path, monkeypatch):
    """As in the paper; the studies against scratch compare frozen encoders too."""
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    modes = {q.mode for q in StudyRun(Request(path, "gpu", tmp_path)).study.questions}
    assert modes == ({"finetune", "probe"} if path.stem in ("labels", "pretraining") else {"finetune"})


@pytest.mark.parametrize("path", [*SHIPPED, *FURTHER], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_studies_expand_at_both_scales(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    study = load_study(path)
    assert study.name == path.stem + ("_further" if path in FURTHER else "")
    assert set(study.scales) == {"cpu", "gpu"}
    for scale in study.scales:
        cells = expand(study, scale, tmp_path)
        levels = [{(f, level) for f, level in c.levels.items()} for c in cells]
        for question in study.questions:
            for side in (question.better, question.worse):
                assert any(set(side.items()) <= found for found in levels), (
                    f"{question.name}: no cell has {side}"
                )
        if scale == "cpu":
            for setup in study.scales["cpu"].setups.values():
                assert (
                    setup.data.tiles["test"] >= 1500
                )  # counts are of tiles: crops of one are not independent
                assert len(setup.seeds) >= 5


def test_the_study_of_decoders_has_each_head_with_each_seed_on_both_datasets(tmp_path):
    cells = expand(load_study(REPO / "benchmarks" / "decoders" / "decoders.yaml"), "cpu", tmp_path)
    expected = [
        (d, h, s) for d in ("flair_hub", "pastis_hd") for h in ("attentive", "upernet") for s in range(3)
    ]
    assert sorted((c.dataset, c.recipe.model.decoder, c.seed) for c in cells) == expected
    assert {(c.encoder, e.mode) for c in cells for e in c.evaluations} == {("scratch", "scratch")}


def test_no_other_recipe_changes_the_base_of_the_cpu_studies():
    for path in (STUDIES / "base").glob("*_cpu.yaml"):
        base = yaml.safe_load(path.read_text()).get("extends", "treesatai_ts_cpu.yaml")
        assert (path.parent / base).parent == STUDIES / "base", f"{path.name} extends {base}"
    base = (STUDIES / "base" / "treesatai_ts_cpu.yaml").read_text()
    assert "extends" not in yaml.safe_load(base)


def test_dissimilar_sensors_are_encoded_together_on_both_datasets(tmp_path):
    cells = expand(load_study(STUDIES / "modalities.yaml"), "cpu", tmp_path)
    groups = {
        c.dataset: {name: sensor.group for name, sensor in c.recipe.data.mixture[0].sensors.items()}
        for c in cells
        if c.levels.get("fusion", "").startswith("all")
    }
    radar = {"s1_asc": "all", "s1_des": "all"}
    assert groups == {
        "treesatai_ts": {"aerial": "all", "s2": "all", **radar},
        "pastis_hd": {"spot": "all", "s2": "all", **radar},
    }


def test_paths_are_relative_to_the_file_that_gives_them(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    write_study(folder)
    child = tmp_path / "child.yaml"
    child.write_text("extends: base/study.yaml\nname: child\n")
    assert load_study(child).scales["cpu"].setups["trees"].base == str(folder / "tiny.yaml")
    changed = load_study(child, ["scales.cpu.datasets.trees.base=other.yaml"])
    assert changed.scales["cpu"].setups["trees"].base == str(tmp_path / "other.yaml")


def test_null_leaves_out_a_dataset_of_an_extended_file(tmp_path):
    write_study(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: study.yaml\nscales: {cpu: {datasets: {trees: null}}}\n")
    assert load_study(child).scales["cpu"].setups == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scales.cpu.datasets.trees.sedes=[1]", "unknown key (did you mean 'seeds'?)"),
        ("scales.cpu.datasets.trees.seeds=[1,1]", "1 is given twice"),
        ("questions[0].better.target=pach", "unknown level 'pach' (did you mean 'patch'?)"),
        ("questions[0].better.taget=patch", "unknown factor (did you mean 'target'?)"),
        ("questions[0].worse.target=patch", "has the cells of better"),
        ("questions[0].datasets=tree", "unknown dataset 'tree' (did you mean 'trees'?)"),
        ("questions[0].mode=kn", "did you mean 'knn'?"),
        ("questions[0].margin=-1", "greater than 0"),
        ("scales.cpu.datasets.trees.evaluations[0].modes=[scratch]", "add a level {encoder: scratch}"),
        ("exclude=[{dataset: tree}]", "unknown level 'tree'"),
        ("factors.dataset.x={}", "rename the factor"),
        ("factors.target.none={seed: 7}", "seed is set by the study: list the seeds of the setup instead"),
        (
            'factors.target.none={"data.mixture[0].shards": x}',
            "data.mixture.0.shards is set by the study: give",
        ),
        ("scales.cpu.datasets.trees.set={data: {mixture: [{shards: x}]}}", "data.mixture.0.shards is set by"),
        ("scales.cpu.datasets.trees.evaluations[0].set={seed: 1}", "seed is set by the study"),
        ("scales.cpu.datasets.trees.baselines=[random,random]", "random is given twice"),
        ("scales.cpu.gpu={kind: h10}", "unknown GPU 'h10' (did you mean 'h100'?)"),
        ("questions[0].datasets=[trees,trees]", "trees is given twice"),
        ("sample={trials: 2, space: {optim.base_lr: {low: 1, high: 2}}}", "leave out factors and cells"),
    ],
)
def test_mistakes_are_refused_with_a_hint(tmp_path, override, message):
    assert message in refusal(write_study(tmp_path), override)


def test_the_sides_of_a_question_have_other_levels(tmp_path):
    """A level that one side names holds for the other too."""
    factors = {**STUDY["factors"], "depth": {"one": {}, "two": {"model.depth": 3}}}
    question = {**STUDY["questions"][0], "better": {"target": "patch"}, "worse": {"depth": "one"}}
    path = write_study(tmp_path, factors=factors, questions=[question])
    assert "worse: has the cells of better: name another level" in refusal(path)


def test_a_range_has_an_order(tmp_path):
    path = write_study(tmp_path, factors={}, questions=[])
    space = "sample={{trials: 2, mode: knn, space: {{optim.base_lr: {}}}}}"
    assert "not above low" in refusal(path, space.format("{low: 2, high: 1}"))
    assert "either low and high, or choices" in refusal(path, space.format("{low: 2}"))
    assert "above 0 with log" in refusal(path, space.format("{low: 0, high: 1, log: true}"))
    assert load_study(path, [space.format("{choices: [1, 2]}")]).sample is not None


def test_a_search_is_for_a_score_that_is_computed_with_keys_that_the_study_does_not_set(tmp_path):
    path = write_study(tmp_path, factors={}, questions=[])
    sample = "sample={{trials: 2, mode: {}, space: {{{}: {{low: 1, high: 2}}}}}}"
    assert load_study(path, [sample.format("knn", "optim.clip")]).sample is not None
    reason = "sample.mode: no evaluation of scale cpu has the mode probe"
    assert reason in refusal(path, sample.format("probe", "optim.clip"))
    assert "seed is set by the study" in refusal(path, sample.format("knn", "seed"))


def test_data_are_given_once(tmp_path):
    setup = {"data": {"dataset": "treesatai_ts"}}
    assert "give shards, or tiles" in refusal(write_study(tmp_path, setup=setup))
    assert STUDY["name"] == "tiny"


def test_a_grid_that_cannot_be_run_is_refused_before_it_is_expanded(tmp_path):
    levels = {f"l{j}": {"train.steps": j + 1} for j in range(10)}
    path = write_study(tmp_path, factors={f"f{i}": levels for i in range(9)}, questions=[])
    assert "scales.cpu: has 1,000,000,000 cells, more than 5,000" in refusal(path)


def test_values_that_are_no_path_no_encoder_and_no_range(tmp_path):
    assert "trees.base: 'a\\x00b' is not a path" in refusal(write_study(tmp_path, setup={"base": "a\0b"}))
    for encoder in (5, ["random"]):
        factors = {"target": {"patch": {"encoder": encoder}, "none": {}}}
        with pytest.raises(RecipeError, match=r"encoder of a level is .*: give the name of a baseline"):
            expand(load_study(write_study(tmp_path, factors=factors)), "cpu", tmp_path)
    for given, message in (
        ({"low": 0.2, "high": 0.8, "integer": True}, "0.2 or 0.8 is not a whole number"),
        ({"low": 1, "high": 1e300}, "numbers are at most 1e+15"),
    ):
        sample = {"trials": 1, "space": {"train.steps": given}}
        assert message in refusal(write_study(tmp_path, factors={}, questions=[], sample=sample))


def test_the_directory_of_a_cell_is_below_the_root(tmp_path):
    path = write_study(tmp_path, setup={"data": {"dataset": "../../../a/b", "shards": "s"}})
    base = tmp_path / "tiny.yaml"
    base.write_text(base.read_text().replace("dataset: treesatai_ts", "dataset: ../../../a/b"))
    root = tmp_path / "root"
    for cell in expand(load_study(path), "cpu", root):
        assert cell.directory.parent == root / "cells"
