"""Registry of the raw datasets: specs, readers and synthetic data by dataset name.

Each dataset is one folder with a ``reader`` (SPEC, open_raw) and a ``synth`` module. To add one, add a folder and an
entry here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, RawDataset
from maestro_scale.datasets.synthetic.output import MARKER

# name: (module with SPEC and open_raw, function that writes synthetic tiles; empty where there are none)
_DATASETS = {
    "treesatai_ts": ("treesatai_ts.reader", "treesatai_ts.synth:write"),
    "pastis_hd": ("pastis_hd.reader", "pastis_hd.synth:write"),
    "flair_hub": ("flair_hub.reader", "flair_hub.synth:write"),
    "flair2": ("flair_hub.flair2", "flair_hub.synth:write_flair2"),
    "s2_naip": ("s2_naip.reader", "s2_naip.synth:write"),
    "fuel_moisture": ("fuel_moisture.reader", ""),
}


def known() -> tuple[str, ...]:
    """Names of the datasets that have a reader."""
    return tuple(_DATASETS)


def folder(name: str) -> Path:
    """The folder of the code that reads a dataset and writes its synthetic tiles; KeyError as of ``spec``."""
    return Path(__file__).parent / _known(name)[0].partition(".")[0]


def spec(name: str) -> DatasetSpec:
    """The spec of dataset ``name``; KeyError with the nearest known name if there is none."""
    return _reader(name).SPEC


def full_spec(name: str) -> DatasetSpec:
    """The spec with all modalities and sensors that the reader supports, including those not in the preset."""
    module = _reader(name)
    return getattr(module, "FULL_SPEC", module.SPEC)


def open_raw(name: str, src: Path, split: str, modalities: Sequence[str] | None = None) -> RawDataset:
    """Split ``split`` of dataset ``name`` in folder ``src``; ``modalities``: those to read, None: the preset's.

    Raises KeyError for an unknown dataset, DatasetError (one line) for a missing folder, an empty split, an
    unknown modality, or a split of which no tile has its files. A single tile without files raises when it is read.
    """
    return _reader(name).open_raw(Path(src), split, modalities)


def synth(name: str, dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` synthetic tiles into ``dst`` in the dataset's official raw layout.

    A tile depends on (seed, index) only. The files that list the splits are written last, so that an interrupted
    ``dst`` cannot be mistaken for a complete one; the same call again completes it. Raises KeyError for an unknown
    dataset, DatasetError if ``dst`` holds anything else.
    """
    writer = _known(name)[1]
    if not writer:
        raise DatasetError(f"{name} has no synthetic data: download it, see docs/datasets.md")
    module, function = writer.split(":")
    getattr(_module(module), function)(Path(dst), tiles, seed)


def synthetic_windows(name: str, tiles: int, seed: int, window_m: float) -> RawDataset:
    """The middle of ``tiles`` synthetic scenes, ``window_m`` metres wide, as tiles that are not on disk. KeyError for
    an unknown dataset, DatasetError for one without such tiles, or a width that does not fit its pixels."""
    module = _known(name)[1].partition(":")[0]
    make = getattr(_module(module), "Windows", None) if module else None
    if make is None:
        raise DatasetError(f"{name} has no synthetic tiles of another size: leave window_m out")
    return make(tiles, seed, window_m)


def is_synthetic(src: Path) -> bool:
    """Whether a folder of raw data was written by :func:`synth`; then its scores are not those of the real data."""
    return (Path(src) / MARKER).is_file()


def _reader(name: str) -> ModuleType:
    return _module(_known(name)[0])


def _known(name: str) -> tuple[str, str]:
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise KeyError(f"no dataset is called {name!r}; {hint}known: {', '.join(_DATASETS)}")
    return _DATASETS[name]


def _module(name: str) -> ModuleType:
    # Imported on demand: the raw readers need packages (rasterio, h5py, …) that training does not.
    return importlib.import_module(f"maestro_scale.datasets.{name}")
