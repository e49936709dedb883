"""The analysis of a study and its pages, from results with known counts."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.results import EvalResult, RunScore
from maestro_scale.study.analysis import StudyResult, analyse, unanswered
from maestro_scale.study.config import Study
from maestro_scale.study.page import verdict_text, write_pages
from maestro_scale.study.records import CellRecord, EvaluationRecord
from maestro_scale.study.verdict import Verdict
from tests.evaluation.test_report import Page
from tests.testkit.hostile import NAMES

KEYS = tuple(f"tile-{i}" for i in range(8))


def study(*questions: dict, claim: str = "Targets matter.") -> Study:
    data = {"dataset": "treesatai_ts", "tiles": {"train": 1}}
    evaluation = {"name": "trees", "modes": ["probe"]}
    setup = {"data": data, "base": "base.yaml", "seeds": [0], "evaluations": [evaluation]}
    tree = {
        "name": "targets",
        "claim": claim,
        "scales": {"cpu": {"datasets": {"trees": setup, "fields": setup}}},
        "factors": {"target": {"group": {}, "patch": {}, "none": {}}, "depth": {"one": {}, "two": {}}},
        "questions": [
            {"name": f"q{i}", "claim": "It is so.", "mode": "probe", **question}
            for i, question in enumerate(questions)
        ],
    }
    return Study.model_validate_json(json.dumps(tree))


GROUP_PATCH = {"better": {"target": "group"}, "worse": {"target": "patch"}}


def result(hits: str, seed: int, mode: str = "probe", keys: tuple[str, ...] = KEYS) -> EvalResult:
    """A result of one class that hits the tiles of a "1": its wF1 is the share of hits."""
    array = np.array([[[1], [0], [0]] if hit == "1" else [[0], [1], [1]] for hit in hits])
    value = hits.count("1") / len(hits)
    counts = TileCounts(keys[: len(hits)], array)
    return EvalResult(
        "treesatai_ts",
        "wf1",
        mode,
        value,
        {"oak": value},
        (0.0, 1.0),
        len(hits),
        seeds=(seed,),
        counts=counts,
    )


class Cells:
    """Cells whose results are written to a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.records = root, []

    def add(
        self, hits: str | None, seed: int, mode: str = "probe", dataset: str = "trees", **levels: str
    ) -> Path:
        """A cell; without ``hits`` it has no result yet."""
        name = "-".join([dataset, *levels.values(), mode, str(seed)])
        path = self.root / name / "results.json"
        if hits is not None:
            result(hits, seed, mode).write(path)
        record = EvaluationRecord("trees", mode, path)
        self.records.append(CellRecord(name, dataset, seed, levels, "", [record], 90.0, 1))
        return path


@pytest.fixture
def cells(tmp_path) -> Cells:
    return Cells(tmp_path / "cells")


def three_seeds(cells: Cells, first: str = "group", second: str = "patch", **more: str) -> None:
    """Seeds that move alike: ``first`` hits two tiles of eight more than ``second``."""
    for seed, (a, b) in enumerate(
        (("11110000", "11000000"), ("11111100", "11110000"), ("11000000", "00000000"))
    ):
        cells.add(a, seed, target=first, **more)
        cells.add(b, seed, target=second, **more)


def test_an_effect_is_the_mean_over_seeds_in_pairs(cells):
    three_seeds(cells)
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.difference.value == pytest.approx(0.25)
    assert answer.difference.seed.variance == pytest.approx(0, abs=1e-15)
    assert (answer.difference.num_seeds, answer.difference.num_tiles) == ((3,), 8)
    assert answer.better == ("trees-group-probe-0", "trees-group-probe-1", "trees-group-probe-2")
    assert (answer.dataset, answer.benchmark, answer.metric, answer.num_missing) == (
        "trees",
        "trees",
        "wf1",
        0,
    )


def test_scores_are_means_over_seeds_and_missing_ones_are_empty(cells):
    for seed, hits in enumerate(("11110000", "11111100", None)):
        cells.add(hits, seed, target="group")
    cells.add(None, 0, target="none")
    cells.records.append(
        CellRecord("r", "trees", 0, {}, "random", [EvaluationRecord("trees", "knn", Path("none"), 0.1)])
    )
    scores = analyse(study(), cells.records).scores
    first, second, third = scores
    assert (first.mean, first.seeds, first.num_planned, first.metric) == (0.625, (0, 1), 3, "wf1")
    assert first.deviation == pytest.approx(0.25 / 2**0.5)
    assert first.estimate.value == pytest.approx(0.625)
    assert first.estimate.num_tiles == 8
    assert (second.mean, second.deviation, second.estimate, second.seeds) == (None, None, None, ())
    assert (third.baseline, third.fraction) == ("random", 0.1)


def test_a_cell_that_is_listed_twice_counts_once(cells):
    """As two trials of a search with the same values."""
    cells.add("11110000", 0, target="group")
    cells.records.append(cells.records[0])
    cells.add("11000000", 1, target="group")
    (score,) = analyse(study(), cells.records).scores
    assert (score.seeds, score.num_planned) == ((0, 1), 2)
    assert score.mean == pytest.approx(0.375)  # of 0.5 and 0.25


def test_questions_without_an_evaluation_are_known_before_a_cell_is_run(cells):
    cells.add(None, 0, target="group")
    cells.add(None, 0, target="patch")
    cells.add(None, 0, target="none", dataset="fields")
    wrong = [{"mode": "knn"}, {"fraction": 0.1}, {"benchmark": "tres"}]
    asked = study(GROUP_PATCH, *({**GROUP_PATCH, **change} for change in wrong))
    found = unanswered(asked, cells.records)
    assert [name for name, dataset in found if dataset == "trees"] == ["q1", "q2", "q3"]
    assert [name for name, dataset in found if dataset == "fields"] == ["q0", "q1", "q2", "q3"]


def test_the_verdicts_of_constructed_cases(cells):
    """24 tiles whose differences are equal in each seed: no variation but that of the tiles."""
    rows = {"group": "1" * 24, "patch": "1" * 12 + "0" * 12, "none": "1" * 13 + "0" * 11}
    for target, hits in rows.items():
        for seed in range(3):
            path = cells.add(None, seed, target=target)
            result(hits, seed, keys=tuple(map(str, range(24)))).write(path)
    none_patch = {"better": {"target": "none"}, "worse": {"target": "patch"}}
    asked = study(
        GROUP_PATCH,
        {"better": {"target": "patch"}, "worse": {"target": "group"}},
        {**GROUP_PATCH, "at_least": 0.8},
        none_patch,
        {**none_patch, "margin": 0.15},
        {**GROUP_PATCH, "margin": 0.1},
        {"better": {"target": "none"}, "worse": {"target": "patch", "depth": "two"}},
    )
    answers = analyse(asked, cells.records).answers
    words = [answer.verdict.word for answer in answers]
    assert words == ["holds", "opposite", "smaller", "not resolved", "matches", "differs", "not evaluated"]
    # One tile of 24 differs: value 1/24, standard error of the mean also 1/24, so p = 0.33; six p values are adjusted.
    assert answers[3].difference.value == pytest.approx(1 / 24)
    assert answers[3].difference.error == pytest.approx(1 / 24)
    assert answers[3].verdict.p_value == pytest.approx(0.3277, abs=1e-3)
    assert answers[3].verdict.adjusted_p == answers[3].verdict.p_value
    # 1/24² · 24 / n · (1.96 + 0.84)² = 1/24²: 188 tiles with the normal distribution, 191 with t.
    assert (answers[3].verdict.needed_seeds, answers[3].verdict.needed_tiles) == (None, 191)


def test_other_levels_are_equal_on_both_sides_and_averaged(cells):
    three_seeds(cells, depth="one")
    for seed in range(3):
        cells.add("11111111", seed, target="group", depth="two")
        cells.add("00000000", seed, target="patch", depth="two")
        cells.add("11111111", seed, target="none", depth="two")
    asked = study(GROUP_PATCH, {"better": {"target": "none"}, "worse": {"target": "patch", "depth": "two"}})
    first, second = analyse(asked, cells.records).answers
    assert first.difference.value == pytest.approx((0.25 + 1) / 2)
    assert first.difference.num_tiles == 8
    assert len(first.better) == 6
    assert second.difference.value == 1  # none is compared at depth two, as patch is


def test_a_cell_that_is_missing_leaves_its_seed_out(cells):
    three_seeds(cells)
    cells.add(None, 3, target="group")
    cells.add("11111111", 3, target="patch")
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.difference.value == pytest.approx(0.25)
    assert (answer.difference.num_seeds, answer.num_missing) == ((3,), 1)


def test_only_seeds_that_are_compared_are_listed(cells):
    three_seeds(cells)
    cells.add("11111111", 7, target="group")  # the other side has no seed 7
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.difference.num_seeds == (3,)
    assert answer.better == tuple(f"trees-group-probe-{seed}" for seed in range(3))
    assert answer.worse == tuple(f"trees-patch-probe-{seed}" for seed in range(3))


def test_a_level_from_scratch_answers_for_finetuning(cells):
    for seed in range(2):
        cells.add("11110000", seed, "finetune", target="group")
        cells.add("11000000", seed, "scratch", target="none")
        cells.add("00000000", seed, "probe", target="none")
    question = {"better": {"target": "group"}, "worse": {"target": "none"}, "mode": "finetune"}
    (answer,) = analyse(study(question), cells.records).answers
    assert answer.difference.value == pytest.approx(0.25)


def test_a_lower_error_is_better(cells):
    """Errors of 1 and 2 on every tile: sums of the number of values, and of squared errors, as of RMSE."""
    for target, error in (("group", 1.0), ("patch", 2.0)):
        for seed in range(2):
            path = cells.add(None, seed, target=target)
            sums = np.zeros((8, 6))
            sums[:, 0], sums[:, 2] = 1, error**2
            kept = dataclasses.replace(result("1" * 8, seed), metric="rmse", value=error, per_class={})
            dataclasses.replace(kept, counts=TileCounts(KEYS, sums)).write(path)
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.difference.value == pytest.approx(1)
    assert answer.verdict.word == "holds"


def test_modes_can_be_compared_with_each_other(cells):
    for seed in range(2):
        cells.add("11110000", seed, "finetune", target="group")
        cells.add("11000000", seed, "probe", target="group")
    question = {
        "better": {"target": "group"},
        "worse": {"target": "group"},
        "worse_mode": "probe",
        "mode": "finetune",
    }
    (answer,) = analyse(study(question), cells.records).answers
    assert answer.difference.value == pytest.approx(0.25)


def test_every_dataset_has_an_answer_unless_some_are_named(cells):
    for dataset in ("trees", "fields"):
        for seed in range(2):
            cells.add("1100", seed, dataset=dataset, target="group")
            cells.add("1000", seed, dataset=dataset, target="patch")
    asked = study(GROUP_PATCH, {**GROUP_PATCH, "datasets": ["fields"]})
    answers = analyse(asked, cells.records).answers
    assert [(a.question.name, a.dataset) for a in answers] == [
        ("q0", "trees"),
        ("q0", "fields"),
        ("q1", "fields"),
    ]


def test_levels_of_the_same_cells_are_no_comparison(cells):
    three_seeds(cells)
    same = [dataclasses.replace(r, levels={"target": "none"}) for r in cells.records if "patch" in r.name]
    question = {"better": {"target": "none"}, "worse": {"target": "patch"}}
    result = analyse(study(question), [*cells.records, *same])
    assert result.answers[0].verdict == Verdict("same cells")
    assert len(result.costs) == 6  # a cell is listed once


def test_folds_of_a_result_are_read_from_its_runs(cells, tmp_path, caplog):
    for seed in range(2):
        for target, hits in (("group", "1111"), ("patch", "1100")):
            path = cells.add(None, seed, target=target)
            runs = []
            for fold in (1, 2):
                keys = KEYS[4 * fold - 4 : 4 * fold]
                of_fold = dataclasses.replace(result(hits, seed, keys=keys), folds=(fold,))
                of_fold.write(path.parent / f"fold_{fold}" / "results.json")
                runs.append(RunScore(of_fold.value, (0.0, 1.0), seed, fold, f"fold_{fold}/results.json"))
            mean = dataclasses.replace(result(hits * 2, seed), runs=tuple(runs), folds=(1, 2), counts=None)
            mean.write(path)
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.difference.value == pytest.approx(0.5)
    assert answer.difference.num_tiles == 8
    outside = dataclasses.replace(mean, runs=(RunScore(0.5, (0.0, 1.0), 1, 1, "../../x/results.json"),))
    outside.write(path)
    (answer,) = analyse(study(GROUP_PATCH), cells.records).answers
    assert answer.verdict.word == "no result"
    assert "is not below it" in caplog.text


def test_a_result_without_counts_or_a_damaged_one_is_shown_without_interval(cells, caplog):
    three_seeds(cells)
    path = cells.root / "trees-group-probe-0" / "results.json"
    (path.parent / "counts.npz").unlink()
    found = analyse(study(GROUP_PATCH), cells.records)
    assert found.answers[0].verdict.word == "no result"
    group = next(s for s in found.scores if s.levels["target"] == "group")
    assert (group.mean, group.estimate) == (0.5, None)
    assert "counts.npz cannot be read" in caplog.text
    path.write_text("{")
    found = analyse(study(GROUP_PATCH), cells.records)
    assert found.answers[0].num_missing == 1
    assert found.answers[0].difference.num_seeds == (2,)


def rendered(cells: Cells, folder: Path, asked: Study) -> tuple[StudyResult, Page, str]:
    found = analyse(asked, cells.records)
    paths = write_pages(found, folder, "maestro-scale study targets.yaml")
    assert [p.name for p in paths] == ["study.html", "study.md", "study.svg", "study.json"]
    return found, Page(paths[0].read_text()), paths[1].read_text()


def test_pages_show_every_figure(cells, tmp_path):
    three_seeds(cells)
    cells.add(None, 0, target="none")
    none = {"better": {"target": "none"}, "worse": {"target": "patch"}}
    _, page, text = rendered(cells, tmp_path / "out", study({**GROUP_PATCH, "margin": 0.9}, none))
    assert re.search(
        r"\| q0 \| It is so. \(margin 90\) \| trees, probe \| wF1 \| \+25.00 "
        r"\| [-+.\d]+ to [-+.\d]+ \| 3 \| 8 \| [\\<.\d ]+ \| [\\<.\d ]+ \| – \| \*\*matches within the margin\*\* \|",
        text,
    )
    assert "| q1 | It is so. | trees, probe | wF1 | – | – | – | – | – | – | 1 | **no result** |" in text
    assert re.search(
        r"\| trees \| trees \| target group \| probe \| 100 % \| wF1 50.00 \| 25.00 \| [-.\d]+ to [-.\d]+ \| 3 \| 8 \|",
        text,
    )
    assert "| trees | trees | target none | probe | 100 % | – | – | – | 0 of 1 | – |" in text
    assert "| trees-group-probe-0 | 90 | 0.03 |" in text
    assert "| all | 630 | 0.17 |" in text
    assert "| command | maestro-scale study targets.yaml |" in text
    assert not re.search(r"\n\n\|[^\n]+\n\n\|", text), "a table is torn apart"
    words = " ".join(" ".join(page.text).split())
    assert "q0 It is so. (margin 90) trees, probe wF1 +25.00" in words
    (image,) = page.images
    svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
    assert svg == (tmp_path / "out" / "study.svg").read_bytes()
    assert svg.startswith(b"<?xml")


def test_equal_results_give_equal_tables_whatever_they_cost(cells, tmp_path):
    three_seeds(cells)
    first, _, text = rendered(cells, tmp_path / "a", study(GROUP_PATCH))
    cells.records = [dataclasses.replace(r, seconds=7.0) for r in cells.records]
    _, _, other = rendered(cells, tmp_path / "b", study(GROUP_PATCH))
    assert text.split("## Cost")[0] == other.split("## Cost")[0]
    assert text != other
    for name in ("study.svg",):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("a", "b"))
    assert a["table_sha256"] == b["table_sha256"]
    assert a["questions"][0]["difference"]["value"] == pytest.approx(0.25)
    assert a["questions"][0]["verdict"]["word"] == first.answers[0].verdict.word
    assert a["costs"] != b["costs"]
    cells.add("11111111", 3, target="none")
    rendered(cells, tmp_path / "c", study(GROUP_PATCH))
    assert json.loads((tmp_path / "c" / "study.json").read_text())["table_sha256"] != a["table_sha256"]


def test_a_comparison_of_cells_with_other_threads_has_a_note(cells, tmp_path):
    three_seeds(cells)
    one, two = "1 thread, CPU", "2 threads, CPU"
    cells.records = [dataclasses.replace(r, machines=(one,)) for r in cells.records]
    _, _, text = rendered(cells, tmp_path / "a", study(GROUP_PATCH))
    assert f"| trees-group-probe-0 | 90 | 0.03 | {one} |" in text
    assert "rounding" not in text
    cells.records[1] = dataclasses.replace(cells.records[1], machines=(one, two))
    none = {"better": {"target": "group"}, "worse": {"target": "none"}}
    _, page, other = rendered(cells, tmp_path / "b", study(GROUP_PATCH, none))
    note = f"q0 on trees: its cells were run with {one} and with {two}, so a part of the difference may be rounding."
    assert note in other
    assert note in " ".join(" ".join(page.text).split())
    assert other.count("rounding") == 1
    assert json.loads((tmp_path / "b" / "study.json").read_text())["notes"] == [note]


def test_a_study_without_a_result_has_pages_too(cells, tmp_path):
    cells.add(None, 0, target="group")
    _, page, text = rendered(cells, tmp_path, study(GROUP_PATCH))
    assert page.images == []
    assert "study.svg" not in text
    assert "| trees | trees | target group | probe | 100 % | – | – | – | 0 of 1 | – |" in text


def test_hostile_names_are_only_text(cells, tmp_path):
    three_seeds(cells)
    result = analyse(study(GROUP_PATCH), cells.records)
    answer, score, cost = result.answers[0], result.scores[0], result.costs[0]
    hostile = StudyResult(
        study(GROUP_PATCH, claim=NAMES[10]),
        tuple(
            dataclasses.replace(score, dataset=name, benchmark=name, levels={name: name}, baseline=b)
            for name in NAMES
            for b in ("", name)
        ),
        tuple(
            dataclasses.replace(
                answer,
                dataset=name,
                benchmark=name,
                question=answer.question.model_copy(update={"claim": name}),
            )
            for name in NAMES
        ),
        tuple(dataclasses.replace(cost, cell=name) for name in NAMES),
    )
    html, markdown, *_ = write_pages(hostile, tmp_path, NAMES[18])
    page = Page(html.read_text())
    assert [image["src"][:25] for image in page.images] == ["data:image/svg+xml;base64"]
    assert page.links == []
    text = markdown.read_text()
    assert not re.search(r"(?<!\\)<", text)
    rows = [
        line for line in text.split("## Scores")[1].split("## Cost")[0].splitlines() if line.startswith("| ")
    ]
    assert len(rows) == 1 + 2 * len(NAMES)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11}


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict("holds", 0.01), "holds"),
        (Verdict("no result"), "no result"),
        (Verdict("not evaluated"), "not evaluated: the study has no cell or evaluation of this question"),
        (Verdict("opposite", 0.01), "opposite"),
        (Verdict("smaller", 0.01), "smaller than claimed"),
        (Verdict("not resolved", 0.2, 12, 5200), "not resolved, would need 5,200 tiles or 12 seeds"),
        (Verdict("not resolved", 0.2, None, 5200), "not resolved, would need 5,200 tiles"),
        (Verdict("not resolved", 0.2, 12, None), "not resolved, would need 12 seeds"),
        (Verdict("not resolved", 0.9), "not resolved, would need more seeds and more tiles"),
    ],
)
def test_verdicts_in_words(verdict, text):
    assert verdict_text(verdict) == text


def test_one_seed_needs_several():
    assert verdict_text(Verdict("not resolved"), 1) == "not resolved, needs several seeds"
