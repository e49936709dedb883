"""Mistakes in a study that can be found before its cells are run, and would otherwise be found hours later."""

from __future__ import annotations

from collections.abc import Sequence

from maestro_scale.datasets.spec import Target
from maestro_scale.errors import MaestroError
from maestro_scale.recipe import RecipeError
from maestro_scale.study.cells import Cell, Evaluation
from maestro_scale.study.config import Question, Study
from maestro_scale.study.cost import specs_of


def check_study(study: Study, cells: Sequence[Cell]) -> None:
    """RecipeError where a dataset does not have the target of an evaluation, or where the border of a question (its
    ``margin`` or ``at_least``) is a number that no difference of the metric reaches. Data that cannot be read yet are
    not checked."""
    checked: set[tuple[str, str]] = set()
    for cell in cells:
        for evaluation in cell.evaluations:
            place = (cell.dataset, evaluation.benchmark)
            if place in checked:
                continue
            checked.add(place)
            target = _target(evaluation)
            if target is None or target.kind == "regression":
                continue
            first = next(e.benchmark for e in cell.evaluations)
            for question in study.questions:
                if (question.benchmark or first) == evaluation.benchmark and (
                    not question.datasets or cell.dataset in question.datasets
                ):
                    _check_border(question, target)


def _target(evaluation: Evaluation) -> Target | None:
    """What an evaluation predicts; None where the dataset cannot be read."""
    try:
        spec = specs_of(evaluation.recipe, evaluation.data)[0][0]
    except MaestroError:
        return None
    if evaluation.target is None:
        return spec.targets[0]
    try:
        return spec.target(evaluation.target)
    except KeyError as error:
        raise RecipeError(f"evaluation {evaluation.benchmark}: target: {error.args[0]}") from error


def _check_border(question: Question, target: Target) -> None:
    for name, border in (("margin", question.margin), ("at_least", question.at_least)):
        if border is not None and abs(border) >= 1:
            raise RecipeError(
                f"question {question.name}: {name} is {border:g}, and scores of {target.name} are fractions of 1: "
                f"{border:g} percentage points are {border / 100:g}"
            )
