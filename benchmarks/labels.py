"""The benefit of pretraining with few labels: the quickstart encoder and an untrained one, with a tenth of the labels.

    maestro-scale quickstart --out /tmp/quickstart
    python benchmarks/labels.py --quickstart /tmp/quickstart

kNN and probe on frozen features, and finetuning with two schedules, the same for both encoders: one with the paper's
ratio of learning rates (a third of that of pretraining), and one with three times the learning rate and twice the
steps, which suits the untrained encoder better. The oracle gives the upper bound. Prints a table and writes
benchmarks/results/labels.json; exit code 1 if the intervals of kNN, of the probe or of the paper's schedule overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.training.run_dir import git_revision

EVALUATE = Path(__file__).parents[1] / "maestro_scale" / "evaluate.py"
COMMON = (
    "train.global_batch=16",
    "train.micro_batch=16",
    "train.log_every=20",
    "data.lanes=1",
    "data.mixture[0].split=train",
    "optim.final_div=2",
    "evaluation.ema=0.98",
    "evaluation.validations=10",
    "evaluation.patience=0",
    "checkpoint.every_steps=1000",
    "tracking.enabled=false",
)
SCHEDULES = {
    "frozen": (("knn", "probe"), ()),
    "the paper's course": (("finetune",), ("train.steps=200", "optim.base_lr=2.0e-4")),
    "faster and longer": (("finetune",), ("train.steps=400", "optim.base_lr=6.0e-4")),
}


def evaluate(
    args: argparse.Namespace, encoder: list[str], out: Path, modes: tuple[str, ...], more: tuple[str, ...]
) -> dict[str, EvalResult]:
    """{mode: result} of one evaluation command."""
    run = args.quickstart / "runs" / "quickstart"
    command = [sys.executable, str(EVALUATE), f"--recipe={run / 'recipe.yaml'}", *encoder, f"--out={out}"]
    command += [f"--fraction={args.fraction}", f"--features={args.work / 'features'}"]
    command += [*(f"--mode={m}" for m in modes), "--set", *COMMON, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return {r.mode: r for r in (EvalResult.load(p) for p in out.glob("*/results.json"))}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quickstart", type=Path, required=True, help="output folder of `maestro-scale quickstart`"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for features and results (default: QUICKSTART/labels)"
    )
    parser.add_argument("--fraction", type=float, default=0.1)
    args = parser.parse_args()
    args.work = args.work or args.quickstart / "labels"
    encoders = {
        "pretrained": [f"--checkpoint={args.quickstart / 'runs' / 'quickstart'}"],
        "untrained": ["--baseline=random"],
    }
    rows = []
    for schedule, (modes, more) in SCHEDULES.items():
        found = {
            name: evaluate(args, words, args.work / schedule.replace(" ", "_") / name, modes, more)
            for name, words in encoders.items()
        }
        for mode in modes:
            row: dict[str, Any] = {"course": schedule, "mode": mode}
            row |= {name: [f[mode].value, *f[mode].interval] for name, f in found.items()}
            rows.append(row | {"apart": row["pretrained"][1] > row["untrained"][2]})
    best = evaluate(args, ["--baseline=oracle"], args.work / "oracle", (), ())["oracle"]
    table = Table(
        title=f"weighted F1 in %, {100 * args.fraction:g} % of the labels; the oracle {100 * best.value:.1f}"
    )
    for column in ("mode", "course", *encoders, "intervals apart"):
        table.add_column(column)
    for row in rows:
        scores = ["{:.1f} ({:.1f}-{:.1f})".format(*(100 * v for v in row[name])) for name in encoders]
        table.add_row(row["mode"], row["course"], *scores, "yes" if row["apart"] else "no")
    Console(width=110).print(table)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {"machine": machine, "revision": git_revision(), "fraction": args.fraction}
    record |= {"oracle": best.value, "rows": rows}
    path = Path(__file__).parent / "results" / "labels.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r["apart"] for r in rows if r["course"] != "faster and longer") else 1


if __name__ == "__main__":
    sys.exit(main())
