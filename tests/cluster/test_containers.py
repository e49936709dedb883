"""Dockerfiles and compose.yaml: linted, consistent, not root; built and run if there is a Docker engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from maestro_scale.strict_yaml import shipped
from tests.test_docs_commands import wrong_options

REPO = Path(__file__).parents[2]
DOCKER = REPO / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint(file):
    done = subprocess.run(["hadolint", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda p: p.name)
def test_sources_exist_and_the_user_is_not_root(file):
    lines = file.read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (REPO / source).exists(), line
    (user,) = (line.split()[1] for line in lines if line.startswith("USER"))
    assert int(user) > 0
    ignored = (REPO / ".dockerignore").read_text().split()
    assert not {"maestro_scale", "recipes", "slurm", "pyproject.toml", "PACKAGE.md"} & set(ignored)


OF_CI = pytest.mark.skipif(
    "MAESTRO_DEPENDENCIES" in os.environ, reason="benchmarks.dependencies installed other versions than CI"
)


@OF_CI
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_has_the_versions_that_ci_tests(name):
    text = (DOCKER / name).read_text()
    for package in ("torch", "deepspeed", "mlflow"):
        (pinned,) = re.findall(rf"^ARG {package.upper()}=(.+)$", text, re.MULTILINE)
        assert f'"{package}==${{{package.upper()}}}"' in text
        assert pinned == metadata.version(package).split("+")[0], package


@OF_CI
def test_the_server_of_mlflow_has_the_version_of_its_clients():
    text = (DOCKER / "Dockerfile.mlflow").read_text()
    assert re.findall(r'"mlflow==([\d.]+)"', text) == [metadata.version("mlflow")]


def _installed_packages(text: str) -> set[str]:
    """Debian packages that a Dockerfile installs."""
    (command,) = re.findall(r"apt-get install ((?:.*\\\n)*)", text)
    return {word for word in command.replace("\\", " ").split() if not word.startswith(("-", "&"))}


def test_the_gpu_image():
    text = (DOCKER / "Dockerfile").read_text()
    packages = _installed_packages(text)
    # NCCL opens these at run time; without them it uses TCP.
    assert {"libibverbs1", "librdmacm1", "ibverbs-providers", "rdma-core"} <= packages
    # torch.compile and Triton compile host code.
    assert {"g++", "python3-dev"} <= packages
    # Nothing is compiled for the GPU in the image: no compiler of CUDA, no op of DeepSpeed.
    assert re.search(r"^FROM nvidia/cuda:\$\{CUDA\}-base-", text, re.MULTILINE)
    assert re.findall(r"DS_BUILD_\w+=\d", text) == ["DS_BUILD_OPS=0"]
    (cuda,) = re.findall(r"^ARG CUDA=(\d+\.\d+)", text, re.MULTILINE)
    (index,) = re.findall(r"/whl/cu(\d+)$", text, re.MULTILINE)
    assert index == cuda.replace(".", "")
    (extras,) = re.findall(r"pip install -e '\.\[([\w,]+)\]'", text)
    assert "gpu" in extras.split(",")  # NVML


def docker_runs(text: str) -> list[str]:
    """The `docker run` commands of a page, each in one line."""
    found = re.findall(r"^    (docker run (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [re.sub(r"\s*\\\n\s*", " ", command) for command in found]


def test_the_documented_container_commands_exist():
    text = (REPO / "docs" / "clusters.md").read_text()
    commands = [re.search(r" maestro-scale(?::cpu)? (\S.*)$", line)[1].split() for line in docker_runs(text)]
    assert [words[0] for words in commands] == ["quickstart", "shard", "dashboard", "train", "evaluate"]
    assert [wrong_options("maestro-scale", words) for words in commands] == [[]] * len(commands)
    recipes = [words[words.index("--recipe") + 1] for words in commands if "--recipe" in words]
    assert [shipped.find("recipe", name) is None for name in recipes] == [False, False]


def test_the_documented_container_commands_give_nccl_what_it_needs():
    text = (REPO / "docs" / "clusters.md").read_text()
    (docker,) = (line for line in docker_runs(text) if "maestro-scale train " in line)
    for option in (
        "--gpus all",
        "--shm-size",
        "--ulimit memlock=-1",
        "--network host",
        "--device /dev/infiniband",
    ):
        assert option in docker
    (apptainer,) = re.findall(r"^    apptainer exec (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert "--nv" in apptainer


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_installs_what_the_project_declares(name):
    """The extras exist, and pyproject.toml allows the pinned torch."""
    text = (DOCKER / name).read_text()
    project = (REPO / "pyproject.toml").read_text()
    (extras,) = re.findall(r"pip install -e '\.\[([\w,]+)\]'", text)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    (torch,) = re.findall(r"ARG TORCH=2\.(\d+)\.", text)
    low, high = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', project).groups()
    assert int(low) <= int(torch) < int(high)


def test_compose_is_consistent():
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    for name, service in services.items():
        assert ("image" in service) != ("build" in service), name
        if "image" in service:
            assert re.search(r":[\w.-]*\d", service["image"]), f"{name}: pin {service['image']}"
        else:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        for other, needs in service.get("depends_on", {}).items():
            assert other in services, name
            if needs["condition"] == "service_healthy":
                assert "healthcheck" in services[other], other
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in volumes, name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is not bound to localhost"


def test_the_trainer_of_compose_runs_the_quickstart():
    from typer.testing import CliRunner

    from maestro_scale.cli import app

    command, *options = COMPOSE["services"]["trainer"]["command"]
    assert command == "quickstart"
    help_text = CliRunner().invoke(app, ["quickstart", "--help"]).output
    for option in options[::2]:
        assert option in help_text


@pytest.mark.slow
def test_compose_runs():
    if shutil.which("docker") is None or os.environ.get("MAESTRO_TEST_DOCKER") != "1":
        pytest.skip("needs a Docker engine and network: MAESTRO_TEST_DOCKER=1")
    command = ["docker", "compose", "-f", str(DOCKER / "compose.yaml")]
    try:
        up = [*command, "up", "--build", "--exit-code-from", "trainer"]
        subprocess.run(up, check=True, timeout=3600)
    finally:
        subprocess.run([*command, "down", "--volumes"], check=False, timeout=300)
