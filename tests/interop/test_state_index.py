"""The index of a training state: which file has which elements."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maestro_scale.interop.sharded_state import ParameterSlice, StateReader, write_slices
from maestro_scale.interop.state_index import FileSlices, StateIndex
from maestro_scale.untrusted import InputError


def slices(file: str, *rows: tuple[str, tuple[int, ...], int, int]) -> FileSlices:
    """``rows``: (name, shape, first element, number of elements)."""
    names, shapes, starts, sizes = zip(*rows, strict=True)
    return FileSlices(file, ("weight",), names, shapes, np.array(starts), np.array(sizes))


def example() -> StateIndex:
    """b (2, 3) in three files, whose order is not that of its elements; a (4,) in one."""
    return StateIndex.of(
        [
            slices("rank00000.safetensors", ("b", (2, 3), 4, 2), ("a", (4,), 0, 4)),
            slices("rank00001.safetensors", ("b", (2, 3), 0, 1)),
            slices("rank00002.safetensors", ("b", (2, 3), 1, 3)),
        ],
        adam_step=7,
    )


def test_the_elements_of_each_file_by_hand(tmp_path):
    written = example()
    entries = written.write(tmp_path)
    assert sorted(entries) == ["index.json", "slices.safetensors"]
    for index in (written, StateIndex.read(tmp_path)):
        assert (index.adam_step, index.kinds) == (7, ("weight",))
        assert dict(index.shapes) == {"a": (4,), "b": (2, 3)}
        zero, one, two = (f"rank0000{i}.safetensors" for i in range(3))
        assert list(index.overlapping("b", 0, 6)) == [(one, 0, 1), (two, 0, 3), (zero, 0, 2)]
        assert list(index.overlapping("b", 2, 3)) == [(two, 1, 3), (zero, 0, 1)]
        assert list(index.overlapping("b", 1, 1)) == [(two, 0, 1)]
        assert list(index.overlapping("b", 5, 0)) == []
        assert list(index.overlapping("a", 1, 2)) == [(zero, 1, 3)]


def test_slices_that_do_not_cover_their_parameter_are_not_written():
    first = slices("rank00000.safetensors", ("w", (6,), 0, 3))
    with pytest.raises(
        ValueError, match="w: its slices cover the elements up to 3, but the next one starts at 4"
    ):
        StateIndex.of([first, slices("rank00001.safetensors", ("w", (6,), 4, 2))], 0)
    with pytest.raises(
        ValueError, match="w: its slices cover the elements up to 3, but the next one starts at 2"
    ):
        StateIndex.of([first, slices("rank00001.safetensors", ("w", (6,), 2, 4))], 0)
    with pytest.raises(ValueError, match=r"w: its slices have 3 elements, but its shape is \[6\]"):
        StateIndex.of([first, slices("rank00001.safetensors", ("v", (1,), 0, 1))], 0)
    with pytest.raises(
        ValueError, match="v: its slices cover the elements up to 0, but the next one starts at 1"
    ):
        StateIndex.of([first, slices("rank00001.safetensors", ("v", (1,), 1, 0), ("w", (6,), 3, 3))], 0)


# Of ``example``: first [0, 1, 4], file [0, 1, 2, 0], start [0, 0, 1, 4].
@pytest.mark.parametrize(
    ("array", "values", "problem"),
    [
        ("first", [0, 1], "its arrays do not fit together"),
        ("first", [0, 5, 4], "its parameters do not cover its slices"),
        ("first", [1, 1, 4], "its parameters do not cover its slices"),
        ("first", [0, 0, 4], "'b': its slices do not cover it exactly once"),
        ("first", [0, 4, 4], "'a': its slices do not cover it exactly once"),
        ("start", [0, 0, 1], "its arrays do not fit together"),
        ("start", [1, 0, 1, 4], "'a': its slices do not cover it exactly once"),
        ("start", [0, 0, 0, 4], "'b': its slices do not cover it exactly once"),
        ("start", [0, 0, 4, 1], "'b': its slices do not cover it exactly once"),
        ("start", [0, 0, 1, 6], "'b': its slices do not cover it exactly once"),
        ("start", [0, -1, 1, 4], "'b': its slices do not cover it exactly once"),
        ("file", [0, 1, 3, 0], "'b': its slices do not cover it exactly once"),
        ("file", [-1, 1, 2, 0], "'a': its slices do not cover it exactly once"),
        ("file", [0, 0, 2, 0], "'b': its slices do not cover it exactly once"),
        ("file", None, "has no list of integers file"),
    ],
)
def test_damaged_slices_are_refused(tmp_path, array, values, problem):
    example().write(tmp_path)
    good = {"first": [0, 1, 4], "file": [0, 1, 2, 0], "start": [0, 0, 1, 4]} | {array: values}
    save_file(
        {name: torch.tensor(v) for name, v in good.items() if v is not None}, tmp_path / "slices.safetensors"
    )
    with pytest.raises(InputError, match=problem) as error:
        StateIndex.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'slices.safetensors'}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["rank00000.safetensors"] * 3},
        {"files": ["rank00000.safetensors", "rank00001.safetensors", "../../x.safetensors"]},
        {"shapes": {"a": [-4], "b": [2, 3]}},
        {"shapes": {"a": [2**40, 2**40], "b": [2, 3]}},
        {"shapes": {"a": [4], "b": [3]}},
        {"shapes": []},
        {"kinds": 1},
        {"unknown": 1},
    ],
)
def test_damaged_indexes_are_refused(tmp_path, change):
    example().write(tmp_path)
    head = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(head | change))
    with pytest.raises(InputError):
        StateIndex.read(tmp_path)


def test_a_state_of_several_ranks_is_read_by_any_range(tmp_path):
    """Parameter w of 10 elements, value i at element i, in pieces of 3, 3 and 4."""
    written = []
    for rank, (start, size) in enumerate([(0, 3), (3, 3), (6, 4)]):
        values = {"weight": torch.arange(start, start + size, dtype=torch.float32)}
        of_file, entries = write_slices(tmp_path, rank, [ParameterSlice("w", (2, 5), start, values)])
        assert list(entries) == [f"rank0000{rank}.safetensors"]
        written.append(of_file)
    written.append(write_slices(tmp_path, 3, [])[0])
    assert not (tmp_path / "rank00003.safetensors").exists()
    StateIndex.of(written, 0).write(tmp_path)
    with StateReader(tmp_path) as reader:
        for start in range(10):
            for size in range(10 - start):
                expected = list(range(start, start + size))
                assert reader.read("weight", "w", start, size).tolist() == expected
        assert reader.read_full("weight", "w").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
