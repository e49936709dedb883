"""The setup of a run for reports: device, GPU model and count, ranks, nodes, launcher, precision, versions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.training import nvml
from maestro_scale.training.distributed import World

_KERNELS = ("attention", "compile", "micro_batch")
"""Keys of ``environment.json``, beside ``setup``, that decide how fast a step is."""
_LAST_TIME = 2.0**40  # seconds; MLflow stores milliseconds as 64-bit integers
_VERSIONS = {"torch": "torch", "cuda": "CUDA", "nccl": "NCCL", "driver": "driver", "deepspeed": "DeepSpeed"}
"""Names of the versions in ``setup_line``, in its order."""


def describe_setup(world: World, precision: str) -> dict[str, Any]:
    """The setup as ``environment.json`` records it under ``setup``; values that do not apply are None."""
    device = world.device
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_cuda else None,
        "gpus": 0 if device.type == "cpu" else world.size,  # one per rank
        "ranks": world.size,
        "nodes": world.num_nodes,
        "launcher": world.launcher,
        "precision": precision,
        "versions": {
            "torch": torch.__version__,
            "cuda": (torch.version.cuda or torch.version.hip) if on_cuda else None,
            "nccl": _nccl_version() if on_cuda else None,
            "driver": nvml.driver_version() if on_cuda else None,
            "deepspeed": metadata.version("deepspeed"),
        },
    }


def _nccl_version() -> str:
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def read_environment(run_dir: Path) -> dict[str, Any]:
    """The ``environment.json`` of a run; empty where there is none."""
    path = run_dir / "environment.json"
    record = untrusted.read_record(path) if path.exists() else {}
    if "setup" in record:
        try:
            _check_setup(record["setup"])
        except untrusted.InputError as error:
            raise untrusted.InputError(f"{path}: setup: {error}; remove it from the file") from None
    return record


def _check_setup(setup: Any) -> None:
    """InputError unless ``setup`` has what the functions below show."""
    for name in ("gpus", "ranks", "nodes"):
        untrusted.field_of(setup, int, name)
    for name in ("device", "launcher", "precision"):
        untrusted.field_of(setup, str, name)
    untrusted.field_of(setup, dict, "versions")
    if not isinstance(setup.get("gpu"), str | None):
        raise untrusted.InputError(f"gpu is {shorten(setup['gpu'])}, expected a text")


def first_start(run_dir: Path) -> float | None:
    """Unix time at which a run was first started; None where ``environment.json`` does not say."""
    try:
        started = untrusted.read_record(run_dir / "environment.json").get("started")
    except (OSError, untrusted.InputError):
        return None
    return started if isinstance(started, float) and 0 < started < _LAST_TIME else None


def setup_line(environment: Mapping[str, Any]) -> str:
    """The setup in an ``environment.json`` as one line; empty for a run of an earlier revision."""
    setup = environment.get("setup")
    if not setup:
        return ""
    devices = f"{setup['gpus']} x {setup.get('gpu') or setup['device']}" if setup["gpus"] else "CPU"
    parts = [
        f"{devices}, {_count(setup['ranks'], 'rank')} on {_count(setup['nodes'], 'node')} ({setup['launcher']})",
        setup["precision"],
        *(f"{key.replace('_', '-')} {environment[key]}" for key in _KERNELS if key in environment),
    ]
    versions = [f"{name} {v}" for key, name in _VERSIONS.items() if (v := setup["versions"].get(key))]
    return f"{', '.join(parts)}; {', '.join(versions)}"


def setup_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """The setup in an ``environment.json`` as tags; empty for a run of an earlier revision, or of no training."""
    setup = environment.get("setup")
    if not setup:
        return {}
    versions = {f"version/{name}": version for name, version in setup["versions"].items()}
    kernels = {key: environment.get(key) for key in _KERNELS}
    tags = {key: value for key, value in {**setup, **versions, **kernels}.items() if key != "versions"}
    return {key: str(value) for key, value in tags.items() if value is not None}


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
