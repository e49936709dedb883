"""Prints a cluster plan as tables, followed by the sbatch command that runs it."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from maestro_scale.model.cost import GIB
from maestro_scale.planning.plan import GPUS, Cluster, ClusterPlan


def print_plan(
    plan: ClusterPlan, cluster: Cluster, recipe_path: str, overrides: list[str], console: Console
) -> None:
    """Print a plan."""
    console.print(f"parameters        {plan.parameters:,}")
    table = Table(
        title=f"GiB per rank on {cluster.num_gpus} {cluster.gpu} ({GPUS[cluster.gpu].memory_bytes / GIB:.0f} GiB each)",
        title_justify="left",
    )
    columns = (
        "stage",
        "micro",
        "weights",
        "gradients",
        "optimizer",
        "buckets",
        "activations",
        "batches",
        "total",
    )
    for column in (*columns, "host", "sent per step", "fits"):
        table.add_column(column, justify="right")
    for x in plan.layouts:
        m, f = x.memory, x.memory.footprint
        device = (f.weights, f.gradients, f.optimizer, f.buckets, m.activations, m.batches, m.device)
        row = (f"{b / GIB:.2f}" for b in (*device, f.host, x.traffic.total))
        table.add_row(str(x.stage), str(x.micro_batch), *row, "yes" if x.fits else "no")
    console.print(table)
    console.print(
        f"data              {plan.bytes_per_sample / 1e6:.2f} MB per sample, "
        f"{plan.node_bytes_per_s(cluster) / 1e6:.1f} MB/s to each of {cluster.num_nodes} nodes"
    )
    console.print(f"speed             {plan.samples_per_s:,.1f} samples/s at {cluster.mfu:.0%} MFU")
    if plan.seconds is None:
        console.print(
            "time              unknown: the shards, which determine the length of an epoch, cannot be read here"
        )
    else:
        console.print(
            f"time              {plan.seconds / 3600:,.1f} h for {plan.num_steps:,} steps, "
            f"{plan.gpu_hours(cluster):,.0f} GPU-hours"
        )
    console.print("Activations, speed and time are estimates, not measured on a GPU.")
    if plan.best is None:
        console.print(
            "no layout fits: set model.checkpointing=blocks, use more GPUs, or offload the optimizer"
        )
        return
    print(
        sbatch_command(plan, cluster, recipe_path, overrides)
    )  # plain print: rich would wrap the command, which is to be copied


def sbatch_command(plan: ClusterPlan, cluster: Cluster, recipe_path: str, overrides: list[str]) -> str:
    """The sbatch line of the recommended layout."""
    assert plan.best is not None
    changes = [
        *overrides,
        f"train.micro_batch={plan.best.micro_batch}",
        f"deepspeed.zero_optimization.stage={plan.best.stage}",
    ]
    nodes = f"--nodes={cluster.num_nodes} --gpus-per-node={min(cluster.per_node, cluster.num_gpus)}"
    script = f"slurm/pretrain_multinode.sh {shlex.quote(recipe_path)}"
    return f"sbatch {nodes} {script} --set {shlex.join(changes)}"
