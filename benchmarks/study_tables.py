"""Write the tables of the cpu studies into docs/study.md, and record what they are made of.

    python -m benchmarks.study_tables ROOT

ROOT is that of ``maestro-scale study … --root ROOT``. The record of a study, benchmarks/results/studies/NAME.json, has
the figures of its study.json and the revisions of the code that trained its cells. The page has a pair of comments
around the tables of each study; what is between them is made from the record alone (tests/study/test_tables.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.study.page import verdict_text
from maestro_scale.study.verdict import Verdict

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "study.md"
RECORDS = Path(__file__).parent / "results" / "studies"
_FIGURES = ("study", "claim", "questions", "scores")
_DATASETS = {"treesatai_ts": "TreeSatAI-TS", "pastis_hd": "PASTIS-HD"}
_MISSING = "–"

Record = Mapping[str, Any]


def record_of(root: Path, name: str) -> Record:
    """The record of a finished study below ``root``."""
    folder = root / "studies" / f"{name}-cpu"
    result = json.loads((folder / "study.json").read_text())
    cells = {cell["name"] for cell in json.loads((folder / "cells.json").read_text())["cells"]}
    environments = [root / "cells" / cell / "environment.json" for cell in sorted(cells)]
    revisions = {json.loads(p.read_text())["git_revision"] for p in environments if p.exists()}
    return {
        "revisions": sorted(revision[:9] for revision in revisions if revision),
        "sha256": result["table_sha256"],
        **{name: result[name] for name in _FIGURES},
    }


def digest(record: Record) -> str:
    """SHA-256 of the figures, as the pages of the study show it."""
    figures = {name: record[name] for name in _FIGURES}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def render(record: Record) -> str:
    """The tables of a study as Markdown."""
    name, revisions = record["study"], ", ".join(record["revisions"])
    stem = name.removesuffix("_further")
    file = name if stem == name else f"recipes/study/further/{stem}.yaml"
    head = f"`maestro-scale study {file} --scale cpu --root studies`; cells trained at revision {revisions}."
    figures = [f"SHA-256 of the figures: `{digest(record)}`.", "", *_questions(record), "", *_scores(record)]
    return "\n".join([head, *figures])


def place(page: str, record: Record) -> str:
    """The page with the tables of a study between its comments. ValueError if it has none."""
    begin, end = f"<!-- tables: {record['study']} -->", "<!-- end of tables -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE.name} has no comment {begin}")
    return pattern.sub(lambda _: f"{begin}\n\n{render(record)}\n\n{end}", page, count=1)


def _questions(record: Record) -> Iterator[str]:
    yield "| A is better than B | where | A - B | interval | seeds | tiles | p | p (Holm) | verdict |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for answer in record["questions"]:
        question, found = answer["question"], answer["difference"]
        verdict = Verdict(**answer["verdict"])
        columns = [_claim(question), _where(answer), *[_MISSING] * 4]
        if found is not None:
            interval = f"{_number(found['low'], '+')} to {_number(found['high'], '+')}"
            counts = "/".join(map(str, dict.fromkeys(found["num_seeds"])))
            columns[2:] = [_number(found["value"], "+"), interval, counts, f"{found['num_tiles']:,}"]
        p_values = [_p_text(verdict.p_value), _p_text(verdict.adjusted_p)]
        text = verdict_text(verdict, min(found["num_seeds"]) if found else 2)
        yield _row([*columns, *p_values, f"**{text}**" if verdict.is_resolved else text])


def _claim(question: Mapping[str, Any]) -> str:
    if question["margin"]:
        return f"{question['claim']} (margin {_number(question['margin'])})"
    return question["claim"]


def _where(answer: Mapping[str, Any]) -> str:
    question, metric = answer["question"], answer["metric"] and METRIC_KINDS[answer["metric"]].title
    against = question["worse_mode"] not in (None, question["mode"])
    modes = f"{question['mode']} against {question['worse_mode']}" if against else question["mode"]
    labels = "" if question["fraction"] == 1 else f", {100 * question['fraction']:g} % of the labels"
    return ", ".join(filter(None, (_DATASETS[answer["dataset"]], metric, modes))) + labels


def _scores(record: Record) -> Iterator[str]:
    scores = record["scores"]
    datasets = {s["dataset"]: METRIC_KINDS[s["metric"]].title for s in scores if s["metric"]}
    titles = [f"{_DATASETS[name]}, {metric} in %" for name, metric in datasets.items()]
    yield _row(["encoder, mode", *titles])
    yield "|" + "---|" * (len(titles) + 1)
    rows: dict[str, dict[str, str]] = {}
    for score in scores:
        levels = ", ".join(f"{factor} {level}" for factor, level in sorted(score["levels"].items()))
        labels = "" if score["fraction"] == 1 else f", {100 * score['fraction']:g} % of the labels"
        encoder = f"baseline {score['baseline']}" if score["baseline"] else levels
        rows.setdefault(f"{encoder}, {score['mode']}{labels}", {})[score["dataset"]] = _score(score)
    for label, by_dataset in rows.items():
        yield _row([label, *(by_dataset.get(name, "") for name in datasets)])


def _score(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "not run"
    found, missing = score["estimate"], score["num_planned"] > len(score["seeds"])
    text = f"{_number(score['mean'])} ({_number(found['low'])} to {_number(found['high'])})"
    return f"{text}, {len(score['seeds'])} of {score['num_planned']} seeds" if missing else text


def _number(value: float, sign: str = "") -> str:
    """A fraction as percent."""
    return f"{100 * value:{sign}.2f}"


def _p_text(value: float | None) -> str:
    if value is None:
        return _MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _row(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="ROOT")
    root = parser.parse_args().root
    page = PAGE.read_text()
    RECORDS.mkdir(parents=True, exist_ok=True)
    for name in re.findall(r"<!-- tables: (\w+) -->", page):
        if not (root / "studies" / f"{name}-cpu" / "study.json").exists():
            print(f"{name}: not run, its tables stay")
            continue
        record = record_of(root, name)
        (RECORDS / f"{name}.json").write_text(
            json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"
        )
        page = place(page, record)
        print(f"{name}: {record['sha256']}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
