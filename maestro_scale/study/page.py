"""Write the pages of a study: ``study.md``, ``study.html`` (self-contained), ``study.svg`` and ``study.json``.

Everything but cost and origin is a function of the results: the same for a study that was killed and resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maestro_scale.evaluation.metric_kinds import METRIC_KINDS, significant
from maestro_scale.evaluation.paired import Estimate
from maestro_scale.evaluation.report.pages import data_url, html_templates, markdown_templates
from maestro_scale.study.analysis import Answer, Score, StudyResult
from maestro_scale.study.plot import Bar, effects
from maestro_scale.study.verdict import Verdict
from maestro_scale.training.run_dir import environment, write_atomically

STEM = "study"
NOTHING = "–"
_ORIGIN = ("command", "git_revision", "platform", "host")


def write_pages(result: StudyResult, folder: Path, command: str | None = None) -> tuple[Path, ...]:
    """Write the four files into ``folder``, atomically, and return their paths; the HTML page first.

    ``command``: that makes them; None: that of this process.
    """
    origin = {name: value for name, value in environment().items() if name in _ORIGIN}
    if command is not None:
        origin["command"] = command
    figure = effects([_bar(answer) for answer in result.answers if answer.difference is not None])
    table = {
        "study": result.study.name,
        "claim": result.study.claim,
        "questions": [_answer_values(a) for a in result.answers],
        "scores": [_score_values(s) for s in result.scores],
    }
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    costs = [vars(cost) for cost in result.costs]
    notes = _machine_notes(result)
    values = {**table, "table_sha256": digest, "costs": costs, "notes": notes, "origin": origin}
    content = {
        "study": result.study,
        "questions": [_question_row(a) for a in result.answers],
        "scores": [_score_row(s) for s in result.scores],
        "costs": _cost_rows(result),
        "notes": notes,
        "origin": {name.replace("_", " "): str(value or NOTHING) for name, value in origin.items()},
        "figure": data_url(figure, "image/svg+xml"),
        "digest": digest,
        "has_figure": any(a.difference for a in result.answers),
    }
    files: dict[str, str | bytes] = {
        "html": html_templates("maestro_scale.study").get_template("study.html").render(content),
        "md": markdown_templates("maestro_scale.study").get_template("study.md").render(content),
        "svg": figure,
        "json": json.dumps(values, indent=1, allow_nan=False) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in files.items():
        write_atomically(folder / f"{STEM}.{suffix}", text)
    return tuple(folder / f"{STEM}.{suffix}" for suffix in files)


def verdict_text(verdict: Verdict, num_seeds: int = 2) -> str:
    """The verdict in words, with what would decide an open one. ``num_seeds``: the smallest number on either side."""
    if verdict.word == "smaller":
        return "smaller than claimed"
    if verdict.word == "matches":
        return "matches within the margin"
    if verdict.word == "differs":
        return "differs by more than the margin"
    if verdict.word == "same cells":
        return "no difference: both sides are the same cells"
    if verdict.word == "not evaluated":
        return "not evaluated: the study has no cell or evaluation of this question"
    if verdict.word != "not resolved":
        return verdict.word
    if num_seeds < 2:
        return "not resolved, needs several seeds"
    needed = []
    if verdict.needed_tiles is not None:
        needed.append(f"{verdict.needed_tiles:,} tiles")
    if verdict.needed_seeds is not None:
        needed.append(f"{verdict.needed_seeds:,} seeds")
    return f"not resolved, would need {' or '.join(needed) or 'more seeds and more tiles'}"


def _bar(answer: Answer) -> Bar:
    found, question, scale = answer.difference, answer.question, _scale(answer.metric)
    assert found is not None  # those without are left out
    borders = (question.at_least,) if question.margin is None else (-question.margin, question.margin)
    return Bar(
        f"{question.name}, {_place(answer)}, {question.mode}",
        answer.verdict.word,
        scale * found.value,
        scale * found.low,
        scale * found.high,
        [scale * border for border in borders if border],
    )


def _question_row(answer: Answer) -> dict[str, str]:
    question, found = answer.question, answer.difference
    labels = "" if question.fraction == 1 else f", {100 * question.fraction:g} % of labels"
    against = "" if question.worse_mode in (None, question.mode) else f" against {question.worse_mode}"
    return {
        "name": question.name,
        "claim": _claim(answer),
        "where": f"{_place(answer)}, {question.mode}{against}{labels}",
        "metric": METRIC_KINDS[answer.metric].title if answer.metric else NOTHING,
        "difference": _number(answer.metric, found.value, "+") if found else NOTHING,
        "interval": _interval(answer.metric, found, "+") if found else NOTHING,
        "seeds": _pair_text(found) if found else NOTHING,
        "tiles": f"{found.num_tiles:,}" + ("" if found.pairs_tiles else " (not paired)")
        if found
        else NOTHING,
        "missing": str(answer.num_missing or NOTHING),
        "p": _p_text(answer.verdict.p_value),
        "adjusted": _p_text(answer.verdict.adjusted_p),
        "word": answer.verdict.word.replace(" ", "-"),
        "verdict": verdict_text(answer.verdict, min(found.num_seeds) if found else 2),
    }


def _place(answer: Answer) -> str:
    """Dataset and benchmark, which often have the same name."""
    return ", ".join(dict.fromkeys((answer.dataset, answer.benchmark)))


def _claim(answer: Answer) -> str:
    question, scale = answer.question, _scale(answer.metric)
    if question.margin is not None:
        return f"{question.claim} (margin {scale * question.margin:g})"
    return question.claim + (f" (by at least {scale * question.at_least:g})" if question.at_least else "")


def _scale(metric: str) -> int:
    """Fractions are shown in percentage points."""
    return 100 if not metric or METRIC_KINDS[metric].is_fraction else 1


def _number(metric: str, value: float, sign: str = "") -> str:
    if METRIC_KINDS[metric].is_fraction:
        return f"{100 * value:{sign}.2f}"
    return ("+" if sign and value >= 0 else "") + significant(value)


def _interval(metric: str, found: Estimate, sign: str = "") -> str:
    return f"{_number(metric, found.low, sign)} to {_number(metric, found.high, sign)}"


def _pair_text(found: Estimate) -> str:
    numbers = " and ".join(map(str, found.num_seeds))
    return numbers if found.pairs_seeds else f"{numbers} (not paired)"


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return NOTHING
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _score_row(score: Score) -> dict[str, str]:
    found = score.estimate
    labels = ", ".join(f"{factor} {level}" for factor, level in sorted(score.levels.items()))
    return {
        "dataset": score.dataset,
        "benchmark": score.benchmark,
        "encoder": f"baseline {score.baseline}" if score.baseline else labels or "the base recipe",
        "mode": score.mode,
        "labels": f"{100 * score.fraction:g} %",
        "score": NOTHING
        if score.mean is None
        else f"{METRIC_KINDS[score.metric].title} {_number(score.metric, score.mean)}",
        "deviation": NOTHING if score.deviation is None else _number(score.metric, score.deviation),
        "interval": _interval(score.metric, found) if found else NOTHING,
        "seeds": str(len(score.seeds))
        if len(score.seeds) == score.num_planned
        else f"{len(score.seeds)} of {score.num_planned}",
        "tiles": f"{found.num_tiles:,}" if found else NOTHING,
    }


def _cost_rows(result: StudyResult) -> list[dict[str, str]]:
    rows = [
        {
            "cell": cost.cell,
            "seconds": NOTHING if cost.seconds is None else f"{cost.seconds:,.0f}",
            "gpu_hours": NOTHING if cost.gpu_hours is None else f"{cost.gpu_hours:.2f}",
            "machine": "; ".join(cost.machines) or NOTHING,
        }
        for cost in result.costs
    ]
    seconds = [c.seconds for c in result.costs if c.seconds is not None]
    hours = [c.gpu_hours for c in result.costs if c.gpu_hours is not None]
    total = {
        "cell": "all",
        "seconds": f"{sum(seconds):,.0f}",
        "gpu_hours": f"{sum(hours):.2f}",
        "machine": "",
    }
    return [*rows, total] if seconds else rows


def _machine_notes(result: StudyResult) -> list[str]:
    """A sentence per comparison of cells that were not all run with the same threads and device."""
    return [
        f"{question} on {dataset}: its cells were run with {' and with '.join(machines)}, "
        "so a part of the difference may be rounding."
        for (question, dataset), machines in result.mixed_machines.items()
    ]


def _answer_values(answer: Answer) -> dict[str, Any]:
    question = answer.question
    return {
        "question": question.model_dump(mode="json"),
        "dataset": answer.dataset,
        "benchmark": answer.benchmark,
        "metric": answer.metric,
        "better": answer.better,
        "worse": answer.worse,
        "num_missing": answer.num_missing,
        "difference": _estimate_values(answer.difference),
        "verdict": vars(answer.verdict),
    }


def _score_values(score: Score) -> dict[str, Any]:
    return {**vars(score), "estimate": _estimate_values(score.estimate)}


def _estimate_values(found: Estimate | None) -> Mapping[str, Any] | None:
    if found is None:
        return None
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "level": found.level,
        "error": found.error,
        "freedom": None if found.freedom == float("inf") else found.freedom,
        "num_seeds": found.num_seeds,
        "num_tiles": found.num_tiles,
        "pairs_seeds": found.pairs_seeds,
        "pairs_tiles": found.pairs_tiles,
        "variances": {name: getattr(found, name).variance for name in ("seed", "tile", "inter")},
    }
