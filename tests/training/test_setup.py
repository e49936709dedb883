"""The setup of a run in environment.json, in the first log line, in report.md and as tags."""

from __future__ import annotations

import json
import logging
import multiprocessing.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from maestro_scale.recipe import load_recipe
from maestro_scale.tracking.run_params import run_metadata
from maestro_scale.tracking.run_report import run_report
from maestro_scale.tracking.terminal import TerminalProgress
from maestro_scale.training.distributed import World, hard_exit
from maestro_scale.training.observer import RunInfo
from maestro_scale.training.run_dir import write_run_files
from maestro_scale.training.setup import describe_setup, setup_line, setup_tags

LINE = (
    "16 x NVIDIA H100 80GB HBM3, 16 ranks on 2 nodes (srun), bf16, attention flash, compile blocks, micro-batch 64; "
    "torch 2.13.0+cu129, CUDA 12.9, NCCL 2.27.3, driver 570.86.15, DeepSpeed 0.19.8"
)


@pytest.fixture
def environment(monkeypatch):
    """That of rank 0 on 2 nodes of 8 H100."""
    driver = SimpleNamespace(
        NVMLError=Exception, nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "570.86.15"
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu129")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.8")
    world = World(0, 16, 0, torch.device("cuda", 0), None, "srun", 2)
    return {
        "setup": describe_setup(world, "bf16"),
        "attention": "flash",
        "compile": "blocks",
        "micro_batch": 64,
    }


def test_a_run_on_gpus(environment):
    assert setup_line(environment) == LINE
    assert setup_tags(environment) == {
        "device": "cuda",
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpus": "16",
        "ranks": "16",
        "nodes": "2",
        "launcher": "srun",
        "precision": "bf16",
        "attention": "flash",
        "compile": "blocks",
        "micro_batch": "64",
        "version/torch": "2.13.0+cu129",
        "version/cuda": "12.9",
        "version/nccl": "2.27.3",
        "version/driver": "570.86.15",
        "version/deepspeed": "0.19.8",
    }


def test_a_run_on_the_cpu():
    setup = describe_setup(World(0, 1, 0, torch.device("cpu")), "fp32")
    assert {key: setup[key] for key in ("device", "gpu", "gpus")} == {"device": "cpu", "gpu": None, "gpus": 0}
    line = setup_line({"setup": setup})
    assert line.startswith(f"CPU, 1 rank on 1 node (none), fp32; torch {torch.__version__}, DeepSpeed ")
    assert not {"gpu", "version/cuda", "version/nccl", "attention"} & set(setup_tags({"setup": setup}))


def test_an_earlier_run_has_no_setup():
    assert setup_line({"versions": {}}) == ""
    assert setup_tags({"versions": {}}) == {}


def test_the_setup_is_in_every_report(environment, tmp_path, minimal_recipe, capsys):
    recipe = load_recipe(minimal_recipe)
    write_run_files(tmp_path, recipe, **environment)
    line = {"step": 1, "samples": 8, "loss": 1.0, "skipped_steps": 0, "peak_memory_gib": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert f"\n{LINE}\n" in run_report(recipe, tmp_path, "done")
    assert run_metadata(recipe, tmp_path).tags["gpu"] == "NVIDIA H100 80GB HBM3"
    TerminalProgress("x").started(RunInfo(tmp_path, 0, 4, 8))
    assert capsys.readouterr().err.splitlines()[:2] == [f"x: to step 4, in {tmp_path}", LINE]


@pytest.fixture
def minimal_recipe(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text("name: x\ndata: {mixture: [{dataset: treesatai_ts, shards: /none}]}\n")
    return path


def test_a_hard_exit_removes_the_folder_of_the_fork_server(tmp_path, monkeypatch):
    folder = tmp_path / "pymp-x"
    folder.mkdir()
    (folder / "listener-y").touch()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
    monkeypatch.setattr(multiprocessing.util, "_run_finalizers", lambda least: None)  # those of pytest
    monkeypatch.setattr(logging, "shutdown", lambda: None)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as exited:
        hard_exit(3)
    assert exited.value.code == 3
    assert not folder.exists()
