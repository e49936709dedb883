"""Commands on models: list, export, convert and publish them, and compute embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maestro_scale.cli.options import CACHE_DIR, CacheDir, Device, Precision, check_choice
from maestro_scale.errors import shorten
from maestro_scale.escaping import printable, python_command, shell_command

_EMBEDDINGS: tuple[Literal["vector", "tokens"], ...] = ("vector", "tokens")
_PRECISIONS: tuple[Literal["auto", "bf16", "fp32"], ...] = ("auto", "bf16", "fp32")
_FORMATS: tuple[Literal["parquet", "tiff"], ...] = ("parquet", "tiff")
_DEVICES: tuple[Literal["auto", "cpu"], ...] = ("auto", "cpu")


def export(
    run_dir: Annotated[
        Path,
        typer.Argument(
            help="A run directory with at least one checkpoint, or that of a finetuning (OUT/finetune)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for model.safetensors and config.json.")],
    ema: Annotated[
        bool, typer.Option(help="Export the moving average of the weights (optim.ema) instead.")
    ] = False,
    register: Annotated[
        str, typer.Option(help="Also register it as a new version of this model in MLflow's model registry.")
    ] = "",
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Alias of the registered version, besides newest. Can be repeated."),
    ] = None,
) -> None:
    """Export the newest checkpoint as safetensors; of a finetuning, the tested weights with their head. ``load_model``
    needs only torch to load it."""
    from maestro_scale.evaluation.features.load_encoder import export_run
    from maestro_scale.tracking import registry

    if register:
        registry.check_tracked(run_dir)  # before anything is written
    model = export_run(run_dir, out, ema)
    command = shell_command("maestro-scale", "embed", model, "SHARDS", "OUT")
    print(f"exported to {model}; next: {command}, or load_model({str(model)!r})")
    if register:
        version = registry.register(out, register, run_dir, alias or ())
        print(f"registered as {version.uri} at {version.store}; next: {version.load_command}")


def convert_ign(
    src: Annotated[
        Path,
        typer.Argument(
            help="The authors' Lightning checkpoint; or a model of this project, to convert it back."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder for the converted model; or file for the authors' checkpoint.")
    ],
    weights: Annotated[str, typer.Option(help="raw, or ema: the moving average in the checkpoint.")] = "raw",
    dataset: Annotated[
        str | None,
        typer.Option(help="Dataset whose sensors the model has, if the file does not determine it."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="config.json that describes the model, instead of --dataset.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Number of attention heads, for a non-standard size.")
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option(min=1, help="Number of attention heads of the decoder.")
    ] = None,
    fusion: Annotated[str | None, typer.Option(help="group, mod, monotemp or shared.")] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Sensor, or part such as heads.cosia, not to convert. Can be repeated."),
    ] = None,
) -> None:
    """Convert a checkpoint of IGNF/MAESTRO to safetensors that ``load_model`` reads, or such a model back."""
    from rich.console import Console

    from maestro_scale.interop import convert as interop
    from maestro_scale.interop.convert_back import convert_to_reference
    from maestro_scale.interop.export import ExportError
    from maestro_scale.interop.reference_model import ConversionHints
    from maestro_scale.interop.transfer import transfer_table

    if interop.is_exported_model(src):
        given = {
            "--weights": weights != "raw",
            "--dataset": dataset,
            "--like": like,
            "--heads": heads,
            "--decoder-heads": decoder_heads,
            "--fusion": fusion,
            "--leave-out": leave_out,
        }
        if unused := [option for option, value in given.items() if value]:
            raise ExportError(
                f"{unused[0]} is for checkpoints of the authors; {src} is converted to theirs: leave it out"
            )
        notes = convert_to_reference(src, out)
        print(f"{src} converted to the authors' format in {out}")
        for note in notes:
            print(printable(f"note: {note}"))
        return
    for option, value, valid in (
        ("--weights", weights, tuple(interop.PREFIXES)),
        ("--fusion", fusion, (None, "group", "mod", "monotemp", "shared")),
    ):
        if value not in valid:
            raise ExportError(f"{option} {value}: use one of {', '.join(v for v in valid if v)}")
    hints = ConversionHints(heads, decoder_heads, fusion, tuple(leave_out or ()))
    options = interop.ConvertOptions("ema" if weights == "ema" else "raw", dataset, like, hints)
    parts = interop.convert(src, out, options)
    Console(width=110).print(transfer_table(parts, f"{src.name} to {out}"))


def models(
    model: Annotated[
        str | None,
        typer.Argument(help="Describe this model: a name of the list, hf://owner/name, a folder or a run."),
    ] = None,
) -> None:
    """List the published models that ``load_model`` fetches by name, or describe one model."""
    from rich.console import Console

    from maestro_scale.interop.model_tables import published_table, sensor_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if model is None:
        console.print(published_table())
        command = python_command("from maestro_scale import load_model; load_model('NAME')")
        print(f"next: {command}, or any command that takes a MODEL")
        return
    from maestro_scale.evaluation.features.load_encoder import load_encoder

    found, step = load_encoder(Path(model))
    console.print(sensor_table(found, model, step))


def push(
    run: Annotated[
        Path,
        typer.Argument(help="A run directory, that of a finetuning, a checkpoint, or an exported model."),
    ],
    address: Annotated[str, typer.Argument(help="hf://owner/name[@branch][/folder]; created if missing.")],
    ema: Annotated[
        bool, typer.Option(help="Publish the moving average of the weights (optim.ema) instead.")
    ] = False,
    license: Annotated[
        str, typer.Option(help="Of the weights, as the hub names it: apache-2.0, cc-by-4.0, other, …")
    ] = "",
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with results.json for the card. Repeatable. [default: those in RUN]"),
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder that would be uploaded, and stop.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where --dry-run writes. [default: the model's name]")
    ] = None,
) -> None:
    """Publish a model on the Hugging Face hub: weights, configuration, and a model card written from its run.

    Logs in as the hub's own client: HF_TOKEN, or `hf auth login`."""
    from maestro_scale.interop.hub import HubAddress
    from maestro_scale.publishing.push import upload, write_folder
    from maestro_scale.shards.temporary import temporary_folder

    where = HubAddress.parse(address)
    chosen = tuple(results or ())
    if dry_run:
        out = folder or Path(str(where).rpartition("/")[2].partition("@")[0])
        names = write_folder(run, out, where, ema, license, chosen)
        print(f"{', '.join(names)} in {out}; next: read README.md, then push without --dry-run")
        return
    with temporary_folder() as temporary:
        out = temporary / "model"
        write_folder(run, out, where, ema, license, chosen)
        url = upload(out, where, private)
    command = python_command(f"from maestro_scale import load_model; load_model({str(where)!r})")
    print(f"published as {where} ({url}); next: {command}")


def embed(
    model: Annotated[
        Path, typer.Argument(help="A run directory, one of its checkpoints, or an exported model.")
    ],
    shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds manifest.json.")],
    out: Annotated[
        Path, typer.Argument(help="Folder for the embeddings. An interrupted run resumes where it stopped.")
    ],
    split: Annotated[str, typer.Option(help="Split to embed.")] = "test",
    what: Annotated[
        str, typer.Option(help="vector: one per crop; tokens: the token grid of each sensor.")
    ] = "vector",
    format: Annotated[
        str, typer.Option(help="parquet: one file per shard; tiff: one image per tile and sensor.")
    ] = "parquet",
    batch: Annotated[int, typer.Option(min=1, help="Crops per forward pass.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    cache_dir: CacheDir = CACHE_DIR,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Write an encoder's embeddings of a split. Under torchrun, deepspeed or srun the ranks share the work."""
    from maestro_scale.evaluation.embedding import EmbeddingWriter
    from maestro_scale.evaluation.features.adapt import adapt_encoder
    from maestro_scale.evaluation.features.load_encoder import load_encoder
    from maestro_scale.evaluation.results import EvaluationError
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.store import Store
    from maestro_scale.tracking.terminal import progress
    from maestro_scale.training.device import bind_process, use_device
    from maestro_scale.training.manifests import UsedDataset, compare_manifests_of_launch

    embeddings = check_choice("--what", what, _EMBEDDINGS)
    file_format = check_choice("--format", format, _FORMATS)
    arithmetic = check_choice("--precision", precision, _PRECISIONS)
    binding = bind_process(check_choice("--device", device, _DEVICES))
    rank, world = binding.launch.rank, binding.launch.size
    manifest = Manifest.load(shards)
    spec = manifest.spec
    if split not in manifest.splits:
        there = ", ".join(manifest.splits)
        raise EvaluationError(
            f"{shards} has no split {shorten(split)}; there are: {there}; name one with --split"
        )
    compare_manifests_of_launch(binding.launch, [UsedDataset(spec.name, shards, manifest, (split,))])
    encoder = load_encoder(model)[0]
    notes: list[str] = []
    if spec.name not in {v.dataset for v in encoder.config.views}:
        encoder, notes = adapt_encoder(encoder, spec)
    encoder.to(use_device(binding))
    store = Store(shards, cache_dir, 100 * 2**30)
    writer = EmbeddingWriter(encoder, store, manifest, embeddings, file_format, batch, workers, arithmetic)
    for note in notes if rank == 0 else ():
        print(printable(note))
    share = f", rank 0's share of {world}" if world > 1 else ""
    with progress(f"embed {spec.name} {split}{share}", "crops", rank) as update:
        num_written = writer.write(out, split, rank, world, update)
    if rank == 0:
        print(
            f"{num_written} crops embedded{share} (existing files are kept) in {out}; "
            f"next: {_preview_command(out, file_format)}"
        )


def _preview_command(out: Path, file_format: str) -> str:
    """A command that shows written embeddings."""
    if file_format == "parquet":
        return python_command(f"import pyarrow.dataset as d; print(d.dataset({str(out)!r}).to_table())")
    find = shell_command("find", out, "-name", "*.tif")
    return f'rio info "$({find} | head -1)"'
