"""The bytes of a sample, stated by hand: datasets of terabytes have this layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format import codec
from maestro_scale.shards.format.codec import Sample, encode_fields
from maestro_scale.shards.format.compress import FieldEncoding


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


def test_samples_with_equal_fields_share_a_layout():
    def sample(key: str, **fields: np.ndarray) -> Sample:
        return Sample(encode_fields(key, fields))

    one, two = sample("k", x=np.zeros(3, np.uint8)), sample("another", x=np.ones(3, np.uint8))
    assert (one.key, two.key) == ("k", "another")
    assert one.layout is two.layout
    assert two.array("x").tolist() == [1, 1, 1]
    for other in (np.zeros(4, np.uint8), np.zeros(3, np.int8), np.zeros((3, 1), np.uint8)):
        assert sample("k", x=other).layout is not one.layout
    assert sample("k", y=np.zeros(3, np.uint8)).layout is not one.layout


def test_metadata_may_come_once():
    entry = '"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    metadata = '"__metadata__":{"key":"k"}'
    assert Sample(header(f"{{{entry},{metadata}}}", b"\x07")).array("x").tolist() == [7]
    with pytest.raises(CodecError, match="contains the key '__metadata__' twice"):
        Sample(header(f"{{{metadata},{entry},{metadata}}}", b"\x07"))


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


def test_names_and_keys_are_stored_as_ascii():
    assert b'{"key":"\\u00e9"}' in encode_fields("é", {"x": np.zeros(1)})


def test_the_metadata_of_compressed_fields():
    fields = {"b": np.zeros((2, 4096), np.uint8), "a": np.zeros(2048, np.int16)}
    buffer = encode_fields("k", fields, "delta-zstd")
    header = json.loads(buffer[8 : 8 + int.from_bytes(buffer[:8], "little")])
    (a,), (b,) = header["a"]["shape"], header["b"]["shape"]
    assert header["__metadata__"]["encoded"] == (
        f'{{"a":{{"codec":"delta-zstd","dtype":"int16","ends":[{a}],"rows":2048,"shape":[2048],"strip":0}},'
        f'"b":{{"codec":"delta-zstd","dtype":"uint8","ends":[{b}],"rows":2,"shape":[2,4096],"strip":0}}}}'
    )


@pytest.mark.parametrize(("size", "encoded"), [(4096, False), (4095, True)])
def test_a_field_is_compressed_only_if_that_is_shorter(size: int, encoded: bool, monkeypatch):
    encoding = FieldEncoding("zstd", "uint8", (4096,), 4096, (size,))
    monkeypatch.setattr(codec, "compress", lambda array, name: (encoding, bytes(size)))
    sample = Sample(encode_fields("k", {"x": np.ones(4096, np.uint8)}, "zstd"))
    assert (sample.layout.fields["x"].encoding is not None) == encoded


class Source:
    """Bytes outside memory; notes what is read."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.buffer)

    def read(self, begin: int, end: int) -> memoryview:
        assert 0 <= begin <= end <= len(self.buffer)
        self.reads.append((begin, end))
        return memoryview(self.buffer)[begin:end]

    def new_reads(self, start: int) -> list[tuple[int, int]]:
        """What was read since the last call, counted from byte ``start``."""
        reads, self.reads = self.reads, []
        return [(begin - start, end - start) for begin, end in reads]


def opened(array: np.ndarray) -> tuple[Source, Sample, int]:
    """A sample with field x behind another field; the position where x starts."""
    source = Source(encode_fields("k", {"wide": np.zeros(3), "x": array}))
    sample = Sample(source)
    assert source.new_reads(0) == [(0, min(len(source), 16384))]
    return source, sample, len(source) - array.nbytes


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint16).reshape(shape)


def test_a_field_outside_memory_is_read_at_once_and_so_are_small_entries_near_each_other():
    array = numbered(4, 3, 5, 2)  # 60 bytes per entry
    source, sample, start = opened(array)
    assert np.array_equal(sample.array("x"), array)
    assert source.new_reads(start) == [(0, 240)]
    assert np.array_equal(sample.rows("x", np.array([3, 0, 3])), array[[3, 0, 3]])
    assert source.new_reads(start) == [(0, 240)]
    assert np.array_equal(sample.rows("x", np.array([2, 1])), array[[2, 1]])
    assert source.new_reads(start) == [(60, 180)]
    assert sample.rows("x", np.array([], int)).shape == (0, 3, 5, 2)
    assert source.new_reads(start) == []
    # A window of small images: whole entries.
    window = (slice(1, 4), slice(0, 1))
    assert np.array_equal(sample.array("x", window), array[:, :, 1:4, :1])
    assert source.new_reads(start) == [(0, 240)]
    with pytest.raises(IndexError, match=r"x has 4 entries, requested were \[0, 4\]"):
        sample.rows("x", np.array([0, 4]))
    with pytest.raises(IndexError, match=r"requested were \[-1, 3\]"):
        sample.rows("x", np.array([-1, 3]))


def test_entries_far_from_each_other_are_read_one_by_one():
    array = numbered(8, 2048)  # 4,096 bytes per entry: between 0 and 5 lie 16,384, between 0 and 6 more
    source, sample, start = opened(array)
    assert np.array_equal(sample.rows("x", np.array([0, 5])), array[[0, 5]])
    assert source.new_reads(start) == [(0, 24576)]
    assert np.array_equal(sample.rows("x", np.array([6, 0, 6])), array[[6, 0, 6]])
    assert source.new_reads(start) == [(0, 28672)]  # for two gaps: 16,384 bytes each
    assert np.array_equal(sample.rows("x", np.array([0, 6])), array[[0, 6]])
    assert source.new_reads(start) == [(0, 4096), (24576, 28672)]
    # Entries of 16 KiB are large enough for a read of their own.
    source, sample, start = opened(numbered(2, 8192))
    assert np.array_equal(sample.rows("x", np.array([0, 1])), numbered(2, 8192))
    assert source.new_reads(start) == [(0, 16384), (16384, 32768)]


def test_a_single_image_outside_memory_is_read_at_once():
    array = numbered(40, 300)
    source, sample, start = opened(array)
    assert np.array_equal(sample.array("x", (slice(2, 4), slice(7, 9))), array[2:4, 7:9])
    assert source.new_reads(start) == [(0, 24000)]


def test_rows_of_pixels_are_skipped_between_images_from_16_kib_on():
    # A row of pixels has 16 bytes, an image 17,600 and an entry of three images 52,800. Beside a window of 76 rows lie
    # 1,024, which have 16,384 bytes; beside one of 77, 1,023.
    array = numbered(2, 3, 1100, 8)
    source, sample, start = opened(array)
    window = (slice(10, 86), slice(2, 7))
    assert np.array_equal(sample.rows("x", np.array([1]), window), array[[1], :, 10:86, 2:7])
    assert source.new_reads(start) == [(52960, 54176), (70560, 71776), (88160, 89376)]
    assert np.array_equal(sample.array("x", window), array[..., 10:86, 2:7])
    assert source.new_reads(start) == [
        (160, 1376), (17760, 18976), (35360, 36576), (52960, 54176), (70560, 71776), (88160, 89376)
    ]  # fmt: skip
    window = (slice(10, 87), slice(2, 7))
    assert np.array_equal(sample.rows("x", np.array([1, 0]), window), array[[1, 0], :, 10:87, 2:7])
    assert source.new_reads(start) == [(52800, 105600), (0, 52800)]
    assert sample.rows("x", np.array([], int), (slice(0, 9), slice(0, 3))).shape == (0, 3, 9, 3)
    assert source.new_reads(start) == []


@pytest.mark.parametrize("shape", [(3, 1100, 8), (2, 2, 3, 1100, 8)])
def test_rows_of_pixels_are_skipped_in_series_of_any_number_of_axes(shape):
    array = numbered(*shape)
    source, sample, start = opened(array)
    images = np.prod(shape[:-2])
    assert np.array_equal(sample.array("x", (slice(10, 86), slice(2, 7))), array[..., 10:86, 2:7])
    assert source.new_reads(start) == [(i * 17600 + 160, i * 17600 + 1376) for i in range(images)]
    assert np.array_equal(sample.array("x", (slice(10, 87), slice(2, 7))), array[..., 10:87, 2:7])
    assert len(source.new_reads(start)) == shape[0]


def test_windows_in_memory_are_views():
    array = Sample(encode_fields("k", {"x": numbered(2, 6, 4)})).array("x", (slice(1, 3), slice(0, 2)))
    assert array.tolist() == [[[4, 5], [8, 9]], [[28, 29], [32, 33]]]
    assert not array.flags.writeable


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def padded(size: int) -> str:
    """A header of ``size`` bytes with the key k, followed by nothing."""
    text = '{"__metadata__":{"key":"k","note":"%s"}}'
    return text % ("n" * (size - len(text % "")))


def test_headers_of_up_to_16_kib_with_their_length_are_read_once():
    for size, reads in (
        (16376, [(0, 16384)]),
        (16377, [(0, 16384), (8, 16385)]),
        (20000, [(0, 16384), (8, 20008)]),
    ):
        source = Source(header(padded(size)))
        assert Sample(source).key == "k"
        assert source.reads == reads


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (b"", "0 bytes that do not start with a safetensors header"),
        (bytes(7), "7 bytes that do not start with a safetensors header"),
        (bytes(8), "8 bytes that do not start with a safetensors header"),
        (bytes(10), "10 bytes that do not start with a safetensors header"),
        (b"\x03" + bytes(7) + b"{}", "10 bytes that do not start with a safetensors header"),
        (b"\x02" + bytes(6) + b"\x01{}", "10 bytes that do not start with a safetensors header"),
        (b"\x01" + bytes(7) + b"x", "the safetensors header is not valid"),
        (header("{}"), "metadata has no 'key'"),
        (
            header('{"__metadata__":{"key":"k","encoded":"[]"}}'),
            r"'encoded' cannot be read \(is not an object",
        ),
    ],
)
def test_what_is_not_a_header_is_refused(buffer: bytes, message: str):
    with pytest.raises(CodecError, match=message):
        Sample(buffer)


def forged(dtype: str, shape: list[int], ends: list[int], rows: int = 1) -> bytes:
    """A sample with a field x of ones that is declared as compressed."""
    encoding = {"codec": "zstd", "dtype": "uint8", "shape": [2, 3], "rows": rows, "ends": ends, "strip": 0}
    size = int(np.prod(shape))
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    metadata = {"key": "k", "encoded": json.dumps({"x": encoding})}
    return header(json.dumps({"__metadata__": metadata, "x": entry}), b"\x01" * size)


@pytest.mark.parametrize(
    ("dtype", "shape", "ends", "message"),
    [
        ("I8", [11], [4, 11], "'encoded' has 'x', which is not a tensor of bytes"),
        ("U8", [11, 1], [4, 11], "'encoded' has 'x', which is not a tensor of bytes"),
        ("U8", [11], [4, 10], "'encoded' is inconsistent: 'x': its frames end at byte 10 of 11"),
        ("U8", [11], [11], "'encoded' is inconsistent: 'x': 1 frames do not make up the shape"),
    ],
)
def test_inconsistent_compression_is_refused(dtype: str, shape: list[int], ends: list[int], message: str):
    with pytest.raises(CodecError, match=message):
        Sample(forged(dtype, shape, ends))


def test_errors_of_fields_name_sample_and_field():
    sample = Sample(forged("U8", [11], [4, 11]))
    for read in (lambda: sample.array("x"), lambda: sample.rows("x", np.array([0]))):
        with pytest.raises(CodecError, match="sample k, field x: frame 0 "):
            read()
    sample = Sample(header('{"__metadata__":{"key":"k","place":"["}}'))
    with pytest.raises(CodecError, match=r"sample k: its place cannot be read \("):
        _ = sample.origin

    class Short(Source):
        def read(self, begin: int, end: int) -> memoryview:
            return super().read(begin, end)[:-1] if begin else super().read(begin, end)

    sample = Sample(Short(encode_fields("k", {"x": np.zeros((2, 3), np.uint8)})))
    with pytest.raises(CodecError, match=r"sample k, field x: 5 bytes for uint8 \(2, 3\)"):
        sample.array("x")
