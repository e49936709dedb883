"""Loss curves of the precisions: how closely each follows fp32, step by step, and how ZeRO stages agree.

    python -m benchmarks.precision --work /tmp/precision              # all cases, 200 steps
    python -m benchmarks.precision --work /tmp/precision --steps 40 --cases fp32 bf16

Trains a very small model on synthetic TreeSatAI-TS shards with the unmodified trainer, every case on the same batches;
ranks are processes of this machine. Cases named ``bf16, … in bf16`` round a part of the weights, or the residual
stream, on top of ``bf16``, to show which parts need fp32. Prints a table and writes benchmarks/results/precision.json
(with fewer steps or cases: WORK/precision.json);
exit code 1 if a bound in BOUNDS does not hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.overhead import make_shards
from benchmarks.ranks import run_ranks
from maestro_scale.model.transformer import Block
from maestro_scale.recipe import load_recipe
from maestro_scale.training.distributed import destroy_process_group, hard_exit, init_distributed
from maestro_scale.training.engine import Engine
from maestro_scale.training.pretrain import pretrain
from maestro_scale.training.run_dir import git_revision
from maestro_scale.training.stop import StopRequest
from maestro_scale.training.watchdog import Watchdog

MAX_FROM_FP32, MAX_BETWEEN_STAGES = 1e-3, 2e-3
RESULTS = Path(__file__).parent / "results" / "precision.json"
RECIPE = """
name: precision
seed: 0
data:
  mixture:
    - dataset: treesatai_ts
      shards: {shards}
      split: train
      sensors:
        aerial: {{image_size: 60, patch: 20}}
        s2: {{num_dates: 4, patch: 3}}
        s1_asc: {{num_dates: 2, patch: 3}}
        s1_des: {{num_dates: 2, patch: 3}}
  lanes: 2
  workers: 1
  cache_dir: {cache}
  shuffle_window: 64
model: {{size: tiny, width: 32, depth: 2, heads: 2, decoder_depth: 1, decoder_width: 32, inter_depth: 1}}
optim: {{base_lr: 3.0e-4}}
train: {{steps: {steps}, global_batch: 8, micro_batch: 4, log_every: 1, warmup_check: false}}
checkpoint: {{every_steps: 100000}}
tracking: {{enabled: false, pictures_every: 0}}
"""
_STEPS = 200
_NORMS, _TOKENS = r"norm", r"mask_token|quer"


@dataclass(frozen=True)
class Case:
    """``rounded``: pattern of parameters that compute in bf16; ``residual``: whether the residual stream does."""

    precision: str
    stage: int = 0
    ranks: int = 1
    sets: tuple[str, ...] = ()
    rounded: Callable[[str, Tensor], bool] | None = None
    residual: bool = False


def _matches(pattern: str) -> Callable[[str, Tensor], bool]:
    return lambda name, p: re.search(pattern, name) is not None


_SENT_IN_BF16 = 'deepspeed.torch_autocast.lower_precision_safe_modules=["torch.nn.Linear"]'
CASES: dict[str, Case] = {
    "fp32": Case("fp32"),
    "bf16": Case("bf16"),
    **{f"bf16, ZeRO {s}, 2 ranks": Case("bf16", s, 2) for s in (1, 2, 3)},
    **{f"bf16_weights, ZeRO {s}, 2 ranks": Case("bf16_weights", s, 2) for s in (1, 2, 3)},
    **{
        f"bf16, ZeRO {s}, 2 ranks, gradients sent in bf16": Case("bf16", s, 2, (_SENT_IN_BF16,))
        for s in (2, 3)
    },
    "bf16, all weights in bf16": Case("bf16", rounded=lambda name, p: True),
    "bf16, matrices in bf16": Case("bf16", rounded=lambda name, p: p.dim() >= 2 and name.endswith("weight")),
    "bf16, norms in bf16": Case("bf16", rounded=_matches(_NORMS)),
    "bf16, biases in bf16": Case("bf16", rounded=_matches(r"bias$")),
    "bf16, mask tokens and queries in bf16": Case("bf16", rounded=_matches(_TOKENS)),
    "bf16, all but norms in bf16": Case("bf16", rounded=lambda name, p: not re.search(_NORMS, name)),
    "bf16, residual stream in bf16": Case("bf16", residual=True),
}


def lower(network: nn.Module, case: Case) -> None:
    """Make parts of ``network`` compute in bf16, as ``case`` says; the parameters themselves stay fp32."""
    if case.residual:
        for block in (m for m in network.modules() if isinstance(m, Block)):
            block.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    if case.rounded is None:
        return
    names = [name for name, p in network.named_parameters() if case.rounded(name, p)]
    assert names, "no parameter matches"
    forward, inside = network.forward, [False]

    def lowered(*args: Any) -> Any:
        if inside[0]:
            return forward(*args)
        inside[0] = True
        try:
            parameters = dict(network.named_parameters())
            return functional_call(network, {n: parameters[n].bfloat16().float() for n in names}, args)
        finally:
            inside[0] = False

    network.forward = lowered  # of this instance only


def run_rank(name: str, recipe_path: str, run_dir: Path, sets: Sequence[str]) -> None:
    """Train one case on this rank."""
    case = CASES[name]
    recipe = load_recipe(recipe_path, list(sets))
    torch.set_num_threads(1)
    world = init_distributed()
    initialise = Engine.__init__

    def lower_first(self: Engine, network: nn.Module, *args: Any) -> None:
        lower(network, case)
        initialise(self, network, *args)

    watch = Watchdog(world, recipe.train.hang_timeout_s, run_dir).start()
    with mock.patch.object(Engine, "__init__", lower_first):  # the trainer is otherwise unmodified
        pretrain(recipe, run_dir, world, [], watch, StopRequest(run_dir).install())
    watch.stop()
    destroy_process_group()
    hard_exit(0)


def curve(name: str, recipe: Path, run_dir: Path) -> list[float]:
    """Train one case in processes of its own; the loss of every step."""
    case = CASES[name]
    sets = [
        f"train.precision={case.precision}",
        f"deepspeed.zero_optimization.stage={case.stage}",
        *case.sets,
    ]
    command = [sys.executable, "-m", "benchmarks.precision", "--rank-of", name, "--recipe", str(recipe)]
    command += ["--work", str(run_dir), "--set", *sets]
    run_dir.mkdir(parents=True)
    run_ranks(command, case.ranks, run_dir / "log.txt")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def deviation(curve: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative difference of the losses, per step."""
    return [a / b - 1 for a, b in zip(curve, reference, strict=True)]


def problems(curves: dict[str, list[float]]) -> list[str]:
    """The bounds that do not hold among the measured cases."""
    found = []
    default = {name: c for name, c in curves.items() if re.fullmatch(r"bf16(, ZeRO \d, 2 ranks)?", name)}
    for name, losses in default.items():
        worst = max(map(abs, deviation(losses, curves["fp32"])))
        if worst > MAX_FROM_FP32:
            found.append(f"{name} is {worst:.2%} from fp32, allowed {MAX_FROM_FP32:.1%}")
    for a in default.values():
        worst = max(max(map(abs, deviation(a, b))) for b in default.values())
        if worst > MAX_BETWEEN_STAGES:
            found.append(f"ZeRO stages differ by {worst:.2%}, allowed {MAX_BETWEEN_STAGES:.1%}")
    return list(dict.fromkeys(found))


def show(curves: dict[str, list[float]]) -> None:
    """Print the largest deviation of each case, where it occurs, and some steps of the curve."""
    steps = [s for s in (5, 10, 20, 50, 100, 200) if s <= len(curves["fp32"])]
    table = Table(title="Loss relative to fp32, %", title_justify="left")
    for column in ("case", "largest", "at step", "mean", *(f"step {s}" for s in steps)):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, losses in curves.items():
        off = deviation(losses, curves["fp32"])
        worst = max(range(len(off)), key=lambda i: abs(off[i]))
        mean = sum(map(abs, off)) / len(off)
        numbers = [off[worst], worst + 1, mean, *(off[s - 1] for s in steps)]
        cells = [f"{worst + 1}" if i == 1 else f"{100 * n:+.3f}" for i, n in enumerate(numbers)]
        table.add_row(name, *cells)
    table.add_row("fp32, loss", "", "", "", *(f"{curves['fp32'][s - 1]:.4f}" for s in steps))
    Console(width=150).print(table)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument(
        "--out", type=Path, help=f"default: {RESULTS.name} in benchmarks/results, or in WORK for a part"
    )
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--set", dest="sets", nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.recipe, args.work, args.sets)
    work = args.work.resolve()
    shards = make_shards(work)
    recipe = work / "recipe.yaml"
    quoted = {"shards": json.dumps(str(shards)), "cache": json.dumps(str(work / "cache"))}
    recipe.write_text(RECIPE.format(steps=args.steps, **quoted))
    shutil.rmtree(work / "runs", ignore_errors=True)
    names = ["fp32", *(name for name in args.cases if name != "fp32")]
    curves = {name: curve(name, recipe, work / "runs" / str(i)) for i, name in enumerate(names)}
    show(curves)
    found = problems(curves)
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    rounded = {name: [round(loss, 7) for loss in losses] for name, losses in curves.items()}
    record = {
        "revision": git_revision(),
        **machine,
        "steps": args.steps,
        "problems": found,
        "losses": rounded,
    }
    is_complete = args.steps == _STEPS and set(args.cases) == set(CASES)
    out = args.out or (
        RESULTS if is_complete else args.work / RESULTS.name
    )  # a part must not replace the record
    out.write_text(json.dumps(record) + "\n")
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
