"""Decoders of a finetuning on synthetic PASTIS-HD and FLAIR-HUB: attentive, linear and UPerNet, on the same encoder.

    python -m benchmarks.decoders --work /tmp/decoders

A small encoder with random weights learns with each decoder from the same crops in the same order, as in mode
``scratch``. The crops of all tiles are divided at random: a few tiles hold few of the classes each, so that scores of
other tiles would say more about the choice of tiles than about decoders. Per seed (of weights and order) the mIoU of
the test crops. Prints a table and writes benchmarks/results/decoders.json; exit code 1 if UPerNet is worse than the
attentive head by more than twice the standard error of the paired differences over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.evaluation.finetune.predictor import MaestroPredictor, build_predictor
from maestro_scale.evaluation.probes.dense import tile_confusion
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.model.config import DecoderName, ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import Size
from maestro_scale.recipe import load_recipe, resolve_spec
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import git_revision

RESULTS = Path(__file__).parent / "results" / "decoders.json"
DECODERS: tuple[DecoderName, ...] = ("attentive", "linear", "upernet")
SIZE = Size(64, 3, 2, 32, 2, 1, 32, 1, 32, 2)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """A dataset at small scale: ``sensors`` and ``crop_m`` as in a recipe, ``steps`` of ``batch`` crops."""

    dataset: str
    tiles: int
    steps: int
    batch: int
    sensors: str
    crop_m: float | None = None


CASES = (
    Case("pastis_hd", 10, 300, 16, "{spot: null, s2: {num_dates: 4}, s1_asc: null, s1_des: null}"),
    Case(
        "flair_hub",
        60,
        300,
        16,
        "{aerial: {image_size: 128}, s2: null, dem: null, s1_asc: null, s1_des: null}",
        25.6,
    ),
)
TEST_SHARE = 0.25


def write_shards(case: Case, work: Path) -> Path:
    """The shards of a case, written once."""
    shards, raw = work / case.dataset, work / f"{case.dataset}_raw"
    if not (shards / "manifest.json").exists():
        command = [sys.executable, "-m", "maestro_scale.cli"]
        subprocess.run(
            [*command, "synth", case.dataset, str(raw), "--tiles", str(case.tiles), "--seed", "3"], check=True
        )
        for split in SPLITS:
            subprocess.run(
                [*command, "shard", case.dataset, str(raw), str(shards), "--split", split], check=True
            )
    return shards


def resolved(case: Case, shards: Path, work: Path) -> DatasetSpec:
    """The spec of a case's view."""
    path = work / f"{case.dataset}.yaml"
    crop = f", crop_m: {case.crop_m}" if case.crop_m else ""
    path.write_text(
        f"name: decoders\ndata: {{mixture: [{{dataset: {case.dataset}, shards: {str(shards)!r}, "
        f"sensors: {case.sensors}{crop}}}]}}\n"
    )
    recipe = load_recipe(str(path))
    return resolve_spec(Manifest.load(str(shards)).spec, recipe.data.mixture[0])


def read_crops(case: Case, shards: Path, spec: DatasetSpec, work: Path) -> list[Batch]:
    """Every crop of every tile, as an evaluation prepares it: batches of one."""
    manifest, store = Manifest.load(str(shards)), Store(str(shards), work / "cache", 20 * 2**30)
    source = Source(spec, manifest.shards_of(SPLITS), store)
    return [batch.map(torch.clone) for batch in EvalLoader(source, 1)]


def joined(crops: list[Batch]) -> Batch:
    """One batch of several crops."""

    def stacked(part: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(c, part)[name] for c in crops]) for name in getattr(crops[0], part)}

    ref_date = torch.cat([c.ref_date for c in crops])
    parts = [stacked(part) for part in ("pixels", "dates", "noise", "targets")]
    return Batch(crops[0].dataset, *parts[:2], ref_date, *parts[2:], tuple(c.keys[0] for c in crops))


def train(network: MaestroPredictor, crops: list[Batch], case: Case, seed: int, lr: float) -> float:
    """Train with one cycle; returns seconds of computation per step."""
    loss, rng = network.target_loss, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, case.steps, pct_start=0.2)
    started = time.process_time()
    for _ in range(case.steps):
        batch = joined([crops[i] for i in rng.choice(len(crops), case.batch, replace=False)])
        labels = loss.loss_targets(loss.task.label_tensor(batch))
        share, _ = network(batch, labels, loss.num_terms(labels)[None])
        optimizer.zero_grad()
        share.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (time.process_time() - started) / case.steps


@torch.no_grad()
def score(network: MaestroPredictor, crops: list[Batch]) -> float:
    """mIoU of crops."""
    loss = network.target_loss
    counts = []
    for first in range(0, len(crops), 32):
        batch = joined(crops[first : first + 32])
        predicted = loss.predict(network.logits(batch)).numpy()
        truth = loss.loss_targets(loss.task.label_tensor(batch)).numpy()
        counts += [
            tile_confusion(len(loss.task.classes), p, t) for p, t in zip(predicted, truth, strict=True)
        ]
    return float(loss.task.statistic(np.sum(counts, axis=0)))


def measure(case: Case, work: Path, seeds: int, lr: float, decoders: list[DecoderName]) -> list[dict]:
    """A row per decoder and seed."""
    shards = write_shards(case, work)
    spec = resolved(case, shards, work)
    crops = read_crops(case, shards, spec, work)
    order = np.random.default_rng(0).permutation(len(crops))
    num_test = round(TEST_SHARE * len(crops))
    test, fit = ([crops[i] for i in part] for part in (order[:num_test], order[num_test:]))
    loss = target_loss_for(task_for(spec))
    view = {"sensors": spec.sensors, "pos_grid": spec.pos_grid, "ref_sensor": spec.ref_sensor}
    config = ModelConfig(
        size=SIZE, inter_depth=1, norm="token", dataset=spec.name, crop_m=spec.crop_m, **view
    )
    rows = []
    for seed in range(seeds):
        encoder = Maestro(config).initialise(seed)
        for decoder in decoders:
            network = build_predictor(encoder, spec.name, loss, seed, True, decoder)
            assert isinstance(network, MaestroPredictor)
            seconds = train(network, fit, case, seed, lr)
            row = {"dataset": case.dataset, "decoder": decoder, "seed": seed, "test": score(network, test)}
            heads = sum(p.numel() for p in network.heads.parameters())
            rows.append(row | {"step_s": round(seconds, 4), "head_parameters": heads})
            print(rows[-1], flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Per dataset and decoder: mean, deviation, and the paired difference to attentive."""
    found = []
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        scores: dict[str, dict[int, float]] = {}
        for decoder in dict.fromkeys(r["decoder"] for r in rows if r["dataset"] == dataset):
            chosen = [r for r in rows if r["dataset"] == dataset and r["decoder"] == decoder]
            scores[decoder] = {r["seed"]: r["test"] for r in chosen}
            values = list(scores[decoder].values())
            row = {"dataset": dataset, "decoder": decoder, "seeds": len(values)}
            row |= {"miou": statistics.mean(values), "deviation": _deviation(values)}
            row |= {k: statistics.median(r[k] for r in chosen) for k in ("step_s", "head_parameters")}
            paired = [v - scores["attentive"][s] for s, v in scores[decoder].items()]
            row |= {
                "difference": statistics.mean(paired),
                "standard_error": _deviation(paired) / len(paired) ** 0.5,
            }
            row["resolved"] = len(paired) > 1 and abs(row["difference"]) > 2 * row["standard_error"]
            found.append(row)
    return found


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data, kept between runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--datasets", nargs="+", default=[c.dataset for c in CASES])
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS))
    parser.add_argument("--steps", type=int, help="instead of those of each case")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows: list[dict] = []
    for case in CASES:
        if case.dataset in args.datasets:
            if args.steps:
                case = Case(**{**vars(case), "steps": args.steps})
            rows += measure(case, args.work, args.seeds, args.lr, args.decoders)
    if RESULTS.exists():  # of the other datasets
        rows = [
            r for r in json.loads(RESULTS.read_text())["rows"] if r["dataset"] not in args.datasets
        ] + rows
    found = summary(rows)
    table = Table(title="mIoU in % on synthetic tiles, mean ± deviation over seeds")
    for column in (
        "dataset",
        "decoder",
        "mIoU",
        "minus attentive",
        "s per step",
        "parameters",
    ):
        table.add_column(column)
    for r in found:
        table.add_row(
            r["dataset"],
            r["decoder"],
            f"{100 * r['miou']:.1f} ± {100 * r['deviation']:.1f}",
            ""
            if r["decoder"] == "attentive"
            else f"{100 * r['difference']:+.1f} ± {100 * r['standard_error']:.1f}",
            f"{r['step_s']:.2f}",
            f"{r['head_parameters']:,.0f}",
        )
    Console(width=120).print(table)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {
        "machine": machine,
        "revision": git_revision(),
        "cases": [vars(c) for c in CASES if c.dataset in {r["dataset"] for r in rows}],
        "size": vars(SIZE),
        "lr": args.lr,
        "test_share": TEST_SHARE,
        "summary": found,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    worse = [r for r in found if r["decoder"] == "upernet" and r["resolved"] and r["difference"] < 0]
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
