"""Backward compatibility: shards, a run, a finetuning, a model and results of commit 2a808f9 can still be used.

``fixtures/`` holds the files; ``expected.json`` in it the numbers which that commit computed from them; ``make.py`` is
the script that wrote both. Only command lines and the top-level API are used: the code behind them may change, the file
formats may not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import maestro_scale
from maestro_scale import load_model
from maestro_scale.shards import as_webdataset

FIXTURES = Path(__file__).parent / "fixtures"
REPO = Path(maestro_scale.__file__).parents[1]
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
TIMEOUT_S = 240


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the fixtures; every path in their recipes is relative to it."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "fixtures"))


def run(folder: Path, *command: str) -> str:
    """Output of a command, which must succeed."""
    more = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env = {**os.environ, **more, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        command,
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def cli(folder: Path, *args: str) -> str:
    """``maestro-scale ARGS``."""
    return run(folder, str(Path(sys.executable).parent / "maestro-scale"), *args)


def script(folder: Path, name: str, *args: str) -> str:
    """``python maestro_scale/NAME ARGS``."""
    return run(folder, sys.executable, str(REPO / "maestro_scale" / name), *args)


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_machine() -> bool:
    """Whether the expected numbers come from the same kernels, so that they differ by the order of operations only."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    found = {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu": cpu}
    return found == EXPECTED["machine"]


def agree(found: Any, expected: Any) -> None:
    """Assert equality up to rounding: 2a808f9 computed the same sums in another order."""
    rel = 1e-5 if same_machine() else 1e-4
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        pairs = [(found[k], expected[k]) for k in expected]
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        pairs = list(zip(found, expected, strict=True))
    else:
        wanted = pytest.approx(expected, rel=rel, abs=1e-6) if isinstance(expected, float) else expected
        assert found == wanted
        return
    for mine, theirs in pairs:
        agree(mine, theirs)


def test_the_fixtures_stay_small():
    files = (path for path in FIXTURES.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert sum(path.stat().st_size for path in files) < 300_000


def test_shards_are_verified_and_inspected(folder):
    counts = "shards: 3 shards, 8 samples"
    assert EXPECTED["files"].startswith(counts)
    assert counts in cli(folder, "verify", "shards")
    shown = cli(folder, "inspect", "shards", "--png", "tile.png")
    assert "TreeSatAI-TS" in shown
    assert (folder / "tile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_modified_shard_is_detected(folder):
    path = folder / "shards" / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="SHA-256"):
        cli(folder, "verify", "shards")


@pytest.mark.slow
def test_a_stopped_pretraining_resumes(folder):
    # Two ranks wrote it; one rank resumes, with the recipe in the run directory.
    before = lines(folder / "run" / "metrics.jsonl")
    steps = EXPECTED["run"]
    assert 0 < len(before) < len(steps) == 12
    printed = script(folder, "train.py", "--recipe=run/recipe.yaml", "--run-dir=run")
    assert "done: 12 steps, 48 samples" in printed
    after = lines(folder / "run" / "metrics.jsonl")
    assert after[: len(before)] == before
    agree([{k: line[k] for k in wanted} for line, wanted in zip(after, steps, strict=True)], steps)
    assert json.loads((folder / "run" / "outcome.json").read_text())["reason"] == "done"


@pytest.mark.slow
def test_a_run_is_exported_with_the_same_weights(folder):
    cli(folder, "export", "run", "again")
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("again", "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert json.loads((folder / "again" / "config.json").read_text()) == json.loads(
        (folder / "model" / "config.json").read_text()
    )


@pytest.mark.slow
def test_a_stopped_finetuning_resumes(folder):
    tuned = folder / "evaluation" / "finetune"
    before = lines(tuned / "metrics.jsonl")
    expected = EXPECTED["finetune"]
    assert 0 < len(before) < len(expected["steps"]) == 12
    asked = ["--checkpoint=model", "--out=evaluation", "--mode=finetune"]
    script(folder, "evaluate.py", "--recipe=evaluation/finetune/recipe.yaml", *asked)
    after = lines(tuned / "metrics.jsonl")
    assert after[: len(before)] == before
    agree([{k: line[k] for k in ("step", "loss", "lr", "grad_norm")} for line in after], expected["steps"])
    result = json.loads((tuned / "results.json").read_text())
    assert len(lines(tuned / "validation.jsonl")) == 2
    if same_machine():  # with two tiles, a rounding error can change the score a lot
        assert lines(tuned / "validation.jsonl") == expected["validation"]
        assert result["value"] == expected["value"]


def synthetic_batch(model: Any) -> SimpleNamespace:
    """Two samples for ``embed``: pixels (B, D, C, H, W), dates (B, D, 3). The same as in make.py."""
    pixels, dates = {}, {}
    for number, sensor in enumerate(model.config.sensors):
        shape = (2, sensor.num_dates, len(sensor.bands), sensor.image_size, sensor.image_size)
        wave = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.7 + number).sin()
        size = sensor.scale.divisor if sensor.scale.kind == "linear" else 0.1
        pixels[sensor.name] = (wave.reshape(shape) * 0.3 + 0.5).mul(size).float()
        day = (torch.arange(2 * sensor.num_dates).reshape(2, -1) * 37 + 20) % 365 + 1
        when = [torch.full_like(day, 2019), day, torch.full_like(day, 10)]
        dates[sensor.name] = torch.stack(when, dim=-1).to(torch.int16)
    ref_date = torch.tensor([[2019, 180, 0]] * 2, dtype=torch.int16)
    return SimpleNamespace(dataset=model.config.dataset, pixels=pixels, dates=dates, ref_date=ref_date)


def test_an_exported_model_loads_and_embeds():
    model = load_model(FIXTURES / "model")
    weights = model.state_dict()
    found = {"number": len(weights), "elements": sum(w.numel() for w in weights.values())}
    assert found == EXPECTED["weights"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            vectors = model.embed(synthetic_batch(model)).vector
    finally:
        torch.set_num_threads(threads)
    assert vectors.shape == (2, 2 * 16)  # two sensors, 16 wide
    torch.testing.assert_close(vectors, torch.tensor(EXPECTED["vectors"]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_model_embeds_a_split(folder):
    cli(folder, "embed", "model", "shards", "embedded", "--split", "test", "--cache-dir", "cache")
    files = sorted((folder / "embedded").rglob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    dates = {
        tile["__key__"]: (tile["s2.dates"], tile["s1_asc.dates"])
        for tile in as_webdataset(str(FIXTURES / "shards"), "test")
    }
    for row in rows:  # columns that earlier revisions did not write
        days = [
            date(int(year), 1, 1) + timedelta(int(day) - 1)
            for year, day, _ in np.concatenate(dates[row["key"]])
        ]
        assert (row.pop("first_date"), row.pop("last_date")) == (min(days), max(days))
        assert row.pop("geometry", None) is None  # the shards have no origins
    agree(rows, EXPECTED["embedded"])


@pytest.mark.slow
def test_a_probe_of_a_model_has_the_same_score(folder):
    asked = ["--recipe=evaluate.yaml", "--checkpoint=model", "--out=again", "--mode=probe"]
    script(folder, "evaluate.py", *asked)
    new = json.loads((folder / "again" / "probe" / "results.json").read_text())
    old = json.loads((folder / "evaluation" / "probe" / "results.json").read_text())
    for result in (new, old):
        result.pop("timings")
        result.pop("recipe")
    # Not in earlier revisions: the digests of the data and of the weights.
    manifest = (folder / "shards" / "manifest.json").read_bytes()
    assert list(new.pop("datasets").values()) == [hashlib.sha256(manifest).hexdigest()]
    assert re.fullmatch("[0-9a-f]{64}", new.pop("weights"))
    assert (new.pop("units"), new.pop("synthetic")) == ("", None)  # the manifest does not say
    for name in ("counts_sha256", "adaptation", "architecture", "by_sensors"):
        new.pop(name)
    agree(new, old)


@pytest.mark.slow
def test_results_are_reported(folder):
    shutil.rmtree(folder / "evaluation" / "finetune")
    printed = cli(folder, "report", "evaluation", "--out", "report.html")
    assert printed.startswith("1 results in report.html and report.md")
    rows = [row for row in (folder / "report.md").read_text().splitlines() if "probe" in row]
    # Earlier revisions had no column for the data, and their results do not record it.
    rows_then = [row.replace("| test | 4 |", "| test | – | 4 |") for row in EXPECTED["probe"]["rows"]]
    # They compared frozen encoders with the published finetuned ones.
    assert rows == [row.replace(" [-53.8]", "") for row in rows_then]
    assert f"{100 * EXPECTED['probe']['value']:.1f}" in rows[0]
