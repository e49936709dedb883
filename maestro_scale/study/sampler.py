"""Search for the best values of recipe keys by Optuna: every trial is a cell per seed, its value their mean score.

The trials are stored in the folder of the study. A trial that a kill interrupted is completed first, and the sampler is
built from the seed and the number of the trial, so an interrupted search continues as an uninterrupted one. A trial
whose cell failed stays open too, as the reason may be a full disk: the next start runs it again, like a failed cell.
Values that give no valid recipe end their trial as failed, without a score.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.recipe import RecipeError
from maestro_scale.study.cells import Cell, distinct, make_cell, scale_of
from maestro_scale.study.config import Sample, Study
from maestro_scale.study.run import Outcome, StudyError
from maestro_scale.training.run_dir import write_atomically

if TYPE_CHECKING:
    import optuna

STORE = "optuna.db"
TRIALS = "trials.json"
_MAX_FAILED = 5  # in one call

RunCells = Callable[[Sequence[Cell]], Outcome]
"""Runs cells; returns when they have ended."""


def search(study: Study, scale: str, root: Path, study_dir: Path, run: RunCells) -> Outcome:
    """Run the trials that are missing; writes ``trials.json``. StudyError without Optuna."""
    sample = study.sample
    assert sample is not None  # the caller's choice
    optuna = _optuna()
    study_dir.mkdir(parents=True, exist_ok=True)
    searched = _open(optuna, study_dir / STORE, _search_name(study, scale, root))
    total, failed = Outcome(), set[int]()
    while trial := _next_trial(optuna, searched, sample, failed):
        try:
            cells = trial_cells(study, scale, root, trial.params)
        except RecipeError as error:
            searched.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            _write_trials(searched, study_dir)
            print(f"trial {trial.number} has no valid recipe: {error}", file=sys.stderr, flush=True)
            continue
        outcome = run(distinct(cells))
        total.finished += outcome.finished
        total.failures += outcome.failures
        if outcome.is_stopped:
            total.is_stopped = True
            return total
        scores = [score for cell in cells if (score := _score(cell, sample.mode)) is not None]
        if len(scores) == len(cells):
            searched.tell(trial.number, fmean(scores))
        else:
            failed.add(trial.number)
        _write_trials(searched, study_dir)
        if len(failed) >= _MAX_FAILED:  # the values of further trials would be drawn from too few results
            total.failures.append(
                f"{len(failed)} trials failed: the search stops; the same command continues it"
            )
            print(total.failures[-1], file=sys.stderr, flush=True)
            return total
    if not failed and not any(t.state == optuna.trial.TrialState.COMPLETE for t in searched.trials):
        total.failures.append("no trial has a score: change the space of the search")
        print(total.failures[-1], file=sys.stderr, flush=True)
    return total


def trial_cells(study: Study, scale: str, root: Path, params: Mapping[str, Any]) -> list[Cell]:
    """The cells of a trial, one per seed."""
    assert study.sample is not None
    setups = scale_of(study, scale).setups
    name = study.sample.dataset or next(iter(setups))
    if name not in setups:
        raise StudyError(f"sample.dataset: scale {scale} has no dataset {name!r}: use {', '.join(setups)}")
    levels = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in params.items()}
    return [
        make_cell(name, setups[name], seed, root.resolve(), levels, params) for seed in setups[name].seeds
    ]


def known_trials(study: Study, scale: str, root: Path, study_dir: Path) -> list[dict[str, Any]]:
    """The parameters of the trials of this search that were started and have a valid recipe; needs Optuna if there are
    any."""
    if not (study_dir / STORE).exists():
        return []
    assert study.sample is not None  # the caller's choice
    optuna = _optuna()
    searched = _open(optuna, study_dir / STORE, _search_name(study, scale, root))
    valid = [t for t in searched.trials if t.state != optuna.trial.TrialState.FAIL]
    return [trial.params for trial in valid if set(trial.params) == set(study.sample.space)]


def _open(optuna: Any, path: Path, name: str) -> optuna.Study:
    """The stored search of this name, created if there is none. StudyError where the file is damaged."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if path.exists():
            untrusted.check_regular(path)
        searched: optuna.Study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True
        )
        _ = searched.trials  # reads all
    except (SQLAlchemyError, ValueError, KeyError, RuntimeError) as error:
        raise StudyError(
            f"{path} cannot be read ({shorten(str(error), 200)}); remove it to start the search again"
        ) from error
    return searched


def _search_name(study: Study, scale: str, root: Path) -> str:
    """Name in the store, by what determines the trials and their values: those of another space, objective or base
    recipe must not count as trials of this search. More ``trials`` continue it."""
    assert study.sample is not None
    cells = [
        (
            cell.name,
            [
                str(e.results.relative_to(cell.directory))
                for e in cell.evaluations
                if e.mode == study.sample.mode
            ],
        )
        for cell in trial_cells(study, scale, root, {})
    ]
    identity = [study.sample.model_dump(mode="json", exclude={"trials"}), cells]
    return f"{scale}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}"


def _next_trial(optuna: Any, searched: optuna.Study, sample: Sample, failed: Set[int]) -> Any:
    """An interrupted trial, else a new one; None if all have ended. ``failed``: numbers of those that failed now."""
    running = [
        t for t in searched.trials if t.state == optuna.trial.TrialState.RUNNING and t.number not in failed
    ]
    complete = [t for t in running if set(t.params) == set(sample.space)]
    for interrupted in running:
        if interrupted not in complete:  # killed while its values were drawn
            searched.tell(interrupted.number, state=optuna.trial.TrialState.FAIL)
    if complete:
        return complete[0]
    ended = sum(len(t.params) == len(sample.space) for t in searched.trials)
    if ended >= sample.trials:
        return None
    seed = sample.seed + ended
    samplers = optuna.samplers
    searched.sampler = (
        samplers.TPESampler(seed=seed) if sample.method == "tpe" else samplers.RandomSampler(seed=seed)
    )
    asked = searched.ask()
    for key, values in sample.space.items():
        if values.choices:
            asked.suggest_categorical(key, list(values.choices))
        elif values.integer:
            asked.suggest_int(key, int(values.low or 0), int(values.high or 0), log=values.log)
        else:
            asked.suggest_float(key, values.low or 0.0, values.high or 0.0, log=values.log)
    return asked


def _score(cell: Cell, mode: str) -> float | None:
    """Larger is better, whatever the metric."""
    found = (r for e in cell.evaluations if e.mode == mode and (r := e.load()) is not None)
    return next((result.kind.sign * result.value for result in found), None)


def _write_trials(searched: optuna.Study, study_dir: Path) -> None:
    rows = [
        {"number": t.number, "params": t.params, "value": t.value, "state": t.state.name}
        for t in searched.trials
    ]
    write_atomically(study_dir / TRIALS, json.dumps(rows, indent=1) + "\n")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise StudyError("sample needs optuna: pip install 'maestro-scale[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
