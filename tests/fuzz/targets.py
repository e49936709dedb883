"""The fuzz targets: each reads bytes as one kind of file, and may end in an expected error only.

A target takes any bytes. What it may raise is what an entry point prints as one line (:func:`entry.error_line`);
anything else is a bug. Files are written to a folder in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.entry import error_line

MAX_MESSAGE = 4100
_SHM = Path("/dev/shm")
_folder: Path | None = None


def folder() -> Path:
    """A folder of this process, in memory where the machine has /dev/shm."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_SHM if _SHM.is_dir() else None))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def place(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def expected_errors() -> Any:
    """Swallow an error that ends in one line; anything else passes through."""
    try:
        yield
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        assert len(line) < MAX_MESSAGE, f"a message of {len(line)} characters: {line[:200]}"
        assert line.isprintable() or "\n" in line, f"unprintable: {line[:200]!r}"


def manifest(data: bytes) -> None:
    from maestro_scale.datasets.spec_check import crop_problems
    from maestro_scale.shards.format.manifest import Manifest

    read = Manifest.loads(data)
    list(crop_problems(read.spec))
    assert Manifest.loads(read.dumps()) == read
    _ = read.digest, read.content_digest
    if read.splits:
        read.digest_of(read.splits)


def index(data: bytes) -> None:
    from maestro_scale.shards.format.index import ShardIndex

    read = ShardIndex.loads(data, "index")
    assert ShardIndex.loads(read.dumps(), "index") == read


def sample(data: bytes) -> None:
    from maestro_scale.datasets.spec import DatasetError
    from maestro_scale.shards.errors import CodecError
    from maestro_scale.shards.format.codec import Sample
    from maestro_scale.shards.format.fields import check_layouts
    from maestro_scale.shards.format.values import value_problems

    read = Sample(data)
    fields: dict[str, np.ndarray] = {}
    with contextlib.suppress(CodecError):
        _ = read.origin
    for name in read.names[:50]:
        with contextlib.suppress(CodecError):
            shape = read.shape(name)
            fields[name] = read.array(name)
            if len(shape) > 2 and min(shape) > 0:
                window = (slice(0, 1), slice(0, 1))
                assert read.rows(name, np.array([0]), window).shape[1:] == (*shape[1:-2], 1, 1)
    with contextlib.suppress(DatasetError):
        check_layouts(
            read.key, {name: (a.shape, str(a.dtype)) for name, a in fields.items()}, _fixture_spec()
        )
        value_problems(fields, _fixture_spec())


def tar(data: bytes) -> None:
    from maestro_scale.shards.format.index import ShardIndex

    read = ShardIndex.from_tar(place("shard.tar", data), "0" * 64)
    for key, offset, size in list(zip(read.keys, read.offsets, read.sizes, strict=True))[:3]:
        assert key is not None
        with expected_errors():
            sample(data[offset : offset + size])


def recipe(data: bytes) -> None:
    from maestro_scale.recipe import load_recipe

    load_recipe(str(place("recipe.yaml", data)), [])


def description(data: bytes) -> None:
    """A dataset in YAML, what follows from it, and its patterns on the names of files; no file is opened."""
    from maestro_scale.datasets.description.dataset import only
    from maestro_scale.datasets.description.index import list_sections, sections
    from maestro_scale.datasets.description.load import load_description
    from maestro_scale.datasets.description.spec import settings_of
    from maestro_scale.datasets.sources.listing import pattern_of

    read = load_description(place("description.yaml", data))
    settings_of(only(read, [next(n for n, raster in read.rasters.items() if raster is not None)]))
    for section in sections(read).values():
        with expected_errors():
            pattern = pattern_of(section)
            for name in ("s2/a_20200101_B2.tif", "a" * 200, f"{'a_' * 50}/20201301T000000.tif"):
                pattern.match(name)
                pattern.nearly(name)
    if b"://" not in data:  # a folder without files: whatever the description says, nothing is read
        with expected_errors():
            list_sections(read, str(folder() / "empty"), "train")


def override(data: bytes) -> None:
    from maestro_scale.recipe import load_recipe
    from maestro_scale.secrets_filter import scrub_command

    text = data.decode(errors="replace").replace("\0", " ")
    scrub_command(["train.py", "--set", text])
    load_recipe("tests/fixtures/pretrain.yaml", [text])


def results(data: bytes) -> None:
    from maestro_scale.evaluation.report.groups import find_results, group_results

    groups = group_results(find_results([place("results.json", data)]))
    for group in groups:
        _ = group.anchor, group.first


def counts(data: bytes) -> None:
    """A ``counts.npz``, and the comparison of what it holds with itself."""
    from maestro_scale.evaluation.counts import TileCounts
    from maestro_scale.evaluation.metrics import STATISTICS
    from maestro_scale.evaluation.paired import Run, difference

    read = TileCounts.loads(data)
    for metric in STATISTICS:
        with expected_errors():
            difference([Run(metric, 0, None, read)], [Run(metric, 0, None, read)])


def commit(data: bytes) -> None:
    """As it is, and again with a hash that fits, which the format requires and a mutation would never find."""
    from maestro_scale.training.checkpoint import commit as marker

    with expected_errors():
        _read_commit(data)
    try:
        whole = json.loads(data)
        whole.pop("sha256", None)
        signed = json.dumps({**whole, "sha256": marker._digest(whole)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return
    _read_commit(signed)


def _read_commit(data: bytes) -> None:
    from maestro_scale.training.checkpoint import commit as marker
    from maestro_scale.training.checkpoint.identity import differences
    from maestro_scale.training.checkpoint.record import Position, read_record

    path = place("step_00000004/COMMIT.json", data)
    marker.problem(path.parent, hashes=True)
    try:
        record = read_record(path.parent)
    except ValueError:  # what it documents; Checkpoints.resume reports it
        return
    assert isinstance(record.position, Position)
    differences(record.identity, {"model": {"size": 1}, "engine": {"precision": "bf16"}})


def state_index(data: bytes) -> None:
    """``index.json`` of a checkpoint's state, beside the files of the fixture."""
    from maestro_scale.interop.export import full_state

    state = next(Path("tests/fixtures/run/checkpoints").glob("*/state"))
    target = folder() / "state"
    if not target.exists():
        shutil.copytree(state, target)
    (target / "index.json").write_bytes(data)
    full_state(target)


def checkpoint(data: bytes) -> None:
    """A file to convert: the first byte chooses whether the rest is the file, or the pickle within a valid file."""
    from maestro_scale.interop.convert import ConversionHints, ConvertOptions, convert

    if data[:1] == b"P":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in (("data.pkl", data[1:]), ("byteorder", b"little"), ("data/0", bytes(4096))):
                file.writestr(f"a/{name}", content)
        body = archive.getvalue()
    else:
        body = data[1:]
    options = ConvertOptions(hints=ConversionHints(heads=3, decoder_heads=16))
    convert(place("foreign.ckpt", body), folder() / "converted", options)


def model(data: bytes) -> None:
    """An exported model: the length of config.json, config.json, model.safetensors (empty: the fixture's)."""
    from maestro_scale.interop.pretrained import read_model
    from maestro_scale.interop.sources import ModelSource

    length = int.from_bytes(data[:4], "little")
    weights = data[4 + length :] or Path("tests/fixtures/model/model.safetensors").read_bytes()
    place("model/config.json", data[4 : 4 + length])
    place("model/model.safetensors", weights)
    read_model(ModelSource(folder() / "model"))


def tensors(data: bytes) -> None:
    """A safetensors file, by the library and by this project's own header parser."""
    from maestro_scale import untrusted

    path = place("model.safetensors", data)
    with contextlib.suppress(untrusted.InputError):
        untrusted.load_tensors(path)
    with contextlib.suppress(untrusted.InputError):
        untrusted.load_tensors(data)
    if len(data) >= 8:
        size = struct.unpack("<Q", data[:8])[0]
        if size <= len(data) - 8:
            untrusted.parse_safetensors_header(data[8 : 8 + size], len(data) - 8 - size)


RUN_FILES = (
    "environment.json",
    "outcome.json",
    "metrics.jsonl",
    "attempts.jsonl",
    "tracking.json",
    "outbox",
    "node",
)


def run(data: bytes) -> None:
    """One file of a run directory, chosen by the first byte, beside valid ones."""
    from maestro_scale.cluster.attempts import Attempt, decide
    from maestro_scale.cluster.health import read_reports
    from maestro_scale.tracking.origin import provenance_tags
    from maestro_scale.tracking.outbox import OUTBOX_FILE, list_pending
    from maestro_scale.tracking.run_file import last_store, parent_run_dir
    from maestro_scale.training.run_dir import JsonLines
    from maestro_scale.training.setup import read_environment, setup_line, setup_tags

    name = RUN_FILES[data[0] % len(RUN_FILES)] if data else RUN_FILES[0]
    run_dir = folder() / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "nodes").mkdir()
    path = {"outbox": run_dir / OUTBOX_FILE, "node": run_dir / "nodes" / "n1.json"}.get(name, run_dir / name)
    path.write_bytes(data[1:])
    for read in (
        lambda: (setup_line(read_environment(run_dir)), setup_tags(read_environment(run_dir))),
        lambda: provenance_tags(read_environment(run_dir)),
        lambda: decide(run_dir, run_dir / "logs", Attempt("1", 0, 0, 1, False), 3),
        lambda: list_pending(run_dir),
        lambda: JsonLines(run_dir / "metrics.jsonl").read(),
        lambda: (last_store(run_dir), parent_run_dir(run_dir)),
        lambda: read_reports(run_dir / "nodes"),
    ):
        with expected_errors():
            read()


def labels(data: bytes) -> None:
    """JSON and JSON within tables of the raw datasets."""
    from maestro_scale.datasets.flair_hub.dates import Dates  # noqa: F401  # registers the parser
    from maestro_scale.datasets.treesatai_ts.splits import LABELS_JSON, SentinelNames, from_lst

    source = folder() / "treesat"
    place(f"treesat/{LABELS_JSON}", data)
    listing = place("treesat/train_filenames.lst", b"a.tif\nb.tif\n")
    from_lst(source, listing, SentinelNames([]))


def _fixture_spec() -> Any:
    from maestro_scale.shards.format.manifest import Manifest

    global _spec
    if _spec is None:
        _spec = Manifest.loads(Path("tests/fixtures/shards/manifest.json").read_bytes()).spec
    return _spec


_spec: Any = None

TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        manifest,
        index,
        sample,
        tar,
        recipe,
        description,
        override,
        results,
        counts,
        commit,
        state_index,
    )
} | {f.__name__: f for f in (checkpoint, model, tensors, run)}
