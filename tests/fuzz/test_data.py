"""Fuzzing of what shards, recipes and results are read from. The other targets are in test_runs.py, which CI runs at
the same time."""

from __future__ import annotations

import pytest

from tests.fuzz.kit import check


@pytest.mark.parametrize("target", ["manifest", "index", "sample", "tar", "recipe", "description"])
def test_only_expected_errors(target, tmp_path):
    check(target, tmp_path)
