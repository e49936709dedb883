"""Files of tensors that are hashed while they are written."""

from __future__ import annotations

import errno
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from maestro_scale.interop import tensors
from maestro_scale.interop.tensors import file_sha256, write_bytes_hashed, write_tensors_hashed


@pytest.mark.parametrize(
    "content",
    [
        {"weight/b.ü": torch.arange(3.0), "ema/a": torch.zeros(2, 2), 'q"\n': torch.ones(())},
        {"of no elements": torch.empty(0), "w": torch.ones(7)},
        {"transposed": torch.arange(6.0).view(2, 3).T},
        {"integers": torch.arange(5)},
        {"bytes": torch.arange(5, dtype=torch.uint8)},
    ],
)
def test_a_hashed_file_is_the_one_that_safetensors_writes(tmp_path, content):
    entry = write_tensors_hashed(content, tmp_path / "ours")
    save_file({name: t.contiguous() for name, t in content.items()}, tmp_path / "theirs")
    theirs = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == theirs
    assert entry == {"bytes": len(theirs), "sha256": hashlib.sha256(theirs).hexdigest()}


def test_tensors_of_several_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="of one dtype"):
        write_tensors_hashed({"a": torch.ones(1), "b": torch.arange(1)}, tmp_path / "x")


def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left") as error:
        write_tensors_hashed({"a": torch.ones(1)}, tensors.Path("/dev/full"))
    assert error.value.errno == errno.ENOSPC


def test_a_small_file_is_hashed_from_memory(tmp_path):
    # The first test vector of FIPS 180.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert write_bytes_hashed(b"abc", tmp_path / "abc") == {"bytes": 3, "sha256": sha256}
    assert (tmp_path / "abc").read_bytes() == b"abc"


@pytest.mark.parametrize("size", [0, 1, 4, 5, 8, 9])
def test_a_file_is_hashed_block_by_block(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 4)
    content = b"abcdefghi"[:size]
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
