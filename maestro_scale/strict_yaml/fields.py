"""Base class of all sections of YAML documents, and the field types they share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


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
    return each_once(some(values))


def each_once(values: tuple) -> tuple:
    """ValueError if a value is given twice."""
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
