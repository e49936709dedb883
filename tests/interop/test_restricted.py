"""Pickled checkpoints from others: what torch.save writes is read; what a pickle can do beyond that is refused."""

from __future__ import annotations

import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from maestro_scale.interop.export import ExportError
from maestro_scale.interop.restricted import load_untrusted


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        contents = {"data.pkl": data, "byteorder": b"little", "data/0": bytes(range(64)), **records}
        for name, content in contents.items():
            file.writestr(f"a/{name}", content)
    return path


def storage(number_of_elements: int = 16, kind: bytes = b"FloatStorage", key: bytes = b"0") -> bytes:
    return b"(X\x07\0\0\0storagectorch\n%b\nX\x01\0\0\0%bX\x03\0\0\0cpuK%ctQ" % (
        kind,
        key,
        number_of_elements,
    )


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], of: bytes | None = None) -> bytes:
    numbers = b"".join(
        b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in part) + b"t" for part in (shape, strides)
    )
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage() if of is None else of)
    return head + pickle.dumps(offset, 2)[2:-1] + numbers + b"\x89ccollections\nOrderedDict\n)RtR"


def test_every_dtype_and_layout_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24, dtype=torch.float32)
    content = {
        "tensors": OrderedDict(
            {
                str(dtype): base.to(dtype).reshape(2, 3, 4)
                for dtype in (
                    torch.float64,
                    torch.float16,
                    torch.bfloat16,
                    torch.int64,
                    torch.uint8,
                    torch.bool,
                )
            }
        ),
        "transposed": base.reshape(4, 6).T,
        "part": base[5:9],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        "plain": [1, -2, 2**40, 0.5, "ü", None, True, False, (1, 2, 3, 4), b"bytes", {"a": {"b": []}}],
        3: {1.5: "x", (1, "a"): "y"},
    }
    path = tmp_path / "a.pt"
    torch.save(content, path)
    read, expected = load_untrusted(path), torch.load(path, weights_only=True)
    assert read["plain"] == expected["plain"]
    assert read[3] == expected[3]
    for name in ("transposed", "part", "scalar", "empty", "parameter"):
        assert torch.equal(read[name], expected[name]), name
        assert read[name].dtype == expected[name].dtype
    for name, value in expected["tensors"].items():
        assert torch.equal(read["tensors"][name], value), name


def test_a_tensor_that_fits_is_read(tmp_path):
    read = load_untrusted(archive(tmp_path / "a", b"\x80\x02" + tensor(1, (3, 5), (5, 1)) + b"."))
    assert torch.equal(read.reshape(-1), torch.frombuffer(bytearray(range(64)), dtype=torch.float32)[1:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensor(0, (17,), (1,)) + b".", "past the end"),
        (tensor(2, (15,), (1,)) + b".", "past the end"),
        (tensor(0, (2, 2), (8, 9)) + b".", "past the end"),
        (tensor(0, (10**9,), (0,)) + b".", "past the end"),  # expanded
        (tensor(-1, (2,), (1,)) + b".", "without storage, shape and strides"),
        (tensor(0, (2,), (-1,)) + b".", "without storage, shape and strides"),
        (tensor(0, (2,), (1, 1)) + b".", "without storage, shape and strides"),
        (tensor(0, (2,), (1,), b"K\x01") + b".", "without storage, shape and strides"),
        (tensor(0, (1,) * 17, (1,) * 17) + b".", "without storage, shape and strides"),
        (tensor(0, (2,), (1,), storage(kind=b"QInt8Storage")) + b".", "a storage of the type"),
        (tensor(0, (2,), (1,), storage(key=b"9")) + b".", "does not contain"),
        (b"]" + b"(" + tensor(0, (16,), (1,)) * 5000 + b"e.", "more elements than the file"),
        (b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.", "would run builtins.bytearray"),
        (b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR.", "would run torch.FloatTensor"),
        (b"cbuiltins\neval\n(X\x01\0\0\x001tR.", "would run builtins.eval"),
        (b"cposix\nsystem\n(X\x01\0\0\x00xtR.", "would run posix.system"),
        (b"cbuiltins\ngetattr\n(cmaestro\nx\nX\x01\0\0\x00xtR.", "would run builtins.getattr"),
        (b"K\x01)R.", "calls something that is not a name"),
        (b"K\x01)\x81.", "creates an object of something"),
        (b"R.", "empty stack"),
        (b"e.", "ends a group that it did not begin"),
        (b"h\x05.", "a value that it does not have"),
        (b"}](K\x01K\x02es.", "empty stack"),
        (b"}]K\x01s.", "a key that is not a text or a number"),
        (b"}(K\x01u.", "a key without a value"),
        (b"}\x8a\x08" + (2**60).to_bytes(8, "little") + b"Ns.", "a key of more than 60 bits"),
        (b"}\x8a\x08" + (2**60).to_bytes(8, "little") + b"\x85Ns.", "a key of more than 60 bits"),
        (
            b"}(" + b"".join(b"M%b\x85N" % n.to_bytes(2, "little") for n in range(1001)) + b"u.",
            "1000 keys that are",
        ),
        (tensor(0, (0, 2**46, 2**46), (1, 1, 1)) + b".", "which torch does not have"),
        (b"K\x01]a.", "fills"),
        (b"\x8a\xff" + b"\x7f" * 255 + b".", "an integer of 255 bytes"),
        (b"X\xff\xff\xff\x7f.", "a text of"),
        (b"X\x01\0\0\0\xff.", "utf-8"),
        (b"\x8c\x01a.", "unsupported opcode"),
        (b"cbuiltins", "cut short"),
        (b"", "cut short"),
    ],
)
def test_what_a_checkpoint_does_not_need_is_refused(tmp_path, data, message):
    with pytest.raises(ExportError, match=message) as error:
        load_untrusted(archive(tmp_path / "a", b"\x80\x02" + data))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_values_that_contain_each_other_are_not_hashed(tmp_path):
    """((x, x), (x, x)) …, 60 levels deep, as a key: hashing it takes 2^60 steps."""
    nested = b"K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60
    started = time.process_time()
    with pytest.raises(ExportError, match="a key that is not a text or a number"):
        load_untrusted(archive(tmp_path / "a", b"\x80\x02}" + nested + b"K\x01s."))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "value",
    [b"K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60, b"]" * 100_000 + b"a" * 99_999],
    ids=["in each other", "deep"],
)
def test_values_in_values_are_shown_as_far_as_a_message_needs(tmp_path, value):
    """The text of the first has 2^60 numbers; that of the second exceeds the recursion limit."""
    started = time.process_time()
    with pytest.raises(ExportError, match="expected a text"):
        load_untrusted(archive(tmp_path / "a", b"\x80\x02c_codecs\nencode\n" + value + b"\x85R."))
    assert time.process_time() - started < 2


def test_the_directory_is_bounded_before_it_is_parsed(tmp_path, monkeypatch):
    many = archive(tmp_path / "a", b"\x80\x02N.", **{f"data/{i}": b"" for i in range(20)})
    assert load_untrusted(many) is None
    monkeypatch.setattr("maestro_scale.interop.restricted.MAX_RECORDS", 20)
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # what is created for each record
    with pytest.raises(ExportError, match="more than 20 records"):
        load_untrusted(many)
    monkeypatch.setattr("maestro_scale.untrusted.zip.ZIP_DIRECTORY_BYTES", 1000)
    with pytest.raises(ExportError, match="a directory of more than 0 MiB"):
        load_untrusted(many)


def test_encodings_are_not_applied(tmp_path):
    """_codecs.encode with "hex" doubles a text; 40 of them would take a terabyte."""
    chain = b"c_codecs\nencode\n" * 40 + b"X\x04\0\0\0abcd" + b"X\x03\0\0\0hex\x86R" * 40
    try:
        read = load_untrusted(archive(tmp_path / "a", b"\x80\x02" + chain + b"."))
    except ExportError:
        return
    assert len(read) <= 4


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: archive(path, b".", zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda path: archive(path, b".", byteorder=b"big"), "big-endian"),
        (lambda path: archive(path, b".", **{"constants.pkl": b""}), "not a checkpoint of torch.save"),
        (lambda path: path.write_bytes(archive(path, b"N.").read_bytes()[:-30]), "cut short"),
        (lambda path: path.write_bytes(b"PK\5\6" + bytes(18)), "not a checkpoint of torch.save"),
    ],
)
def test_archives_are_checked(tmp_path, write, message):
    path = tmp_path / "a"
    write(path)
    with pytest.raises(ExportError, match=message):
        load_untrusted(path)
