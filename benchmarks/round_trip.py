"""Round trip of base-size models to the authors' format and back: equal weights, moving average too, and peak memory.

    python -m benchmarks.round_trip [--dataset flair_hub] [--inter-depth 3]

For FLAIR-HUB and TreeSatAI-TS, with 0 and 3 blocks over all sensors: our model is converted to the authors' checkpoint;
the stand-in of their loader (tests/testkit/authors.py, which requires the arguments of their constructor) loads it,
changes its moving average and saves all of its weights; both sets of weights are converted back and compared.
Every conversion runs in a process of its own; its peak resident memory, with Python, torch and the mapped pages of its
file, is compared with the size of the checkpoint. Writes benchmarks/results/round_trip.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from maestro_scale import datasets, untrusted
from maestro_scale.interop.export import WEIGHTS, write_model
from maestro_scale.interop.reference_keys import to_reference
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import SIZES

OUT = Path(__file__).parent / "results" / "round_trip.json"
LIMIT = 2.5  # peak memory by the size of the checkpoint

_CONVERT = """
import re, sys
from pathlib import Path
from maestro_scale.interop.convert import ConvertOptions, convert
from maestro_scale.interop.convert_back import convert_to_reference

def peak():  # of this program: ru_maxrss is at least that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, out, weights = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
start = peak()
if source.is_dir():
    convert_to_reference(source, out)
else:
    # FLAIR-HUB and FLAIR#2 have the same sensors: a file without our configuration leaves the choice.
    convert(source, out, ConvertOptions(weights, sys.argv[4] or None))
print(start, peak())
"""

_LOAD = """
import json, sys
import torch
sys.path.insert(0, sys.argv[4])
from testkit.authors import TheirModule
shapes = {name: tuple(shape) for name, shape in json.loads(open(sys.argv[3]).read()).items()}
module = TheirModule.load_from_checkpoint(sys.argv[1], strict=False, datasets=shapes)
for name, weight in module.weights.items():
    if name.startswith("ema_"):
        weight += 1
hyper = torch.load(sys.argv[1], weights_only=False, mmap=True)["hyper_parameters"]
torch.save({"state_dict": module.weights, "hyper_parameters": hyper, "epoch": 1, "global_step": 5}, sys.argv[2])
"""


def measure(name: str, inter_depth: int, folder: Path) -> dict[str, Any]:
    """The round trip of one model. AssertionError where a weight differs."""
    spec = datasets.spec(name)
    config = ModelConfig(
        dataset=spec.name,
        sensors=spec.sensors,
        pos_grid=spec.pos_grid,
        ref_sensor=spec.ref_sensor,
        crop_m=spec.crop_m,
        size=SIZES["base"],
        inter_depth=inter_depth,
    )
    model = Maestro(config)
    model.initialise(0).requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    write_model(folder / "ours", model.state_dict(), model.config, {"step": 5, "epoch": 1})
    shapes = {k: tuple(v.shape) for k, v in to_reference(model.state_dict(), model.config).items()}
    (folder / "shapes.json").write_text(json.dumps(shapes))
    del model
    ours, theirs, saved = folder / "ours", folder / "theirs.ckpt", folder / "saved.ckpt"
    conversions = [_convert("to the authors' format", ours, theirs)]
    tests = Path(__file__).parents[1] / "tests"
    _run(_LOAD, theirs, saved, folder / "shapes.json", tests)
    conversions.append(_convert("and back", theirs, folder / "again"))
    assert _difference(ours, folder / "again") == 0
    for weights, expected in (("raw", 0), ("ema", 1)):
        out = folder / weights
        conversions.append(_convert(f"saved by the authors' code, {weights}", saved, out, weights, name))
        assert _difference(ours, out, expected) == 0
    return {
        "dataset": name,
        "inter_depth": inter_depth,
        "parameters": parameters,
        "equal": True,
        "conversions": conversions,
    }


def _convert(what: str, source: Path, out: Path, weights: str = "raw", dataset: str = "") -> dict[str, Any]:
    start, peak = map(int, _run(_CONVERT, source, out, weights, dataset).split())
    size = (out if source.is_dir() else source).stat().st_size
    return {
        "what": what,
        "file_bytes": size,
        "start_bytes": start,
        "peak_bytes": peak,
        "ratio": round(peak / size, 3),
    }


def _run(program: str, *arguments: object) -> str:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def _difference(ours: Path, other: Path, expected: float = 0.0) -> int:
    """Number of tensors of ``other`` that are not those of ``ours`` plus ``expected``."""
    first, second = untrusted.load_tensors(ours / WEIGHTS), untrusted.load_tensors(other / WEIGHTS)
    assert first.keys() == second.keys()
    return sum(not torch.equal(first[k] + expected if expected else first[k], second[k]) for k in first)


def _record(model: dict[str, Any]) -> None:
    """Add to the record, in the place of an earlier measurement of this model."""
    before = untrusted.read_record(OUT)["models"] if OUT.exists() else []
    kept = [m for m in before if any(m[k] != model[k] for k in ("dataset", "inter_depth"))]
    models = sorted([*kept, model], key=lambda m: (m["dataset"], m["inter_depth"]))
    OUT.write_text(json.dumps({"size": "base", "limit": LIMIT, "models": models}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", choices=("flair_hub", "treesatai_ts"), action="append")
    parser.add_argument("--inter-depth", type=int, choices=(0, 3), action="append")
    options = parser.parse_args()
    found = []
    for name in options.dataset or ("flair_hub", "treesatai_ts"):
        for inter_depth in options.inter_depth or (0, 3):
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(name, inter_depth, Path(folder)))
            ratios = ", ".join(f"{c['what']} {c['ratio']:.2f}" for c in found[-1]["conversions"])
            print(
                f"{name}, inter {inter_depth}: equal; peak by the size of the checkpoint: {ratios}",
                flush=True,
            )
            _record(found[-1])
    over = [c for of in found for c in of["conversions"] if c["ratio"] > LIMIT]
    assert not over, over


if __name__ == "__main__":
    main()
