"""The files of a run directory contain no secrets, in any notation of YAML."""

from __future__ import annotations

import json

import pytest

from maestro_scale.recipe import load_recipe
from maestro_scale.training.run_dir import has_same_recipe, write_run_files
from tests.testkit.runs import REPO

LONG = "correct horse battery staple planted " * 4


@pytest.mark.parametrize(
    "secret", [LONG.strip(), "pa\"planted'7: x", "planted\\n # one", "a planted\nsecret"]
)
def test_secrets_that_yaml_quotes_or_folds_are_hidden(tmp_path, monkeypatch, secret):
    monkeypatch.setenv("SOME_API_KEY", secret)
    monkeypatch.setattr("sys.argv", ["train.py", "--set", f"name={secret}"])
    recipe = load_recipe(REPO / "recipes" / "vitt.yaml", ["deepspeed.comet.mode=a ${SOME_API_KEY}"])
    assert recipe.deepspeed["comet"]["mode"] == f"a {secret}"
    assert not has_same_recipe(tmp_path, recipe)
    write_run_files(tmp_path, recipe, note=secret)
    text = (tmp_path / "recipe.yaml").read_text() + (tmp_path / "environment.json").read_text()
    assert "planted" not in text
    assert json.loads((tmp_path / "environment.json").read_text())["note"] == "(hidden)"
    assert has_same_recipe(tmp_path, recipe)
    assert load_recipe(tmp_path / "recipe.yaml").deepspeed["comet"]["mode"] == "a (hidden)"
