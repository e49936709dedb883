"""Commands on runs and machines: quickstart, cluster plan, MLflow, evaluation report, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from maestro_scale.escaping import printable, shell_command


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for all output. Run the command again to resume.")] = Path(
        "quickstart"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the scenes, the weights and the sample order.")
    ] = 0,
    tiles: Annotated[int, typer.Option(min=60, help="Number of synthetic tiles, over all splits.")] = 1000,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Pretraining steps, instead of the recipe's.")
    ] = None,
    shards: Annotated[
        str, typer.Option(help="s3:// prefix for the shards, instead of a folder in OUT.")
    ] = "",
) -> None:
    """Run the full pipeline on synthetic data: shards, pretraining, evaluation; minutes on two CPU cores."""
    from maestro_scale.quickstart import quickstart as run

    run(out, seed, tiles, steps, shards)


def plan(
    recipe: Annotated[Path, typer.Option(help="YAML recipe (see recipes/).")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, over all nodes.")],
    gpu: Annotated[str, typer.Option(help="GPU model, e.g. a100, h100, h200, b200 or mi300x.")] = "h100",
    per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 8,
    mfu: Annotated[float, typer.Option(help="Fraction of the peak FLOP/s that matrix products reach.")] = 0.6,
    launch_us: Annotated[
        float, typer.Option(help="Microseconds in which the host launches an operation.")
    ] = 5.0,
    network_gb_s: Annotated[
        float, typer.Option(help="Network between nodes, GB/s per GPU and direction.")
    ] = 50.0,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value. Can be repeated.")
    ] = None,
) -> None:
    """Estimate what a recipe needs on a cluster: memory by ZeRO stage, communication, data rate, time; and print the
    sbatch command."""
    from rich.console import Console

    from maestro_scale.planning import Cluster, plan_cluster
    from maestro_scale.planning.report import print_plan
    from maestro_scale.recipe import load_recipe
    from maestro_scale.training.dry_run import specs_and_sizes

    cluster, overrides = Cluster(gpu, gpus, per_node, mfu, launch_us, network_gb_s), change or []
    loaded = load_recipe(str(recipe), overrides)
    planned = plan_cluster(loaded, *specs_and_sizes(loaded), cluster)
    print_plan(planned, cluster, str(recipe), overrides, Console(width=120))


def sync(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a running or finished run.")],
) -> None:
    """Send to MLflow what it is missing of a run: after an outage, or from nodes without network."""
    from maestro_scale.tracking.sync import sync as run

    result = run(run_dir)
    state = "finished" if result.is_finished else "running"
    if result.num_unreadable:
        print(f"{result.num_unreadable} lines of {run_dir}/metrics.jsonl cannot be read and were not sent")
    for reason in result.lost_evaluations:
        print(f"an evaluation was not sent: {printable(reason)}")
    evaluations = f", and {result.num_evaluations} more evaluations" if result.num_evaluations else ""
    print(
        f"{result.store} has all {result.num_lines} lines and {result.num_pictures} more pictures of {run_dir} "
        f"({state}), as run {result.run_id}{evaluations}"
    )


def dashboard(
    runs: Annotated[Path, typer.Argument(help="Folder that holds run directories, and mlflow.db.")] = Path(
        "runs"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
) -> None:
    """Start the MLflow UI on the tracking store of these runs, and print its address."""
    from maestro_scale.tracking.dashboard import dashboard as serve

    raise typer.Exit(serve(runs, host, port))


def report(
    results: Annotated[
        list[Path], typer.Argument(help="results.json files, or folders to search recursively.")
    ],
    out: Annotated[
        Path, typer.Option(help="HTML file to write. The tables are also written to a .md file next to it.")
    ] = Path("report.html"),
) -> None:
    """Compare results with the published tables: one HTML page with scores, classes, confusion matrices and maps."""
    from maestro_scale.evaluation.report.groups import find_results
    from maestro_scale.evaluation.report.report import write_report

    found = find_results(results)
    html, markdown = write_report(found, out)
    command = shell_command("python", "-m", "webbrowser", html)
    print(f"{len(found)} results in {html} and {markdown}; next: {command}")


def doctor(
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or s3:// prefix of a sharded dataset that must be reachable. Can be repeated."
        ),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="Folder for runs or caches; default: the working directory. Can be repeated."),
    ] = None,
) -> None:
    """Check this machine for training, with advice for each problem. Exit code 1 if there is one."""
    from maestro_scale.cluster.doctor import print_findings, run_checks

    num_problems = print_findings(run_checks(data or (), folder or ()))
    print(f"{num_problems} problem{'s' * (num_problems != 1)} found" if num_problems else "no problems found")
    sys.exit(1 if num_problems else 0)
