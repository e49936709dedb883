"""The wheel in a fresh environment: metadata, files, recipes by name, a user's first commands in an empty folder.

The environments see the dependencies of the running one, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from dataclasses import dataclass, field
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from testkit.runs import REPO, metrics

import maestro_scale
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.quickstart import ENCODERS
from maestro_scale.training.distributed import free_port
from tests.test_docs_commands import blocks, own_commands, wrong_options

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "PACKAGE.md", "LICENSE", "maestro_scale", "recipes", "descriptions")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
NO_DOWNLOAD = ("--no-index", "--no-deps")


def call(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, as `pip wheel .` builds it in a checkout."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, checkout / name)
    call([*PIP, "wheel", "--no-build-isolation", *NO_DOWNLOAD, f"--wheel-dir={out}", str(checkout)])
    (built,) = out.iterdir()
    return built


@dataclass
class Installation:
    """``python`` of an environment in which the wheel is installed; ``variables``: what it needs to be found."""

    python: Path
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Variables of this process without those that name a checkout, data or a store."""
        dropped = ("PYTHON", "MAESTRO_", "MLFLOW_TRACKING_URI", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **self.variables}

    def run(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ``maestro-scale``, which must succeed."""
        command = [str(self.python), "-m", "maestro_scale.cli", *words]
        return call(command, cwd=folder, env=self.environment())


def fresh_environment(folder: Path) -> Path:
    """The interpreter of a new environment that sees the packages of the running one, but not this checkout."""
    venv.create(folder, symlinks=True, system_site_packages=True)  # without, pip refuses --user
    (site,) = folder.glob("lib/python3.*/site-packages")
    # Python reads no .pth file in a folder that a .pth file names: an editable installation there is not seen.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module", params=["environment"])
def installation(request, wheel, tmp_path_factory) -> Installation:
    """The wheel in a fresh environment, or in a folder of ``--target`` or ``--user`` beside one."""
    python = fresh_environment(tmp_path_factory.mktemp("fresh") / "env")
    place = tmp_path_factory.mktemp("place")
    options, variables = {
        "environment": ((), {}),
        "target": ((f"--target={place}",), {"PYTHONPATH": str(place)}),
        "user": (("--user",), {"PYTHONUSERBASE": str(place)}),
    }[request.param]
    install = [
        *PIP,
        f"--python={python}",
        "install",
        *NO_DOWNLOAD,
        *options,
        "--ignore-installed",
        str(wheel),
    ]
    found = Installation(python, variables)
    call(install, env={**found.environment(), "PIP_NO_WARN_SCRIPT_LOCATION": "1"})
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_metadata_is_complete(wheel):
    call([sys.executable, "-m", "twine", "check", "--strict", str(wheel)])
    found = metadata(wheel)
    assert found["Version"] == maestro_scale.__version__
    assert found["License"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == "<3.14,>=3.10"
    classifiers = found.get_all("Classifier")
    assert [c.rpartition(" ")[2] for c in classifiers if ":: 3." in c] == ["3.10", "3.11", "3.12"]
    assert "License :: OSI Approved :: Apache Software License" in classifiers
    assert len(found.get_all("Project-URL")) >= 3
    text = found.get_payload()
    commands = [command for block in blocks(text) for command in own_commands(block)]
    assert {words[0] for _, words in commands} >= {"quickstart", "shard", "train", "evaluate", "report"}
    assert [wrong_options(program, words) for program, words in commands] == [[]] * len(commands)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) >= 3
    assert [target for target in targets if not target.startswith("https://")] == []


def test_every_document_and_template_is_in_the_wheel(wheel):
    expected = {
        f"share/maestro_scale/{path.relative_to(REPO).as_posix()}"
        for folder, pattern in (("recipes", "*.yaml"), ("descriptions", "*.*"))
        for path in (REPO / folder).rglob(pattern)
    }
    expected |= {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "maestro_scale").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".data/data/")[2] or name for name in archive.namelist()}
    assert len(expected) > 500
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)


@pytest.mark.parametrize("installation", ["target", "user"], indirect=True)
def test_recipes_are_found_by_name_in_other_installations(installation, tmp_path):
    listed = installation.run(tmp_path, "recipes").stdout.splitlines()
    assert any(line.split() and line.split()[0] == "vitt" for line in listed)
    installation.run(tmp_path, "init", "vitt", "my.yaml")
    assert "name: vitt" in (tmp_path / "my.yaml").read_text()


def test_the_first_commands_of_a_user_in_an_empty_folder(installation, tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    command = check_quickstart(installation, folder)
    check_training(installation, folder)
    check_dashboard(installation, folder, command)


def check_quickstart(installation: Installation, folder: Path) -> list[str]:
    """Every stage runs, and a second call repeats none; returns the command that it prints next."""
    small = ("quickstart", "--tiles=60", "--steps=8")
    first = installation.run(folder, *small).stdout
    for words in (
        *("4/4", "pretrained", "scratch, equal cost", "statistics", "untrained", "oracle"),
        *("masked loss", "reconstruction:"),
    ):
        assert words in first
    out = folder / "quickstart"
    result = EvalResult.load(out / "results" / "pretrained" / "probe" / "results.json")
    assert (result.checkpoint_step, result.num_tiles, result.metric) == (8, 12, "wf1")
    for encoder, mode in (("untrained", "knn"), ("statistics", "probe"), ("oracle", "oracle")):
        found = EvalResult.load(out / "results" / encoder / mode / "results.json")
        assert (found.checkpoint_step, found.num_tiles, found.metric) == (0, 12, "wf1")
    scratch = EvalResult.load(out / "runs" / "scratch" / "results.json")
    assert (scratch.mode, scratch.num_tiles, scratch.checkpoint_step) == ("scratch", 12, 0)
    # 8 * 451 / 1000 steps have the same cost, and each is validated, which adds a line.
    for run, expected in (("quickstart", [1, 8]), ("scratch", [1, 2, 3, 4])):
        assert [line["step"] for line in metrics(out / "runs" / run)] == expected
    runs = {"pretrained": "quickstart", "scratch": "quickstart scratch"}
    with sqlite3.connect(out / "runs" / "mlflow.db") as store:
        recorded = store.execute(
            "select r.name, m.key from latest_metrics m join runs r using (run_uuid) where m.key like 'eval/treesatai%'"
        ).fetchall()
    assert sorted(recorded) == sorted(
        (runs.get(encoder, encoder), f"eval/treesatai_ts/{mode}/wf1")
        for encoder, modes in ENCODERS.items()
        for mode in modes
    )

    started = time.monotonic()
    assert "already done" in installation.run(folder, *small).stdout
    assert time.monotonic() - started < 60, "a stage ran again"
    command = [str(installation.python), "-m", "maestro_scale.cli", *small, "--seed=1"]
    other = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=folder, env=installation.environment()
    )
    assert other.returncode == 2
    assert "seed" in other.stderr
    assert "Traceback" not in other.stderr
    (line,) = (line for line in first.splitlines() if line.startswith("dashboard: "))
    return shlex.split(line.removeprefix("dashboard: "))


def check_training(installation: Installation, folder: Path) -> None:
    """Training and evaluation by names of recipes, on the shards that the quickstart wrote."""
    (folder / "data").mkdir()
    (folder / "data" / "treesatai_ts").symlink_to(folder / "quickstart" / "shards")
    course = [
        "train.steps=2",
        "train.global_batch=2",
        "train.micro_batch=2",
        "data.lanes=2",
        "data.workers=0",
    ]
    course += ["model.depth=4", "tracking.enabled=false"]
    cache = f"data.cache_dir={json.dumps(str(folder / 'cache'))}"
    installation.run(folder, "train", "--recipe", "vitt", "--run-dir", "run", "--set", *course, cache)
    assert [line["step"] for line in metrics(folder / "run")] == [1, 2]
    words = ["--recipe", "eval/treesatai_ts", "--checkpoint", "run", "--mode", "knn", "--out", "results"]
    installation.run(folder, "evaluate", *words, "--set", "tracking.enabled=false", cache)
    score = EvalResult.load(folder / "results" / "knn" / "results.json")
    assert (score.checkpoint_step, score.num_tiles) == (2, 12)
    installation.run(folder, "report", "results", "--out", "report.html")
    assert f"{100 * score.value:.1f}" in (folder / "report.html").read_text()


def check_dashboard(installation: Installation, folder: Path, command: list[str]) -> None:
    """The printed command starts, answers and ends."""
    assert command[:2] == ["maestro-scale", "dashboard"]
    script, port = installation.python.parent / command[0], free_port()
    with (folder / "dashboard.log").open("wb") as log:
        process = subprocess.Popen(
            [str(script), *command[1:], f"--port={port}"],
            cwd=folder,
            env=installation.environment(),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 120
        while f"http://127.0.0.1:{port} shows" not in (folder / "dashboard.log").read_text():
            assert process.poll() is None, (folder / "dashboard.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as page:
            assert b"MLflow" in page.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
