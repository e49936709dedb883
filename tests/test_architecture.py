"""No module takes part in an import cycle. Layers between and within packages are contracts in pyproject.toml."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set

import grimp

from maestro_scale.recipe import Recipe


def import_graph(package: str) -> dict[str, Set[str]]:
    """{module: modules it imports}, imports within functions and for type checking included."""
    graph = grimp.build_graph(package, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def find_cycles(graph: Mapping[str, Set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972), each sorted."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    cycles = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for imported in graph[module]:
            if imported not in order:
                visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], order[imported])
        if lowest[module] == order[module]:
            at = stack.index(module)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                cycles.append(sorted(component))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return cycles


def test_no_modules_import_each_other():
    assert find_cycles(import_graph("maestro_scale")) == []


def test_a_cycle_through_a_function_level_import_is_found(tmp_path, monkeypatch):
    package = tmp_path / "cyclic_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "leaf.py").write_text("")
    (package / "first.py").write_text("from cyclic_package import leaf, second\n")
    (package / "second.py").write_text(
        "def load():\n    from cyclic_package.third import value\n    return value\n"
    )
    (package / "third.py").write_text("import cyclic_package.first\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = find_cycles(import_graph("cyclic_package"))
    finally:
        sys.modules.pop("cyclic_package", None)
    assert found == [["cyclic_package.first", "cyclic_package.second", "cyclic_package.third"]]


def test_batch_sizes_are_global_or_micro():
    """Invariant 9 of docs/architecture.md, for the keys of recipes: a batch is global or of one forward pass."""
    sections = {
        name: f.annotation for name, f in Recipe.model_fields.items() if hasattr(f.annotation, "model_fields")
    }
    keys = [key for section in sections.values() for key in section.model_fields if "batch" in key]
    assert sorted(keys) == ["global_batch", "micro_batch"]
