"""The field types of recipes, beside those of all YAML documents."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, WrapValidator

from maestro_scale.shards.storage import credentials_in
from maestro_scale.strict_yaml.fields import Count, Probability, Section, distinct, each_once, listed, some

__all__ = [
    "AutoOrCount",
    "ClassWeights",
    "Count",
    "Place",
    "Probability",
    "Section",
    "distinct",
    "each_once",
    "listed",
    "nearest_divisors",
    "some",
]


def _without_credentials(url: str) -> str:
    if problem := credentials_in(url):
        raise ValueError(problem)
    return url


# A path or URL; ~ is expanded. Credentials in it are refused: recipes are copied into run directories and MLflow.
Place = Annotated[
    str, Field(min_length=1), AfterValidator(os.path.expanduser), AfterValidator(_without_credentials)
]


def _auto_or_count(value: Any) -> int | str:
    if value != "auto" and (type(value) is not int or value < 1):  # bool is a subclass of int
        raise ValueError(f"must be auto or a whole number of at least 1, got {value!r}")
    return value


# A union would report one error per member.
AutoOrCount = Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)]


def _class_weights(value: Any) -> str | dict[str, float]:
    if value in ("none", "balanced"):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be none, balanced or a mapping of classes to weights, got {value!r}")
    for name, weight in value.items():
        if type(weight) not in (int, float) or not 0 < weight <= 1e6:
            raise ValueError(f"the weight of {name} must be a number above 0 and at most 1e6, got {weight!r}")
    return {str(name): float(weight) for name, weight in value.items()}


ClassWeights = Annotated[
    Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0, le=1e6)]],
    WrapValidator(lambda value, handler: handler(_class_weights(value))),
]


def nearest_divisors(wanted: int, number: int) -> str:
    """The divisors of ``number`` at or below and above ``wanted``, for messages: ``8 or 12``."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in (*below, *above))
