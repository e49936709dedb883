"""How much a map of ``maestro-scale predict`` depends on where its windows begin.

    python -m benchmarks.seams --work /tmp/seams RESULTS/scratch …

Each model is the directory of a finetuning on synthetic PASTIS-HD or FLAIR-HUB, such as those of benchmarks/decoders.
Other tiles are generated, and those of their test split are mapped with windows at two places, half a stride apart in
both directions, without blending (overlap 0) and with it. The table has the share of pixels with the same class in both
maps, and the share of pixels that are right in each. Overlap 0 at the first place is the map by tiles. With a stride of
one pixel of the coarsest sensor there is no other place: all possible windows are used, and the maps are equal.
Results are in benchmarks/results/seams.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.evaluation.features.load_encoder import load_encoder
from maestro_scale.inference import command, run
from maestro_scale.inference.folder import Folder
from maestro_scale.inference.outputs import ClassMap
from maestro_scale.inference.source import Layout
from maestro_scale.inference.windows import stride_m
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.read.preview import read_samples
from maestro_scale.training.run_dir import git_revision

RESULTS = Path(__file__).parent / "results" / "seams.json"
OVERLAPS = (0.0, 0.5, 0.75)
SEED = 99  # no study has it


def write_tiles(dataset: str, tiles: int, work: Path) -> Path:
    """Shards with the test split of ``tiles`` tiles; written once."""
    shards, raw = work / f"{dataset}-{tiles}", work / f"{dataset}-{tiles}-raw"
    if not (shards / "manifest.json").exists():
        program = [sys.executable, "-m", "maestro_scale.cli"]
        synth = ["synth", dataset, str(raw), "--tiles", str(tiles), "--seed", str(SEED)]
        subprocess.run([*program, *synth], check=True)
        subprocess.run([*program, "shard", dataset, str(raw), str(shards), "--split", "test"], check=True)
    return shards


def measure(path: Path, work: Path, num_tiles: int) -> list[dict]:
    """A row per overlap: agreement of two maps, and their accuracies."""
    import rasterio

    model, _ = load_encoder(path)
    assert isinstance(model, Maestro)
    target = model.config.heads[0]
    dataset = model.config.dataset
    shards = write_tiles(dataset, num_tiles, work)
    options = command.Options(splits=("test",), cache_dir=work / "cache")
    data = command.open_data(model, str(shards), options)
    spec, _ = command.view_on(model, data.spec)
    assert target.resolution_m is not None
    step_m = max(spec.modality(s.source).resolution_m for s in spec.sensors)
    tokens_m = [spec.crop_m / sensor.grid for sensor in spec.sensors]
    labels = _labels(data, target.name)
    rows = []
    for overlap in OVERLAPS:
        stride = stride_m(spec.crop_m, overlap, [step_m, target.resolution_m], tokens_m)
        layout = Layout(target.resolution_m, stride)
        maps = []
        started = time.perf_counter()
        for offset in (0.0, 0.5):
            source = command.open_source(data, spec, layout, options, offset)
            out = work / f"maps-{dataset}-{overlap:g}-{offset:g}"
            shutil.rmtree(out, ignore_errors=True)
            folder = Folder(out, {"path": str(path)})
            run.predict_maps(source, ClassMap(model, target, False), folder, run.Run(torch.device("cpu")))
            read = []
            for area in source.areas:
                with rasterio.open(folder.file("", area.name, ".tif")) as image:
                    read.append(image.read(1))
            maps.append(np.stack(read))
        truth = np.stack([labels[area.name] for area in source.areas])
        counted = np.isin(truth, [i for i in range(len(target.classes)) if i not in target.ignored])
        row = {
            "dataset": dataset,
            "tiles": len(truth),
            "overlap": overlap,
            "stride_m": layout.stride_m,
            "agreement": float((maps[0] == maps[1])[counted].mean()),
            "accuracy": [float((m == truth)[counted].mean()) for m in maps],
            "seconds": round(time.perf_counter() - started, 1),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def _labels(data: command.Data, target: str) -> dict[str, np.ndarray]:
    """The stored labels by key."""
    assert data.manifest is not None
    found = {}
    for shard in data.manifest.shards_of(data.splits):
        for sample in read_samples(data.address, shard, range(shard.samples)):
            found[sample.key] = sample.array(f"target.{target}")
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, help="directories of finetunings, one per dataset")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, kept between runs")
    parser.add_argument(
        "--tiles", type=int, default=40, help="of the synthetic dataset; its test split is mapped"
    )
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [row for path in args.models for row in measure(path, args.work, args.tiles)]
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {"machine": machine, "revision": git_revision(), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title="maps with windows at two places")
    for column in ("dataset", "overlap", "same class", "accuracy"):
        table.add_column(column)
    for r in rows:
        accuracy = " / ".join(f"{100 * a:.2f} %" for a in r["accuracy"])
        table.add_row(r["dataset"], f"{r['overlap']:g}", f"{100 * r['agreement']:.2f} %", accuracy)
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
