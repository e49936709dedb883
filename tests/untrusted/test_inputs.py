"""Malformed files of every kind, as a user meets them: each ends in a project error, in seconds and bounded memory."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from maestro_scale.errors import MaestroError
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.interop.pretrained import load_model
from maestro_scale.interop.sharded_state import StateReader
from maestro_scale.recipe import RecipeError, load_recipe
from maestro_scale.shards.errors import CodecError, ManifestError
from maestro_scale.shards.format.codec import Sample, encode_fields
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.record import read_record
from tests.fuzz.seeds import documents

MAX_SECONDS = 5.0
FIXTURES = Path("tests/fixtures")
HEADER_KEY = "__metadata__"


def refused(read: Callable[[], object], kind: type[Exception] = MaestroError) -> str:
    """The one line that ``read`` must end in; five seconds of processor time."""
    started = time.process_time()
    with pytest.raises(kind) as caught:
        read()
    assert time.process_time() - started < MAX_SECONDS
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


DEEP = "[" * 1500 + "]" * 1500
LONG = "9" * 5000
NESTED = {"deep": DEEP, "digits": LONG, "twice": '{"a": 1, "a": 2}', "bytes": "\udcff", "infinite": "[1e999]"}


@pytest.fixture(params=NESTED)
def text(request) -> bytes:
    """JSON that used to end in a traceback."""
    return NESTED[request.param].encode("utf-8", errors="surrogateescape")


class TestJsonFiles:
    def test_manifest(self, text):
        refused(lambda: Manifest.loads(text), ManifestError)

    def test_index(self, text):
        refused(lambda: ShardIndex.loads(text, "index"), ManifestError)

    def test_header(self, text):
        refused(lambda: Sample(len(text).to_bytes(8, "little") + text), CodecError)

    def test_commit(self, text, tmp_path):
        if b"1e999" in text:
            pytest.skip("the state of the loss guard may be infinite")
        (tmp_path / commit.MARKER).write_bytes(text)
        assert commit.problem(tmp_path).startswith("unreadable COMMIT.json")

    def test_results(self, text, tmp_path):
        (tmp_path / "results.json").write_bytes(text)
        refused(lambda: EvalResult.load(tmp_path / "results.json"), EvaluationError)

    def test_model(self, text, tmp_path):
        (tmp_path / "config.json").write_bytes(text)
        refused(lambda: load_model(tmp_path))

    def test_state(self, text, tmp_path):
        (tmp_path / "index.json").write_bytes(text)
        refused(lambda: StateReader(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"value": [0.5]},
        {"value": "0.5"},
        {"interval": {"low": 0.1}},
        {"interval": ["a", "b"]},
        {"per_class": {"a": [0.5]}},
        {"per_class": {"a": "0.5"}},
        {"num_tiles": 7.5},
        {"num_tiles": [7]},
        {"seeds": ["0"]},
        {"folds": 1},
        {"splits": {"test": "test"}},
        {"scores": {"oa": {}}},
        {"confusion": [[0.5]]},
        {"timings": {"encode_s": "3"}},
        {"chosen": {"l2": None}},
        {"runs": [{"value": 1}]},
        {"recipe": [1]},
        {"trained_on": "a"},
        {"benchmark": 3},
    ],
)
def test_results_with_lists_or_text_where_numbers_belong(tmp_path, change):
    values = json.loads(next((FIXTURES / "evaluation").rglob("results.json")).read_bytes())
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**values, **change}))
    message = refused(lambda: EvalResult.load(path), EvaluationError)
    assert next(iter(change)) in message
    assert "evaluate again" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: " + "[" * 900 + "]" * 900, "nest"),
        ("- " * 900, "nested more than 64 levels"),
        ("data: &a {b: *a}", "alias 'a' is within what it refers to"),
        ("name: " + LONG, "an integer of more than 20 digits"),
        ("name: '" + "x" * 10_000_000 + "'", "larger than 1 MiB"),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 60))]),
            "aliases expanded",
        ),
        ("!!python/object/apply:os.system ['touch x']", "is not supported"),
        ("? " + "x" * 60_000 + "\n: 1", "unknown key"),
        ("train:\n  ? " + "x" * 60_000 + "\n  : 1", "unknown key"),
    ],
)
def test_recipes(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), [])
    assert time.process_time() - started < MAX_SECONDS
    assert message in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a." + LONG + "=1", "is longer than any key"),
        (".".join("a" * 2000) + "=1", "is longer than any key"),
        ("name=" + LONG, "an integer of more than 20 digits"),
        ("model=" + "[" * 900, "nest"),
        ("model=&a [*a]", "is within what it refers to"),
        ("x" * 100_000, "is not section.key=value"),
    ],
)
def test_overrides(override, message):
    assert message in refused(lambda: load_recipe(str(FIXTURES / "pretrain.yaml"), [override]), RecipeError)


def test_manifests_name_files_below_the_dataset():
    manifest = json.loads((FIXTURES / "shards" / "manifest.json").read_bytes())
    for path in ("a\0b.tar", "../a.tar", "/a.tar", "a/../b.tar", "", "x\n.tar"):
        manifest["shards"][0]["path"] = path
        assert "is not a path below" in refused(lambda: Manifest.loads(json.dumps(manifest)), ManifestError)


@pytest.mark.parametrize("length", [60_000, 1_000_000])
def test_a_long_class_name_is_not_printed(length):
    manifest = json.loads((FIXTURES / "shards" / "manifest.json").read_bytes())
    target = manifest["spec"]["targets"][0]
    target["classes"] = ["x" * length, "x" * length]
    refused(lambda: Manifest.loads(json.dumps(manifest)), ManifestError)


def test_three_hundred_thousand_shards():
    manifest = Manifest.loads((FIXTURES / "shards" / "manifest.json").read_bytes())
    shard = '{"path": "train-%06d.tar", "split": "train", "bytes": 10, "samples": 1, "sha256": "%064x"}'
    empty = json.loads(manifest.dumps()) | {"shards": []}
    shards = ",".join(shard % (i, i) for i in range(300_000))
    text = json.dumps(empty).replace('"shards": []', f'"shards": [{shards}]')
    started = time.process_time()
    read = Manifest.loads(text)
    assert time.process_time() - started < 30  # 5 s on an idle core; minutes before
    assert read.shards[-1] == ShardInfo("train-299999.tar", "train", 10, 1, f"{299_999:064x}")


class TestShards:
    def tar(self, path: Path, names: list[str], layout: int = tarfile.GNU_FORMAT, **fields: Any) -> Path:
        with tarfile.open(path, "w", format=layout) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                for field, value in fields.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO())
        return path

    def test_a_sparse_file(self, tmp_path):
        headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000"}
        path = self.tar(tmp_path / "a.tar", ["a.safetensors"], tarfile.PAX_FORMAT, pax_headers=headers)
        assert "sparse" in refused(lambda: ShardIndex.from_tar(path, ""), ManifestError)

    def test_many_long_names(self, tmp_path):
        path = self.tar(tmp_path / "a.tar", [f"{i:0200d}.safetensors" for i in range(20_000)])
        started = time.process_time()
        assert len(ShardIndex.from_tar(path, "").keys) == 20_000
        assert time.process_time() - started < MAX_SECONDS

    def test_many_empty_members(self, tmp_path):
        block = self.tar(tmp_path / "a.tar", ["a.safetensors"]).read_bytes()[:512]
        path = tmp_path / "b.tar"
        path.write_bytes(block * 200_000)
        started = time.process_time()
        assert len(ShardIndex.from_tar(path, "").keys) == 200_000
        assert time.process_time() - started < MAX_SECONDS


def sample(entries: dict[str, Any], data: bytes, **metadata: str) -> bytes:
    header = json.dumps({HEADER_KEY: {"key": "k", **metadata}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


class TestSamples:
    ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}  # noqa: RUF012 # not changed

    def test_the_entry_is_valid(self):
        assert Sample(sample({"a": self.ENTRY}, b"abcd")).array("a").tolist() == [97, 98, 99, 100]

    @pytest.mark.parametrize(
        "change",
        [
            {"data_offsets": [0.0, 4.0]},
            {"data_offsets": [0]},
            {"data_offsets": None},
            {"shape": [4.0]},
            {"shape": [-4]},
            {"shape": "4"},
            {"dtype": None},
            {"dtype": ["U8"]},
        ],
    )
    def test_fields_of_the_wrong_type(self, change):
        refused(lambda: Sample(sample({"a": {**self.ENTRY, **change}}, b"abcd")), CodecError)

    @pytest.mark.parametrize("field", ENTRY)
    def test_a_missing_field(self, field):
        entry = {k: v for k, v in self.ENTRY.items() if k != field}
        refused(lambda: Sample(sample({"a": entry}, b"abcd")), CodecError)

    @pytest.mark.parametrize(
        "change",
        [
            {"shape": [10**12, 2]},
            {"shape": [2**40]},
            {"shape": []},
            {"shape": [0, 4]},
            {"shape": [4.0, 4096]},
            {"shape": 4},
            {"rows": 0},
            {"rows": 1.5},
            {"rows": True},
            {"ends": []},
            {"ends": [5.5]},
            {"ends": [-1]},
            {"ends": [10**9]},
            {"dtype": "O"},
            {"dtype": "datetime64[s]"},
            {"dtype": {"names": ["a"], "formats": ["<f8"]}},
            {"dtype": "complex128"},
            {"codec": "zip"},
            {"codec": None},
            {"strip": -1},
            {"strip": 7},
            {"more": 1},
        ],
    )
    def test_encodings_that_do_not_fit(self, change):
        buffer = encode_fields("k", {"a": np.zeros((4, 4096), np.int16)}, "zstd")
        size = int.from_bytes(buffer[:8], "little")
        header = json.loads(buffer[8 : 8 + size])
        encoded = json.loads(header[HEADER_KEY]["encoded"])
        encoded["a"].update(change)
        metadata = {"encoded": json.dumps(encoded)}
        entries = {k: v for k, v in header.items() if k != HEADER_KEY}
        refused(lambda: Sample(sample(entries, buffer[8 + size :], **metadata)).array("a"), CodecError)

    @pytest.mark.parametrize("place", ["[]", "{}", '{"crs": 3, "west_m": 0, "north_m": 0}', DEEP, LONG])
    def test_a_place_that_is_none(self, place):
        read = Sample(sample({"a": self.ENTRY}, b"abcd", place=place))
        refused(lambda: read.origin, CodecError)


def test_commits_name_files_below_their_folder(tmp_path):
    for name in ("../x", "/etc/passwd", "a\0b", "a//b"):
        commit.commit(tmp_path, {}, {name: {"bytes": 1, "sha256": ""}})
        assert "not a path below its folder" in commit.problem(tmp_path)
    for entry in ({}, {"bytes": "1", "sha256": ""}, {"bytes": 1}, [], None):
        commit.commit(tmp_path, {}, {"a": entry})
        assert "no size and sha256" in commit.problem(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"position": {"step": -1}},
        {"position": {"step": "4"}},
        {"position": [4]},
        {"position": {"stp": 4}},
        {"guard": []},
        {"identity": None},
        {"hooks": {"a": 3}},
    ],
)
def test_commits_of_the_wrong_types(tmp_path, change):
    commit.commit(tmp_path, {"position": {"step": 4}, "guard": {}, "identity": {}}, {})
    assert read_record(tmp_path).position.step == 4
    commit.commit(tmp_path, {"position": {}, "guard": {}, "identity": {}, **change}, {})
    refused(lambda: read_record(tmp_path), ValueError)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(shape=[-1]),
        lambda p: p.update(shape=[10**15]),
        lambda p: p["pieces"].append(p["pieces"][0]),
        lambda p: p["pieces"][0].__setitem__(0, "../../x.safetensors"),
        lambda p: p["pieces"][0].__setitem__(1, 5),
        lambda p: p["pieces"][0].__setitem__(2, -5),
        lambda p: p["pieces"][0].__setitem__(2, "5"),
        lambda p: p.update(pieces={}),
        lambda p: p.pop("pieces"),
    ],
)
def test_state_indexes_that_do_not_cover_their_parameters(tmp_path, change):
    state = next(FIXTURES.glob("run/checkpoints/*/state"))
    index = json.loads((state / "index.json").read_bytes())
    change(next(iter(index["parameters"].values())))
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert "index.json: " in refused(lambda: StateReader(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {
            "size": {
                **dict.fromkeys(("width", "depth", "heads", "dim_head", "mlp_ratio", "decoder_depth"), 10**9)
            }
        },
        {"size": []},
        {"sensors": {}},
        {"sensors": []},
        {"fusion": "other"},
        {"inter_depth": "3"},
        {"pos_grid": 1.5},
    ],
)
def test_models_that_no_version_has(tmp_path, change):
    record = json.loads((FIXTURES / "model" / "config.json").read_bytes())
    record["model"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "model" / "model.safetensors").read_bytes())
    refused(lambda: load_model(tmp_path))


BOMBS: dict[str, Callable[[], bytes]] = {
    # 6 GiB in one frame, as its own header claims
    "sample": lambda: sample(
        {"a": {"dtype": "U8", "shape": [len(_BOMB)], "data_offsets": [0, len(_BOMB)]}},
        _BOMB,
        encoded=json.dumps(
            {
                "a": {
                    "codec": "zstd",
                    "dtype": "uint8",
                    "shape": [6 * 2**30],
                    "rows": 6 * 2**30,
                    "ends": [len(_BOMB)],
                }
            }
        ),
    ),
    "manifest": lambda: b"[" + b"[]," * 20_000_000 + b"0]",
    "index": lambda: b'{"a":"' + "\N{GRINNING FACE}".encode() * 25_000_000 + b'"}',
    "recipe": lambda: (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
        )
    ),
    "results": lambda: b'{"version": 1, "per_class": {' + b'"":{},' * 8_000_000 + b'"x": 0}}',
    "tensors": lambda: (99 * 2**20).to_bytes(8, "little") + b"[" * (99 * 2**20),
    "checkpoint": lambda: b"P\x80\x02" + b"]" * 50_000_000 + b".",
}
_BOMB = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(2**20))


@pytest.mark.parametrize("name", BOMBS)
def test_documents_that_claim_memory_stay_below_one_gib(tmp_path, name):
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name]())
    script = (
        "import sys, resource, time, pathlib\n"
        "from tests.fuzz.targets import TARGETS, expected_errors\n"
        f"data = pathlib.Path({str(path)!r}).read_bytes()\n"
        f"with expected_errors(): TARGETS[{name!r}](b'P')\n"  # imports
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before, started = peak(), time.process_time()\n"
        f"with expected_errors(): TARGETS[{name!r}](data)\n"
        "print(peak() - before, time.process_time() - started)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    mib, seconds = map(float, result.stdout.split())
    assert mib < 1024
    assert seconds < MAX_SECONDS


def test_valid_documents_are_read():
    """The documents that the fuzz targets start from are valid: a target that refused them would test nothing."""
    valid = documents()
    Manifest.loads(valid["manifest"][0])
    ShardIndex.loads(valid["index"][0], "index")
    assert Sample(valid["sample"][1]).array("s2").shape == (6, 2, 16, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
