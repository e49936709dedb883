"""Samples survive encoding in every codec, dtype and shape, and the safetensors library can read them."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from shards.kit import fields_equal, tile

from maestro_scale.datasets.spec_check import DTYPES
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format import compress
from maestro_scale.shards.format.codec import Sample, encode, encode_fields
from maestro_scale.shards.format.compress import CODECS

arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=40))
)


@settings(max_examples=60, deadline=None)
@given(array=arrays, codec=st.sampled_from(CODECS), data=st.data())
def test_arrays_survive_a_round_trip(array, codec, data):
    big = np.concatenate([array] * (1 + 5000 // max(array.nbytes, 1)))  # small fields are never compressed
    sample = Sample(encode_fields("k", {"a": big, "b": array}, codec))
    for name, wanted in (("a", big), ("b", array)):
        assert sample.dtype(name) == wanted.dtype
        assert sample.shape(name) == wanted.shape
        assert sample.array(name).tobytes() == wanted.tobytes()
        rows = np.array(data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=6)), dtype=np.int64)
        assert sample.rows(name, rows).tobytes() == wanted[rows].tobytes()


images = st.sampled_from(("uint8", "int16", "float16", "float32")).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
)


@settings(max_examples=60, deadline=None)
@given(image=images, codec=st.sampled_from(CODECS), zoom=st.sampled_from((1, 7, 40)), data=st.data())
def test_a_window_equals_numpy_slicing(image, codec, zoom, data):
    wanted = np.kron(image, np.ones((zoom, zoom), image.dtype)).astype(
        image.dtype
    )  # large enough for several strips
    wanted = np.concatenate([wanted] * (1 + 5000 // wanted.nbytes))
    sample = Sample(encode_fields("k", {"a": wanted}, codec))
    edges = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in wanted.shape[-2:]
    ]
    window = tuple(slice(*e) for e in edges)
    assert np.array_equal(sample.array("a", window), wanted[(..., *window)], equal_nan=True)
    if wanted.ndim > 2:
        rows = np.array(data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=6)), dtype=np.int64)
        assert np.array_equal(sample.rows("a", rows, window), wanted[(rows, ..., *window)], equal_nan=True)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_decode_only_the_frames_that_contain_them(codec, monkeypatch):
    series = np.random.default_rng(0).integers(0, 99, (9, 4, 100, 100), np.int16)  # two strips per date
    sample = Sample(encode_fields("k", {"s": series}, codec))
    frames = []
    decode = compress._frame
    monkeypatch.setattr(
        compress, "_frame", lambda e, d, i, s, z: frames.append((i, s)) or decode(e, d, i, s, z)
    )
    rows = np.array([7, 2, 7])
    assert np.array_equal(sample.rows("s", rows), series[rows])
    assert frames == ([] if codec == "raw" else [(2, 0), (2, 1), (7, 0), (7, 1)])
    frames.clear()
    south = (slice(50, 70), slice(3, 5))
    assert np.array_equal(sample.rows("s", rows, south), series[rows, :, 50:70, 3:5])
    assert np.array_equal(sample.array("s", south), series[..., 50:70, 3:5])
    assert frames == ([] if codec == "raw" else [(2, 1), (7, 1), *((date, 1) for date in range(9))])
    with pytest.raises(IndexError, match="s has 9 entries"):
        sample.rows("s", np.array([9]))
    with pytest.raises(IndexError):
        sample.rows("s", np.array([-1]))


def test_samples_are_compatible_with_the_safetensors_library():
    wanted = tile("T.1")
    buffer = encode(wanted, "raw")
    theirs = safetensors.numpy.load(buffer)
    sample = Sample(buffer)
    assert sample.key == "T.1"
    assert set(theirs) == set(sample.names)
    assert all(np.array_equal(theirs[n], sample.array(n)) for n in theirs)
    back = Sample(safetensors.numpy.save(theirs, metadata={"key": "T.1"}))
    assert fields_equal(back, wanted)


@pytest.mark.parametrize("codec", CODECS)
def test_a_compressed_sample_is_still_a_safetensors_file(codec):
    buffer = encode(tile("a"), codec)
    assert safetensors.numpy.load(buffer).keys() == set(Sample(buffer).names)
    assert buffer == encode(tile("a"), codec)
    assert fields_equal(Sample(buffer), tile("a"))


def test_raw_fields_are_aligned_read_only_views():
    buffer = bytearray(encode(tile("a"), "raw"))
    array = Sample(memoryview(buffer)).array("s2")
    assert array.flags.aligned
    assert not array.flags.writeable
    assert not array.flags.owndata
    before = array.copy()
    position = bytes(buffer).find(array.tobytes())
    buffer[position] ^= 1
    assert not np.array_equal(before, array)


class OnDisk:
    """Bytes outside memory."""

    def __init__(self, data: bytes):
        self.data = data

    def __len__(self):
        return len(self.data)

    def read(self, begin, end):
        return memoryview(self.data)[begin:end]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("where", [bytes, OnDisk])
def test_an_empty_window_and_no_rows_are_empty_arrays(codec, where):
    stored = (np.arange(5 * 2 * 200 * 100) % 251).astype(np.uint16).reshape(5, 2, 200, 100)
    sample = Sample(where(encode_fields("k", {"x": stored}, codec)))
    assert sample.array("x", (slice(7, 7), slice(0, 40))).shape == (5, 2, 0, 40)
    assert sample.rows("x", np.array([3, 1]), (slice(0, 60), slice(9, 9))).shape == (2, 2, 60, 0)
    assert sample.rows("x", np.array([], int), (slice(0, 6), slice(0, 9))).shape == (0, 2, 6, 9)


def test_delta_zstd_is_smaller():
    sizes = [len(encode(tile("a"), codec)) for codec in CODECS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.9 * sizes[0]


@pytest.mark.parametrize("codec", ["raw", "delta-zstd"])
def test_damaged_bytes_raise_only_expected_errors(codec):
    buffer = encode(tile("a"), codec)
    for cut in (0, 7, 8, 100, len(buffer) // 2, len(buffer) - 1):
        with pytest.raises(CodecError):
            Sample(buffer[:cut])
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 1500, 300):
        damaged = bytearray(buffer)
        damaged[position] ^= 1 << int(rng.integers(8))
        try:
            sample = Sample(bytes(damaged))
            for name in sample.names:
                sample.array(name)
        except CodecError:
            continue


def test_errors_name_sample_and_field():
    sample = Sample(encode(tile("T.1"), "raw"))
    with pytest.raises(KeyError, match=r"sample T.1 has no field 's3'; it has: .*aerial"):
        sample.array("s3")
    with pytest.raises(CodecError, match="there is no codec 'zip'; use one of: raw, zstd, delta-zstd"):
        encode(tile("a"), "zip")
    with pytest.raises(CodecError, match="field x has dtype complex64"):
        encode_fields("k", {"x": np.zeros(3, np.complex64)})
    with pytest.raises(CodecError, match="metadata has no 'key'"):
        Sample(safetensors.numpy.save({"x": np.zeros(3)}))


def test_big_endian_and_strided_arrays_are_stored_as_their_values():
    array = np.arange(24, dtype=">i2").reshape(4, 6)[:, ::2]
    sample = Sample(encode_fields("k", {"x": array, "s": np.array(7.0)}))
    assert np.array_equal(sample.array("x"), array)
    assert sample.array("s") == 7.0
    assert sample.shape("s") == ()
