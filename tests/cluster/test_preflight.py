"""What the batch script checks before any task starts, and ``MAESTRO_CHECK=1``, which prints what would run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from testkit.runs import REPO

from maestro_scale.cluster import preflight
from maestro_scale.cluster.network import interface_to

RECIPE = REPO / "tests" / "fixtures" / "pretrain.yaml"
SHARDS = f"data.mixture[0].shards={REPO / 'tests' / 'fixtures' / 'shards'}"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """``preflight WHAT RANKS`` on the fixture's recipe in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MAESTRO_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(preflight, "gpu_sign", lambda env: None)

    def check(what: str, ranks: int = 2, *overrides: str) -> int:
        return preflight.main([what, str(ranks), "--recipe", str(RECIPE), "--set", SHARDS, *overrides])

    return check


def test_a_run_that_can_start_gives_its_directory(check, capsys, tmp_path):
    assert check("run-dir") == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/compat\n"


def test_missing_data_is_not_a_bad_recipe_or_node(check, capsys):
    assert check("run-dir", 2, "data.mixture[0].shards=/nowhere") == preflight.NO_DATA
    assert "error: /nowhere/manifest.json: not found" in capsys.readouterr().err
    assert check("run-dir", 2, "data.mixture[0].split=training") == preflight.NO_DATA
    assert "no split 'training' in shards" in capsys.readouterr().err
    assert check("show", 2, "data.mixture[0].shards=/nowhere") == preflight.NO_DATA
    assert "treesatai_ts, train: MISSING: /nowhere/manifest.json" in capsys.readouterr().out


def test_a_wrong_number_of_ranks_and_a_wrong_key_are_recipe_errors(check, capsys):
    assert check("run-dir", 3) == preflight.BAD_RECIPE
    assert "data.lanes: 2 cannot be shared evenly by 3 ranks" in capsys.readouterr().err
    assert check("run-dir", 2, "train.step=3") == preflight.BAD_RECIPE


@pytest.mark.parametrize("gres", ["gpu:8", "gpu:h100:4(S:0-1)"])
def test_a_job_without_gpus_does_not_train_on_a_node_with_gpus(check, monkeypatch, capsys, gres):
    monkeypatch.setenv("MAESTRO_NODE_GRES", gres)
    assert check("run-dir") == preflight.NO_GPUS
    message = capsys.readouterr().err
    assert f"this node has GPUs ({gres}), and the job asks for none: sbatch --gpus-per-node=N" in message
    assert check("run-dir", 2, "train.device=cpu") == 0  # as asked
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert check("run-dir") == 0


def test_gpus_that_slurm_does_not_know_are_found_too(check, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "gpu_sign", lambda env: "/dev/nvidia0 exists")
    assert check("run-dir") == preflight.NO_GPUS
    assert "(/dev/nvidia0 exists)" in capsys.readouterr().err


def test_folders_of_a_container_are_those_of_run_and_data(check, capsys, tmp_path):
    assert check("folders", 2, "model.init_from=m") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/runs",
        str(REPO / "tests" / "fixtures" / "shards"),
        f"{tmp_path}/m",
    ]
    assert check("folders", 2, "data.mixture[0].shards=s3://bucket/x") == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs\n"


def script(name: str, tmp_path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script under ``MAESTRO_CHECK=1``, outside of SLURM, in an empty folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "SLURM_"))}
    kept |= {"MAESTRO_CHECK": "1", "MAESTRO_PYTHON": sys.executable, "MAESTRO_LOCAL": str(tmp_path / "local")}
    command = ["bash", str(REPO / "slurm" / name), *words]
    (tmp_path / "here").mkdir(exist_ok=True)
    return subprocess.run(
        command, env={**kept, **env}, cwd=tmp_path / "here", capture_output=True, text=True, timeout=120
    )


def test_the_check_prints_what_would_run_and_leaves_nothing(tmp_path):
    words = [str(RECIPE), "--run-dir", str(tmp_path / "a run"), "--set", SHARDS]
    done = script(
        "pretrain_multinode.sh", tmp_path, *words, MAESTRO_IMAGE="lab/maestro:1", MAESTRO_DATA="/no"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split(" ")[0]: line for line in done.stdout.splitlines()}
    assert "2: NODE1 NODE2" in lines["nodes"]
    assert "rank 0 at NODE1:" in lines["ranks"]
    assert "train: 5 samples in 1 shards" in lines["data"]
    assert lines["run"].endswith(str(tmp_path / "a run"))
    mounts = lines["mounts"].split()[1].split(",")
    for folder in (REPO, RECIPE.parent, RECIPE.parent / "shards", tmp_path, tmp_path / "here"):
        assert f"{folder}:{folder}" in mounts
    assert len(mounts) == len(set(mounts))
    for name, what in (("health", "-m maestro_scale.cluster.health"), ("rank", "maestro_scale/train.py")):
        assert "srun --nodes=2 --ntasks=2 " in lines[name]
        assert "--container-image=lab/maestro:1" in lines[name]
        assert what in lines[name]
    assert "nothing was started" in done.stdout
    assert not list((tmp_path / "local").iterdir())
    assert not (tmp_path / "a run").exists()


def test_the_check_fails_where_the_job_would(tmp_path):
    words = ["--set", "data.mixture[0].shards=/nowhere"]
    done = script("pretrain_multinode.sh", tmp_path, str(RECIPE), *words, SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 2
    assert "MISSING: /nowhere/manifest.json" in done.stdout
    assert "this would end at once" in done.stderr


def mounts_of(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Folders that the check says a container would see."""
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("mounts "))
    pairs = [pair.split(":") for pair in line.split()[1].split(",")]
    assert all(outside == inside for outside, inside in pairs)
    return {outside for outside, _ in pairs}


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """Folders of a user: a run with a checkpoint, raw data, scenes, results."""
    found = {
        name: tmp_path / name for name in ("runs/a/checkpoints/step_00000002", "raw", "scenes", "results")
    }
    for folder in found.values():
        folder.mkdir(parents=True)
    return {name.partition("/")[0]: folder for name, folder in found.items()}


IMAGE = {"MAESTRO_IMAGE": "lab/maestro:1"}


@pytest.mark.slow
def test_an_evaluation_submits_nothing_under_the_check_and_shows_its_mounts(tmp_path, places):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.read_text().replace("shards: shards", f"shards: {RECIPE.parent / 'shards'}"))
    words = ["--checkpoint", str(places["runs"]), "--out", str(places["results"] / "new")]
    done = script(
        "evaluate.sh", tmp_path, *words, "--recipes", str(recipe), "--", "--gpus-per-node=8", **IMAGE
    )
    runs = tmp_path / "runs"  # with the store of MLflow
    expected = {tmp_path, RECIPE.parent / "shards", places["runs"], runs, places["results"]}
    assert {str(folder) for folder in expected} <= mounts_of(done)
    assert "task 1    " in done.stdout
    assert "--array=0-1 --gpus-per-node=8" in done.stdout
    assert not (places["results"] / "new").exists()
    assert not list((tmp_path / "local").iterdir())


def test_sharding_and_prediction_do_nothing_under_the_check_and_show_their_mounts(tmp_path, places):
    done = script(
        "shard_dataset.sh", tmp_path, "flair2", str(places["raw"]), "out", "--split", "train", **IMAGE
    )
    assert str(places["raw"]) in mounts_of(done)
    assert "maestro-scale shard flair2" in done.stdout
    assert "--part 1/8" in done.stdout
    (tmp_path / "area.yaml").touch()
    words = [str(places["results"]), str(tmp_path / "area.yaml"), str(tmp_path / "maps"), "--files"]
    done = script(
        "predict.sh",
        tmp_path,
        *words,
        str(places["scenes"]),
        "--probabilities",
        **IMAGE,
        SLURM_JOB_NUM_NODES="3",
    )
    assert {str(places["results"]), str(tmp_path), str(places["scenes"])} <= mounts_of(done)
    assert "nodes     3: NODE1 NODE2 NODE3, 1 tasks each" in done.stdout
    assert not (tmp_path / "maps").exists()


def test_no_container_gets_the_root_of_the_host(tmp_path):
    done = script("predict.sh", tmp_path, "/", "/area.yaml", "s3://bucket/maps", **IMAGE)
    assert "/" not in mounts_of(done)


@pytest.mark.parametrize("name", ["follow.sh", "study.sh"])
def test_a_script_without_check_says_so(tmp_path, name):
    done = script(name, tmp_path, "x")
    assert done.returncode == 2
    assert "MAESTRO_CHECK: use " in done.stderr


def test_the_script_asks_for_all_memory_of_its_nodes():
    lines = (REPO / "slurm" / "pretrain_multinode.sh").read_text().splitlines()
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0"} <= set(lines)


@pytest.mark.parametrize(
    ("host", "name"), [("127.0.0.1", "lo"), ("::1", "lo"), ("no.such.host.invalid", None)]
)
def test_the_interface_is_found_for_ipv4_and_ipv6(host, name):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert interface_to(host) == name
