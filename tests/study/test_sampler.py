"""Searches by Optuna: every trial runs a cell per seed; interrupted ones continue with the same trials."""

from __future__ import annotations

import json
import sys

import pytest
from testkit.studies import write_results, write_study

from maestro_scale.study import command, sampler
from maestro_scale.study.command import Request, StudyRun
from maestro_scale.study.config import load_study
from maestro_scale.study.run import Outcome, StudyError

SAMPLE = {"trials": 4, "mode": "knn", "space": {"optim.base_lr": {"low": 1e-4, "high": 1e-2, "log": True}}}


@pytest.fixture
def study(tmp_path):
    return load_study(write_study(tmp_path, factors={}, questions=[], sample=SAMPLE, setup={"seeds": [0, 1]}))


def test_without_optuna_the_message_has_the_command(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StudyError, match=r"pip install 'maestro-scale\[study\]'"):
        sampler.search(study, "cpu", tmp_path, tmp_path / "study", lambda cells: Outcome())


def test_an_interrupted_search_continues_with_the_same_trials(study, tmp_path):
    pytest.importorskip("optuna")

    def search(folder: str, stop_at: int | None = None) -> list[list[float]]:
        calls: list[list[float]] = []

        def run(cells) -> Outcome:
            if stop_at is not None and len(calls) == stop_at:
                return Outcome(is_stopped=True)
            calls.append([cell.recipe.optim.base_lr for cell in cells])
            for cell in cells:  # best at the largest learning rate; the seeds differ
                write_results(cell, min(1.0, 50 * cell.recipe.optim.base_lr + 0.01 * cell.seed))
            return Outcome(finished=len(cells))

        outcome = sampler.search(study, "cpu", tmp_path / folder, tmp_path / folder / "study", run)
        assert outcome.is_stopped == (stop_at is not None)
        return calls

    whole = search("whole")
    assert len(whole) == 4
    assert all(a == b for a, b in whole)
    interrupted = search("interrupted", stop_at=2)
    assert interrupted + search("interrupted") == whole
    trials = json.loads((tmp_path / "interrupted" / "study" / "trials.json").read_text())
    assert [t["state"] for t in trials] == ["COMPLETE"] * 4
    assert trials[0]["value"] == pytest.approx(min(1.0, 50 * whole[0][0]) + 0.005)
    assert search("interrupted") == []


def test_a_trial_whose_cell_failed_is_run_again_at_the_next_start(study, tmp_path):
    pytest.importorskip("optuna")
    is_full, calls = True, []

    def run(cells) -> Outcome:
        calls.append(cells[0].recipe.optim.base_lr)
        write_results(cells[0])
        if is_full and len(calls) == 2:
            return Outcome(finished=1, failures=["failed: No space left on device"])
        write_results(cells[1])
        return Outcome(finished=2)

    def search() -> Outcome:
        return sampler.search(study, "cpu", tmp_path, tmp_path / "study", run)

    def states() -> list[str]:
        return [t["state"] for t in json.loads((tmp_path / "study" / "trials.json").read_text())]

    assert search().exit_code == 1
    assert len(calls) == 4  # the others are run
    assert states() == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    is_full = False
    assert search().exit_code == 0
    assert calls[4:] == [calls[1]]
    assert states() == ["COMPLETE"] * 4


def test_values_without_a_valid_recipe_end_their_trial_alone(tmp_path, capsys):
    """Three heads do not divide a width of 32; the other trials are run, and the next start accepts the store."""
    pytest.importorskip("optuna")
    space = {"model.heads": {"choices": [2, 3]}}
    sample = {"trials": 6, "mode": "knn", "method": "random", "space": space}
    study = load_study(write_study(tmp_path, factors={}, questions=[], sample=sample))
    heads = []

    def run(cells) -> Outcome:
        heads.extend(cell.recipe.model.heads for cell in cells)
        for cell in cells:
            write_results(cell)
        return Outcome(finished=len(cells))

    def search(asked) -> Outcome:
        return sampler.search(asked, "cpu", tmp_path, tmp_path / "study", run)

    assert search(study).exit_code == 0
    trials = json.loads((tmp_path / "study" / "trials.json").read_text())
    states = {(t["params"]["model.heads"], t["state"]) for t in trials}
    assert states == {(2, "COMPLETE"), (3, "FAIL")}
    assert set(heads) == {2}
    assert "has no valid recipe: model.heads=3: " in capsys.readouterr().err
    known = sampler.known_trials(study, "cpu", tmp_path, tmp_path / "study")
    assert known == [{"model.heads": 2}] * len(heads)
    invalid = {**sample, "space": {"model.heads": {"choices": [3, 5]}}}
    path = write_study(tmp_path, factors={}, questions=[], sample=invalid)
    assert search(load_study(path)).failures == ["no trial has a score: change the space of the search"]


def test_the_baselines_of_a_search_are_run(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    path = write_study(tmp_path, factors={}, questions=[], sample=SAMPLE, setup={"baselines": ["statistics"]})
    encoders = []

    def run(cells, **_) -> Outcome:
        encoders.extend(cell.encoder for cell in cells)
        for cell in cells:
            write_results(cell)
        return Outcome(finished=len(cells))

    monkeypatch.setattr(command, "run_cells", run)
    assert StudyRun(Request(path, "", tmp_path / "root")).run().finished == 5
    assert encoders == ["statistics", None, None, None, None]


def test_a_search_in_which_every_trial_fails_stops(study, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(sampler, "_MAX_FAILED", 2)
    calls = []

    def run(cells) -> Outcome:
        calls.append(cells)
        return Outcome(failures=["failed"])

    outcome = sampler.search(study, "cpu", tmp_path, tmp_path / "study", run)
    assert (len(calls), outcome.exit_code) == (2, 1)
    assert "2 trials failed" in outcome.failures[-1]


@pytest.mark.parametrize(
    "change",
    [
        "sample.mode=probe",
        "sample.seed=1",
        "sample.space={optim.clip: {low: 0.5, high: 2.0}}",
        "scales.cpu.datasets.trees.set={train.steps: 7}",
        "scales.cpu.datasets.trees.seeds=[5]",
    ],
)
def test_trials_of_another_search_do_not_count(tmp_path, change):
    pytest.importorskip("optuna")
    evaluations = [{"name": "trees", "modes": ["knn", "probe"]}]
    setup = {"seeds": [0], "evaluations": evaluations}
    path = write_study(tmp_path, factors={}, questions=[], sample=SAMPLE, setup=setup)

    def search(*overrides: str) -> int:
        def run(cells) -> Outcome:
            for cell in cells:
                write_results(cell)
            return Outcome(finished=len(cells))

        changed = load_study(path, overrides)
        finished = sampler.search(changed, "cpu", tmp_path, tmp_path / "study", run).finished
        assert (
            len(sampler.known_trials(changed, "cpu", tmp_path, tmp_path / "study")) == changed.sample.trials
        )
        return finished

    assert search() == 4
    assert search(change) == 4
    assert search() == 0
    assert search("sample.trials=5") == 1


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(2000), b"x" * 5000])
def test_a_damaged_store_is_named(study, tmp_path, content):
    pytest.importorskip("optuna")
    (tmp_path / sampler.STORE).write_bytes(content)
    if not content:  # a kill before the first trial
        assert sampler.known_trials(study, "cpu", tmp_path, tmp_path) == []
        return
    with pytest.raises(StudyError, match=r"optuna\.db cannot be read .*; remove it") as caught:
        sampler.known_trials(study, "cpu", tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
