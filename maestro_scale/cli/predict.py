"""Commands on areas: maps and embeddings of them, and what resembles a place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maestro_scale.cli.extras import geo_libraries
from maestro_scale.cli.options import CACHE_DIR, CacheDir, Device, Precision, check_choice
from maestro_scale.escaping import printable, shell_command

_FORMATS: tuple[Literal["cog", "parquet"], ...] = ("cog", "parquet")
_PRECISIONS: tuple[Literal["auto", "bf16", "fp32"], ...] = ("auto", "bf16", "fp32")
_DEVICES: tuple[Literal["auto", "cpu"], ...] = ("auto", "cpu")


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            help="The directory of a finetuning (OUT/finetune), its export, or any exported model."
        ),
    ],
    src: Annotated[
        str,
        typer.Argument(
            help="Shards (folder or address with manifest.json), a description MY.yaml (of tiles, or of scenes: with "
            "grid), or a folder of the model's dataset."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder for the maps. An interrupted run continues where it stopped.")
    ],
    files: Annotated[
        str | None,
        typer.Option(help="Folder or address with the files of MY.yaml. [default: the folder of MY.yaml]"),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Split to predict. Repeatable. [default: all of shards and descriptions, else test]"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Which dataset of a model of several. [default: its first, or SRC's name]"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What to predict, of a model with several heads.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.9,
            help="Share of a window that the next one covers again; 0: no blending. [default: for maps "
            "evaluation.overlap of the finetuning's recipe, 0.5; for points 0]",
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Of classes also their probabilities, a band each.")
    ] = False,
    embeddings: Annotated[
        str | None,
        typer.Option(help="Instead of the target: cog (a map of tokens) or parquet (a vector per window)."),
    ] = None,
    sensor: Annotated[
        str | None, typer.Option(help="Of --embeddings cog: whose tokens. [default: the reference sensor]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of MY.yaml, e.g. grid.area=farm.gpkg. Repeatable.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 8,
    cache_dir: CacheDir = CACHE_DIR,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Map an area: classes or numbers as GeoTIFF (COG), labels of tiles as GeoParquet.

    Under torchrun, deepspeed or srun the ranks share the work."""
    from maestro_scale.evaluation.features.load_encoder import load_encoder
    from maestro_scale.inference import command
    from maestro_scale.inference.run import Run
    from maestro_scale.tracking.terminal import progress
    from maestro_scale.training.device import bind_process, use_device

    options = command.Options(
        splits=command.all_splits(split or ()),
        files=files,
        dataset=dataset,
        target=target,
        overlap=overlap,
        probabilities=probabilities,
        embeddings=None if embeddings is None else check_choice("--embeddings", embeddings, _FORMATS),
        sensor=sensor,
        overrides=tuple(overrides or ()),
        cache_dir=cache_dir,
    )
    arithmetic = check_choice("--precision", precision, _PRECISIONS)
    binding = bind_process(check_choice("--device", device, _DEVICES))
    rank, world = binding.launch.rank, binding.launch.size
    used = use_device(binding)
    encoder = load_encoder(model)[0].to(used)
    how = Run(used, rank, world, batch, arithmetic)
    share = f", rank 0's share of {world}" if world > 1 else ""
    with geo_libraries(), progress(f"predict{share}", "windows", rank) as update:
        num_windows, notes = command.predict(encoder, src, out, options, how, update)
    if rank == 0:
        for note in notes:
            print(printable(note))
        print(
            f"{num_windows} windows predicted{share} (existing files are kept) in {out}; "
            f"next: {shell_command('ls', out)}"
        )


def search(
    embeddings: Annotated[
        Path,
        typer.Argument(help="Folder of `embed` or of `predict --embeddings parquet`, or one of its files."),
    ],
    query: Annotated[str, typer.Argument(help="A tile's key, key#crop, or a place: LONGITUDE,LATITUDE.")],
    top: Annotated[int, typer.Option(min=1, help="Number of neighbours.")] = 12,
    out: Annotated[
        Path | None, typer.Option(help="GeoJSON file for the neighbours. [default: standard output]")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards with the tiles, for the pictures of --png.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Contact sheet of the neighbours, a PNG file.")] = None,
    crs: Annotated[
        str | None,
        typer.Option(help="The query is a place X,Y in this system, such as EPSG:2154."),
    ] = None,
) -> None:
    """Nearest neighbours of a tile or a place, by the cosine of embeddings, as GeoJSON and as a contact sheet."""
    import sys

    from maestro_scale.inference.errors import InferenceError
    from maestro_scale.inference.search import geojson
    from maestro_scale.inference.search import search as neighbours_of
    from maestro_scale.tracking.tile_picture import check_picture

    if (png is None) != (shards is None):
        raise InferenceError("--png and --shards belong together: pictures are drawn of the tiles in shards")
    if png is not None:
        check_picture(png)
    if crs is not None:
        query = _lon_lat(query, crs)
    found = neighbours_of(embeddings, query, top)
    text = geojson(found)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n")
        print(f"{len(found)} places in {out}")
    if png is not None and shards is not None:
        _draw(png, shards, [(n.key, f"{n.similarity:.3f}") for n in found])
        print(f"pictures in {png}", file=sys.stderr)


def _lon_lat(place: str, crs: str) -> str:
    """``X,Y`` in ``crs`` as ``LONGITUDE,LATITUDE``. InferenceError if it is no place."""
    from maestro_scale.inference.errors import InferenceError

    try:
        from pyproj import Transformer
        from pyproj.exceptions import ProjError
    except ImportError:
        raise InferenceError("--crs needs pyproj: pip install 'maestro-scale[geo]'") from None
    try:
        x, y = (float(part) for part in place.split(","))
        lon, lat = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True).transform(x, y, errcheck=True)
    except (ValueError, ProjError) as error:
        raise InferenceError(f"{place!r} is not a place X,Y in {crs!r} ({error})") from None
    return f"{lon:.9f},{lat:.9f}"


def _draw(png: Path, shards: str, wanted: list[tuple[str, str]]) -> None:
    """A contact sheet of tiles by (key, text)."""
    from maestro_scale.inference.errors import InferenceError
    from maestro_scale.shards.format.codec import Sample
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.preview import read_samples
    from maestro_scale.shards.read.store import Store
    from maestro_scale.shards.temporary import temporary_folder
    from maestro_scale.tracking.contact_sheet import contact_sheet

    manifest = Manifest.load(shards)
    keys = {key for key, _ in wanted}
    samples: dict[str, Sample] = {}
    with temporary_folder() as cache:
        store = Store(shards, cache, 2**40)
        for shard in manifest.shards:
            numbers = [n for n, key in enumerate(store.read_keys(shard)) if key in keys - samples.keys()]
            samples |= {sample.key: sample for sample in read_samples(shards, shard, numbers)}
        tiles = [(samples[key], text) for key, text in wanted if key in samples]
        if not tiles:
            raise InferenceError(
                f"{shards} has none of the tiles that were found; give the shards that were embedded"
            )
        contact_sheet(png, tiles, manifest.spec)
