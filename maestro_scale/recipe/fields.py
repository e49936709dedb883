"""Base class of all recipe sections, and the field types they share."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from maestro_scale.shards.storage import credentials_in

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


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


def listed(value: Any) -> Any:
    """A single name, where a list of names is expected, as a list of one."""
    if isinstance(value, list):  # pydantic's strict mode accepts lists for tuples only when parsing JSON
        return tuple(value)
    return (value,) if isinstance(value, str) else value


def some(values: tuple) -> tuple:
    """ValueError unless there is at least one value."""
    if not values:
        raise ValueError("must name at least one")
    return values


def distinct(values: tuple) -> tuple:
    """ValueError unless there is at least one value and none is given twice."""
    some(values)
    twice = [str(v) for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    return values


class Section(BaseModel):
    """Frozen; an unknown key is an error; text is never converted to a number or the reverse."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def nearest_divisors(wanted: int, number: int) -> str:
    """The divisors of ``number`` at or below and above ``wanted``, for messages: ``8 or 12``."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in (*below, *above))
