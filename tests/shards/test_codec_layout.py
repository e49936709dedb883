"""The bytes of a sample, stated by hand: datasets of terabytes have this layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.shards.format.codec import Sample, encode_fields


def test_the_layout_of_a_sample():
    buffer = encode_fields("k", {"b": np.array([1, 2], np.uint8), "a": np.array([[1.5]], np.float32)})
    length = int.from_bytes(buffer[:8], "little")
    assert length % 8 == 0
    # Wide dtypes first, then by name.
    assert json.loads(buffer[8 : 8 + length]) == {
        "__metadata__": {"key": "k"},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
    }
    assert buffer[8 + length :] == b"\x00\x00\xc0\x3f\x01\x02"
    sample = Sample(buffer)
    assert (sample.names, sample.shape("a"), sample.dtype("b")) == (("a", "b"), (1, 1), np.uint8)
    assert sample.origin is None


@pytest.mark.parametrize(("size", "encoded"), [(4095, False), (4096, True)])
def test_fields_from_4096_bytes_on_are_compressed(size: int, encoded: bool):
    buffer = encode_fields("k", {"x": np.zeros(size, np.uint8)}, "zstd")
    assert (b"encoded" in buffer[:400]) == encoded
    assert not Sample(buffer).array("x").any()


def test_noise_stays_raw():
    noise = np.random.default_rng(0).integers(0, 256, 8192, np.uint8)
    assert b"encoded" not in encode_fields("k", {"x": noise}, "zstd")[:400]


def test_the_place_of_a_tile_is_stored_as_json():
    origin = GeoOrigin("EPSG:2154", 1.0, 2.0)
    assert Sample(encode_fields("k", {"x": np.zeros(1)}, origin=origin)).origin == origin
