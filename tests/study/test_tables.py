"""The tables of docs/study.md are what the recorded results give, and the records are those of the command."""

from __future__ import annotations

import json
import re

import pytest
from testkit.runs import REPO

from benchmarks.study_tables import RECORDS, digest, place, render

PAGE = (REPO / "docs" / "study.md").read_text()
NAMES = sorted(path.stem for path in (REPO / "recipes" / "study").glob("*.yaml"))


def test_every_study_has_its_tables():
    on_page = re.findall(r"<!-- tables: (\w+) -->", PAGE)
    assert set(NAMES) <= set(on_page)
    assert sorted(path.stem for path in RECORDS.glob("*.json")) == sorted(on_page)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_recorded_figures(path):
    record = json.loads(path.read_text())
    assert record["sha256"] == digest(record), "the figures were changed since the command wrote them"
    assert place(PAGE, record) == PAGE, "run python -m benchmarks.study_tables ROOT"


def test_a_row_has_difference_interval_and_verdict():
    verdict = {
        "word": "not resolved",
        "p_value": 0.2,
        "needed_seeds": 9,
        "needed_tiles": None,
        "adjusted_p": 0.4,
    }
    question = {"claim": "A is better.", "margin": None, "mode": "probe", "worse_mode": None, "fraction": 0.1}
    difference = {"value": 0.01234, "low": -0.005, "high": 0.03, "num_seeds": [5, 5], "num_tiles": 1500}
    answer = {"question": question, "dataset": "pastis_hd", "metric": "miou", "verdict": verdict}
    score = {
        "dataset": "pastis_hd",
        "metric": "miou",
        "levels": {"target": "none"},
        "baseline": "",
        "mode": "probe",
        "fraction": 1.0,
        "mean": 0.25,
        "estimate": {"low": 0.2, "high": 0.3},
        "seeds": [0, 1, 2, 3],
        "num_planned": 5,
    }
    record = {
        "study": "targets",
        "claim": "C.",
        "revisions": ["abc"],
        "questions": [{**answer, "difference": difference}],
        "scores": [score],
    }
    table = render(record)
    assert (
        "| A is better. | PASTIS-HD, mIoU, probe, 10 % of the labels | +1.23 | -0.50 to +3.00 | 5 | 1,500 | 0.200 | "
        "0.400 | not resolved, would need 9 seeds |" in table
    )
    assert "| target none, probe | 25.00 (20.00 to 30.00), 4 of 5 seeds |" in table
