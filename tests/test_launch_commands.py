"""``maestro-scale train|evaluate|recipes|init``, and recipes by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from testkit.runs import REPO, metrics, write_recipe
from typer.testing import CliRunner

from maestro_scale.cli import app, launch
from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.strict_yaml import shipped


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("vitl").name == "vitl"
    assert load_recipe("eval/treesatai_ts") == load_recipe(REPO / "recipes" / "eval" / "treesatai_ts.yaml")
    (tmp_path / "mine.yaml").write_text("extends: vitt\nname: mine\n")
    assert load_recipe("mine.yaml").model == load_recipe("vitt").model
    (tmp_path / "vitl").mkdir()  # a folder, e.g. a run directory, is not a recipe
    assert load_recipe("vitl").name == "vitl"
    (tmp_path / "vitl").rmdir()
    (tmp_path / "vitl").write_text("extends: vitt\nname: file-of-this-name\n")
    assert load_recipe("vitl").name == "file-of-this-name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vitx", "^vitx: is neither a file nor the name of a recipe .did you mean 'vit[a-z]'..$"),
        ("../recipes/vitl", "is neither a file nor the name of a recipe"),
        ("recipes/vitl.yaml", "No such file or directory; the recipe that comes with .* is called vitl$"),
        ("no.yaml", "no.yaml: cannot read the recipe: No such file or directory$"),
    ],
)
def test_a_wrong_name_is_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(name)
    assert "\n" not in str(caught.value)


def test_missing_data_names_the_folder_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    with pytest.raises(ManifestError, match=f"relative to {tmp_path}; MAESTRO_DATA is not set.$"):
        Manifest.load(load_recipe("vitt").data.mixture[0].shards)
    monkeypatch.setenv("MAESTRO_DATA", str(tmp_path))
    with pytest.raises(ManifestError, match=r"or check the path$"):
        Manifest.load(load_recipe("vitt").data.mixture[0].shards)


def test_every_installation_has_a_place_for_recipes(monkeypatch, tmp_path):
    """pip install --target and --user; a checkout and a virtual environment are tested by use."""
    package = tmp_path / "target" / "maestro_scale"
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    monkeypatch.setattr(shipped.sysconfig, "get_path", lambda name: str(tmp_path / "prefix"))
    monkeypatch.setattr(shipped.site, "USER_BASE", str(tmp_path / "user"))
    for place in ("target", "prefix", "user"):
        assert shipped.find("recipe", "own") is None
        folder = tmp_path / place / "share" / "maestro_scale" / "recipes"
        folder.mkdir(parents=True)
        (folder / "own.yaml").write_text("")
        assert shipped.find("recipe", "own") == folder / "own.yaml"
        (folder / "own.yaml").unlink()


def test_recipes_are_listed_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert any(re.fullmatch("vitl +The paper's large MAESTRO on TreeSatAI-TS.", line) for line in listed)
    assert not any(line.startswith("study/") for line in listed)
    done = CliRunner().invoke(app, ["init", "vitl", "sub/my.yaml"])
    assert done.exit_code == 0, done.output
    assert "maestro-scale train --recipe sub/my.yaml --dry-run" in done.output
    first, *lines = Path("sub/my.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert "extends: " not in "\n".join(lines)
    data = yaml.safe_load("\n".join(lines))
    assert data["model"]["size"] == "large"
    assert data["data"]["mixture"][0]["shards"] == "${MAESTRO_DATA:-data}/treesatai_ts"
    assert load_recipe("sub/my.yaml") == load_recipe("vitl")
    schema = json.loads(Path("sub/recipe.schema.json").read_text())
    assert set(data) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    again = CliRunner().invoke(app, ["init", "vitl", "sub/my.yaml"])
    assert isinstance(again.exception, RecipeError)


def test_visible_devices_are_kept(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,7")
    assert launch._devices(2) == "--include=localhost:5,2"
    assert launch._devices(4) == "--num_gpus=4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-6e0c,GPU-71ab")
    assert launch._devices(2) == "--num_gpus=2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch._devices(2) == "--num_gpus=2"


@pytest.mark.slow
def test_train_and_evaluate_on_two_ranks_from_another_folder(synthetic_shards, tmp_path):
    recipe = write_recipe(tmp_path, synthetic_shards)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)}
    program = [sys.executable, "-m", "maestro_scale.cli"]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*program, *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )

    course = ["--set", "train.steps=2", "checkpoint.every_steps=2"]
    done = run("train", "--nproc", "2", "--recipe", recipe.name, "--run-dir", "run", *course)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert len(list((tmp_path / "run" / "audit").glob("rank*.jsonl"))) == 2
    (evaluate,) = [line for line in done.stdout.splitlines() if " evaluate " in line]
    words = evaluate.split()
    assert words[:4] == ["maestro-scale", "evaluate", "--nproc", "2"]
    scored = run(*words[1:], "--mode=knn")
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert (tmp_path / "RESULTS" / "knn" / "results.json").exists()
    wrong = run("train", "--nproc", "2", "--recipe", recipe.name, "--run_dir", "x")
    assert wrong.returncode == 2
    assert wrong.stderr.count("unrecognized arguments: --run_dir x") == 1
