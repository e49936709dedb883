"""Adds a statement to a function of the package, as if it were in its file."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def statement(function: Callable[..., Any], text: str) -> Iterator[str]:
    """Run ``text`` at the start of ``function`` within the block, wherever it was imported to.

    Yields "package/file.py:line", the place that it has then.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    at = next(s for s in definition.body if not isinstance(s, ast.Expr))  # after the docstring
    (added,) = ast.parse(text).body
    for node in ast.walk(added):
        if hasattr(node, "lineno"):
            node.lineno = node.end_lineno = at.lineno
    definition.body.insert(definition.body.index(at), added)
    path = inspect.getsourcefile(function)
    assert path is not None
    made: dict[str, Any] = {}
    exec(compile(tree, path, "exec"), function.__globals__, made)
    before = function.__code__
    function.__code__ = made[definition.name].__code__
    try:
        inside = path.rpartition("/maestro_scale/")[2]
        yield f"maestro_scale/{inside}:{at.lineno}"
    finally:
        function.__code__ = before
