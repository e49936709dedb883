"""Valid documents of every kind that the targets read; ``python -m tests.fuzz.seeds`` writes them to the corpus."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from maestro_scale.datasets.description import config as description
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.shards.format.codec import encode_fields
from tests.fuzz.targets import RUN_FILES, TARGETS

CORPUS = Path(__file__).parent / "corpus"
FIXTURES = Path("tests/fixtures")


def documents() -> dict[str, list[bytes]]:
    """{target: valid documents}."""
    manifest = (FIXTURES / "shards" / "manifest.json").read_bytes()
    commit = next(FIXTURES.glob("run/checkpoints/*/COMMIT.json")).read_bytes()
    shard = (FIXTURES / "shards" / "val-000000.tar").read_bytes()
    config = (FIXTURES / "model" / "config.json").read_bytes()
    results = [p.read_bytes() for p in sorted((FIXTURES / "evaluation").rglob("results.json"))]
    recipes = [(FIXTURES / "pretrain.yaml").read_bytes(), (FIXTURES / "evaluate.yaml").read_bytes()]
    return {
        "manifest": [manifest],
        "index": [(FIXTURES / "shards" / "val-000000.index.json").read_bytes()],
        "sample": [_sample(codec) for codec in ("raw", "delta-zstd")] + [shard_sample(shard)],
        "tar": [shard, *_tars()],
        "recipe": [*recipes, b"a: &a [1]\nb: *a\n<<: {c: 1}\n", b"train: {steps: 0x1f, lr: 1e-3}\n"],
        "description": [
            *(Path(f"descriptions/{n}.yaml").read_bytes() for n in ("eurosat_ms", "terramesh", "flair2_toy")),
            *(e.encode() for e in examples()),
        ],
        "override": [
            b"model.size=tiny",
            b"data.mixture[0].weight=2",
            b"train={steps: 3}",
            b"a.b=[1, {c: d}]",
        ],
        "results": results,
        "counts": [_counts((4, 3, 2)), _counts((2, 5, 4)), _counts((3, 6))],
        "commit": [commit],
        "state_index": [next(FIXTURES.glob("run/checkpoints/*/state/index.json")).read_bytes()],
        "checkpoint": [b"P" + _pickle(), b"Z" + _archive()],
        "model": [len(config).to_bytes(4, "little") + config],
        "tensors": [_sample("raw")],
        "run": _run_files(),
    }


def examples() -> list[str]:
    """The descriptions in the documentation of their module."""
    blocks = re.findall(r"\n\n((?:    .*\n|\n)+)", description.__doc__ or "")
    return [textwrap.dedent(block) for block in blocks if "tile_m:" in block]


def shard_sample(shard: bytes) -> bytes:
    """The first sample of a shard."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        member = tar.next()
        file = member and tar.extractfile(member)
        assert file is not None
        return file.read()


def _sample(codec: str) -> bytes:
    rng = np.random.default_rng(0)
    fields = {
        "s2": rng.integers(0, 4, (6, 2, 16, 16)).astype(np.int16),
        "s2.dates": np.full((6, 3), 5, np.int16),
        "ref_date": np.array([2019, 100, 0], np.int16),
        "target.kinds": np.zeros(3, np.float32),
    }
    return encode_fields("tile", fields, codec)


def _counts(shape: tuple[int, ...]) -> bytes:
    array = np.random.default_rng(0).integers(0, 300, shape)
    return TileCounts(tuple(map(str, range(len(array)))), array).dumps()


def _tars() -> list[bytes]:
    found = []
    for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
            for name in ("a.safetensors", "dir/", "b" * 120 + ".safetensors", "ü.safetensors"):
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                info.mtime = 1.5 if layout == tarfile.PAX_FORMAT else 1
                try:
                    tar.addfile(info)
                except ValueError:  # ustar has no long names
                    continue
        found.append(buffer.getvalue())
    return found


def _pickle() -> bytes:
    """A state dict as torch.save pickles it, with the opcodes written by hand: no torch needed."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuM\0\x04tQ"
        b"K\0K\x08K\x08\x86K\x08K\x01\x86\x89ccollections\nOrderedDict\n)RtR"
    )
    entries = b"".join(
        b"X" + len(k).to_bytes(4, "little") + k + tensor for k in (b"model.mask_token.s2", b"model.a")
    )
    hyper = pickle.dumps(
        {"model": "mae", "lr": 0.5, "betas": (1, 2.0), "n": None, "on": True, "big": 2**40}, 2
    )
    return (
        b"\x80\x02}q\x00(X\x0a\0\0\0state_dict"
        + b"ccollections\nOrderedDict\nq\x01)Rq\x02("
        + entries
        + b"uX\x10\0\0\0hyper_parameters"
        + hyper[2:-1]
        + b"u."
    )


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in (("data.pkl", _pickle()), ("byteorder", b"little"), ("data/0", bytes(4096))):
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _run_files() -> list[bytes]:
    attempt = {"job": "1", "start": 0, "step": 4, "status": 1, "asked": False}
    node = {
        "node": "n1",
        "port": 1,
        "problems": [],
        "unreachable": [],
        "collective": "",
        "all_reduce_ms": 1.5,
    }
    content: dict[str, bytes] = {
        "environment.json": (FIXTURES / "run" / "environment.json").read_bytes(),
        "outcome.json": json.dumps({"reason": "stopped", "why": "STOP", "step": 4}).encode(),
        "metrics.jsonl": b"\n".join((FIXTURES / "run" / "metrics.jsonl").read_bytes().split(b"\n")[:2]),
        "attempts.jsonl": json.dumps(attempt).encode() + b"\n",
        "tracking.json": json.dumps({"id": "a", "run_id": "b", "tracking_uri": "sqlite:///x"}).encode(),
        "outbox": json.dumps({"results": "/a/results.json", "tags": {"host": "n1"}}).encode() + b"\n",
        "node": json.dumps(node).encode(),
    }
    setup = {
        "setup": {
            "device": "cuda",
            "gpu": "H100",
            "gpus": 8,
            "ranks": 8,
            "nodes": 1,
            "launcher": "torchrun",
            "precision": "bf16",
            "versions": OrderedDict(torch="2.6", cuda=None, nccl="2.2", driver="5", deepspeed="0.19"),
        },
        "git_revision": None,
        "host": "n1",
        "attention": "flash",
    }
    found = [bytes([number]) + content[name] for number, name in enumerate(RUN_FILES)]
    return [*found, b"\0" + json.dumps(setup).encode()]


def write() -> None:
    """Write the valid documents to the corpus."""
    for target, texts in documents().items():
        assert target in TARGETS
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            (CORPUS / target / f"valid-{number}").write_bytes(text)


if __name__ == "__main__":
    write()
