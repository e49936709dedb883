"""Repeats the quickstart for several seeds, which change scenes, weights and order, to check that its result is stable.

    python benchmarks/quickstart.py --seeds 1 2 3 4 5 --out /tmp/quickstart-seeds

Prints a table and writes benchmarks/results/quickstart.json. Exit code 1 if for any seed the masked loss falls by less
than 25 %. Whether the intervals of the probe (pretrained and untrained) are apart is in the table; for seed 0
they are not (docs/quickstart.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.quickstart import ENCODERS, QuickstartPaths
from maestro_scale.training.run_dir import JsonLines, git_revision

MIN_DROP = 0.25


def run(seed: int, out: Path) -> dict:
    """Run the quickstart once; returns its losses and scores."""
    started = time.perf_counter()
    program = Path(sys.executable).parent / "maestro-scale"
    subprocess.run([str(program), "quickstart", f"--out={out}", f"--seed={seed}"], check=True)
    elapsed_s = time.perf_counter() - started
    losses = [line["loss"] for line in JsonLines(out / "runs" / "quickstart" / "metrics.jsonl").read()]
    row = {"seed": seed, "elapsed_s": round(elapsed_s, 1), "first_loss": losses[0], "last_loss": losses[-1]}
    paths = QuickstartPaths(out)
    for encoder, modes in ENCODERS.items():
        for mode in modes:
            result = EvalResult.load(paths.result(encoder, mode))
            row[f"{encoder}/{mode}"] = [result.value, *result.interval]
    row["drop"] = 1 - losses[-1] / losses[0]
    row["apart"] = row["pretrained/probe"][1] > row["untrained/probe"][2]
    return row


def show(rows: list[dict]) -> None:
    """Print the table."""
    table = Table(title="quickstart, weighted F1 in % with 95 % bootstrap interval")
    for column in (
        "seed",
        "seconds",
        "loss drop",
        *(k for k in rows[0] if "/" in k),
        "probe intervals apart",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        scores = ["{:.1f} ({:.1f}-{:.1f})".format(*(100 * v for v in row[k])) for k in row if "/" in k]
        start = (str(row["seed"]), f"{row['elapsed_s']:.0f}", f"{100 * row['drop']:.0f} %")
        table.add_row(*start, *scores, "yes" if row["apart"] else "NO")
    Console(width=220).print(table)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    args = parser.parse_args()
    machine = {
        "processor": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    path = Path(__file__).parent / "results" / "quickstart.json"
    path.parent.mkdir(exist_ok=True)
    rows = []
    for seed in args.seeds:
        rows.append(run(seed, args.out / f"seed{seed}"))
        show(rows)
        record = {"machine": machine, "revision": git_revision(), "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r["drop"] >= MIN_DROP for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
