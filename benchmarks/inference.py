"""Embedding, encoding for an evaluation, and prediction, beside the forward pass alone.

    python -m benchmarks.inference --work /tmp/inference [--rounds 3] [--size tiny]

Three commands on synthetic shards, with one loader process and one thread of computing, by turns with the forward pass
of the same network on the same batches, which are in memory already: what is measured beside it are reading, cropping,
scaling, writing, hashing and waiting.

- embed: ``maestro-scale embed --what vector`` of TreeSatAI-TS (from the store to the Parquet files);
- encode: the features that kNN, the probes and the attentive head train on (to the published folder);
- predict: ``maestro-scale predict --overlap 0`` of maps of PASTIS-HD (to the COGs), in one process, since it has no
  loader. What a window costs beside its forward pass is the same if windows overlap.

Peak memory: of a process that embeds all shards, beside one that embeds a quarter of them. Writes
benchmarks/results/inference.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.loading.data import build, shards_of
from maestro_scale import datasets
from maestro_scale.evaluation.embedding import EmbeddingWriter
from maestro_scale.evaluation.features.cache import cached_features
from maestro_scale.evaluation.features.missing import tile_vector
from maestro_scale.inference import command, run
from maestro_scale.inference.outputs import ClassMap
from maestro_scale.interop.export import write_model
from maestro_scale.interop.pretrained import load_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import SIZES
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import git_revision

BATCH = 16
MAP_SHARDS = 1  # of one tile of PASTIS-HD, 64 windows
CACHE_BYTES = 100 * 2**30


def first_shards(shards: Path, count: int, out: Path) -> Path:
    """A dataset of the first shards of another."""
    manifest = Manifest.load(str(shards))
    kept = manifest.shards_of(["train"])[:count]
    out.mkdir(exist_ok=True)
    for shard in kept:
        (out / shard.path).unlink(missing_ok=True)
        (out / shard.path).symlink_to(shards / shard.path)
    (out / "manifest.json").write_text(replace(manifest, shards=tuple(kept)).dumps())
    return out


def network(dataset: str, size: str, folder: Path) -> Maestro:
    """A network with random weights and, for PASTIS-HD, the head of its segmentation; as loaded from an export."""
    spec = datasets.spec(dataset)
    heads = tuple(t for t in spec.targets if t.is_map)
    config = ModelConfig(
        spec.sensors,
        SIZES[size],
        spec.pos_grid,
        inter_depth=3,
        ref_sensor=spec.ref_sensor,
        heads=heads,
        dataset=dataset,
        crop_m=spec.crop_m,
    )
    record = Finetuned(spec, heads[0].name, "miou", "finetune", 1, 0.5, 0.5) if heads else None
    write_model(
        folder, Maestro(config, decodes=not heads).initialise(0).state_dict(), config, {"step": 1}, record
    )
    return load_model(folder)


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and seconds of processor time of this process and of its ended children."""
    started, before = time.perf_counter(), _processor()
    action()
    return time.perf_counter() - started, _processor() - before


def _processor() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


@torch.no_grad()
def forward(compute: Callable[[Batch], Any], batches: Sequence[Batch]) -> None:
    """The forward pass of every batch."""
    for batch in batches:
        compute(batch)


def embed_all(model: Maestro, shards: Path, out: Path, share: int = 1) -> None:
    """Embed the first of ``share`` parts of the shards."""
    manifest = Manifest.load(str(shards))
    kept = manifest.shards_of(["train"])[: -(-len(manifest.shards) // share)]
    store = Store(str(shards), out / "cache", CACHE_BYTES)
    writer = EmbeddingWriter(model, store, replace(manifest, shards=tuple(kept)), batch_size=BATCH, workers=1)
    writer.write(out / "embeddings", "train")


def eval_loader(model: Maestro, shards: Path, cache: Path, workers: int) -> EvalLoader:
    """All crops of the training split."""
    manifest = Manifest.load(str(shards))
    spec = datasets.spec(model.config.views[0].dataset)
    store = Store(str(shards), cache, CACHE_BYTES)
    return EvalLoader(Source(spec, manifest.shards_of(["train"]), store), BATCH, workers=workers)


def encode_all(model: Maestro, shards: Path, out: Path) -> None:
    """The features of all crops, as an evaluation caches them."""
    cached_features(
        out / "features",
        {"of": "benchmark"},
        eval_loader(model, shards, out / "cache", workers=1),
        lambda batch: tile_vector(model, batch),
        lambda batch: np.zeros((len(batch), 1), np.float32),
        "float32",
        torch.device("cpu"),
    )


def predict_all(model: Maestro, shards: Path, out: Path) -> None:
    """Maps of all tiles."""
    options = command.Options(splits=("train",), cache_dir=out / "cache", overlap=0.0)
    command.predict(model, str(shards), out / "maps", options, run.Run(torch.device("cpu")))


def batches_of_maps(model: Maestro, shards: Path, out: Path) -> list[Batch]:
    """The batches that ``predict_all`` computes, in order."""
    seen: list[Batch] = []
    values = ClassMap.values

    def recorded(self: ClassMap, batch: Batch) -> Any:
        seen.append(batch)
        return values(self, batch)

    with mock.patch.object(ClassMap, "values", recorded):
        predict_all(model, shards, out)
    return seen


def compare(
    whole: Callable[[Path], None],
    compute: Callable[[Batch], Any],
    batches: Sequence[Batch],
    work: Path,
    rounds: int,
) -> dict[str, Any]:
    """Of each round: seconds and processor seconds of the command and of the forward pass, and their ratio."""
    found: dict[str, Any] = {"batches": len(batches), "samples": sum(len(b) for b in batches), "rounds": []}
    for _ in range(rounds):
        shutil.rmtree(work / "out", ignore_errors=True)
        alone = timed(lambda: forward(compute, batches))
        of_command = timed(lambda: whole(work / "out"))
        found["rounds"].append(
            {
                "forward_s": alone[0],
                "command_s": of_command[0],
                "ratio": of_command[0] / alone[0],
                "processor_ratio": of_command[1] / alone[1],
            }
        )
        print(found["rounds"][-1], file=sys.stderr, flush=True)
    return found


def peak_mib(work: Path, size: str, share: int) -> float:
    """Largest resident memory of a process that embeds a part of the shards."""
    words = [sys.executable, "-m", "benchmarks.inference", "--work", str(work), "--size", size]
    done = subprocess.run([*words, "--embed", str(share)], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, kept; 4 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the network")
    parser.add_argument("--embed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    trees = shards_of(build(args.work, "treesatai_ts"), "raw")
    model = network("treesatai_ts", args.size, args.work / "treesatai_ts-model")
    out = args.work / "inference"
    if args.embed:
        shutil.rmtree(out, ignore_errors=True)
        embed_all(model, trees, out, args.embed)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    result: dict[str, Any] = {"revision": git_revision(), "size": args.size, "batch_size": BATCH}
    batches = list(eval_loader(model, trees, args.work / "cache", workers=0))
    vector = lambda batch: tile_vector(model, batch)  # noqa: E731
    for name, action in (("embed", embed_all), ("encode", encode_all)):
        whole = lambda folder, action=action: action(model, trees, folder)  # noqa: E731
        result[name] = compare(whole, vector, batches, out, args.rounds)
    del batches
    result["peak_mib"] = {f"{share}": peak_mib(args.work, args.size, share) for share in (4, 1)}
    fields = first_shards(
        shards_of(build(args.work, "pastis_hd"), "raw"), MAP_SHARDS, args.work / "pastis_hd-first"
    )
    maps = network("pastis_hd", args.size, args.work / "pastis_hd-model")
    head = maps.config.heads[0].name
    shutil.rmtree(out / "out", ignore_errors=True)
    seen = batches_of_maps(maps, fields, out / "out")
    result["predict"] = compare(
        lambda folder: predict_all(maps, fields, folder),
        lambda batch: maps.predict(batch, head).probabilities,
        seen,
        out,
        args.rounds,
    )
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
