"""Prints a cluster plan as tables, followed by the sbatch command that runs it."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from maestro_scale.model.cost import GIB
from maestro_scale.planning.plan import GPUS, Cluster, ClusterPlan
from maestro_scale.planning.speed import StepTime


def print_plan(
    plan: ClusterPlan, cluster: Cluster, recipe_path: str, overrides: list[str], console: Console
) -> None:
    """Print a plan."""
    console.print(f"parameters        {plan.parameters:,}")
    console.print(_layouts(plan, cluster))
    if host := max(x.memory.footprint.host for x in plan.layouts):
        console.print(f"offload           up to {host / GIB:.2f} GiB of the node's memory per rank")
    console.print(
        f"data              {plan.bytes_per_sample / 1e6:.2f} MB per sample, "
        f"{plan.node_bytes_per_s(cluster) / 1e6:.1f} MB/s to each of {cluster.num_nodes} nodes"
    )
    console.print(
        f"speed             {plan.samples_per_s:,.1f} samples/s, {plan.mfu:.1%} MFU"
        + ("" if plan.best else " with the layout that needs the least memory")
    )
    for name, time in (("none", plan.eager), ("step", plan.compiled)):
        console.print(f"compile: {name:<9}{_parts(time)}")
    if plan.eager.is_launch_bound:
        console.print(
            f"launch-bound      in eager mode, launching takes {plan.eager.launch_s / plan.eager.compute_s:.1f} times "
            "as long as computing: set model.compile=step, or a larger micro-batch by a larger train.global_batch"
        )
    if plan.seconds is None:
        console.print(
            "time              unknown: the shards, which determine the length of an epoch, cannot be read here"
        )
    else:
        console.print(
            f"time              {plan.seconds / 3600:,.1f} h for {plan.num_steps:,} steps, "
            f"{plan.gpu_hours(cluster):,.0f} GPU-hours"
        )
    console.print(
        f"Predicted, not measured on a GPU: matrix products at {cluster.mfu:.0%} of the peak, {cluster.launch_us:g} us "
        "per launched operation."
    )
    if plan.best is None:
        console.print(
            "no layout fits: set model.checkpointing=blocks, use more GPUs, or offload the optimizer"
        )
        return
    print(
        sbatch_command(plan, cluster, recipe_path, overrides)
    )  # plain print: rich would wrap the command, which is to be copied


def _layouts(plan: ClusterPlan, cluster: Cluster) -> Table:
    table = Table(
        title=f"GiB per rank on {cluster.num_gpus} {cluster.gpu} ({GPUS[cluster.gpu].memory_bytes / GIB:.0f} GiB each)",
        title_justify="left",
    )
    columns = (
        "stage",
        "micro",
        "weights",
        "grads",
        "adamw",
        "buckets",
        "acts",
        "batches",
        "total",
    )
    for column in (*columns, "sent", "step ms", "limit", "fits"):
        table.add_column(column, justify="right")
    for x in plan.layouts:
        m, f = x.memory, x.memory.footprint
        device = (f.weights, f.gradients, f.optimizer, f.buckets, m.activations, m.batches, m.device)
        row = [f"{b / GIB:.2f}" for b in (*device, x.traffic.total)]
        row += [f"{x.time.total_s * 1e3:.1f}", "launch" if x.time.is_launch_bound else "compute"]
        table.add_row(str(x.stage), str(x.micro_batch), *row, "yes" if x.fits else "no")
    return table


def _parts(time: StepTime) -> str:
    ms = (time.total_s, time.compute_s, time.launch_s, time.optimizer_s, time.communication_s)
    return "step {:.1f} ms: compute {:.1f}, beside it launch {:.1f}, optimizer {:.1f}, communication {:.1f}".format(
        *(1e3 * s for s in ms)
    )


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
