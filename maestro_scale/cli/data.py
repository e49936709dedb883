"""Commands on datasets: synthesize raw data, write shards, verify and inspect them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maestro_scale.cli.extras import geo_libraries
from maestro_scale.errors import did_you_mean
from maestro_scale.escaping import printable, shell_command

if TYPE_CHECKING:
    from maestro_scale.datasets.spec import RawDataset


def synth(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset, e.g. treesatai_ts.")],
    dst: Annotated[
        Path, typer.Argument(help="Output folder: empty, or from an interrupted run of this command.")
    ],
    tiles: Annotated[int, typer.Option(min=3, help="Number of tiles, over all splits.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Random seed. Tile i depends only on (seed, i).")] = 0,
) -> None:
    """Write a synthetic dataset in that dataset's official raw layout."""
    from maestro_scale import datasets

    _check_dataset(dataset)
    datasets.synth(dataset, dst, tiles, seed)
    command = shell_command("maestro-scale", "shard", dataset, dst, "SHARDS", "--split", "train")
    print(f"{tiles} tiles of {dataset} in {dst}; next: {command}")


def describe(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder, s3:// prefix or file with images. With --recipe: folder or s3:// prefix of shards."
        ),
    ] = "",
    blocks: Annotated[
        bool,
        typer.Option(
            "--blocks", help="Draw train, val and test by blocks of ground; else all tiles are train."
        ),
    ] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print a first recipe for a dataset in shards, instead.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of descriptions, for editors, and exit.")
    ] = False,
) -> None:
    """Print a first draft of the description of a folder: what was found, and what is assumed, for you to correct."""
    if schema:
        from maestro_scale.datasets.description.reference import schema as description_schema

        print(json.dumps(description_schema(), indent=1))
        return
    if not src:
        raise typer.BadParameter("name a folder, or give --schema", param_hint="SRC")
    if recipe:
        from maestro_scale.recipe.draft import draft_recipe

        print(draft_recipe(src), end="")
        return
    from maestro_scale.datasets.describe import describe as describe_folder

    def say(message: str) -> None:
        print(f"warning: {printable(message)}", file=sys.stderr)

    with geo_libraries():
        draft = describe_folder(src, blocks, say)
    print(draft.to_yaml(), end="")
    command = shell_command("maestro-scale", "shard", "MY.yaml", draft.source, "SHARDS", "--split", "train")
    print(
        f"next: check the lines with 'assumed' in what you save as MY.yaml, then: {command}", file=sys.stderr
    )


def shard(
    dataset: Annotated[
        str,
        typer.Argument(
            help="Name of a dataset, e.g. treesatai_ts, or a description of your own: MY.yaml (docs/description.md)."
        ),
    ],
    src: Annotated[
        str, typer.Argument(help="Folder with the raw dataset; for a description also an address.")
    ],
    dst: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards.")],
    split: Annotated[str, typer.Option(help="Split to write, e.g. train. Run the command once per split.")],
    workers: Annotated[
        int, typer.Option(min=1, help="Worker processes. The output does not depend on their number.")
    ] = 2,
    codec: Annotated[
        str, typer.Option(help="raw, zstd or delta-zstd (use zstd if the network is the bottleneck).")
    ] = "raw",
    shard_mb: Annotated[int, typer.Option(min=1, help="Target size of a shard in MB.")] = 128,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the shuffle that sets the stored order of samples.")
    ] = 0,
    modalities: Annotated[
        str, typer.Option(help="Modalities to store, comma-separated. Default: those that the preset uses.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at an invalid tile instead of skipping and counting it.")
    ] = False,
    part: Annotated[
        str,
        typer.Option(
            help="i/n: write only part i of n, for n parallel jobs. The job that finishes last writes the manifest."
        ),
    ] = "1/1",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the description, e.g. rasters.s2.nodata=0. Repeatable.",
        ),
    ] = None,
) -> None:
    """Convert one split of a raw dataset to shards. An interrupted run resumes: finished shards are kept."""
    from maestro_scale.shards.write.part import WriterPart
    from maestro_scale.shards.write.writer import write_shards
    from maestro_scale.tracking.terminal import progress

    writer_part = WriterPart.parse(part)
    _check_destination(dst)
    selected = [name.strip() for name in modalities.split(",")] if modalities else None
    with geo_libraries():
        raw, synthetic = _open(dataset, src, split, selected, overrides or [])
    for reason, num in getattr(raw, "left_out", {}).items():
        print(printable(f"{num} tiles {reason}: left out"))
    with geo_libraries(), progress(f"shard {dataset} {split}", "samples") as update:
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
            part=writer_part,
            synthetic=synthetic,
        )
    if manifest is None:
        print(
            f"part {writer_part} of {split} is written; the job that finishes last writes {dst}/manifest.json"
        )
        return
    shards = manifest.shards_of([split])
    total_mb = sum(s.bytes for s in shards) / 1e6
    print(f"{sum(s.samples for s in shards)} samples in {len(shards)} shards ({total_mb:.0f} MB) at {dst}")
    if manifest.notes and len(manifest.splits) > 1:
        print(f"noted in the splits {', '.join(manifest.splits)} together:")
    for note, count in sorted(manifest.notes.items()):
        print(printable(f"  {count} tiles: {note} (first: {manifest.examples.get(note, 'unknown')})"))
    print(f"next: the other splits, then {shell_command('maestro-scale', 'verify', dst)}")


def _check_destination(dst: str) -> None:
    """Refuse ``$MAESTRO_DATA/NAME`` where the shell found the variable unset: a new folder at the root of the disk."""
    path = Path(dst)
    if not os.environ.get("MAESTRO_DATA") and path.parent == Path("/") and not path.exists():
        raise typer.BadParameter(
            f"{dst} would be a new folder at the root of the disk, and MAESTRO_DATA is not set: export "
            f"MAESTRO_DATA=FOLDER, or create {dst} before",
            param_hint="DST",
        )


def verify(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    workers: Annotated[int, typer.Option(min=1, help="Worker processes or connections.")] = 2,
) -> None:
    """Check the manifest, every shard and every sample, as training does. Exit code 1 and a list if any is bad."""
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.verify import verify as verify_shards
    from maestro_scale.tracking.terminal import progress

    with progress(f"verify {url}", "samples") as update:
        warnings: list[str] = []
        problems = verify_shards(url, workers, update, warnings.append)
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    manifest = Manifest.load(url)
    print(
        f"{url}: {len(manifest.shards)} shards, {sum(s.samples for s in manifest.shards)} samples, all valid; "
        f"next: {shell_command('maestro-scale', 'inspect', url, '--png', 'tile.png')}"
    )


def inspect(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    png: Annotated[
        Path | None, typer.Option(help="PNG file to draw one tile to: all modalities and labels.")
    ] = None,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics",
            help="Also spatial and temporal statistics of the pixels, beside those of real data.",
        ),
    ] = False,
    max_tiles: Annotated[
        int, typer.Option(min=1, help="Tiles that --statistics reads, spread over the shards.")
    ] = 64,
) -> None:
    """Summarize a sharded dataset: shards, modalities, class balance, dates by month."""
    from rich.console import Console

    from maestro_scale.shards.errors import ManifestError
    from maestro_scale.shards.read.measure import measure
    from maestro_scale.shards.read.preview import read_first_sample
    from maestro_scale.shards.read.summary import summarize
    from maestro_scale.tracking.inspection import statistics_table, tables
    from maestro_scale.tracking.tile_picture import check_picture, tile_picture

    if png is not None:
        check_picture(png)  # before the summary, which takes minutes on a large dataset
    dataset = summarize(url)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log or a pipe has no width; rich would assume 80 columns
    console.print(tables(dataset))
    if statistics:
        console.print(statistics_table(measure(url, max_tiles)))
    if png is not None:
        if not dataset.manifest.shards:
            raise ManifestError(f"{url}: its manifest lists no shards, so there is no tile to draw")
        tile_picture(png, read_first_sample(url, dataset.manifest.shards[0]), dataset.manifest.spec)
        command = shell_command("maestro-scale", "describe", url, "--recipe")
        print(f"{png}: one tile; next: {command}, or train with a recipe of this dataset")


def _open(
    dataset: str, src: str, split: str, modalities: list[str] | None, overrides: list[str]
) -> tuple[RawDataset, bool | None]:
    """The raw dataset of a name or a description, and whether its tiles are synthetic."""
    from maestro_scale import datasets
    from maestro_scale.datasets.description.dataset import open_described
    from maestro_scale.datasets.description.load import find_description, load_description, shipped
    from maestro_scale.datasets.spec import DatasetError

    if dataset in datasets.known():
        if overrides:
            raise DatasetError(
                f"--set changes a description, and {dataset} has a reader of its own; leave it out"
            )
        return datasets.open_raw(dataset, Path(src), split, modalities), datasets.is_synthetic(Path(src))
    path = find_description(dataset)
    if path is None:
        known = [*datasets.known(), *shipped()]
        raise DatasetError(
            f"no dataset is called {dataset!r}{did_you_mean(dataset, known)}; give one of them, or a description "
            "MY.yaml (docs/description.md)"
        )
    description = load_description(path, overrides)
    synthetic = description.synthetic
    if synthetic is None and "://" not in src:
        synthetic = datasets.is_synthetic(Path(src))
    return open_described(description, src, split, modalities), synthetic


def _check_dataset(dataset: str) -> None:
    from maestro_scale import datasets
    from maestro_scale.datasets.spec import DatasetError

    try:
        datasets.spec(dataset)
    except KeyError as error:
        raise DatasetError(error.args[0]) from None
