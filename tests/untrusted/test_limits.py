"""Documents at each limit are read; those beyond it end in one line, within seconds and bounded memory."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch  # noqa: F401 # not within a time limit
import zstandard

from maestro_scale import untrusted
from maestro_scale.errors import MAX_MESSAGE, MaestroError, did_you_mean, shorten
from maestro_scale.interop.export import ExportError
from maestro_scale.interop.pretrained import load_model
from maestro_scale.training.checkpoint import commit
from maestro_scale.untrusted import InputError, Limits
from maestro_scale.untrusted.limits import NUMBER_CHARACTERS, RECIPE

MAX_SECONDS = 5.0


def refusal(read: Callable[[], object]) -> str:
    """The message of the InputError that ``read`` must end in, within five seconds."""
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        read()
    assert time.process_time() - started < MAX_SECONDS
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


class TestJson:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ('{"a": [1, -2.5, null, true, "x"]}', {"a": [1, -2.5, None, True, "x"]}),
            ("[" * 64 + "]" * 64, None),
            ("9" * NUMBER_CHARACTERS, 10**NUMBER_CHARACTERS - 1),
            ('"' + "9" * 100 + '"', "9" * 100),
            ('["\\ud83d\\ude00"]', ["\N{GRINNING FACE}"]),
            (b'\xef\xbb\xbf["\xc3\xbc"]', ["ü"]),
            ("1e308", 1e308),
        ],
    )
    def test_what_fits_is_read(self, text, value):
        read = untrusted.load_json(text)
        assert value is None or read == value

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[" * 65 + "]" * 65, "nested more than 64 levels"),
            ("[" * 100_000, "nested more than 64 levels"),
            ('{"a":' * 100_000, "nested more than 64 levels"),
            ("9" * (NUMBER_CHARACTERS + 1), "an integer of 41 digits"),
            ("[-" + "1" * 5000 + "]", "an integer of 5001 digits"),
            ("1" * 10_000_000, "an integer of 10000000 digits"),
            ("1e999", "'1e999', which is too large or too long"),
            ("0." + "1" * 1000, "too large or too long"),
            ("NaN", "contains NaN, which is not a number"),
            ("[Infinity]", "contains Infinity, which is not a number"),
            ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
            ('["\\ud800"]', "not valid Unicode"),
            ('{"\\udfff": 1}', "not valid Unicode"),
            (b"\xff\xfe[]", "is not JSON"),
            ("", "is not JSON"),
            ('"' + "x" * 2_000_000 + '"', "a text of more than 1048576 characters"),
        ],
    )
    def test_what_does_not_is_refused(self, text, message):
        assert message in refusal(lambda: untrusted.load_json(text))

    def test_infinities_are_read_on_request(self):
        assert untrusted.load_json("[Infinity, -Infinity, 1e999]", allow_nan=True) == [
            np.inf,
            -np.inf,
            np.inf,
        ]

    def test_sizes_are_checked_before_values_exist(self):
        limits = Limits(bytes=1000, entries=10)
        assert untrusted.load_json("[" + "0," * 9 + "0]", limits=limits) == [0] * 10
        assert "more than 10 entries" in refusal(
            lambda: untrusted.load_json("[" + "[]," * 20 + "0]", limits=limits)
        )
        assert "1001 bytes" in refusal(lambda: untrusted.load_json(" " * 1001, limits=limits))

    def test_a_file_that_grows_or_never_ends_is_not_read_whole(self):
        assert "is larger than 1 MiB" in refusal(
            lambda: untrusted.read_bytes(Path("/dev/zero"), RECIPE, pipe=True)
        )

    def test_lines_that_are_incomplete_are_skipped(self, tmp_path):
        path = tmp_path / "lines"
        path.write_text('{"step": 1}\n\n{"step": 2}\n{"st')
        assert list(untrusted.read_json_lines(path)) == [{"step": 1}, {"step": 2}]

    def test_a_field_is_of_its_type(self):
        document = {"a": [{"b": 1}]}
        assert untrusted.field_of(document, int, "a", 0, "b") == 1
        assert (
            refusal(lambda: untrusted.field_of(document, str, "a", 0, "b")) == "a[0].b is 1, expected a text"
        )
        assert refusal(lambda: untrusted.field_of(document, dict, "a", 1)) == "has no a[1]"
        assert refusal(lambda: untrusted.field_of(document, dict, "a", "b", where="f")) == "f: has no a.b"
        assert "expected an integer" in refusal(lambda: untrusted.field_of({"n": True}, int, "n"))


def test_a_named_pipe_is_not_opened(tmp_path):
    """Opening one blocks until another process writes to it."""
    for name in ("pipe.json", "config.json", "COMMIT.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    for read in (untrusted.read_json, untrusted.read_json_lines, untrusted.load_tensors):
        assert "is not a regular file" in refusal(lambda read=read: list(read(tmp_path / "pipe.json")))
    with pytest.raises(ExportError, match="is not a regular file"):
        load_model(tmp_path)
    assert "is not a regular file" in (commit.problem(tmp_path) or "")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[" * 900 + "]" * 900, "nested more than 64 levels"),
            ("- " * 900, "nested more than 64 levels"),
            ("[" * 500_000, "nest"),  # libyaml has a limit of its own
            ("a: &a [*a]", "alias 'a' is within what it refers to"),
            ("a: &a {b: {c: *a}}", "alias 'a' is within what it refers to"),
            ("a: 1" + "0" * 5000, "an integer of more than 20 digits"),
            ("a: 0x" + "f" * 5000, "an integer of more than 20 digits"),
            ("100000000000000000000: 1", "an integer of more than 20 digits"),
            ("a: 1" + ":59" * 20_000, "an integer of more than 20 digits"),
            ("a: '" + "x" * 10_000_000 + "'", "10000005 bytes, more than 1 MiB"),
            ("a: '" + "x" * 500_000 + "'", "a text of more than 65536 characters"),
            ("---\n" * 250_000, "more than 20000 entries"),
            ("!!timestamp x", "the tag 'tag:yaml.org,2002:timestamp' is not supported"),
            ("!!python/object:os.system {}", "is not supported"),
            ("a: *b", "is not valid YAML"),
            ("[{a: 1, a: 2}]: 3", "is not valid YAML"),
            ("\0", "is not valid YAML"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, text, message):
        assert message in refusal(lambda: untrusted.load_yaml(text))

    @pytest.mark.parametrize("width", [2, 9])
    def test_an_alias_bomb_is_counted_before_it_is_expanded(self, width):
        levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, 60)]
        message = refusal(lambda: untrusted.load_yaml("\n".join(["a0: &a0 [x]", *levels])))
        assert "with its aliases expanded" in message

    def test_aliases_nest_no_deeper_than_lists(self):
        levels = [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 70)]
        message = refusal(lambda: untrusted.load_yaml("\n".join(["a0: &a0 [x]", *levels])))
        assert message == "is nested more than 64 levels deep, with its aliases expanded"

    def test_aliases_that_fit_are_read(self):
        assert untrusted.load_yaml("a: &a [1, 2]\nb: *a\nc: [*a, *a]") == {
            "a": [1, 2],
            "b": [1, 2],
            "c": [[1, 2], [1, 2]],
        }

    def test_many_keys_are_compared_in_linear_time(self):
        from maestro_scale.strict_yaml.merge import parse_yaml

        started = time.process_time()
        assert len(parse_yaml("\n".join(f"k{i}: 1" for i in range(9000)))) == 9000
        assert time.process_time() - started < MAX_SECONDS


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = ""


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    pair: tuple[float, float] | None = None
    shares: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if len(self.inner) > 2:
            raise ValueError("inner: too many")


class TestRecords:
    def test_a_record_is_read(self):
        read = untrusted.from_builtins(Outer, {"inner": [{"size": 3}], "pair": [1, 2.5]})
        assert read == Outer((Inner(3),), (1.0, 2.5))
        assert type(read.pair[0]) is float

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "is [], expected an object"),
            ({}, "inner: is missing"),
            ({"inner": {}}, "inner: is {}, expected a list"),
            ({"inner": [{"size": 1}, {"size": "8"}]}, "inner[1].size: is '8', expected int"),
            ({"inner": [{"size": True}]}, "inner[0].size: is True, expected int"),
            ({"inner": [{"size": 1.5}]}, "inner[0].size: is 1.5, expected int"),
            ({"inner": [{"size": 2**63}]}, f"inner[0].size: is {2**63}, expected int"),
            ({"inner": [{"size": 1, "nam": 1}]}, "inner[0].nam: no such key; did you mean 'name'?"),
            ({"inner": [], "pair": [1]}, "pair: has 1 entries, expected 2"),
            ({"inner": [{"size": 1}] * 3}, "inner: too many"),
        ],
    )
    def test_a_wrong_type_names_its_path(self, data, message):
        assert refusal(lambda: untrusted.from_builtins(Outer, data)) == message

    def test_long_keys_and_values_are_cut(self):
        key = refusal(lambda: untrusted.from_builtins(Inner, {"x" * 1_000_000: 1}))
        value = refusal(lambda: untrusted.from_builtins(Inner, {"size": "x" * 1_000_000}))
        assert len(key) < 200 > len(value)


def tar_of(path: Path, names: list[str], layout: int = tarfile.GNU_FORMAT, **fields: object) -> Path:
    with tarfile.open(path, "w", format=layout) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3 if fields.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(b"abc"))
    return path


def with_header(path: Path, offset: int, value: bytes) -> Path:
    """The first header with bytes replaced, and its checksum repaired."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[:512]))[0]
    path.write_bytes(data)
    return path


class TestTar:
    @pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_lists_what_the_standard_library_lists(self, tmp_path, layout):
        names = ["a", "b/" + "c" * 60 + "/" + "d" * 60, "ü"]
        names += ["x" * 300] if layout != tarfile.USTAR_FORMAT else []
        path = tar_of(tmp_path / "a.tar", names, layout, mtime=1.5 if layout == tarfile.PAX_FORMAT else 1)
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar]
        assert [tuple(m) for m in untrusted.list_tar(path)] == expected

    def test_records_of_extended_headers_are_limited(self, tmp_path, monkeypatch):
        path = tar_of(tmp_path / "a.tar", ["a", "b"], tarfile.PAX_FORMAT, pax_headers={"x": "1", "y": "2"})
        assert len(untrusted.list_tar(path)) == 2
        monkeypatch.setattr("maestro_scale.untrusted.tar.PAX_RECORDS", 3)
        assert "more than 3 records in PAX headers" in refusal(lambda: untrusted.list_tar(path))

    def test_directories_are_skipped(self, tmp_path):
        path = tar_of(tmp_path / "a.tar", ["dir"], type=tarfile.DIRTYPE)
        assert untrusted.list_tar(path) == []

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (tarfile.SYMTYPE, "'a' is a symbolic link"),
            (tarfile.LNKTYPE, "'a' is a link"),
            (tarfile.CHRTYPE, "'a' is a device"),
            (tarfile.FIFOTYPE, "'a' is a named pipe"),
            (tarfile.GNUTYPE_SPARSE, "'a' is a sparse file"),
        ],
    )
    def test_only_regular_files_are_read(self, tmp_path, kind, message):
        path = tar_of(tmp_path / "a.tar", ["a"])
        assert message in refusal(lambda: untrusted.list_tar(with_header(path, 156, kind)))

    @pytest.mark.parametrize(
        ("offset", "value", "message"),
        [
            (124, b"77777777777\0", "cut short"),
            (124, b"\xff" * 12, "invalid number"),
            (124, b"\x80" + b"\xff" * 11, "cut short"),
            (124, b"-0000000001\0", "invalid number"),
            (0, b"\0" * 100, "an empty or too long name"),
            (0, b"\xff\xfe", "not UTF-8"),
        ],
    )
    def test_fields_are_checked(self, tmp_path, offset, value, message):
        path = with_header(tar_of(tmp_path / "a.tar", ["a"]), offset, value)
        assert message in refusal(lambda: untrusted.list_tar(path))

    @pytest.mark.parametrize(
        ("headers", "message"),
        [
            ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}, "a sparse file"),
            ({"path": "a\0b"}, "one with a NUL"),
            ({"path": "x" * 10_000}, "too long name"),
            ({"size": "1" * 5000}, "invalid size"),
            ({"size": "-1"}, "invalid size"),
            ({"size": "77777777777"}, "cut short"),
        ],
    )
    def test_pax_records_are_checked(self, tmp_path, headers, message):
        path = tar_of(tmp_path / "a.tar", ["a"], tarfile.PAX_FORMAT, pax_headers=headers)
        assert message in refusal(lambda: untrusted.list_tar(path))

    @pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_twenty_thousand_long_names_are_read(self, tmp_path, layout):
        path = tar_of(tmp_path / "a.tar", [f"{i:0200d}" for i in range(20_000)], layout)
        started = time.process_time()
        assert len(untrusted.list_tar(path)) == 20_000
        assert time.process_time() - started < MAX_SECONDS

    def test_long_names_that_belong_to_no_file_are_refused(self, tmp_path):
        one = tar_of(tmp_path / "a.tar", ["x" * 200]).read_bytes()[:1024]  # a long name without its member
        path = tmp_path / "b.tar"
        path.write_bytes(one * 20_000)
        assert "ends after an extended header" in refusal(lambda: untrusted.list_tar(path))

    def test_empty_members_are_limited(self, tmp_path, monkeypatch):
        block = tar_of(tmp_path / "a.tar", ["a"], size=0).read_bytes()[:512]
        path = tmp_path / "b.tar"
        path.write_bytes(block * 200_000)
        started = time.process_time()
        assert len(untrusted.list_tar(path)) == 200_000
        assert time.process_time() - started < MAX_SECONDS
        monkeypatch.setattr("maestro_scale.untrusted.tar.TAR_MEMBERS", 1000)
        assert "more than 1000 members" in refusal(lambda: untrusted.list_tar(path))


def header_of(**entries: object) -> bytes:
    return json.dumps(entries).encode()


class TestTensors:
    GOOD = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}  # noqa: RUF012 # not changed

    def test_a_header_is_read(self):
        metadata, entries = untrusted.parse_safetensors_header(
            header_of(a=self.GOOD, b={"dtype": "F32", "shape": [2, 0], "data_offsets": [4, 4]}), 4
        )
        assert metadata == {}
        assert entries["a"] == ("U8", (4,), 0, 4)
        assert entries["b"].shape == (2, 0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"data_offsets": [0.0, 4.0]}, "wrong type"),
            ({"data_offsets": [0, 4, 4]}, "wrong type"),
            ({"data_offsets": [-4, 0]}, "wrong type"),
            ({"data_offsets": [0, True]}, "wrong type"),
            ({"data_offsets": [4, 0]}, "has -4 bytes for U8 (4,)"),
            ({"data_offsets": [0, 8], "shape": [8]}, "points past the end: damaged or cut short"),
            ({"data_offsets": [0, 3], "shape": [3]}, "leaves 1 bytes unused"),
            ({"data_offsets": [1, 4], "shape": [3]}, "starts at byte 1, not 0"),
            ({"shape": 4}, "wrong type"),
            ({"shape": [2.0, 2]}, "wrong type"),
            ({"shape": [1] * 17}, "17 axes, more than 16"),
            ({"shape": [10**30]}, "has 4 bytes for U8"),
            ({"dtype": 3}, "wrong type"),
            ({"dtype": None}, "wrong type"),
            ({"extra": 3}, "does not have exactly dtype, shape and data_offsets"),
        ],
    )
    def test_fields_are_checked(self, change, message):
        header = header_of(a={**self.GOOD, **change})
        assert message in refusal(lambda: untrusted.parse_safetensors_header(header, 4))

    @pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
    def test_a_missing_field_is_refused(self, field):
        header = header_of(a={k: v for k, v in self.GOOD.items() if k != field})
        assert "exactly dtype" in refusal(lambda: untrusted.parse_safetensors_header(header, 4))

    def test_overlapping_tensors_are_refused(self):
        header = header_of(a=self.GOOD, b={"dtype": "U8", "shape": [4], "data_offsets": [2, 6]})
        assert "tensor 'b' overlaps 'a'" in refusal(lambda: untrusted.parse_safetensors_header(header, 6))

    @pytest.mark.parametrize("metadata", [[], {"key": 3}, "x"])
    def test_metadata_is_an_object_of_texts(self, metadata):
        header = header_of(__metadata__=metadata, a=self.GOOD)
        assert "__metadata__" in refusal(lambda: untrusted.parse_safetensors_header(header, 4))

    @pytest.mark.parametrize(
        ("header", "metadata", "rest"),
        [
            (rb'{"__metadata__":{"key":"a\\\"}","b":""},"x":1}  ', {"key": 'a\\"}', "b": ""}, b'{"x":1}'),
            # Not the first entry, not texts alone, with spaces, without tensors, not valid: left to the parser.
            (b'{"x":1,"__metadata__":{"key":"k"}}', {}, None),
            (b'{"__metadata__":{"key":1},"x":1}', {}, None),
            (b'{"__metadata__": {"key":"k"},"x":1}', {}, None),
            (b'{"__metadata__":{"key":"k"}}', {}, None),
            (b'{"__metadata__":{"key":"k"},}', {}, None),
            (b'{"__metadata__":{},"x":1}', {}, b'{"x":1}'),
        ],
    )
    def test_metadata_are_split_from_a_header(self, header: bytes, metadata: dict, rest: bytes | None):
        expected = metadata, header if rest is None else rest
        assert untrusted.split_safetensors_header(header) == expected

    @pytest.mark.parametrize(
        "metadata", [b'{"key":"k",}', b'{"key":"k""b":"c"}', b'{"a":"b","a":"c"}', b'{"a":"\n"}']
    )
    def test_metadata_that_are_not_json_are_refused(self, metadata: bytes):
        header = b'{"__metadata__":' + metadata + b',"x":1}'
        refusal(lambda: untrusted.split_safetensors_header(header))

    @pytest.mark.parametrize(
        "data", [b"", b"\x10", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 9) + b"[" * 9]
    )
    def test_damaged_files_are_refused(self, tmp_path, data):
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        for source in (path, data):
            assert "is not a valid safetensors file" in refusal(
                lambda source=source: untrusted.load_tensors(source)
            )
        assert "is not a valid safetensors file" in refusal(lambda: untrusted.open_tensors(path))


class TestFrames:
    def test_a_frame_has_the_size_of_its_shape(self):
        frame = zstandard.ZstdCompressor().compress(bytes(1000))
        reader = zstandard.ZstdDecompressor()
        assert untrusted.decompress_frame(frame, 1000, reader) == bytes(1000)
        assert "does not hold the 999 bytes" in refusal(
            lambda: untrusted.decompress_frame(frame, 999, reader)
        )
        assert "more than 64 MiB" in refusal(lambda: untrusted.decompress_frame(frame, 2**40, reader))
        assert "cannot be decompressed" in refusal(
            lambda: untrusted.decompress_frame(frame[:-3], 1000, reader)
        )

    def test_a_frame_without_its_size_is_refused(self):
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
        reader = zstandard.ZstdDecompressor()
        assert "does not hold" in refusal(lambda: untrusted.decompress_frame(frame, 1000, reader))


class TestArrays:
    def test_a_header_that_claims_more_than_the_file_is_refused(self, tmp_path):
        path = tmp_path / "a.npy"
        with path.open("wb") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(64))
        assert "is not an array" in refusal(lambda: untrusted.open_npy(path))

    def test_a_header_with_other_values_than_integers_is_refused(self, tmp_path):
        path = tmp_path / "a.npy"
        with path.open("wb") as file:
            header = {"descr": "<f8", "fortran_order": False, "shape": (True,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(8))
        assert "is not an array" in refusal(lambda: untrusted.open_npy(path))

    def test_a_named_pipe_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "a.npy")
        assert "is not a regular file" in refusal(lambda: untrusted.open_npy(tmp_path / "a.npy"))
        assert "is not a regular file" in refusal(lambda: untrusted.load_npz(tmp_path / "a.npy", ["a"]))

    def test_an_archive_is_limited(self, tmp_path, monkeypatch):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, a=np.zeros((2, 3), np.uint8), b=np.zeros(2**20, np.uint8))
        assert untrusted.load_npz(path, ["a"])[0].shape == (2, 3)
        assert "cannot be read" in refusal(lambda: untrusted.load_npz(path, ["c"]))
        monkeypatch.setattr("maestro_scale.untrusted.arrays.ARCHIVE_BYTES", 2**16)
        assert "b.npy has more than" in refusal(lambda: untrusted.load_npz(path, ["b"]))

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compressions_that_numpy_does_not_write_are_refused(self, tmp_path, compression):
        np.save(tmp_path / "a.npy", np.zeros(3))
        with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
            archive.write(tmp_path / "a.npy", "a.npy")
        assert "is not stored in a way that numpy writes" in refusal(
            lambda: untrusted.load_npz(tmp_path / "a.npz", ["a"])
        )

    def test_an_encrypted_member_is_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", a=np.zeros(3))
        content = bytearray((tmp_path / "a.npz").read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
        assert "is not stored in a way" in refusal(lambda: untrusted.parse_npz(bytes(content), ["a"]))

    def test_the_number_of_files_in_an_archive_is_limited(self, tmp_path, monkeypatch):
        np.savez(tmp_path / "a.npz", **{f"x{i}": np.zeros(1) for i in range(5)})
        monkeypatch.setattr("maestro_scale.untrusted.arrays.ARCHIVE_MEMBERS", 4)
        assert "more than 4 records" in refusal(lambda: untrusted.load_npz(tmp_path / "a.npz", ["x1"]))

    def test_pickles_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", a=np.array([{}], object))
        np.save(tmp_path / "a.npy", np.array([{}], object))
        assert "cannot be read" in refusal(lambda: untrusted.load_npz(tmp_path / "a.npz", ["a"]))
        assert "is not an array" in refusal(lambda: untrusted.open_npy(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("a", True),
        ("a/b.tar", True),
        ("", False),
        ("/a", False),
        ("../a", False),
        ("a/../../b", False),
        ("a//b", False),
        ("./a", False),
        ("a/", False),
        ("a\0b", False),
    ],
)
def test_relative_paths(path, valid):
    assert untrusted.is_relative_path(path) is valid


class TestMessages:
    def test_a_message_is_cut_and_escaped(self):
        message = str(MaestroError("a\x1b[2J" + "x" * 1_000_000 + "end"))
        assert message.startswith("a\\x1b[2Jxxx")
        assert message.endswith("xxxend")
        assert len(message) <= MAX_MESSAGE + 100

    def test_a_million_characters_are_not_compared(self):
        started = time.process_time()
        assert did_you_mean("x" * 1_000_000, ["y" * 1_000_000, "z"]) == ""
        assert did_you_mean("abd", ["abc", "y" * 1_000_000]) == " (did you mean 'abc'?)"
        assert time.process_time() - started < 1

    def test_shortened_values(self):
        assert shorten("x" * 1_000_000) == "'" + "x" * 57 + "'…"
        assert shorten([1, 2]) == "[1, 2]"
        assert len(shorten(list(range(1000)))) == 60
        for value in ([], (), {}, (1,), (1, [2, "a'"]), {"a": (None, {}), 2: [1.5]}, {1}, b"a"):
            assert shorten(value) == repr(value)
