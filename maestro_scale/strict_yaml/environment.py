"""``${VAR}`` and ``${VAR:-default}`` in the values of a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from maestro_scale.errors import KeyPath

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^{}]*))?\}|(?P<broken>\$\{)")


class Unresolved(Exception):
    """A reference that cannot be replaced; the message says which variable and why."""


def substitute(text: str, env: Mapping[str, str]) -> str:
    """Replace every reference in ``text``; ``$${`` stands for a literal ``${``.

    As in a shell, ``:-`` covers a variable that is unset or empty. Without a default both raise
    ``Unresolved``: an empty variable would turn ``${MAESTRO_DATA}/x`` into a path at the root of the disk.
    """

    def value_of(match: re.Match[str]) -> str:
        if match.group() == "$${":
            return "${"
        if match["broken"]:
            raise Unresolved(
                f"{text!r} is not a reference: write ${{VAR}}, ${{VAR:-default}}, or $${{ for a literal"
            )
        name = match["name"]
        if env.get(name):
            return env[name]
        if match["default"] is None:
            raise Unresolved(
                f"environment variable {name} is not set: export {name}=…, or write ${{{name}:-default}}"
            )
        return match["default"]

    return _REFERENCE.sub(value_of, text)


def escape(node: Any) -> Any:
    """The inverse for text that holds ``${`` by itself, so that a written recipe reads back unchanged."""
    return mapped(node, lambda _, text: text.replace("${", "$${"))


def mapped(node: Any, change: Callable[[KeyPath, str], Any], loc: KeyPath = ()) -> Any:
    """A copy of a tree of dicts and lists with ``change(loc, text)`` in the place of every string value."""
    if isinstance(node, dict):
        return {key: mapped(value, change, (*loc, str(key))) for key, value in node.items()}
    if isinstance(node, list):
        return [mapped(value, change, (*loc, i)) for i, value in enumerate(node)]
    return change(loc, node) if isinstance(node, str) else node


def is_whole_reference(text: str) -> bool:
    """Whether ``text`` is one reference and nothing else, so that its value may be a number or a list."""
    match = _REFERENCE.fullmatch(text)
    return bool(match and match["name"])
