"""What a contributor runs: the tests that are not slow cover every package, and use the cores there are."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def conftest() -> ModuleType:
    """tests/conftest.py, which cannot be imported by its name."""
    spec = importlib.util.spec_from_file_location("conftest_of_all_tests", ROOT / "tests" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_slow(node: ast.AST) -> bool:
    """Whether a decorator, or the value of ``pytestmark``, says so."""
    return any(isinstance(n, ast.Attribute) and n.attr in ("slow", "root") for n in ast.walk(node))


def has_fast_tests(tree: ast.Module) -> bool:
    """Whether a test of a module runs under ``-m "not slow"``, also as an ordinary user."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "pytestmark"
            and is_slow(node.value)
        ):
            return False
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    return any(not any(map(is_slow, test.decorator_list)) for test in tests)


def imported(tree: ast.Module) -> Iterator[str]:
    """Names of modules, and of what is imported from them, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_has_a_test_that_is_not_slow():
    trees = (ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py"))
    names = {name for tree in trees if has_fast_tests(tree) for name in imported(tree)}
    packages = [
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "maestro_scale").rglob("__init__.py")
    ]
    assert len(packages) > 40
    assert [p for p in packages if not any(name == p or name.startswith(f"{p}.") for name in names)] == []


def test_a_slow_test_is_recognised():
    slow = "@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_a(x): ...\n"
    assert not has_fast_tests(ast.parse(slow))
    assert not has_fast_tests(ast.parse("pytestmark = [pytest.mark.root]\ndef test_a(): ...\n"))
    assert not has_fast_tests(ast.parse("def helper(): ...\n"))
    assert has_fast_tests(ast.parse(f"{slow}@pytest.mark.timeout(9)\ndef test_b(): ...\n"))
    assert set(imported(ast.parse("def f():\n    from a.b import c\nimport d.e\n"))) == {
        "a.b",
        "a.b.c",
        "d.e",
    }


@pytest.mark.parametrize(
    ("words", "cores", "gib", "options", "expected"),
    [
        (["tests"], 8, 64, {}, 8),
        (["tests"], 64, 20, {}, 10),  # as memory allows
        (["tests"], 4, 1, {}, 0),
        (["tests/stream/test_plan.py"], 8, 64, {}, 0),
        (["tests/stream/test_plan.py::test_a", "tests/stream/test_plan.py::test_b"], 8, 64, {}, 0),
        (["tests/stream/test_plan.py", "tests/stream/test_rng.py"], 8, 64, {}, 2),
        (["tests/publishing"], 8, 64, {}, 0),
        (["tests"], 8, 64, {"capture": "no"}, 0),
    ],
)
def test_processes_are_started_where_they_help(monkeypatch, conftest, words, cores, gib, options, expected):
    monkeypatch.setattr(conftest.os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gib * 2**30))
    option = SimpleNamespace(**{"capture": "fd", "collectonly": False, **options})
    config = SimpleNamespace(option=option, args=[str(ROOT / word) for word in words])
    assert conftest.pytest_xdist_auto_num_workers(config) == expected


def test_a_file_runs_in_one_process_and_so_does_slurm(conftest):
    scheduling = object.__new__(conftest.FileScheduling)
    ids = ("stream/test_a.py::test_x[1]", "stream/test_a.py::test_y", "stream/test_b.py::test_x")
    first, second, other = (scheduling._split_scope(f"tests/{nodeid}") for nodeid in ids)
    assert first == second != other
    slurm = {scheduling._split_scope(f"tests/services/slurm/test_{name}.py::test_x") for name in "ab"}
    assert slurm == {"slurm"}
