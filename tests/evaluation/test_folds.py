"""Seeds and folds: the splits of a fold, and mean and standard deviation over several runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from maestro_scale.datasets.pastis_hd.splits import folds_of
from maestro_scale.evaluate import main as evaluate
from maestro_scale.evaluation.report.groups import find_results
from maestro_scale.evaluation.report.report import write_report
from maestro_scale.evaluation.report.summary import summarise
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.folds import find_folds, fold_splits
from maestro_scale.shards.write.writer import Writer
from tests.evaluation.conftest import FIELDS, Fields, field_tile

PASTIS = tuple(f"fold_{k}" for k in range(1, 6))
TILES = {"fold_1": 8, "fold_2": 5, "fold_3": 7}


@pytest.mark.parametrize("number", range(1, 6))
def test_five_parts_rotate_as_pastis_has_them(number):
    for role, names in fold_splits(PASTIS, number).items():
        assert names == tuple(f"fold_{k}" for k in folds_of(f"{role}_rotation_{number}"))


def test_every_part_is_tested_once():
    assert sorted(f["test"] for f in find_folds(PASTIS).values()) == [(name,) for name in PASTIS]


def test_named_folds_are_found_and_the_first_may_go_without():
    plain = ("train", "val", "test")
    second = tuple(f"split_2_{role}" for role in plain)
    assert find_folds((*plain, *second, "split_3_train")) == {
        1: {role: (role,) for role in plain},
        2: {role: (f"split_2_{role}",) for role in plain},
    }
    rotations = tuple(f"{role}_rotation_{k}" for k in (1, 4) for role in plain)
    assert {k: roles["test"] for k, roles in find_folds(rotations).items()} == {
        1: ("test_rotation_1",),
        4: ("test_rotation_4",),
    }
    assert find_folds(plain) == {}
    with pytest.raises(
        EvaluationError, match=r"no fold 6 in these shards \(folds: 1, 2, 3, 4, 5; splits: fold_1"
    ):
        fold_splits(PASTIS, 6)


def test_folds_and_their_roles_by_hand():
    assert find_folds(("fold_1", "fold_2")) == {}
    assert find_folds(("fold_1", "fold_2", "fold_4")) == {}
    assert find_folds(("fold_3", "fold_1", "fold_2")) == {
        1: {"train": ("fold_1",), "val": ("fold_2",), "test": ("fold_3",)},
        2: {"train": ("fold_2",), "val": ("fold_3",), "test": ("fold_1",)},
        3: {"train": ("fold_3",), "val": ("fold_1",), "test": ("fold_2",)},
    }
    assert fold_splits(PASTIS, 4) == {
        "train": ("fold_4", "fold_5", "fold_1"),
        "val": ("fold_2",),
        "test": ("fold_3",),
    }
    # Ten and more are in the order of numbers, not of letters.
    many = find_folds(tuple(f"fold_{k}" for k in range(1, 12)))
    assert (many[1]["val"], many[1]["test"], many[11]["val"]) == (("fold_10",), ("fold_11",), ("fold_9",))


RUN = EvalResult("b", "miou", "probe", 0.5, {"a": 0.5, "z": None}, (0.4, 0.6), 10, ((3, 1), (0, 2)))


def test_the_mean_of_runs_keeps_tiles_and_classes_apart():
    runs = [
        dataclasses.replace(
            RUN,
            value=value,
            seeds=(seed,),
            folds=(number,),
            num_tiles=10 * number,
            splits={"test": (f"fold_{number}",)},
            per_class={"a": value, "z": None if number == 1 else 0.2},
            scores={"pixel_accuracy": value / 2},
        )
        for number, seed, value in ((1, 0, 0.5), (1, 1, 0.7), (2, 0, 0.1), (2, 1, 0.3))
    ]
    result = summarise([(f"{i}/results.json", r) for i, r in enumerate(runs)])
    values = [0.5, 0.7, 0.1, 0.3]
    assert (result.value, result.deviation) == (pytest.approx(0.4), pytest.approx(stdev(values)))
    assert result.num_tiles == 10 + 20
    assert (result.seeds, result.folds, result.splits) == ((0, 1), (1, 2), {"test": ("fold_1", "fold_2")})
    assert result.per_class == {"a": pytest.approx(0.4), "z": pytest.approx(0.2)}
    assert result.scores == {"pixel_accuracy": pytest.approx(0.2)}
    assert result.confusion == ((12, 4), (0, 8))
    assert [(r.fold, r.seed, r.value) for r in result.runs] == [
        (1, 0, 0.5), (1, 1, 0.7), (2, 0, 0.1), (2, 1, 0.3)
    ]  # fmt: skip
    assert summarise([("results.json", RUN)]) is RUN


@pytest.fixture(scope="module")
def rotated(fields, tmp_path_factory) -> Fields:
    """The fields in three parts."""
    shards, first = tmp_path_factory.mktemp("rotated") / "shards", 0
    for split, count in TILES.items():
        with Writer(str(shards), FIELDS, split) as writer:
            for number in range(first, first + count):
                writer.add(field_tile(number))
        first += count
    return Fields(shards, fields.model)


def test_the_command_over_folds_and_seeds(rotated, tmp_path, capsys):
    recipe, out = f"--recipe={rotated.recipe(tmp_path)}", tmp_path / "out"
    (tmp_path / "encoders").mkdir()
    for k in (1, 2, 3):
        (tmp_path / "encoders" / f"part{k}").symlink_to(rotated.model)
    asked = [recipe, f"--checkpoint={tmp_path}/encoders/part{{fold}}", f"--out={out}", "--mode=knn"]
    assert evaluate([*asked, "--folds=all", "--seeds=0,3", "--fraction=0.4"]) == 0
    mean = EvalResult.load(out / "knn_40pct" / "results.json")
    parts = [
        EvalResult.load(out / "knn_40pct" / f"fold_{k}" / f"seed_{s}" / "results.json")
        for k in (1, 2, 3)
        for s in (0, 3)
    ]
    assert mean.value == pytest.approx(fmean(p.value for p in parts))
    assert mean.deviation == pytest.approx(stdev([p.value for p in parts]))
    assert mean.deviation > 0
    assert mean.num_tiles == sum(TILES.values())
    assert [p.splits["test"] for p in parts[::2]] == [("fold_3",), ("fold_1",), ("fold_2",)]
    assert parts[0].splits == {"train": ("fold_1",), "val": ("fold_2",), "test": ("fold_3",)}
    assert [p.num_tiles for p in parts[::2]] == [7, 8, 5]
    assert parts[1].recipe["seed"] == 3
    assert np.array(mean.confusion).sum() == sum(np.array(p.confusion).sum() for p in parts)
    message = f"{100 * mean.value:.1f} ± {100 * mean.deviation:.1f}"
    assert (
        f"knn: mIoU {message} over 2 seeds, 3 folds, {out}/knn_40pct/results.json" in capsys.readouterr().out
    )

    (found,) = find_results([out])  # its runs are no results of their own
    page, text = write_report([found], tmp_path / "report.html")
    assert f"| mIoU {message} | – | 2 seeds, 3 folds | 20 | fold_3, fold_1, fold_2 |" in text.read_text()
    assert "fold 2, seed 3" in page.read_text()

    # The same folds as jobs of their own are the same series.
    for k in (1, 2):
        assert (
            evaluate([recipe, asked[1], f"--out={tmp_path / 'jobs' / str(k)}", "--mode=knn", f"--folds={k}"])
            == 0
        )
    assert EvalResult.load(tmp_path / "jobs" / "2" / "knn" / "results.json").folds == (2,)
    _, text = write_report(find_results([tmp_path / "jobs"]), tmp_path / "jobs.html")
    assert "| 2 folds | 15 |" in text.read_text()


def test_impossible_options_are_refused_before_the_start(rotated, tmp_path, capsys):
    recipe = f"--recipe={rotated.recipe(tmp_path)}"
    (tmp_path / "part1").symlink_to(rotated.model)
    asked = [recipe, f"--checkpoint={tmp_path}/part{{fold}}", f"--out={tmp_path / 'out'}", "--mode=knn"]
    assert evaluate([*asked, "--folds=1,2,3"]) == 2
    assert f"there is no {tmp_path}/part2 and no {tmp_path}/part3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    asked[1] = f"--checkpoint={rotated.model}"
    assert evaluate([*asked, "--split", "train=fold_1", "val=fold_2", "test=fold_1,fold_3"]) == 0
    assert "warning: fold_1 is both test and train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--folds=4"], "no fold 4 in these shards (folds: 1, 2, 3; splits: fold_1, fold_2, fold_3)"),
        (["--folds=one"], "--folds 'one' is not a list of whole numbers such as 0,1,2, or all"),
        (["--folds=1", "--split", "test=fold_1"], "leave --split out"),
    ],
)
def test_mistakes_are_one_line(rotated, tmp_path, capsys, asked, message):
    arguments = [
        f"--recipe={rotated.recipe(tmp_path)}",
        f"--checkpoint={rotated.model}",
        f"--out={tmp_path / 'out'}",
    ]
    assert evaluate([*arguments, *asked]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_encoder_per_fold_needs_folds(fields, tmp_path, capsys):
    recipe = f"--recipe={fields.recipe(tmp_path)}"
    assert evaluate([recipe, "--checkpoint=runs/{fold}", f"--out={Path(tmp_path / 'out')}"]) == 2
    assert "runs/{fold}: {fold} needs --folds" in capsys.readouterr().err
