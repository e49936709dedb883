"""What ``maestro-scale predict`` does: the source, the view of the model on it, the output, and the record of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from maestro_scale import datasets
from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.dataset import only, open_described
from maestro_scale.datasets.description.load import find_description, load_description
from maestro_scale.datasets.description.sections.splits import Splits
from maestro_scale.datasets.description.spec import dataset_spec
from maestro_scale.datasets.description.splits import WHOLE
from maestro_scale.datasets.spec import DatasetSpec, RawDataset
from maestro_scale.datasets.spec_check import crop_problems
from maestro_scale.errors import dotted
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.on_device import eval_precision
from maestro_scale.inference import run
from maestro_scale.inference.errors import InferenceError
from maestro_scale.inference.folder import Folder
from maestro_scale.inference.outputs import (
    ClassMap,
    EmbeddingMap,
    EmbeddingPoints,
    MapOutput,
    TargetPoints,
    ValueMap,
)
from maestro_scale.inference.scenes import open_scene_source
from maestro_scale.inference.source import Layout, Source, from_raw, from_shards
from maestro_scale.inference.windows import stride_m
from maestro_scale.model.config import MAX_OVERLAP, OVERLAP
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.format.checksum import MANIFEST
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import open_storage

EmbeddingFormat = Literal["cog", "parquet"]
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Options:
    """What to predict of what. ``files``: where the files of a description are, None: next to it; ``splits``: of shards
    and datasets, None: all of shards, the test split of a dataset. ``overlap``: share of a window, None: for maps that
    of the finetuning's recipe, for points nothing. ``embeddings``: instead of the target. ``overrides``: of the
    description."""

    splits: tuple[str, ...] | None = None
    files: str | None = None
    dataset: str | None = None
    target: str | None = None
    overlap: float | None = None
    probabilities: bool = False
    embeddings: EmbeddingFormat | None = None
    sensor: str | None = None
    overrides: tuple[str, ...] = ()
    cache_dir: Path = Path("~/.cache/maestro-scale")
    cache_bytes: int = 100 * 2**30


@dataclass(frozen=True)
class Data:
    """What SRC is: ``spec`` as it says itself; exactly one of ``manifest``, ``scenes`` and ``tiles``, of which the last
    two may have a ``description``."""

    address: str
    spec: DatasetSpec
    manifest: Manifest | None = None
    scenes: Description | None = None
    tiles: RawDataset | None = None
    splits: tuple[str, ...] = ()
    description: Description | None = None


def predict(
    model: Maestro, src: str, out: Path, options: Options, how: run.Run, progress: run.Progress | None = None
) -> tuple[int, list[str]]:
    """Predict the data of ``src`` into ``out``. Returns the number of windows that this rank has computed, and notes
    for the user. InferenceError, DatasetError, DocumentError, ManifestError where that is impossible."""
    data = open_data(model, src, options)
    spec, notes = view_on(model, data.spec, options.dataset)
    output = _output(model, spec, options)
    points = output if isinstance(output, TargetPoints | EmbeddingPoints) else None
    maps = None if isinstance(output, TargetPoints | EmbeddingPoints) else output
    overlap = options.overlap
    if overlap is None:
        overlap = 0.0 if points else model.finetuned.overlap if model.finetuned else OVERLAP
    if not 0 <= overlap <= MAX_OVERLAP:
        raise InferenceError(f"--overlap {overlap:g}: is a share of a window, from 0 to {MAX_OVERLAP:g}")
    step_m = max(spec.modality(s.source).resolution_m for s in spec.sensors)
    pixel_m = maps.resolution_m if maps else step_m
    tokens_m = [spec.crop_m / sensor.grid for sensor in spec.sensors]
    layout = Layout(pixel_m, stride_m(spec.crop_m, overlap, [step_m, pixel_m], tokens_m))
    reached = 1 - layout.stride_m / spec.crop_m
    if reached < overlap - 1e-6:
        notes.append(
            f"windows overlap by {reached:.2g}, not {overlap:g}: they are {spec.crop_m:g} m wide, and begin at whole "
            f"pixels of {step_m:g} m"
        )
    source = open_source(data, spec, layout, options)
    folder = Folder(out, _record(model, data, source, layout, options, how))
    if points is not None:
        num_windows, found = run.predict_points(source, points, folder, spec.name, how, progress)
    else:
        assert maps is not None
        num_windows, found = run.predict_maps(source, maps, folder, how, progress)
    return num_windows, [*notes, *source.notes, *found]


def open_data(model: Maestro, src: str, options: Options) -> Data:
    """Find out what ``src`` is: shards, a description, or a folder of a dataset that the model knows."""
    if src.endswith(_YAML):
        description = load_description(src, options.overrides)
        return _described(description, options.files or str(Path(src).parent), options)
    if options.overrides:
        raise InferenceError("--set changes a description: give MY.yaml as SRC")
    if options.files:
        raise InferenceError("--files is where the files of a description are: give MY.yaml as SRC")
    if open_storage(src).size(MANIFEST) is not None:
        manifest = Manifest.load(src)
        splits = options.splits or manifest.splits
        return Data(src, manifest.spec, manifest=manifest, splits=splits)
    name = options.dataset or model.config.dataset
    path = find_description(name)
    if path is not None:
        return _described(load_description(path), src, options)
    if name not in datasets.known():
        raise InferenceError(
            f"{src}: has no {MANIFEST}, and there is no reader for the model's dataset {name!r}: describe the files "
            "(docs/description.md) and give MY.yaml as SRC, with --files for their folder"
        )
    split = ",".join(options.splits or ("test",))
    tiles = datasets.open_raw(name, Path(src), split)
    return Data(src, tiles.spec, tiles=tiles, splits=(split,))


def _described(description: Description, src: str, options: Options) -> Data:
    if description.grid is not None:
        if options.splits:
            raise InferenceError("--split: scenes are mapped as a whole; leave it out, or use grid.area")
        return Data(src, dataset_spec(description), scenes=description, description=description)
    changes: dict[str, object] = {"targets": {}}
    if not options.splits:
        changes["splits"] = Splits()
    split = ",".join(options.splits or (WHOLE,))
    tiles = open_described(description.model_copy(update=changes), src, split)
    return Data(src, tiles.spec, tiles=tiles, splits=(split,), description=description)


def view_on(model: Maestro, stored: DatasetSpec, dataset: str | None = None) -> tuple[DatasetSpec, list[str]]:
    """(the stored dataset with the sensors and crop of the model, notes). InferenceError where it lacks all that the
    model reads, or stores other bands."""
    known = model.finetuned
    names = [v.dataset for v in model.config.views]
    name = dataset or (stored.name if stored.name in names else model.config.dataset)
    if name not in names:
        raise InferenceError(f"--dataset {name}: the model knows {', '.join(names)}")
    view = model.config.for_dataset(name)
    crop_m = known.spec.crop_m if known else view.crop_m or stored.crop_m
    there = {m.name for m in stored.modalities}
    sensors = tuple(s for s in view.sensors if s.source in there)
    missing = [s.name for s in view.sensors if s.source not in there]
    if not sensors:
        raise InferenceError(
            f"{stored.name} has {', '.join(sorted(there))}, but the model reads {', '.join(missing)}: give rasters "
            "these names in the description"
        )
    learned = {m.name: m for m in known.spec.modalities} if known else {}
    for sensor in sensors:
        modality = stored.modality(sensor.source)
        if max(sensor.bands) >= len(modality.bands):
            raise InferenceError(
                f"{stored.name}: {modality.name} has {len(modality.bands)} bands; the model reads number "
                f"{max(sensor.bands) + 1}"
            )
        trained = learned.get(sensor.source)
        if trained is not None and (trained.bands, trained.resolution_m) != (
            modality.bands,
            modality.resolution_m,
        ):
            raise InferenceError(
                f"{stored.name}: {modality.name} has the bands {', '.join(modality.bands)} at "
                f"{modality.resolution_m:g} m, the model was finetuned with {', '.join(trained.bands)} at "
                f"{trained.resolution_m:g} m: change the description"
            )
    ref = view.ref_sensor if view.ref_sensor in {s.name for s in sensors} else None
    names_used = {s.source for s in sensors}
    spec = replace(
        stored,
        name=name,
        crop_m=crop_m,
        pos_grid=view.pos_grid,
        sensors=sensors,
        ref_sensor=ref,
        targets=(),
        modalities=tuple(m for m in stored.modalities if m.name in names_used),
    )
    notes = [f"{stored.name} has no {', '.join(missing)}: the model predicts without"] if missing else []
    return spec, notes


def open_source(
    data: Data, spec: DatasetSpec, layout: Layout, options: Options, offset: float = 0.0
) -> Source:
    """The windows of the data."""
    if data.scenes is not None:
        return open_scene_source(data.scenes, data.address, spec, layout)
    for path, reason in crop_problems(spec):
        raise InferenceError(f"{dotted((spec.name, *path))}: {reason}")
    if data.tiles is not None:
        return from_raw(spec, data.tiles, layout, offset)
    assert data.manifest is not None
    store = Store(data.address, options.cache_dir, options.cache_bytes)
    return from_shards(spec, data.manifest, store, data.splits, layout, offset)


def _output(
    model: Maestro, spec: DatasetSpec, options: Options
) -> MapOutput | TargetPoints | EmbeddingPoints:
    if options.embeddings and (options.target or options.probabilities):
        given = "--target" if options.target else "--probabilities"
        raise InferenceError(
            f"{given} and --embeddings: embeddings are written instead of a target; leave one out"
        )
    if options.embeddings == "parquet":
        if options.sensor:
            raise InferenceError(
                "--sensor: a vector is of all sensors; leave it out, or use --embeddings cog"
            )
        return EmbeddingPoints(model, spec)
    if options.embeddings == "cog":
        return EmbeddingMap(model, spec, options.sensor)
    if options.sensor:
        raise InferenceError("--sensor chooses the tokens of --embeddings cog; leave it out")
    heads = {t.name: t for t in model.config.heads}
    if not heads or (options.target is None and len(heads) > 1) or options.target not in (None, *heads):
        raise InferenceError(
            f"--target: the model predicts {', '.join(heads)}; name one of them"
            if heads
            else "the model has no head to predict with: finetune it (evaluate --mode finetune) and give that run "
            "or its export, or write its embeddings (--embeddings cog)"
        )
    target = heads[options.target] if options.target else next(iter(heads.values()))
    if options.probabilities and target.kind != "segmentation":
        raise InferenceError(f"--probabilities: {target.name} is {target.kind}; leave it out")
    if not target.is_map:
        return TargetPoints(model, target)
    return (
        ValueMap(model, target)
        if target.kind == "regression"
        else ClassMap(model, target, options.probabilities)
    )


def _record(
    model: Maestro, data: Data, source: Source, layout: Layout, options: Options, how: run.Run
) -> dict[str, object]:
    """What the folder contains; equal on all ranks, however many they are."""
    return {
        "model": weights_digest(model),
        "source": data.address if "://" in data.address else str(Path(data.address).resolve()),
        "spec": _digest(json.dumps(asdict(replace(source.spec, title="")), default=str)),
        "description": data.description and _description_digest(data.description, source.spec),
        "data": source.digest(),
        "manifest": data.manifest and data.manifest.digest,
        "splits": list(data.splits),
        "stride_m": layout.stride_m,
        "resolution_m": layout.resolution_m,
        "batch": how.batch_size,
        "memory": how.most_bytes,
        "target": options.target,
        "probabilities": options.probabilities,
        "embeddings": options.embeddings,
        "sensor": options.sensor,
        "precision": eval_precision(how.device, how.precision),
    }


def _description_digest(description: Description, spec: DatasetSpec) -> str:
    """Of files, bands, dates, nodata and resampling of the rasters that the model reads. Grid, area of interest and
    sizes are in the digests of source and spec."""
    read = only(description, list(dict.fromkeys(s.source for s in spec.sensors)))
    return _digest(read.model_dump_json(include={"rasters", "sensors", "ref_date", "origin"}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def all_splits(text: Sequence[str]) -> tuple[str, ...] | None:
    """``--split a,b --split c`` as names; None for none."""
    return tuple(name for part in text for name in part.split(",") if name) or None
