"""Files with many tiles are opened once."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
from datasets.sources.kit import cube, refs_of, section

from maestro_scale.datasets.sources import hdf5
from maestro_scale.datasets.sources.opened import OpenFiles
from maestro_scale.datasets.spec import DatasetError


def test_a_file_with_many_tiles_is_opened_once(tmp_path, monkeypatch):
    opened = []
    new_store = hdf5.new_store
    monkeypatch.setattr(hdf5, "new_store", lambda file, where: opened.append(where) or new_store(file, where))
    for i in range(6):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["s2"] = cube()
    files = section("{n}.h5", variable="s2", axes=["key", "band", "y", "x"], key="{n}",
                    dates={"from": "constant", "date": "2020-01-01"})  # fmt: skip
    refs = refs_of(files, tmp_path)
    kept = pickle.loads(pickle.dumps(OpenFiles()))
    opened.clear()
    for ref in refs:
        with kept.open(files, ref.address) as file:
            np.testing.assert_array_equal(file.image(ref).read().values, cube()[ref.part[0]])
    assert opened == [str(tmp_path / f"{i}.h5") for i in range(6)]
    for ref in refs[-12:]:  # of the latest four
        with kept.open(files, ref.address) as file:
            file.image(ref)
    assert len(opened) == 6
    with pytest.raises(DatasetError), kept.open(files, refs[-1].address):
        raise DatasetError("damaged")
    with kept.open(files, refs[-1].address) as file:
        file.image(refs[-1])
    assert len(opened) == 7
    kept.close()
    single = files.model_copy(update={"axes": ("date", "band", "y", "x")})
    for _ in range(2):
        with kept.open(single, refs[0].address):
            pass
    assert len(opened) == 9
