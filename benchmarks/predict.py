"""Maps of large scenes: memory and time of ``maestro-scale predict``.

    python -m benchmarks.predict --work /tmp/predict --side 30000

A scene of three bands, an encoder with random weights and a head of 19 classes, windows of 512 × 512 pixels that
overlap by --overlap; a process of its own predicts, and its largest resident memory is what the kernel reports.
Results are in benchmarks/results/predict.json.
"""

from __future__ import annotations

import argparse
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

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.inference import command, run
from maestro_scale.interop.export import write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import Size
from maestro_scale.shards.write.from_arrays import Raster, describe
from maestro_scale.training.run_dir import git_revision

RESULTS = Path(__file__).parent / "results" / "predict.json"
CLASSES = tuple(f"class {i}" for i in range(19))
PIXEL_M, WINDOW = 0.2, 512
SIZE = Size(64, 3, 2, 32, 2, 1, 32, 1, 32, 2)


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


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data, kept between runs")
    parser.add_argument("--side", type=int, nargs="*", default=[], help="pixels per side of scenes")
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
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"memory": []}
    for side in args.side:
        row = measure_memory(args.work, side, args.overlap)
        print(row, flush=True)
        record["memory"] = [r for r in record["memory"] if r["side"] != side] + [row]
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
    return 1 if any(r["peak_gib"] >= 2 for r in record["memory"]) else 0


if __name__ == "__main__":
    sys.exit(main())
