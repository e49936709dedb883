"""Runs the encoders of torchgeo and terratorch with random weights on synthetic tiles, in an environment of their own.

    python -m benchmarks.external_baselines --venv /tmp/venv-external [--models terratorch:clay_v1_base …]

Creates the environment where it is missing, and synthetic shards of TreeSatAI-TS and PASTIS-HD. Per model: encodes a
batch of both datasets, evaluates TreeSatAI-TS by kNN and a linear probe, and finetunes where ``FINETUNED`` says so.
Writes benchmarks/results/external_baselines.json; models that are not named keep their earlier record. Exit code 1 if
one failed.
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
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "external_baselines.json"
PINNED = (
    "torch<2.14",
    "torchvision<0.29",  # of torch 2.13
    "torchgeo==0.8.1",
    "terratorch==1.2.11",
    "webdataset==1.0.2",
    "s3fs==2026.9.0",
    "zstandard==0.25.0",
    "psutil",
    "typer==0.29.2",
    "ninja",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
)
DEEPSPEED = "deepspeed==0.19.8"  # built from source, against the torch of the environment
MODELS = (
    "torchgeo:dofa_small_patch16_224",
    "torchgeo:dofa_base_patch16_224",
    "torchgeo:croma_base",
    "torchgeo:panopticon_vitb14",
    "torchgeo:copernicusfm_base",
    "torchgeo:scalemae_large_patch16",
    "torchgeo:vit_small_patch16_224",
    "torchgeo:vit_small_patch14_dinov2",
    "terratorch:prithvi_eo_v1_100",
    "terratorch:prithvi_eo_v2_tiny_tl",
    "terratorch:prithvi_eo_v2_100_tl",
    "terratorch:prithvi_eo_v2_300",
    "terratorch:terramind_v1_tiny",
    "terratorch:terramind_v1_small",
    "terratorch:terramind_v1_base",
    "terratorch:clay_v1_base",
)
FINETUNED = (
    "torchgeo:vit_small_patch16_224",
    "torchgeo:dofa_small_patch16_224",
    "terratorch:prithvi_eo_v2_tiny_tl",
    "terratorch:terramind_v1_tiny",
)
FINETUNE_STEPS = 4
MARK = "record: "
TILES = {"treesatai_ts": 20, "pastis_hd": 5}
SETTINGS = ("data.workers=0", "tracking.enabled=false", "train.device=cpu")

# torchvision's wheel on PyPI is compiled for CUDA and does not load its operators beside a CPU build of torch; its
# import then fails where it registers shapes for nms and qnms. No encoder calls them, so declaring them is enough.
_OPERATORS = """import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for op in ("nms", "qnms"):
                torch.library.define(f"torchvision::{op}", schema)


sys.meta_path.insert(0, _Finder())
"""


def create_environment(folder: Path) -> None:
    """Install the pinned libraries into ``folder``, unless that has been done."""
    marker, python = folder / "installed.txt", folder / "bin" / "python"
    wanted = "\n".join((*PINNED, DEEPSPEED))
    if marker.exists() and marker.read_text() == wanted:
        return
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *PINNED], check=True)
    subprocess.run([*pip, "--no-build-isolation", DEEPSPEED], check=True)
    build = subprocess.run(
        [str(python), "-c", "import torch; print(torch.version.cuda)"],
        capture_output=True,
        text=True,
        check=True,
    )
    if build.stdout.strip() == "None":
        (packages,) = (folder / "lib").glob("python3*/site-packages")
        (packages / "torchvision_operators.py").write_text(_OPERATORS)
        (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    marker.write_text(wanted)


def _environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MAESTRO_DATA": str(work / "shards"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _run(python: Path, work: Path, arguments: Sequence[str]) -> tuple[str, float]:
    """(standard output, seconds) of a command of the environment. RuntimeError with the end of its errors."""
    started = time.perf_counter()
    done = subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(work),
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout, time.perf_counter() - started


def write_shards(python: Path, work: Path) -> None:
    """Synthetic shards of both datasets, unless they exist."""
    for dataset, tiles in TILES.items():
        raw, shards = work / "raw" / dataset, work / "shards" / dataset
        if (shards / "done").exists():
            continue
        cli = ("-m", "maestro_scale.cli")
        _run(python, work, (*cli, "synth", dataset, str(raw), "--tiles", str(tiles)))
        for split in ("train", "val", "test"):
            _run(
                python, work, (*cli, "shard", dataset, str(raw), str(shards), "--split", split, "--workers=1")
            )
        (shards / "done").touch()


def encode(name: str, work: Path) -> dict[str, object]:
    """Build a model for both datasets and encode two crops of each. Runs within the environment."""
    import torch

    from maestro_scale.evaluation.baselines.registry import build_baseline
    from maestro_scale.evaluation.encoder import Encoder
    from maestro_scale.recipe import load_recipe
    from maestro_scale.shards.read.store import Store
    from maestro_scale.stream.eval_loader import EvalLoader
    from maestro_scale.stream.source import Source

    found: dict[str, object] = {}
    for dataset in TILES:
        recipe = load_recipe(f"recipes/eval/{dataset}.yaml", [*SETTINGS, f"data.cache_dir={work / 'cache'}"])
        encoder = Encoder(recipe, None, "statistics", None)
        store = Store(recipe.data.mixture[0].shards, work / "cache", 2**30)
        source = Source(encoder.spec, encoder.manifest.shards_of(("test",)), store)
        batch = next(iter(EvalLoader(source, batch_size=2)))
        started = time.perf_counter()
        baseline = build_baseline(f"{name}@untrained", recipe, encoder.spec)
        built = time.perf_counter()
        with torch.no_grad():
            tokens = baseline.encode(batch)
        seconds = time.perf_counter() - built
        if not all(t.isfinite().all() for t in tokens.values()):
            raise RuntimeError(f"{name}: tokens of {dataset} are not finite")
        found["parameters"] = sum(p.numel() for p in baseline.parameters())
        found["adaptation"] = baseline.adaptation
        found[dataset] = {
            "build_s": round(built - started, 2),
            "encode_s_of_2_crops": round(seconds, 2),
            "tokens": {sensor: " x ".join(map(str, t.shape)) for sensor, t in tokens.items()},
        }
    return found


def evaluate(name: str, work: Path, modes: Sequence[str]) -> dict[str, object]:
    """Score and seconds of modes on TreeSatAI-TS. Runs within the environment."""
    from maestro_scale.evaluate import main as evaluate_main

    out = work / "results" / name.replace(":", "-")
    shutil.rmtree(out, ignore_errors=True)
    settings = [*SETTINGS, f"data.cache_dir={work / 'cache'}"]
    if "finetune" in modes:
        settings += [f"train.steps={FINETUNE_STEPS}", "train.global_batch=4", "train.micro_batch=4"]
        settings += ["train.epochs=null", "data.lanes=1", "evaluation.validations=1"]
    recipe, baseline = "--recipe=recipes/eval/treesatai_ts.yaml", f"--baseline={name}@untrained"
    started = time.perf_counter()
    code = evaluate_main(
        [recipe, baseline, f"--out={out}", *(f"--mode={m}" for m in modes), "--set", *settings]
    )
    if code:
        raise RuntimeError(f"{name}: evaluate.py ended with exit code {code}")
    values = {m: json.loads((out / m / "results.json").read_text())["value"] for m in modes}
    return {"seconds": round(time.perf_counter() - started, 1), "wf1_of_random_weights": values}


def measure(names: Sequence[str], modes: Sequence[str], work: Path) -> None:
    """Print a line of JSON per model: [name, record]. Runs within the environment, where the libraries are imported
    once."""
    for name in names:
        try:
            row = (
                {**encode(name, work), "frozen": evaluate(name, work, ("knn", "probe"))} if not modes else {}
            )
            if modes:
                row["finetune"] = {"steps": FINETUNE_STEPS, **evaluate(name, work, modes)}
        except Exception as error:  # noqa: BLE001  the record names the error of each model
            row = {"error": f"{type(error).__name__}: {error}"}
        # Seconds are those of a machine that others use, too.
        row["load_average"] = round(os.getloadavg()[1], 1)
        print(MARK + json.dumps([name, row]), flush=True)


def rows(python: Path, work: Path, names: Sequence[str], modes: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """(model, record) as the worker prints them."""
    command = [str(python), "-m", "benchmarks.external_baselines", f"--work={work}", "--models", *names]
    command += ["--measure", *modes]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=_environment(work), cwd=ROOT
    ) as worker:
        assert worker.stdout is not None  # a pipe
        for line in worker.stdout:
            if line.startswith(MARK):
                name, row = json.loads(line.removeprefix(MARK))
                yield name, row


def _versions(python: Path, work: Path) -> dict[str, str]:
    packages = ("torch", "torchvision", "torchgeo", "terratorch", "timm", "deepspeed")
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages}}}))"
    return json.loads(_run(python, work, ("-c", code))[0])


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, help="folder of the environment; it is created where missing")
    parser.add_argument(
        "--work", type=Path, help="folder for shards and results (default: work in the environment)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.models, args.measure, args.work)
        return 0
    if args.venv is None:
        parser.error("--venv is required")
    create_environment(args.venv)
    python, work = (args.venv / "bin" / "python").absolute(), (args.work or args.venv / "work").absolute()
    write_shards(python, work)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"models": {}}
    record["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
    record["versions"] = _versions(python, work)
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    record["revision"] = revision.stdout.strip()
    record["weights"] = "random: the scores say only that the evaluation ran"
    finetuned = [name for name in args.models if name in FINETUNED]
    # A process of its own for each finetuning, because DeepSpeed's state is global.
    jobs = [(args.models, ()), *(([name], ("finetune",)) for name in finetuned)]
    for names, modes in jobs:
        for name, row in rows(python, work, names, modes):
            record["models"][name] = {**(record["models"].get(name, {}) if modes else {}), **row}
            ordered = {m: record["models"][m] for m in MODELS if m in record["models"]}
            RECORD.write_text(json.dumps({**record, "models": ordered}, indent=1) + "\n")
            print(f"{name} {' '.join(modes)}: {row.get('error') or 'ran'}", flush=True)
    missing = [name for name in args.models if name not in record["models"]]
    for name in missing:
        print(f"{name}: the worker ended before it", flush=True)
    return 1 if missing or any("error" in row for row in record["models"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
