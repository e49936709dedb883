"""The ``maestro-scale`` command: data in, models out, and everything around a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from maestro_scale.entry import run_command
from maestro_scale.secrets_filter import hide_secrets

app = typer.Typer(
    name="maestro-scale",
    help="Pretrain MAESTRO on many machines: make shards, check them, try everything, export models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PREVIEW_COMMANDS = {
    "parquet": "python -c \"import pyarrow.dataset as d; print(d.dataset('{}').to_table())\"",
    "tiff": "rio info $(find {} -name '*.tif' | head -1)",
}
"""How to look at embeddings, by format."""


def main() -> None:
    """The console entry point: expected errors become one line and exit code 2."""
    hide_secrets()
    sys.exit(run_command(app))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes; run again to continue.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes, the weights and the order.")] = 0,
    tiles: Annotated[int, typer.Option(min=60, help="Synthetic tiles, over all splits.")] = 1000,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Pretraining steps, instead of the recipe's.")
    ] = None,
    shards: Annotated[
        str, typer.Option(help="s3:// prefix for the shards, instead of a folder in OUT.")
    ] = "",
) -> None:
    """Synthetic tiles to a pretrained encoder and its scores, in minutes on two cores."""
    from maestro_scale.quickstart import quickstart as run

    run(out, seed, tiles, steps, shards)


@app.command()
def synth(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset, e.g. treesatai_ts.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; empty, or begun by the same command.")],
    tiles: Annotated[int, typer.Option(min=3, help="Number of tiles, over all splits.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Tile i depends on (seed, i) alone.")] = 0,
) -> None:
    """Write a synthetic dataset in that dataset's official raw layout."""
    from maestro_scale import datasets

    _check_dataset(dataset)
    datasets.synth(dataset, dst, tiles, seed)
    print(
        f"{tiles} tiles of {dataset} in {dst}; next: maestro-scale shard {dataset} {dst} SHARDS --split train"
    )


@app.command()
def shard(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset, e.g. treesatai_ts.")],
    src: Annotated[Path, typer.Argument(help="Folder with the raw dataset.")],
    dst: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards.")],
    split: Annotated[str, typer.Option(help="Split to write, e.g. train; run once per split.")],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; the bytes written do not depend on it.")
    ] = 2,
    codec: Annotated[
        str, typer.Option(help="raw, zstd or delta-zstd (when the network is the limit).")
    ] = "raw",
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MB.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order that samples are stored in.")] = 0,
    modalities: Annotated[
        str, typer.Option(help="What to store, comma-separated, instead of what the preset needs.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a bad tile instead of leaving it out and counting it.")
    ] = False,
    part: Annotated[
        str, typer.Option(help="i/n: write only this share, beside n-1 other jobs; the last publishes.")
    ] = "1/1",
) -> None:
    """Turn one split of a raw dataset into shards; finished shards are kept when it is run again."""
    from maestro_scale import datasets
    from maestro_scale.shards.write.part import Part
    from maestro_scale.shards.write.writer import write_shards
    from maestro_scale.tracking.terminal import progress

    _check_dataset(dataset)
    mine = Part.parse(part)
    chosen = [name.strip() for name in modalities.split(",")] if modalities else None
    raw = datasets.open_raw(dataset, src, split, chosen)
    with progress(f"shard {dataset} {split}", "samples") as update:
        manifest = write_shards(
            raw,
            dst,
            split,
            workers=workers,
            codec=codec,
            shard_mb=shard_mb,
            seed=seed,
            progress=update,
            strict=strict,
            part=mine,
        )
    if manifest is None:
        print(f"part {mine} of {split} is written; the part that is finished last writes {dst}/manifest.json")
        return
    written = manifest.of([split])
    total = sum(s.bytes for s in written) / 1e6
    print(f"{sum(s.samples for s in written)} samples in {len(written)} shards ({total:.0f} MB) at {dst}")
    for note, count in sorted(manifest.notes.items()):
        print(f"  {count} tiles: {note} (first: {manifest.examples.get(note, 'not known')})")
    print(f"next: the other splits, then maestro-scale verify {dst}")


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes or connections.")] = 2,
) -> None:
    """Check every shard against the manifest: size, sha256, count, samples. Exit 1 and what is wrong, if anything."""
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.verify import verify as check
    from maestro_scale.tracking.terminal import progress

    with progress(f"verify {url}", "samples") as update:
        problems = check(url, workers, update)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    manifest = Manifest.load(url)
    print(
        f"{url}: {len(manifest.shards)} shards, {sum(s.samples for s in manifest.shards)} samples, all whole; "
        f"next: maestro-scale inspect {url} --png tile.png"
    )


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    png: Annotated[
        Path | None, typer.Option(help="Draw a tile, all its modalities and labels, here.")
    ] = None,
) -> None:
    """Show what a dataset in shards holds: shards, modalities, class balance, dates by month."""
    from rich.console import Console

    from maestro_scale.shards.read.preview import first_sample
    from maestro_scale.shards.read.summary import summary
    from maestro_scale.tracking.inspection import tables
    from maestro_scale.tracking.tile_picture import check_picture, tile_picture

    if png is not None:
        check_picture(png)
    found = summary(url)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # for a log or a pipe, which have none of their own
    console.print(tables(found))
    if png is not None:
        tile_picture(png, first_sample(url, found.manifest.shards[0]), found.manifest.spec)
        print(f"{png}: one tile; next: maestro-scale plan --recipe RECIPE --gpus 8")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Option(help="YAML recipe (see recipes/).")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, over all nodes.")],
    gpu: Annotated[str, typer.Option(help="a100-40, a100, h100-pcie, h100 or h200.")] = "h100",
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that a step reaches.")] = 0.4,
    change: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeat.")] = None,
) -> None:
    """Tell what a recipe needs on a cluster: memory by ZeRO stage, traffic, data rate, time; and what to submit."""
    from rich.console import Console

    from maestro_scale.planning import Cluster, plan_cluster
    from maestro_scale.planning.report import print_plan
    from maestro_scale.recipe import load_recipe
    from maestro_scale.training.dry_run import spec_and_size

    cluster, overrides = Cluster(gpu, gpus, per_node, mfu), change or []
    asked = load_recipe(str(recipe), overrides)
    found = [spec_and_size(entry) for entry in asked.data.mixture]
    planned = plan_cluster(asked, [spec for spec, _ in found], [size for _, size in found], cluster)
    print_plan(planned, cluster, str(recipe), overrides, Console(width=120))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory with at least one checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder for model.safetensors and config.json.")],
    ema: Annotated[bool, typer.Option(help="The moving average of the weights (optim.ema).")] = False,
    register: Annotated[
        str, typer.Option(help="Also make it a version of this model in MLflow's registry.")
    ] = "",
) -> None:
    """Write the newest checkpoint's weights as safetensors that ``load_model`` reads with torch alone."""
    from maestro_scale.interop.export import export_model
    from maestro_scale.tracking import registry
    from maestro_scale.training.checkpoint.checkpoints import newest

    made_at = export_model(newest(run_dir), out, ema)
    print(
        f"exported to {made_at}; next: maestro-scale embed {made_at} SHARDS OUT, or load_model({str(made_at)!r})"
    )
    if register:
        made = registry.register(out, register, run_dir)
        print(f"registered as {made.uri} at {made.store}; next: {made.load_command}")


@app.command("convert-ign")
def convert_ign(
    src: Annotated[
        Path, typer.Argument(help="The authors' Lightning checkpoint; or a model of ours, to turn back.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for our model; or file for the authors' checkpoint.")],
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average.")] = "raw",
    dataset: Annotated[
        str | None, typer.Option(help="Whose sensors it sees, where that is not plain from the file.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="config.json that describes the model, instead of --dataset.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, for an unusual size.")] = None,
    decoder_heads: Annotated[int | None, typer.Option(min=1, help="The same of the decoder.")] = None,
    fusion: Annotated[str | None, typer.Option(help="group, mod, monotemp or shared.")] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Sensor, or part such as heads.cosia, not to convert; repeat.")
    ] = None,
) -> None:
    """Convert a checkpoint of IGNF/MAESTRO to safetensors that ``load_model`` reads, or such a model back."""
    from rich.console import Console

    from maestro_scale.interop import convert as interop
    from maestro_scale.interop.export import ExportError
    from maestro_scale.interop.parts import table
    from maestro_scale.interop.reference_model import Asked

    if interop.is_ours(src):
        interop.convert_back(src, out)
        print(f"{src} under the authors' names in {out}")
        return
    for option, value, valid in (
        ("--weights", weights, tuple(interop.PREFIXES)),
        ("--fusion", fusion, (None, "group", "mod", "monotemp", "shared")),
    ):
        if value not in valid:
            raise ExportError(f"{option} {value}: use one of {', '.join(v for v in valid if v)}")
    asked = Asked(heads, decoder_heads, fusion, tuple(leave_out or ()))
    options = interop.Options(weights=weights, dataset=dataset, like=like, asked=asked)  # type: ignore[arg-type]
    parts = interop.convert(src, out, options)
    Console(width=110).print(table(parts, f"{src.name} to {out}"))


@app.command()
def embed(
    model: Annotated[
        Path, typer.Argument(help="A run directory, one of its checkpoints, or an exported model.")
    ],
    shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    out: Annotated[Path, typer.Argument(help="Folder for the embeddings; run again to continue.")],
    split: Annotated[str, typer.Option(help="Split to embed.")] = "test",
    what: Annotated[
        str, typer.Option(help="vector: one per crop; tokens: each sensor's token grid.")
    ] = "vector",
    format: Annotated[
        str, typer.Option(help="parquet: a file per shard; tiff: an image per tile and sensor.")
    ] = "parquet",
    batch: Annotated[int, typer.Option(min=1, help="Crops per forward pass.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    cache_dir: Annotated[Path, typer.Option(help="Where downloaded shards are kept.")] = Path(
        "~/.cache/maestro-scale"
    ),
) -> None:
    """Write an encoder's embeddings of a split. Under torchrun, deepspeed or srun the ranks share the work."""
    import torch

    from maestro_scale.evaluation.embedding import Embedder
    from maestro_scale.evaluation.features.adopt import adopt
    from maestro_scale.evaluation.features.checkpoints import open_model
    from maestro_scale.model.config import DatasetView
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.store import Store
    from maestro_scale.tracking.terminal import progress
    from maestro_scale.training.distributed import place

    _check_choice("--what", what, ("vector", "tokens"))
    _check_choice("--format", format, tuple(PREVIEW_COMMANDS))
    rank, world, local_rank = place()
    manifest = Manifest.load(shards)
    spec = manifest.spec
    encoder, notes = open_model(model)[0], []
    if spec.name not in {v.dataset for v in encoder.config.views}:
        view = DatasetView(spec.name, spec.sensors, spec.pos_grid, spec.ref_sensor, spec.crop_m)
        encoder, notes = adopt(encoder, view)
    if torch.cuda.is_available():
        encoder.to(f"cuda:{local_rank % torch.cuda.device_count()}")
    embedder = Embedder(
        encoder, Store(shards, cache_dir, 100 * 2**30), manifest, what, format, batch, workers
    )
    for note in notes if rank == 0 else ():
        print(note)
    share = f", rank 0's share of {world}" if world > 1 else ""
    with progress(f"embed {spec.name} {split}{share}", "crops", rank) as update:
        written = embedder.write(out, split, rank, world, update)
    if rank == 0:
        print(
            f"{written} crops embedded{share}, where not there already, in {out}; "
            f"next: {PREVIEW_COMMANDS[format].format(out)}"
        )


@app.command()
def sync(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, of a run that goes on or is over.")],
) -> None:
    """Send to MLflow what it misses of a run: after an outage, or from nodes without network."""
    from maestro_scale.tracking.sync import sync as run

    synced = run(run_dir)
    state = "over" if synced.ended else "going on"
    if synced.num_unreadable:
        print(f"{synced.num_unreadable} lines of {run_dir}/metrics.jsonl cannot be read and were not sent")
    for line in synced.lost:
        print(f"an evaluation was not sent: {line}")
    evaluations = f", and {synced.num_evaluations} more evaluations" if synced.num_evaluations else ""
    print(
        f"{synced.store} has all {synced.num_lines} lines and {synced.num_pictures} more pictures of {run_dir} "
        f"({state}), as run {synced.run_id}{evaluations}"
    )


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="Folder that holds run directories, and mlflow.db.")] = Path(
        "runs"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Start the MLflow pages on the store of these runs, and print their address."""
    from maestro_scale.tracking.dashboard import dashboard as serve

    raise typer.Exit(serve(runs, host, port))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders to look through.")],
    out: Annotated[
        Path, typer.Option(help="HTML file to write; the tables also go to .md beside it.")
    ] = Path("report.html"),
) -> None:
    """Lay results beside the published tables: one self-contained page with scores, classes, confusions and maps."""
    from maestro_scale.evaluation.report.groups import find_results
    from maestro_scale.evaluation.report.report import write_report

    found = find_results(results)
    page, text = write_report(found, out)
    print(f"{len(found)} results in {page} and {text}; next: python -m webbrowser {page}")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}", param_hint=option)


def _check_dataset(dataset: str) -> None:
    from maestro_scale import datasets
    from maestro_scale.datasets.spec import DatasetError

    try:
        datasets.spec(dataset)
    except KeyError as error:
        raise DatasetError(error.args[0]) from None


@app.command()
def doctor(
    data: Annotated[
        list[str] | None, typer.Option(help="Folder or s3:// prefix of a dataset in shards to reach; repeat.")
    ] = None,
    folder: Annotated[
        list[Path] | None, typer.Option(help="Where runs or caches are to lie; default: here; repeat.")
    ] = None,
) -> None:
    """Say what this machine has for training, with advice for each problem; exit code 1 if there is one."""
    from maestro_scale.cluster.doctor import print_findings, run_checks

    problems = print_findings(run_checks(data or (), folder or ()))
    print(f"{problems} thing{'s' * (problems != 1)} to look at" if problems else "all is well")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
