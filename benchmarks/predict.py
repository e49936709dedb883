"""Maps of large scenes: memory and time of ``maestro-scale predict``, and how little a map depends on its windows.

    python -m benchmarks.predict --work /tmp/predict --side 30000        # memory: one scene of 30,000 × 30,000 pixels
    python -m benchmarks.predict --work /tmp/predict --seams             # agreement between offsets of the windows

Memory: a scene of three bands, an encoder with random weights and a head of 19 classes, windows of 512 × 512 pixels
that overlap by --overlap; a process of its own predicts, and its largest resident memory is what the kernel reports.

Seams: a small encoder with a head learns on synthetic tiles of PASTIS-HD and FLAIR-HUB as in benchmarks/decoders.py;
maps of the tiles of the test split are predicted with windows at two offsets, without blending (overlap 0) and with it.
The table has the share of pixels that have the same class, and the accuracy of both. Results are in
benchmarks/results/predict.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.decoders import SIZE, Case, read_crops, resolved, train, write_shards
from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.finetune.predictor import MaestroPredictor, build_predictor
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.inference import command, run
from maestro_scale.inference.folder import Folder
from maestro_scale.inference.outputs import ClassMap
from maestro_scale.inference.source import Layout
from maestro_scale.inference.windows import stride_m
from maestro_scale.interop.export import write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.from_arrays import Raster, describe
from maestro_scale.training.run_dir import git_revision

RESULTS = Path(__file__).parent / "results" / "predict.json"
CLASSES = tuple(f"class {i}" for i in range(19))
PIXEL_M, WINDOW = 0.2, 512
LR = 5e-4  # with 3e-3 the networks of the seams do not learn
CASES = (
    Case("pastis_hd", 10, 400, 16, "{spot: null, s2: {num_dates: 4}, s1_asc: null, s1_des: null}", 320.0),
    Case(
        "flair_hub",
        60,
        400,
        16,
        "{aerial: {image_size: 128}, s2: null, dem: null, s1_asc: null, s1_des: null}",
        25.6,
    ),
)


def write_scene(path: Path, side: int) -> None:
    """A scene of three bands in blocks, written once; compressible, as photographs are."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 3,
        "dtype": "uint8",
        "compress": "deflate",
    }
    place = {"crs": "EPSG:2154", "transform": from_origin(650_000, 6_860_000, PIXEL_M, PIXEL_M)}
    blocks = {"tiled": True, "blockxsize": 512, "blockysize": 512}
    with rasterio.open(partial, "w", **profile, **place, **blocks) as image:
        for row in range(0, side, 512):
            for column in range(0, side, 512):
                height, width = min(512, side - row), min(512, side - column)
                y, x = np.mgrid[row : row + height, column : column + width]
                waves = [np.sin(y / 97 + k) + np.sin(x / (61 + 9 * k)) for k in range(3)]
                values = (np.stack(waves) * 50 + 128).astype(np.uint8)
                image.write(values, window=Window(column, row, width, height))
    partial.rename(path)


def write_photo_model(folder: Path) -> DatasetSpec:
    """An encoder with random weights and a head of 19 classes; its windows have WINDOW pixels per side."""
    spec = describe(
        "photo",
        WINDOW * PIXEL_M,
        [
            Raster(
                "aerial", ("R", "G", "B"), PIXEL_M, "uint8", patch=32, divisor=255.0, mask_bands=("nodata",)
            )
        ],
        [Target("cover", "segmentation", CLASSES, resolution_m=PIXEL_M)],
    )
    config = ModelConfig(
        spec.sensors,
        SIZE,
        spec.pos_grid,
        inter_depth=1,
        ref_sensor="aerial",
        heads=spec.targets,
        dataset="photo",
    )
    record = Finetuned(spec, "cover", "miou", "finetune", 1, 0.5, 0.5)
    state = Maestro(config, decodes=False).initialise(0).state_dict()
    write_model(folder, state, config, {"step": 1}, record)
    return spec


def predict_scene(work: Path, side: int, overlap: float) -> dict:
    """Predict the scene in this process, and print what it took."""
    started = time.perf_counter()
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model(work / "photo")
    options = command.Options(files=str(work / f"scene-{side}"), overlap=overlap)
    how = run.Run(torch.device("cpu"))
    windows, _ = command.predict(model, str(work / "photo.yaml"), work / f"map-{side}", options, how)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "side": side,
        "overlap": overlap,
        "windows": windows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(peak_kib / 2**20, 3),
        "libraries_gib": round(base_kib / 2**20, 3),
    }


def measure_memory(work: Path, side: int, overlap: float) -> dict:
    """As ``predict_scene``, in a process of its own."""
    work.mkdir(parents=True, exist_ok=True)
    write_scene(work / f"scene-{side}" / "photo.tif", side)
    write_photo_model(work / "photo")
    (work / "photo.yaml").write_text(
        f"name: photo\ntile_m: {WINDOW * PIXEL_M:g}\ngrid: {{}}\nrasters:\n  aerial:\n    files: photo.tif\n"
        f"    bands: [R, G, B]\n    resolution_m: {PIXEL_M}\n    dtype: uint8\n    quantity: image\n"
        "    dates: {from: constant, date: 2020-06-01}\n    sensor: {patch: 32}\n"
    )
    subprocess.run(["rm", "-rf", str(work / f"map-{side}")], check=True)
    words = [sys.executable, "-m", "benchmarks.predict", "--work", str(work), "--inner", str(side)]
    words.append(f"--overlap={overlap:g}")
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def learned(case: Case, work: Path) -> tuple[Maestro, DatasetSpec, Path]:
    """A model that has learned the segmentation of a case from all its tiles."""
    shards = write_shards(case, work)
    spec = resolved(case, shards, work)
    crops = read_crops(case, shards, spec, work)
    loss = target_loss_for(task_for(spec))
    view = {"sensors": spec.sensors, "pos_grid": spec.pos_grid, "ref_sensor": spec.ref_sensor}
    config = ModelConfig(
        size=SIZE, inter_depth=1, norm="token", dataset=spec.name, crop_m=spec.crop_m, **view
    )
    network = build_predictor(Maestro(config).initialise(0), spec.name, loss, 0, True, "attentive")
    assert isinstance(network, MaestroPredictor)
    train(network, crops, case, 0, LR)
    target = loss.task.target
    folder = work / f"{case.dataset}_model"
    record = Finetuned(spec, target.name, "miou", "finetune", case.steps, 0.5, 0.5)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("target_loss")}
    write_model(folder, state, network.config, {"step": case.steps}, record)
    return load_model(folder), spec, shards


def measure_seams(case: Case, work: Path) -> list[dict]:
    """A row per overlap: agreement of two offsets, and accuracies."""
    import rasterio

    model, _, shards = learned(case, work)
    options = command.Options(splits=("test",), cache_dir=work / "cache")
    data = command.open_data(model, str(shards), options)
    spec, _ = command.view_on(model, data.spec)
    target = model.config.heads[0]
    assert target.resolution_m is not None
    step_m = max(spec.modality(s.source).resolution_m for s in spec.sensors)
    rows = []
    for overlap in (0.0, 0.5, 0.75):
        layout = Layout(target.resolution_m, stride_m(spec.crop_m, overlap, [step_m, target.resolution_m]))
        maps = []
        started = time.perf_counter()
        for offset in (0.0, 0.5):
            source = command.open_source(data, spec, layout, options, offset)
            out = work / f"maps-{case.dataset}-{overlap:g}-{offset:g}"
            subprocess.run(["rm", "-rf", str(out)], check=True)
            run.predict_maps(
                source, ClassMap(model, target, False), Folder(out, {"x": 1}), run.Run(torch.device("cpu"))
            )
            read = []
            for area in source.areas:
                with rasterio.open(Folder(out, {"x": 1}).file("", area.name, ".tif")) as image:
                    read.append(image.read(1))
            maps.append(np.stack(read))
        truth = np.stack([_labels(data, target.name, area.name) for area in source.areas])
        counted = np.isin(truth, [i for i in range(len(target.classes)) if i not in target.ignored])
        accuracies = [float((m == truth)[counted].mean()) for m in maps]
        rows.append(
            {
                "dataset": case.dataset,
                "overlap": overlap,
                "stride_m": layout.stride_m,
                "agreement": float((maps[0] == maps[1]).mean()),
                "accuracy": accuracies,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _labels(data: command.Data, target: str, key: str) -> np.ndarray:
    """The stored labels of a tile."""
    from maestro_scale.shards.read.preview import read_samples

    assert data.manifest is not None
    for shard in data.manifest.shards_of(data.splits):
        for sample in read_samples(data.address, shard, range(shard.samples)):
            if sample.key == key:
                return sample.array(f"target.{target}")
    raise KeyError(key)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data, kept between runs")
    parser.add_argument("--side", type=int, nargs="*", default=[], help="pixels per side of scenes")
    parser.add_argument(
        "--seams", nargs="*", choices=[c.dataset for c in CASES], help="datasets, all by default"
    )
    parser.add_argument("--steps", type=int, help="of training, instead of those of each case")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="of the windows of scenes; 0 takes a quarter of the time of 0.5",
    )
    parser.add_argument("--inner", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.inner:
        print(json.dumps(predict_scene(args.work, args.inner, args.overlap)))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"memory": [], "seams": []}
    for side in args.side:
        row = measure_memory(args.work, side, args.overlap)
        print(row, flush=True)
        record["memory"] = [r for r in record["memory"] if r["side"] != side] + [row]
    for case in CASES if args.seams is not None else ():
        if not args.seams or case.dataset in args.seams:
            chosen = dataclasses.replace(case, steps=args.steps or case.steps)
            rows = measure_seams(chosen, args.work)
            record["seams"] = [r for r in record["seams"] if r["dataset"] != case.dataset] + rows
    record["memory"].sort(key=lambda r: r["side"])
    record["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record["revision"] = git_revision()
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    console = Console(width=120)
    table = Table(title=f"scenes of three bands, windows of {WINDOW} pixels, 19 classes, a CPU")
    for column in ("pixels per side", "overlap", "windows", "seconds", "peak memory", "of it libraries"):
        table.add_column(column)
    for r in record["memory"]:
        table.add_row(
            f"{r['side']:,}",
            f"{r.get('overlap', 0.5):g}",
            f"{r['windows']:,}",
            f"{r['seconds']}",
            f"{r['peak_gib']:.2f} GiB",
            f"{r['libraries_gib']:.2f} GiB",
        )
    console.print(table)
    table = Table(title="maps with windows at two offsets")
    for column in ("dataset", "overlap", "same class", "accuracy"):
        table.add_column(column)
    for r in record["seams"]:
        accuracy = " / ".join(f"{100 * a:.2f} %" for a in r["accuracy"])
        table.add_row(r["dataset"], f"{r['overlap']:g}", f"{100 * r['agreement']:.2f} %", accuracy)
    console.print(table)
    return 1 if any(r["peak_gib"] >= 2 for r in record["memory"]) else 0


if __name__ == "__main__":
    sys.exit(main())
