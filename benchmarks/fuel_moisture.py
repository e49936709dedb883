"""Real labels: land cover and live fuel moisture of pixel series, for MAESTRO, Presto and simple features.

    python benchmarks/fuel_moisture.py --data presto/fuel_moisture --presto presto/default_model.pt --out /tmp/fuel

Shards the official split, pretrains a tiny MAESTRO on train and val per seed (recipes/fuel_moisture.yaml), and fits kNN
and a linear probe on the frozen features of every encoder, for three targets: land cover and terciles of moisture
(classification, weighted F1) and moisture (regression, RMSE). Prints a Markdown table and writes
benchmarks/results/fuel_moisture.json. What is finished in ``--out`` is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_scale import datasets
from maestro_scale.evaluation.baselines.protocol import Images, SensorInput
from maestro_scale.evaluation.results import RESULTS, EvalResult
from maestro_scale.evaluation.run import EvalOptions, run_evaluation
from maestro_scale.shards.write.writer import write_shards
from maestro_scale.training.run_dir import git_revision

ROOT = Path(__file__).parents[1]
TARGETS = ("land_cover", "moisture_tercile", "moisture")
MODES = ("knn", "probe")
SPLITS = ("train", "val", "test")


class RawSeries(nn.Module):
    """All values of a pixel's series, in physical units, as one vector (``maestro_scale.evaluation.baselines``)."""

    adaptation = "the values of all dates and bands in physical units, one after the other"

    def __init__(self, sensors: Mapping[str, SensorInput], options: Mapping[str, str]) -> None:
        super().__init__()
        self.width = sum(s.num_dates * len(s.bands) * s.size**2 for s in sensors.values())

    def tokens(self, images: Images) -> Tensor:
        """(B, E)."""
        return torch.cat([pixels.flatten(1) for pixels in images.pixels.values()], dim=1)


def write_data(data: Path, shards: Path) -> None:
    """The three splits in shards."""
    for split in SPLITS:
        raw = datasets.open_raw("fuel_moisture", data, split)
        write_shards(raw, str(shards), split, synthetic=datasets.is_synthetic(data))


def pretrain(out: Path, seed: int, steps: int) -> Path:
    """The run directory of a pretraining."""
    run = out / "runs" / f"maestro-{seed}-{steps}"
    command = [sys.executable, str(ROOT / "maestro_scale" / "train.py")]
    command += [f"--recipe={ROOT / 'recipes' / 'fuel_moisture.yaml'}", f"--run-dir={run}", "--set"]
    command += [f"seed={seed}", f"train.steps={steps}", "tracking.enabled=false", *_places(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return run


def evaluate(
    out: Path,
    name: str,
    target: str,
    seeds: Sequence[int],
    recipe: str,
    checkpoint: str | None = None,
    baseline: str | None = None,
) -> dict[str, EvalResult]:
    """{mode: result} of one encoder, which is a checkpoint or a baseline, on one target."""
    folder = out / "results" / name / target
    if not all((folder / mode / RESULTS).exists() for mode in MODES):
        run_evaluation(
            EvalOptions(
                str(ROOT / "recipes" / "eval" / recipe),
                folder,
                checkpoint=checkpoint,
                baseline=baseline,
                modes=MODES,
                target=target,
                seeds=seeds,
                features=out / "features",
                overrides=("tracking.enabled=false", f"seed={seeds[0]}", *_places(out)),
            )
        )
    return {mode: EvalResult.load(folder / mode / RESULTS) for mode in MODES}


def _places(out: Path) -> tuple[str, ...]:
    return (
        f"data.mixture[0].shards={json.dumps(str(out / 'shards'))}",
        f"data.cache_dir={json.dumps(str(out / 'cache'))}",
        "data.workers=0",
    )


def _row(name: str, target: str, mode: str, results: Sequence[EvalResult]) -> dict[str, Any]:
    """One encoder, target and mode; ``results``: one per pretraining."""
    values = [r.value for r in results]
    return {
        "encoder": name,
        "target": target,
        "mode": mode,
        "metric": results[0].metric,
        "units": results[0].units,
        "values": values,
        "intervals": [list(r.interval) for r in results],
        "scores": [dict(r.scores) for r in results],
        "num_tiles": results[0].num_tiles,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per encoder and mode, a column per target; the mean over pretrainings and of their intervals."""
    lines = [
        "| encoder | mode | land cover, wF1 % | moisture terciles, wF1 % | moisture, RMSE % | R² |",
        "|---|---|---|---|---|---|",
    ]
    found = {(r["encoder"], r["mode"], r["target"]): r for r in rows}
    for encoder, mode in dict.fromkeys((r["encoder"], r["mode"]) for r in rows):
        cells = [_cell(found[encoder, mode, target]) for target in TARGETS]
        scores = found[encoder, mode, "moisture"]["scores"]
        r2 = sum(s["r2"] for s in scores) / len(scores)
        lines.append(f"| {encoder} | {mode} | {' | '.join(cells)} | {r2:.2f} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    scale = 1 if row["metric"] == "rmse" else 100
    values, intervals = row["values"], row["intervals"]
    mean = scale * sum(values) / len(values)
    low, high = (scale * sum(i[k] for i in intervals) / len(intervals) for k in (0, 1))
    spread = (
        f", {len(values)} runs {scale * min(values):.1f}-{scale * max(values):.1f}" if len(values) > 1 else ""
    )
    return f"{mean:.1f} ({low:.1f}-{high:.1f}{spread})"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of s1_s2_era5_srtm.npy and its siblings"
    )
    parser.add_argument("--presto", help="Presto's default_model.pt; without it Presto is left out")
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, runs and results")
    parser.add_argument("--steps", type=int, default=1000, help="of the pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="pretrainings of MAESTRO")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "fuel_moisture.json")
    args = parser.parse_args()
    out = args.out.resolve()
    write_data(args.data, out / "shards")
    own, external = "fuel_moisture.yaml", "fuel_moisture_presto.yaml"
    encoders: dict[str, list[tuple[str, str, dict[str, str]]]] = {
        "raw series": [("raw", external, {"baseline": "python:benchmarks.fuel_moisture:RawSeries"})],
        "statistics": [("statistics", own, {"baseline": "statistics"})],
    }
    if args.presto:
        encoders["Presto"] = [("presto", external, {"baseline": f"presto:{args.presto}"})]
    encoders["MAESTRO, untrained"] = [(f"untrained-{s}", own, {"baseline": "random"}) for s in args.seeds]
    encoders["MAESTRO, pretrained here"] = [
        (f"maestro-{s}", own, {"checkpoint": str(pretrain(out, s, args.steps))}) for s in args.seeds
    ]
    rows = []
    for name, variants in encoders.items():
        for target in TARGETS:
            found = [
                evaluate(
                    out,
                    folder,
                    target,
                    (int(folder.rpartition("-")[2]) if "-" in folder else 0,),
                    recipe,
                    **what,
                )
                for folder, recipe, what in variants
            ]
            rows += [_row(name, target, mode, [f[mode] for f in found]) for mode in MODES]
    print(table(rows))
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {"machine": machine, "revision": git_revision(), "steps": args.steps, "seeds": args.seeds}
    record |= {"rows": rows}
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
