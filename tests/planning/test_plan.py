"""Cluster plans: consistent numbers, and a printed command that works."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex

import pytest
import typer.testing
from rich.console import Console
from testkit.runs import REPO

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.model.cost import compute_cost
from maestro_scale.planning import GPUS, Cluster, PlanningError, plan_cluster
from maestro_scale.recipe import build_model_config, load_recipe
from maestro_scale.training.dry_run import dry_run
from maestro_scale.training.stored_data import StoredData

RECIPE = str(REPO / "recipes" / "vitb.yaml")
SPEC = datasets.spec("treesatai_ts")
STORED = StoredData(50_000, 50_000 * 400_000)


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    monkeypatch.setenv("MAESTRO_DATA", "/nowhere")


def planned(*changes: str, gpus: int = 16, gpu: str = "h100", stored=STORED):
    cluster = Cluster(gpu, gpus, 8, 0.5)
    return cluster, plan_cluster(load_recipe(RECIPE, list(changes)), [SPEC], [stored], cluster)


def test_time_and_data_rate_follow_from_speed():
    cluster, plan = planned("train.steps=1000")
    assert plan.seconds == pytest.approx(1000 * 96 / plan.samples_per_s)
    assert plan.gpu_hours(cluster) == pytest.approx(plan.seconds * 16 / 3600)
    assert plan.node_bytes_per_s(cluster) == pytest.approx(plan.samples_per_s * 400_000 / 2)
    assert plan.samples_per_s == pytest.approx(96 / plan.best.time.total_s)
    _, epochs = planned("train.epochs=3")
    assert epochs.num_steps == 3 * (50_000 // 96)
    apart = STORED._replace(parts=(49_900, 96, 4))  # 519, 1 and 1 steps
    assert planned("train.epochs=3", stored=apart)[1].num_steps == 3 * 521
    assert planned("train.epochs=3", stored=None)[1].seconds is None


def test_the_recommended_layout_fits_and_is_fastest(monkeypatch):
    _, plan = planned()
    assert {x.stage for x in plan.layouts} == {0, 1, 2, 3}
    assert {x.micro_batch for x in plan.layouts} == {1, 2, 3, 6}
    assert all(x.fits for x in plan.layouts)
    assert plan.best.time.total_s == min(x.time.total_s for x in plan.layouts)
    # On a GPU that fits only the smallest layout, that one is recommended.
    smallest = min(x.memory.device for x in plan.layouts)
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(GPUS["h100"], memory_bytes=smallest / 0.899))
    _, tight = planned()
    assert [x.fits for x in tight.layouts].count(True) >= 1
    assert tight.best.memory.device == smallest
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(GPUS["h100"], memory_bytes=10**6))
    assert planned()[1].best is None


def test_invalid_clusters_are_refused():
    with pytest.raises(PlanningError, match=r"h999.*h100"):
        Cluster("h999", 8, 8, 0.4)
    with pytest.raises(PlanningError, match="--gpus 12"):
        Cluster("h100", 12, 8, 0.4)
    with pytest.raises(PlanningError, match="--mfu"):
        Cluster("h100", 8, 8, 40)
    with pytest.raises(PlanningError, match=r"7 GPUs cannot share train.global_batch 96"):
        planned(gpus=7)
    with pytest.raises(PlanningError, match="--launch-us"):
        Cluster("h100", 8, 8, launch_us=-1)
    with pytest.raises(PlanningError, match="--launch-us nan"):
        Cluster("h100", 8, 8, launch_us=float("nan"))
    with pytest.raises(PlanningError, match="--network-gb-s"):
        Cluster("h100", 8, 8, network_gb_s=0)
    with pytest.raises(PlanningError, match="--network-gb-s nan"):
        Cluster("h100", 8, 8, network_gb_s=float("nan"))


def test_the_dry_run_prints_the_estimate_of_plan():
    recipe = load_recipe(RECIPE, ["train.steps=10"])
    console = Console(width=120, record=True, file=io.StringIO())
    dry_run(recipe, 8, console)
    printed = console.export_text()
    _, plan = planned("train.steps=10", gpus=8)
    for stage in range(4):
        (layout,) = (x for x in plan.layouts if (x.stage, x.micro_batch) == (stage, recipe.train.micro_batch))
        line = next(x for x in printed.splitlines() if re.match(rf"│\s+{stage}( \(recipe\))? │", x))
        assert line.split("│")[2].strip() == f"{layout.memory.device / 2**30:.2f}"  # of 8 ranks
    console = Console(width=120, record=True, file=io.StringIO())
    dry_run(load_recipe(RECIPE, ["train.steps=10", "train.micro_batch=auto"]), 8, console)
    assert "train.micro_batch auto" in console.export_text().replace("\n", " ")


def test_the_printed_command_is_a_recipe_that_runs_on_these_ranks():
    result = typer.testing.CliRunner().invoke(
        app, ["plan", "--recipe", RECIPE, "--gpus", "16", "--set", "train.steps=10", "--set", "optim.ema=0.9"]
    )
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output.strip().splitlines()[-1])
    assert words[:4] == ["sbatch", "--nodes=2", "--gpus-per-node=8", "slurm/pretrain_multinode.sh"]
    assert words[4:6] == [RECIPE, "--set"]
    recipe = load_recipe(words[4], words[6:])
    assert recipe.train.steps == 10
    recipe.deepspeed_config(16, "cuda")


def test_the_step_takes_what_can_be_computed_by_hand(monkeypatch):
    """A GPU of 100 TFLOP/s, infinite bandwidth: only matrix products and launches take time."""
    ideal = dataclasses.replace(GPUS["h100"], tflops=100.0, bandwidth=1e30, link=1e30)
    monkeypatch.setitem(GPUS, "h100", ideal)
    recipe = load_recipe(RECIPE, ["train.steps=10"])
    cost = compute_cost(build_model_config(recipe, [SPEC]), 0.75)
    slow_device = Cluster("h100", 8, 8, mfu=0.001, launch_us=1)
    plan = plan_cluster(recipe, [SPEC], [None], slow_device)
    # 12 samples per GPU at 0.1 TFLOP/s; AdamW is bound by its launches, one for two of its 477 tensors.
    compute_s = 12 * cost.step_flops / 1e11
    assert plan.best.time.total_s == pytest.approx(compute_s + 477 / 2 * 1e-6)
    assert plan.mfu == pytest.approx(0.001, rel=0.01)
    assert not plan.eager.is_launch_bound
    slow_host = Cluster("h100", 8, 8, mfu=1.0, launch_us=1000)
    bound = plan_cluster(recipe, [SPEC], [None], slow_host)
    # One micro-batch of 12 at stage 0: 39 blocks of 34 operations, 3 sequences of 61, 99 more, a hook per tensor.
    assert bound.eager.launch_s == pytest.approx((39 * 34 + 3 * 61 + 99 + 477) * 1e-3)
    assert bound.eager.is_launch_bound
    assert bound.compiled.launch_s == pytest.approx((2 + 477) * 1e-3)  # CUDA graphs


@pytest.mark.parametrize(("seconds", "reported"), [(50.0, True), (0.0, False)])
def test_a_launch_bound_layout_is_reported(seconds, reported):
    command = ["plan", "--recipe", RECIPE, "--gpus", "8", "--launch-us", str(seconds)]
    result = typer.testing.CliRunner().invoke(app, command)
    assert ("launch-bound" in result.output) is reported
    assert "not measured on a GPU" in result.output


def test_collectives_across_nodes_share_the_network_cards_of_a_node():
    assert Cluster("h100", 8, 8).assumptions.link == 450e9  # NVLink
    assert Cluster("h100", 16, 8, network_gb_s=25).assumptions.link == 200e9
    assert Cluster("l40s", 16, 8).assumptions.link == 32e9  # PCIe is slower than the network
